#!/usr/bin/env bash
# `make demo`: CNN-JEPA on bundled Fashion-MNIST images, method and backbone as two plugin files. Further arguments
# are settings: scripts/demo.sh seed=1
set -euo pipefail
cd "$(dirname "$0")/.."
release="${CARGO_TARGET_DIR:-target}/release"

echo "Pretraining CNN-JEPA without labels on 8,000 Fashion-MNIST images, then asking a linear probe and kNN what the"
echo "features know of the classes, on 2,000 images that were not trained on."
# So short a run wants a target encoder that follows faster than the published 0.996.
"$release/jepa-host" --plugin libcnn_jepa.so --config configs/demo.toml method.ema.from=0.99 "$@"

cat <<EOF

Before: random weights. After: pretrained. linear_top1 is of the probe's best epoch, as in papers; chance is 0.1.
To go on:
    $release/jepa-host eval knn runs/demo                       # the same figures again, from the checkpoint
    $release/jepa-host export runs/demo backbone.safetensors    # for timm, or for init.from in another run
    $release/jepa-host data pack PHOTOS/ photos.h5              # your own images; then see README.md
EOF
