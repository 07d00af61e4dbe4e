#!/usr/bin/env bash
# `make bench`: the same work in PyTorch and in jepa-host, by turns, on this machine and with the same threads. Prints
# a Markdown table of medians and ratios on the standard output; what it means stands in benches/README.md.
#
# Variables, all optional:
#     CASES="..."        which of: resnet50 resnet50_bf16 demo loader (default: all but the loader)
#     REPEAT=3           rounds; in each one, both sides run once
#     STEPS=N            timed steps of a run (default: 8, in the demo 20)
#     THREADS=N          threads to compute with (default: every core)
#     MASK_RATIO=0.6     share of the cells that the context encoder does not see
#     PHOTOS=/path.h5    images to train on and to load (default: the bundled ones)
#     PYTHON=/path       a Python that has torch 2.11, timm, torchvision, lightly and h5py; otherwise one is set up
#                        in .deps/bench (2 GB to download, 6 GB on disk)
set -euo pipefail
cd "$(dirname "$0")/.."

jepa_host=${CARGO_TARGET_DIR:-target}/release/jepa-host
cases=${CASES:-resnet50 resnet50_bf16 demo}
repeat=${REPEAT:-3}
threads=${THREADS:-$(nproc)}
mask_ratio=${MASK_RATIO:-0.6}
images=${PHOTOS:-examples/demo-data/fashion_mnist_train.h5}
# The first steps choose kernels and allocate memory.
warmup=3

deps=$PWD/.deps/bench
results=$deps/last
packages=(torch==2.11.0 torchvision==0.26.0 timm==1.0.31 h5py==3.16.0 pillow==13.0.0 lightning-utilities==0.15.3)
# Without what it names as its dependencies: its transforms need neither Lightning nor Hydra.
lightly=lightly==1.6.0

# The standard output is for the table.
say() { printf 'bench: %s\n' "$*" >&2; }
die() {
    printf 'bench: %s\n' "$@" >&2
    exit 1
}

# Sets what a case is. Both sides take it from here, so that they train the same network.
describe() {
    stem=imagenet width=64 precision=fp32 steps=${STEPS:-8}
    case $1 in
        resnet50) backbone=resnet50 depths=[3,4,6,3] size=224 batch=8 ;;
        resnet50_bf16) backbone=resnet50 depths=[3,4,6,3] size=224 batch=8 precision=bf16 ;;
        # As configs/demo.toml has it.
        demo) backbone=resnet18 stem=small width=32 depths=[1,1,1] size=32 batch=128 steps=${STEPS:-20} ;;
        loader) ;;
        *) die "CASES: there is no case $1; there are resnet50, resnet50_bf16, demo and loader." ;;
    esac
}

check_arguments() {
    local name value
    for name in repeat threads steps; do
        value=${!name}
        [[ $value =~ ^[1-9][0-9]*$ ]] || die "${name^^}=$value is not a whole number above 0."
    done
    [[ -f $images ]] || die "there is no file $images: set PHOTOS to an HDF5 file of images."
    [[ -x $jepa_host ]] || die "$jepa_host is not built: run make bench, or cargo build --release --workspace."
}

install_python() {
    local pins="${packages[*]} $lightly" free
    python=$deps/python/bin/python
    [[ -f $deps/python/.pins && $(<"$deps/python/.pins") == "$pins" ]] && return
    say "a Python environment with PyTorch in .deps/bench (2 GB to download, 6 GB on disk)"
    mkdir -p "$deps"
    free=$(df -Pm "$deps" | awk 'NR == 2 { print $4 }')
    ((free >= 9000)) ||
        die "9000 MB of free disk are needed for $deps and $free MB are there." \
            "Free some space, or name a Python that has PyTorch 2.11: PYTHON=/path make bench"
    rm -rf "$deps/python"
    python3 -m venv "$deps/python" >&2 ||
        die "python3 cannot make a virtual environment (Debian and Ubuntu: apt install python3-venv)."
    { "$python" -m pip install --quiet --disable-pip-version-check "${packages[@]}" &&
        "$python" -m pip install --quiet --disable-pip-version-check --no-deps "$lightly"; } >&2 ||
        die "pip could not install PyTorch; its own words are above. PyTorch 2.11 needs Python 3.10 to 3.14." \
            "Or name a Python that has it: PYTHON=/path make bench"
    echo "$pins" >"$deps/python/.pins"
}

find_python() {
    if [[ -z ${PYTHON:-} ]]; then
        install_python
        return
    fi
    python=$(command -v "$PYTHON") || die "PYTHON=$PYTHON: there is no such program."
    "$python" -c '
import sys
import torch, torchvision, timm, h5py, lightly.transforms.ijepa_transform
if torch.__version__.split("+")[0] != "2.11.0":
    sys.exit(f"It has torch {torch.__version__}, and jepa-host uses libtorch 2.11.0.")
' >&2 ||
        die "PYTHON=$PYTHON cannot run the PyTorch side, see above." \
            "It needs ${packages[*]}, and $lightly installed with --no-deps." \
            "Leave PYTHON out to have them installed in .deps/bench."
}

# run_pytorch NAME OPTION...
run_pytorch() {
    local name=$1
    shift
    "$python" benches/peer_step.py --backbone "$backbone" --stem "$stem" --width "$width" --depths "$depths" \
        --size "$size" --batch "$batch" --precision "$precision" --mask-ratio "$mask_ratio" \
        --threads "$threads" --steps $((warmup + steps)) "$@" >"$results/$name.json" ||
        die "the PyTorch side failed; its own words are above."
}

# Random masks show the same number of cells in every step; the default mix of masks does not.
run_ours() {
    local name=$1
    "$jepa_host" --quiet --plugin cnn_jepa run.dir="$runs" run.name="$name" \
        backbone.name="$backbone" backbone.stem="$stem" backbone.width="$width" backbone.depths="$depths" \
        data.train="$images" data.size="$size" data.threads="$threads" optimizer.batch_size="$batch" \
        method.mask.strategy=random method.mask.ratio="$mask_ratio" \
        trainer.device=cpu trainer.threads="$threads" trainer.precision="$precision" \
        trainer.max_steps=$((warmup + steps)) trainer.log_every_steps=1 checkpoint.every_epochs=0 \
        >"$results/$name.log" 2>&1 ||
        die "jepa-host failed:" "$(<"$results/$name.log")"
    mv "$runs/$name/version_0/metrics.jsonl" "$results/$name.jsonl"
    # A checkpoint of a ResNet-50 takes 500 MB.
    rm -r "${runs:?}/$name"
}

# One side of a case, in one round.
run_side() {
    say "$case, round $round of $repeat: $1"
    case $1 in
        pytorch) run_pytorch "$case.$round.pytorch" ;;
        channels_last) run_pytorch "$case.$round.channels_last" --channels-last ;;
        ours) run_ours "$case.$round.ours" ;;
        loader) "$python" benches/peer_loader.py "$images" >"$results/loader.$round.pytorch.json" ||
            die "the PyTorch side failed; its own words are above." ;;
    esac
}

run_case() {
    local sides=(pytorch channels_last ours)
    # A machine that grows warm or busy is not to favour the side that always comes first.
    ((round % 2)) || sides=(ours channels_last pytorch)
    [[ $case == loader ]] && sides=(loader)
    for side in "${sides[@]}"; do run_side "$side"; done
}

for case in $cases; do
    describe "$case"
    check_arguments
done
find_python
rm -rf "$results"
mkdir -p "$results"
runs=$(mktemp -d "$deps/runs.XXXXXX")
trap 'rm -rf "$runs"' EXIT

# Rounds on the outside: what slows the machine for a while then touches every case a little.
for ((round = 1; round <= repeat; round++)); do
    for case in $cases; do
        describe "$case"
        run_case
    done
done

"$python" benches/report.py "$results" --warmup "$warmup" \
    --version "$(git describe --always --dirty 2>/dev/null || echo unknown)" \
    --command "make bench CASES=\"$cases\" REPEAT=$repeat THREADS=$threads MASK_RATIO=$mask_ratio${STEPS:+ STEPS=$STEPS}${PHOTOS:+ PHOTOS=$(basename "$PHOTOS")}"
