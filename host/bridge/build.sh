#!/usr/bin/env bash
# Builds libjepa_torch_0_24.so, the C layer of tch 0.24 over one libtorch:
#
#     host/bridge/build.sh TORCH_DIR LIB_DIR
#
# TORCH_DIR has include/ and lib/; LIB_DIR gets the library. The C++ is torch-sys's own, found where cargo keeps
# it. To serve another libtorch, run this again with its directory: neither host nor plugins need a rebuild. Functions
# that this libtorch has no more become errors that say so; LIB_DIR/libjepa_torch_0_24.lacks names them.
set -euo pipefail

torch=$(realpath -s "$1")
lib_dir=$(realpath -s "$2")
here=$(realpath "$(dirname "$0")")
tch=0.24.0
name=libjepa_torch_0_24

# cargo knows where the sources lie, and downloads them if they are not there yet.
sources=$(cd "$here" && cargo metadata --format-version 1 --filter-platform x86_64-unknown-linux-gnu | python3 -c '
import json, os, sys
for package in json.load(sys.stdin)["packages"]:
    if package["name"] == "torch-sys" and package["version"] == sys.argv[1]:
        print(os.path.join(os.path.dirname(package["manifest_path"]), "libtch"))
' "$tch")
if [[ ! -f $sources/torch_api.cpp ]]; then
    echo "bridge: torch-sys $tch is not among this workspace's dependencies; Cargo.toml must ask for tch $tch" >&2
    exit 1
fi

work=$(mktemp -d "$lib_dir/.bridge.XXXXXX")
trap 'rm -rf "$work"' EXIT

# -O1: these functions only unpack arguments, and the optimizer's time on 30,000 lines of them is set-up time.
compile() {
    "${CXX:-c++}" -std=c++17 -O1 -g0 -fPIC -w -D_GLIBCXX_USE_CXX11_ABI=1 -DGLOG_USE_GLOG_EXPORT \
        -I "$sources" -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" \
        "${@:2}" -c "$1" -o "$work/$(basename "$1" .cpp).o"
}
generated=$work/torch_api_generated.cpp
cp "$sources/torch_api_generated.cpp" "$generated"
touch "$work/lacks"
version=$(sed -n "s/^__version__ = '\([^+']*\).*/\1/p" "$torch/version.py" 2>/dev/null || true)

compile_generated() {
    # Each round finds the errors that those of the round before have hidden.
    for _ in 1 2 3; do
        compile "$generated" 2>"$work/errors" && return
        python3 "$here/leave_out.py" "$generated" "$work/errors" "${version:-in use}" "$work/lacks" || break
    done
    cat "$work/errors" >&2
    return 1
}

compile_generated &
generating=$!
compile "$sources/torch_api.cpp"
compile "$here/streams.cpp"
compile "$here/autograd.cpp"
compile "$here/parallel.cpp" -fopenmp
compile "$here/ranks.cpp"
compile "$here/cuda.cpp"
wait "$generating"

# The absolute path is for a link to this file elsewhere (cargo's build folder), where $ORIGIN would mislead.
"${CXX:-c++}" -shared -s -o "$work/$name.so" "$work"/*.o \
    -Wl,-soname,"$name.so" -Wl,--version-script,"$here/exports.map" -Wl,--no-undefined -Wl,--enable-new-dtags \
    -Wl,-rpath,'$ORIGIN/../site/torch/lib' -Wl,-rpath,"$torch/lib" \
    -L"$torch/lib" -ltorch_cpu -lc10 -lgomp -ldl
sort -u "$work/lacks" >"$lib_dir/$name.lacks"
mv "$work/$name.so" "$lib_dir/$name.so"
