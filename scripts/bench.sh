#!/usr/bin/env bash
# Times PyTorch and jepa-host on the same work, one after the other in every round, and prints a table.
#
# Variables, all optional:
#     PYTHON=python3     a Python with torch 2.11, timm and lightly; without one, they are fetched into .deps/bench (2.5 GB)
#     CASES="..."        of those of benches/step.py --help (all)
#     ROUNDS=3           times that everything is run; the tables have the median
#     STEPS=5            training steps in each round, behind 2 that are left out
#     THREADS=N          threads that both compute with (all cores)
#     PHOTOS=photos.h5   images for the loaders, as benches/photos.py makes them; without them, photos of Debian's wallpaper
#                        packages are fetched where there is apt, and otherwise loaders are left out
set -euo pipefail
cd "$(dirname "$0")/.."

read -ra cases <<<"${CASES:-}"
rounds=${ROUNDS:-3}
steps=${STEPS:-5}
threads=${THREADS:-$(nproc)}
jepa_host=${CARGO_TARGET_DIR:-target}/release/jepa-host
packages=(torch==2.11.0 torchvision==0.26.0 timm==1.0.31 lightly==1.6.0 h5py==3.16.0)

die() {
    printf 'bench: %s\n' "$@" >&2
    exit 1
}
has_packages() { "$1" -c 'import h5py, lightly, timm, torch' 2>/dev/null; }

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

# The built benchmark, wherever cargo has put it.
encoder() {
    cargo bench --quiet -p jepa-tests --bench encoder --no-run --message-format json |
        "$python" -c 'import json, sys
built = (json.loads(line) for line in sys.stdin)
print(next(x["executable"] for x in built if x.get("executable") and x["target"]["name"] == "encoder"))'
}

# Photos for the loaders, cut from Debian's wallpapers.
find_photos() {
    photos=${PHOTOS:-.deps/photos.h5}
    [[ -n ${PHOTOS:-} || -e $photos ]] && return
    command -v apt-get dpkg >/dev/null || return 1
    local folder
    folder=$(mktemp -d)
    echo "bench: fetching wallpapers (74 MB)" >&2
    (cd "$folder" && apt-get download mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 >&2 &&
        for package in *.deb; do dpkg -x "$package" .; done) &&
        "$python" benches/photos.py "$folder" "$photos"
    local made=$?
    rm -rf "$folder"
    return "$made"
}

find_python
[[ -x $jepa_host ]] || die "$jepa_host is missing: run make bench, which builds it."
features=$(grep -o -w -m1 -E 'avx2|avx512f|avx512_bf16|amx_bf16' /proc/cpuinfo | sort -u | paste -sd ' ')
echo "$(date +%F) · $(sed -n 's/^model name.*: //p;T;q' /proc/cpuinfo) ($features), $(nproc) cores ·" \
    "jepa-host $(git describe --always --dirty)"
echo
"$python" benches/step.py --jepa-host "$jepa_host" --rounds "$rounds" --steps "$steps" --threads "$threads" \
    ${cases:+--cases "${cases[@]}"}
echo
encoder=$(encoder)
libraries=$PWD/.deps/lib:${LIBTORCH:-$PWD/.deps/site/torch}/lib
for backbone in resnet50 resnet18; do
    "$python" benches/encoder.py --ours "$encoder" --libraries "$libraries" --backbone "$backbone" \
        --rounds "$rounds" --threads "$threads"
    echo
done
if find_photos; then
    "$python" benches/loader.py --jepa-host "$jepa_host" --photos "$photos" --rounds "$rounds"
    echo
else
    echo "bench: no photos: loaders are left out. Name a file of them in PHOTOS (benches/photos.py makes one)." >&2
fi
