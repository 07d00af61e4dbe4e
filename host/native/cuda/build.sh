#!/usr/bin/env bash
# Builds libjepa_cuda.so, what the host needs of libtorch_cuda itself, NCCL for ranks and CUDA graphs:
#
#     host/native/cuda/build.sh TORCH_DIR LIB_DIR
#
# TORCH_DIR has include/ and lib/, with libtorch_cuda, and beside it lies nvidia/ with the headers of CUDA and NCCL, as PyPI's
# wheels have them. LIB_DIR gets the library; LIB_DIR/../cuda-headers has what those wheels lack.
set -euo pipefail

torch=$(realpath -s "$1")
lib_dir=$(realpath -s "$2")
here=$(realpath "$(dirname "$0")")
nvidia=$(dirname "$(realpath "$torch")")/nvidia
more=$lib_dir/../cuda-headers/nvidia/cu13/include
name=libjepa_cuda.so

work=$(mktemp -d "$lib_dir/.native.XXXXXX")
trap 'rm -rf "$work"' EXIT

# libtorch_cuda's own libraries are found when it is opened, not here.
"${CXX:-c++}" -std=c++17 -O2 -g0 -fPIC -w -D_GLIBCXX_USE_CXX11_ABI=1 -DUSE_C10D_NCCL \
    -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" \
    -isystem "$nvidia/cu13/include" -isystem "$nvidia/nccl/include" -isystem "$more" -isystem "$more/cccl" \
    -shared -s -o "$work/$name" "$here"/{nccl,graph}.cpp \
    -Wl,-soname,"$name" -Wl,--version-script,"$here/../exports.map" -Wl,--allow-shlib-undefined -Wl,--enable-new-dtags \
    -Wl,-rpath,'$ORIGIN/../site/torch/lib' -Wl,-rpath,"$torch/lib" \
    -L"$torch/lib" -ltorch_cuda -ltorch_cpu -lc10_cuda -lc10
mv "$work/$name" "$lib_dir/$name"
