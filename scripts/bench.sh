#!/usr/bin/env bash
# Times PyTorch and jepa-host on the same work, one after the other in every round, and prints a table.
#
# Variables, all optional:
#     PYTHON=python3     a Python with torch 2.11 and timm; without one, they are fetched into .deps/bench (2.5 GB)
#     CASES="..."        of: resnet50 resnet50_bf16 demo
#     ROUNDS=3           times that everything is run; the table has the median
#     STEPS=12           training steps in a run, of which the first 4 are left out
#     THREADS=N          threads that both compute with (all cores)
#     IMAGES=photos.h5   images to train on (the bundled ones)
set -euo pipefail
cd "$(dirname "$0")/.."

cases=${CASES:-resnet50 resnet50_bf16 demo}
rounds=${ROUNDS:-3}
steps=${STEPS:-12}
warmup=4
threads=${THREADS:-$(nproc)}
images=${IMAGES:-examples/demo-data/fashion_mnist_train.h5}
jepa_host=${CARGO_TARGET_DIR:-target}/release/jepa-host
packages=(torch==2.11.0 torchvision==0.26.0 timm==1.0.31)

die() {
    printf 'bench: %s\n' "$@" >&2
    exit 1
}
has_packages() { "$1" -c 'import timm, torch' 2>/dev/null; }

find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        has_packages "$PYTHON" || die "$PYTHON lacks one of ${packages[*]}."
        python=$PYTHON
        return
    fi
    python=.deps/bench/bin/python
    [[ -x $python ]] && has_packages "$python" && return
    echo "bench: fetching ${packages[*]} (2.5 GB)" >&2
    rm -rf .deps/bench
    python3 -m venv .deps/bench || die "python3 cannot make a virtual environment: install python3-venv."
    "$python" -m pip install --quiet --disable-pip-version-check "${packages[@]}" ||
        die "the packages cannot be fetched; pip's own words are above. Name a Python that has them in PYTHON."
}

# step CASE ROUND PRECISION BACKBONE STEM WIDTH DEPTHS SIZE BATCH
step() {
    local out=$folder/$1.$2 precision=$3 backbone=$4 stem=$5 width=$6 depths=$7 size=$8 batch=$9
    local peer=("$python" benches/peer_step.py --backbone "$backbone" --stem "$stem" --width "$width"
        --depths "$depths" --size "$size" --batch "$batch" --precision "$precision" --threads "$threads"
        --steps "$steps")
    "${peer[@]}" >"$out.pytorch.json"
    "${peer[@]}" --channels-last >"$out.channels_last.json"
    "$jepa_host" --quiet --plugin cnn_jepa backbone.name="$backbone" backbone.stem="$stem" backbone.width="$width" \
        backbone.depths="$depths" data.train="$images" data.size="$size" data.upscale=true optimizer.batch_size="$batch" \
        trainer.precision="$precision" trainer.threads="$threads" trainer.device=cpu trainer.max_steps="$steps" \
        trainer.log_every_steps=1 method.mask.strategy=random checkpoint.every_epochs=0 checkpoint.keep=1 \
        run.dir="$folder" run.name="$1.$2" >/dev/null 2>"$out.log" || die "jepa-host failed:" "$(<"$out.log")"
    mv "$folder/$1.$2/version_0/metrics.jsonl" "$out.ours.jsonl"
    rm -r "${folder:?}/$1.$2"
}

find_python
[[ -x $jepa_host ]] || die "$jepa_host is missing: run make bench, which builds it."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for ((round = 1; round <= rounds; round++)); do
    for case in $cases; do
        echo "bench: round $round of $rounds: $case" >&2
        case $case in
        resnet50) step "$case" "$round" fp32 resnet50 imagenet 64 '[3,4,6,3]' 224 8 ;;
        resnet50_bf16) step "$case" "$round" bf16 resnet50 imagenet 64 '[3,4,6,3]' 224 8 ;;
        demo) step "$case" "$round" fp32 resnet18 small 32 '[1,1,1]' 32 128 ;;
        *) die "there is no case $case: choose among resnet50, resnet50_bf16 and demo" ;;
        esac
    done
done
"$python" benches/report.py "$folder" --warmup "$warmup" --version "$(git describe --always --dirty)" \
    --command "CASES=\"$cases\" ROUNDS=$rounds STEPS=$steps THREADS=$threads make bench"
