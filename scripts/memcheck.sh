#!/usr/bin/env bash
# Runs each bundled plugin under valgrind: load, build, train, save, load, train on, drop. Fails on an invalid read or
# write, on a decision by memory that was never written, and on memory that nothing leads to any more.
# tests/libtorch.supp names what libtorch does itself.
set -euo pipefail
cd "$(dirname "$0")/.."

jepa_host=${CARGO_TARGET_DIR:-target}/release/jepa-host
command -v valgrind >/dev/null || {
    echo "memcheck: valgrind is missing: install it (Debian and Ubuntu: apt install valgrind)." >&2
    exit 1
}
# Valgrind knows no AVX-512.
export ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 OMP_NUM_THREADS=1

check() {
    echo "memcheck: $*"
    valgrind --quiet --error-exitcode=99 --leak-check=full --show-leak-kinds=definite \
        --errors-for-leak-kinds=definite --suppressions=tests/libtorch.supp \
        "$jepa_host" --quiet plugin check "$1" --only state trainer.threads=1 "${@:2}" >/dev/null
}
small=(backbone.name=resnet18 backbone.stem=small backbone.width=4 'backbone.depths=[1,1]')
check cnn_jepa "${small[@]}" method.mask.min_keep=1
check byol "${small[@]}" method.hidden=16 method.output=8
check simclr "${small[@]}" method.hidden=16 method.output=8
check vicreg "${small[@]}" method.units=16
check supervised "${small[@]}"
check sparse_resnet "${small[@]}" data.size=32
check sparse_convnext backbone.name=convnext_atto backbone.stem=small backbone.width=4 'backbone.depths=[1,1,1,1]' data.size=32
echo "memcheck: every plugin is clean"
