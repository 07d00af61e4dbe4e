#!/usr/bin/env bash
# Fetches what tests compare with: wandb-core, and h5py, TensorBoard and W&B's command line for $PYTHON (default:
# python3), which may have them already.
set -euo pipefail
cd "$(dirname "$0")/.."

WANDB=1 scripts/setup.sh

python=${PYTHON:-python3}
has_all() { PYTHONPATH=.deps/python "$python" -c 'import h5py, tensorboard, wandb; assert wandb.__version__ == "0.31.0"' 2>/dev/null; }

has_all && exit
echo "tests: fetching h5py, TensorBoard and wandb (75 MB)"
rm -rf .deps/python
"$python" -m pip install --quiet --root-user-action ignore --disable-pip-version-check --only-binary :all: --target .deps/python h5py==3.16.0 tensorboard==2.21.0 setuptools==80.9.0 wandb==0.31.0 ||
    { echo "tests: h5py, TensorBoard or wandb cannot be fetched; pip's own words are above. Install them, and name their Python in PYTHON." >&2; exit 1; }
has_all
