#!/usr/bin/env bash
# Runs each bundled plugin under valgrind: load, build, train, save, load, train on, drop. Fails on an invalid read or
# write, on a decision by memory that was never written, and on memory that nothing leads to any more.
# tests/libtorch.supp names what libtorch does itself. A plugin that loses memory comes first: it has to be found out.
set -euo pipefail
cd "$(dirname "$0")/.."

jepa_host=${CARGO_TARGET_DIR:-target}/release/jepa-host
command -v valgrind >/dev/null || {
    echo "memcheck: valgrind is missing: install it (Debian and Ubuntu: apt install valgrind)." >&2
    exit 1
}
# Valgrind knows no AVX-512.
export ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 OMP_NUM_THREADS=1

# A plugin, the check to run on it, and settings.
under_valgrind() {
    valgrind --quiet --error-exitcode=99 --leak-check=full --show-leak-kinds=definite \
        --errors-for-leak-kinds=definite --suppressions=tests/libtorch.supp \
        "$jepa_host" --quiet plugin check "$1" --only "$2" trainer.threads=1 "${@:3}"
}
said=$(mktemp)
trap 'rm -f "$said"' EXIT
# The exit code that has to come, and what to run. Its words are shown when another one comes.
ends_with() {
    local code=0
    under_valgrind "${@:2}" >"$said" 2>&1 || code=$?
    [[ $code == "$1" ]] && return
    cat "$said" >&2
    echo "memcheck: ${*:2}: ended with $code instead of $1; its words are above" >&2
    exit 1
}
check() {
    echo "memcheck: $*"
    ends_with 0 "$1" state "${@:2}"
}
loses() {
    echo "memcheck: $* (has to be found out)"
    ends_with 99 "$@"
}
loses faulty_plugin state method.keep_batches=true
loses faulty_probe metrics eval.probes.faulty.keep_features=true
small=(backbone.name=resnet18 backbone.stem=small backbone.width=4 'backbone.depths=[1,1]')
check cnn_jepa "${small[@]}" method.mask.min_keep=1
check byol "${small[@]}" method.hidden=16 method.output=8
check simclr "${small[@]}" method.hidden=16 method.output=8
check vicreg "${small[@]}" method.units=16
check supervised "${small[@]}"
check sparse_resnet "${small[@]}" data.size=32
check sparse_convnext backbone.name=convnext_atto backbone.stem=small backbone.width=4 'backbone.depths=[1,1,1,1]' data.size=32
check torchscript_backbone backbone.file=tests/fixtures/torchscript_net.pt data.size=32
echo "memcheck: a probe"
ends_with 0 faulty_probe metrics
echo "memcheck: every plugin is clean"
