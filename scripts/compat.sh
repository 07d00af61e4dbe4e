#!/usr/bin/env bash
# Puts the torch bridge over a newer libtorch and trains with it: the same host and plugin files, which were compiled
# with libtorch 2.11 beside them. Everything goes into .deps/compat; nothing else changes.
#
# Variables, all optional:
#     TORCH=2.13.0       the version, from PyPI (530 MB)
#     WHEEL=/path        a wheel of it that is here already
set -euo pipefail
cd "$(dirname "$0")/.."

version=${TORCH:-2.13.0}
place=$PWD/.deps/compat/$version
jepa_host=${CARGO_TARGET_DIR:-target}/release/jepa-host
data=examples/demo-data

die() {
    printf 'compat: %s\n' "$@" >&2
    exit 1
}

fetch() {
    [[ -f $place/site/torch/version.py ]] && return
    local wheel=${WHEEL:-}
    rm -rf "$place"
    mkdir -p "$place/wheels"
    if [[ -z $wheel ]]; then
        echo "compat: fetching libtorch $version (530 MB)"
        python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.11 \
            --implementation cp --platform manylinux_2_28_x86_64 --dest "$place/wheels" "torch==$version" ||
            die "the download failed; pip's own words are above."
        wheel=$(echo "$place"/wheels/*.whl)
    fi
    python3 scripts/unpack_wheels.py "$place/site" "$wheel"
    rm -r "$place/wheels"
    # The CUDA runtime that libtorch_cpu.so names is the one that libtorch 2.11 came with.
    [[ ! -d .deps/site/nvidia ]] || ln -s "$PWD/.deps/site/nvidia" "$place/site/nvidia"
}

fetch
mkdir -p "$place/lib"
for library in bridge native; do
    echo "compat: compiling the $library over libtorch $version"
    "host/$library/build.sh" "$place/site/torch" "$place/lib" || die "host/$library does not compile over libtorch $version."
done

# A library path goes before the places that are written into the files.
export LD_LIBRARY_PATH=$place/lib
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$jepa_host" doctor | tee "$folder/doctor"
grep -q "^libtorch  *$version" "$folder/doctor" || die "the host does not run on libtorch $version."
# What is gone has to say so: the body of such a function looks at no argument.
while read -r gone; do
    python3 - "$place/lib/libjepa_torch_0_24.so" "$gone" <<'PYTHON' || die "calling $gone gives no error that names it."
import ctypes
import sys

bridge, gone = ctypes.CDLL(sys.argv[1]), sys.argv[2]
last_error = bridge.get_and_reset_last_err
last_error.restype = ctypes.c_char_p
getattr(bridge, "atg_" + gone)(*[None] * 12)
said = (last_error() or b"").decode()
print(f"compat: {gone}: {said}")
sys.exit(gone.rstrip("_") not in said)
PYTHON
done <"$place/lib/libjepa_torch_0_24.lacks"

short=(data.size=32 data.upscale=true data.train=$data/fashion_mnist_train.h5 data.val=$data/fashion_mnist_test.h5 eval.train_limit=500
    eval.at_start=false eval.linear.epochs=3 optimizer.batch_size=64 trainer.max_steps=5 run.dir="$folder/runs")
resnet=(backbone.name=resnet18 backbone.stem=small backbone.width=8 'backbone.depths=[1,1]')
convnext=(backbone.name=convnext_atto backbone.stem=small backbone.width=8 'backbone.depths=[1,1,1,1]')
script=(backbone.name=torchscript backbone.file=tests/fixtures/torchscript_net.pt)
heads=(method.hidden=32 method.output=16)
# A plugin with a method, and settings.
train() {
    "$jepa_host" --quiet --plugin "$1" "${short[@]}" "${@:2}" >"$folder/out" || die "$* does not train over libtorch $version."
    printf 'compat: %-12s val/loss %s\n' "$1" "$(awk '$1 == "val/loss" { print $3 }' "$folder/out")"
}
train cnn_jepa method.mask.min_keep=1 "${resnet[@]}"
train cnn_jepa method.mask.min_keep=1 "${convnext[@]}"
train byol "${heads[@]}" "${resnet[@]}"
train simclr "${heads[@]}" "${script[@]}"
train vicreg method.units=32 "${resnet[@]}"
train supervised "${resnet[@]}"
echo "compat: every plugin file trains over libtorch $version; the bridge leaves out" \
    "$(wc -l <"$place/lib/libjepa_torch_0_24.lacks") of tch's functions"
