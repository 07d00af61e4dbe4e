#!/usr/bin/env bash
# Fetches h5py for the test that has it read our files, into .deps/python, unless $PYTHON (default: python3) has it.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
has_h5py() { PYTHONPATH=.deps/python "$python" -c 'import h5py' 2>/dev/null; }

has_h5py && exit
echo "tests: fetching h5py (25 MB)"
rm -rf .deps/python
"$python" -m pip install --quiet --root-user-action ignore --disable-pip-version-check --only-binary :all: --target .deps/python h5py==3.16.0 ||
    { echo "tests: h5py cannot be fetched; pip's own words are above. Install it, and name its Python in PYTHON." >&2; exit 1; }
has_h5py
