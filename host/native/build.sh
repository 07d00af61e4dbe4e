#!/usr/bin/env bash
# Builds libjepa_native.so, the interface of native.h over one libtorch:
#
#     host/native/build.sh TORCH_DIR LIB_DIR
#
# TORCH_DIR has include/ and lib/; LIB_DIR gets the library.
set -euo pipefail

torch=$(realpath -s "$1")
lib_dir=$(realpath -s "$2")
here=$(realpath "$(dirname "$0")")
name=libjepa_native.so

work=$(mktemp -d "$lib_dir/.native.XXXXXX")
trap 'rm -rf "$work"' EXIT

# The absolute path is for a link to this file elsewhere, where $ORIGIN would mislead.
"${CXX:-c++}" -std=c++17 -O2 -g0 -fPIC -Wall -Wextra -D_GLIBCXX_USE_CXX11_ABI=1 \
    -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" \
    -DUSE_C10D_GLOO -isystem "$here" \
    -shared -s -o "$work/$name" "$here"/{native,transfer,comm,exchange}.cpp \
    -Wl,-soname,"$name" -Wl,--version-script,"$here/exports.map" -Wl,--no-undefined -Wl,--enable-new-dtags \
    -Wl,-rpath,'$ORIGIN/../site/torch/lib' -Wl,-rpath,"$torch/lib" \
    -L"$torch/lib" -ltorch_cpu -lc10
mv "$work/$name" "$lib_dir/$name"
