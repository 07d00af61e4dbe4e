#!/usr/bin/env bash
# Prepares under .deps what cargo does not bring, and does nothing where it is there already:
#
#     .deps/site/torch   libtorch, with .deps/site/nvidia beside it, where libtorch_cpu.so looks for it
#     .deps/cmake        for the build of HDF5
#     .deps/lib          the torch bridge (host/bridge), the native library (host/native), and wandb-core
#
# Variables, all optional:
#     LIBTORCH=/path     use this PyTorch 2.11 (its `torch` folder, or a libtorch folder) instead of a download
#     CUDA=1             also fetch the CUDA libraries that torch's metadata names (some 4 GB on disk)
#     WANDB=1            also fetch wandb-core, W&B's engine (20 MB)
#     CXX=...            the C++17 compiler
set -euo pipefail
cd "$(dirname "$0")/.."

root=$PWD
deps=$root/.deps
torch_version=2.11.0
need_mb=3500

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

# Every pip call here asks for the same files, whatever Python runs it. pip takes each older manylinux by name only.
platforms=(--only-binary=:all: --python-version 3.11 --implementation cp)
for minor in {28..17}; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)

check_system() {
    [[ $(uname -s) == Linux && $(uname -m) == x86_64 ]] ||
        die "jepa-host runs on Linux on x86_64; this is $(uname -s) on $(uname -m)."
}

check_tools() {
    command -v cargo >/dev/null ||
        die "cargo is missing: install Rust 1.95 or newer with rustup (https://rustup.rs)."
    command -v python3 >/dev/null ||
        die "python3 is missing: install it (Debian and Ubuntu: apt install python3 python3-pip)."
    local compiler=${CXX:-c++}
    command -v "${compiler%% *}" >/dev/null ||
        die "the C++ compiler $compiler is missing: install one (Debian and Ubuntu: apt install g++) or set CXX."
    command -v cc >/dev/null ||
        die "the C compiler cc is missing, and rustc links with it: install one (Debian and Ubuntu: apt install gcc)."
    echo '#include <optional>
static_assert(__cplusplus >= 201703L);' | $compiler -std=c++17 -fsyntax-only -x c++ - 2>/dev/null ||
        die "$compiler does not compile C++17: install g++ 9 or newer, or set CXX to another compiler."
}

check_pip() {
    python3 -m pip --version >/dev/null 2>&1 ||
        die "python3 has no pip: install it (Debian and Ubuntu: apt install python3-pip; elsewhere: python3 -m ensurepip)."
}

check_disk() {
    local need=$1 free
    free=$(df -Pm "$deps" | awk 'NR == 2 { print $4 }')
    ((free >= need)) ||
        die "$need MB of free disk are needed for $root and $free MB are there." \
            "Free some space, or put the checkout elsewhere."
}

# download FOLDER PIP_ARGUMENT...
download() {
    local folder=$1
    shift
    mkdir -p "$folder"
    # pip says more than its last line when it fails; a progress bar only where a person watches.
    local bar=off
    [[ -t 1 ]] && bar=on
    PIP_DISABLE_PIP_VERSION_CHECK=1 python3 -m pip download --quiet --progress-bar "$bar" --retries 2 --timeout 30 \
        --dest "$folder" "${platforms[@]}" "$@" ||
        die "the download failed; pip's own words are above." \
            "Without a network connection: connect, or name your proxy in HTTPS_PROXY or your PyPI mirror in PIP_INDEX_URL." \
            "If a hash differs, the mirror serves another file; ask PyPI itself." \
            "Or use a PyTorch $torch_version that is on this machine: make setup LIBTORCH=/path/to/torch"
}

unpack() { python3 "$root/scripts/unpack_wheels.py" "$@"; }

# The lines of scripts/wheels.txt that belong to the packages named.
pins() { awk -v names=" $* " '/^[a-z]/ { split($1, pin, "=="); on = index(names, " " pin[1] " ") } on && !/^#/' scripts/wheels.txt; }

install_cmake() {
    local pin
    pin=$(pins cmake)
    [[ -f $deps/cmake/.pin && $(<"$deps/cmake/.pin") == "$pin" ]] && return
    say "cmake (28 MB)"
    check_pip
    check_disk 200
    download "$tmp/wheels" --no-deps --require-hashes -r <(echo "$pin")
    unpack "$tmp/cmake" "$tmp"/wheels/cmake-*.whl
    rm -r "$tmp/wheels"
    mv "$tmp/cmake/cmake/data" "$tmp/cmake/ready"
    echo "$pin" >"$tmp/cmake/ready/.pin"
    rm -rf "$deps/cmake"
    mv "$tmp/cmake/ready" "$deps/cmake"
}

install_torch() {
    local pin
    # One that the user named stays in use until another is named.
    [[ -L $deps/site/torch && -d $deps/site/torch/lib ]] && return
    pin=$(pins torch nvidia-cuda-runtime nvidia-cuda-cupti)
    [[ -f $deps/site/.pin && $(<"$deps/site/.pin") == "$pin" ]] && return
    say "libtorch $torch_version (545 MB to download, 1.2 GB on disk)"
    check_pip
    check_disk "$need_mb"
    download "$tmp/wheels" --no-deps --require-hashes -r <(echo "$pin")
    say "unpacking libtorch"
    unpack "$tmp/site" "$tmp"/wheels/*.whl
    rm -r "$tmp/wheels"
    echo "$pin" >"$tmp/site/.pin"
    replace_site
}

# What is in place from now on is complete: it comes by a rename.
replace_site() {
    rm -rf "$deps/site"
    mv "$tmp/site" "$deps/site"
}

# The version of a PyTorch: the package says it in version.py, a libtorch archive in build-version.
version_of() {
    if [[ -f $1/version.py ]]; then
        sed -n "s/^__version__ = '\(.*\)'.*/\1/p" "$1/version.py"
    elif [[ -f $1/build-version ]]; then
        head -n 1 "$1/build-version"
    fi
}

use_torch() {
    local given version
    given=$(realpath -e "$1" 2>/dev/null) || die "LIBTORCH=$1: there is no such folder."
    # Also taken: the site-packages folder that holds torch.
    [[ -d $given/torch/lib && ! -d $given/lib ]] && given=$given/torch
    [[ -f $given/lib/libtorch_cpu.so && -d $given/include/ATen ]] ||
        die "LIBTORCH=$1 is not a PyTorch: it has no lib/libtorch_cpu.so or no include/ATen." \
            "Name the torch folder of a Python installation; this prints it:" \
            "    python3 -c 'import torch; print(torch.__path__[0])'"
    version=$(version_of "$given")
    [[ ${version%%+*} == "$torch_version" ]] ||
        die "LIBTORCH=$1 has PyTorch ${version:-of an unknown version}; $torch_version is needed." \
            "Name another one, or leave LIBTORCH out and $torch_version is downloaded."
    [[ -L $deps/site/torch && $(readlink "$deps/site/torch") == "$given" ]] && return
    say "using libtorch $version in $given"
    mkdir "$tmp/site"
    ln -s "$given" "$tmp/site/torch"
    replace_site
}

# The CUDA libraries, in the versions that torch's metadata names for Linux on x86_64. Their hashes are PyPI's.
install_cuda() {
    [[ -L $deps/site/torch ]] &&
        die "CUDA=1 completes a downloaded libtorch; the one in $(readlink "$deps/site/torch") brings its own CUDA." \
            "Leave CUDA=1 out, or remove .deps/site to have libtorch downloaded."
    [[ -f $deps/site/.cuda ]] && return
    local names=() line
    while read -r line; do names+=("$line"); done < <(python3 - "$deps/site/torch-$torch_version.dist-info/METADATA" <<'PYTHON'
import email
import sys

# A requirement reads `name[extras]==version; condition`. Triton and the Python bindings serve Python code only.
for requirement in email.message_from_file(open(sys.argv[1])).get_all("Requires-Dist", []):
    pinned, _, condition = (part.strip() for part in requirement.partition(";"))
    if pinned.startswith(("cuda-toolkit", "nvidia-")) and "extra" not in condition:
        print(pinned)
PYTHON
    )
    ((${#names[@]} > 0)) || die "torch's metadata in .deps/site names no CUDA packages; remove .deps/site and run this again."
    say "CUDA libraries for libtorch (2 GB to download, 4 GB on disk): ${names[*]}"
    check_pip
    check_disk 7000
    download "$tmp/wheels" "${names[@]}"
    say "unpacking the CUDA libraries"
    unpack "$tmp/cuda" "$tmp"/wheels/*.whl
    rm -r "$tmp/wheels"
    # Moved in file by file, since the two that are there share folders with these; .cuda comes last.
    (cd "$tmp/cuda" && find . -type f -print0) | while IFS= read -r -d '' file; do
        mkdir -p "$deps/site/$(dirname "$file")"
        mv "$tmp/cuda/$file" "$deps/site/$file"
    done
    printf '%s\n' "${names[@]}" >"$deps/site/.cuda"
}

# Whether the libtorch in use has CUDA and NCCL, with their headers beside it.
has_cuda() {
    local torch
    torch=$(realpath "$deps/site/torch")
    [[ -f $torch/lib/libtorch_cuda.so && -f $(dirname "$torch")/nvidia/nccl/include/nccl.h ]]
}

install_cuda_headers() {
    local pin
    pin=$(pins nvidia-cuda-crt nvidia-cuda-cccl)
    [[ -f $deps/cuda-headers/.pin && $(<"$deps/cuda-headers/.pin") == "$pin" ]] && return
    say "CUDA headers (3 MB)"
    check_pip
    download "$tmp/wheels" --no-deps --require-hashes -r <(echo "$pin")
    unpack "$tmp/cuda-headers" "$tmp"/wheels/*.whl
    rm -r "$tmp/wheels"
    echo "$pin" >"$tmp/cuda-headers/.pin"
    rm -rf "$deps/cuda-headers"
    mv "$tmp/cuda-headers" "$deps/cuda-headers"
}

# W&B's engine, out of the wandb wheel. Its Python code is not needed.
install_wandb() {
    local pin
    pin=$(pins wandb)
    [[ -f $deps/lib/.wandb.pin && $(<"$deps/lib/.wandb.pin") == "$pin" ]] && return
    say "wandb-core (20 MB)"
    check_pip
    check_disk 200
    download "$tmp/wheels" --no-deps --require-hashes -r <(echo "$pin")
    unpack "$tmp/wandb" "$tmp"/wheels/wandb-*.whl
    rm -r "$tmp/wheels"
    mv "$tmp"/wandb/wandb/bin/wandb-{core,symon} "$deps/lib/"
    echo "$pin" >"$deps/lib/.wandb.pin"
}

# build NAME FOLDER TIME FILE...: runs FOLDER/build.sh unless the library was made from the same sources (those of the folder, and
# these files), by the same compiler, against the same libtorch, in the same place.
build() {
    local name=$1 folder=$2 time=$3 stamp=$deps/lib/.$1.made_from
    local made_from
    made_from=$(
        echo "$root ${CXX:-c++} $(realpath "$deps/site/torch") $(version_of "$deps/site/torch")"
        find "$folder" "${@:4}" -type f -print0 | sort -z | xargs -0 cat
    )
    made_from=$(sha256sum <<<"$made_from")
    [[ -f $deps/lib/$name && -f $stamp && $(<"$stamp") == "$made_from" ]] && return
    say "compiling $name (about $time)"
    rm -f "$stamp"
    "$folder/build.sh" "$deps/site/torch" "$deps/lib" ||
        die "compiling $name failed; the messages above say where." \
            "If cargo could not download a crate, check the network connection."
    echo "$made_from" >"$stamp"
}

check_system
check_tools
mkdir -p "$deps/lib"
# One set-up at a time.
if command -v flock >/dev/null; then
    exec 9>"$deps/.lock"
    flock 9
fi
# What an interrupted run has left.
rm -rf "$deps"/tmp.* "$deps"/lib/.bridge.* "$deps"/lib/.native.*
tmp=$deps/tmp.$$
mkdir "$tmp"
trap 'rm -rf "$tmp"' EXIT

install_cmake
if [[ -n ${LIBTORCH:-} ]]; then use_torch "$LIBTORCH"; else install_torch; fi
if [[ -n ${CUDA:-} && $CUDA != 0 ]]; then install_cuda; fi
if [[ -n ${WANDB:-} && $WANDB != 0 ]]; then install_wandb; fi
build libjepa_torch_0_24.so host/bridge "80 s on two cores"
build libjepa_native.so host/native "25 s"
if has_cuda; then
    install_cuda_headers
    build libjepa_cuda.so host/native/cuda "40 s" host/native/{guarded.h,native.h,exports.map}
    # What it was called before it had CUDA graphs.
    rm -f "$deps"/lib/{libjepa_nccl.so,.libjepa_nccl.so.made_from}
fi
say "ready"
