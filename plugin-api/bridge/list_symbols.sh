#!/usr/bin/env bash
# Writes the C names that a torch-sys crate declares, one a line: `list_symbols.sh TORCH_SYS_DIR`.
# torch_0_24.symbols beside this file was made so from torch-sys 0.24.0. Its Python part is behind a feature that
# nothing here uses, and is left out.
set -euo pipefail
cat "$1"/src/{lib,cuda,c_generated}.rs | sed -n 's/^ *pub fn \([A-Za-z0-9_]*\)(.*/\1/p' | LC_ALL=C sort -u
