#!/usr/bin/env bash
# Packs all of Fashion-MNIST: data/fashion_mnist_train.h5 (60,000 images) and data/fashion_mnist_test.h5 (10,000).
# What is there already stays.
#
# The images come from Debian's package dataset-fashion-mnist, which is unpacked and not installed. On a machine
# without apt, name a folder that holds the four IDX files (gzipped or not):
#
#     FASHION_MNIST=/path make data
set -euo pipefail
cd "$(dirname "$0")/.."

jepa_host=${JEPA_HOST:-${CARGO_TARGET_DIR:-target}/release/jepa-host}
package=dataset-fashion-mnist
classes="T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"

say() { printf 'data: %s\n' "$*"; }
die() {
    printf 'data: %s\n' "$@" >&2
    exit 1
}

out() { printf 'data/fashion_mnist_%s.h5' "$1"; }

# Prints the folder of the IDX files.
fetch() {
    local hint="Or get the four IDX files from the authors (github.com/zalandoresearch/fashion-mnist) and run: FASHION_MNIST=/their/folder make data"
    command -v apt-get >/dev/null && command -v dpkg >/dev/null ||
        die "this machine has no apt, which would bring the Debian package $package." "$hint"
    (cd "$tmp" && apt-get download --quiet "$package" >&2) ||
        die "apt cannot download $package; apt's own words are above (run apt-get update first where its lists are old)." "$hint"
    dpkg -x "$tmp"/"$package"*.deb "$tmp/unpacked" >&2 || die "dpkg cannot unpack $package."
    printf '%s' "$tmp/unpacked/usr/share/datasets/fashion-mnist"
}

[[ -x $jepa_host ]] || die "$jepa_host is not built: run make data, or cargo build --release."

missing=()
for split in train test; do [[ -f $(out $split) ]] || missing+=("$split"); done
if ((${#missing[@]} == 0)); then
    say "$(out train) and $(out test) are there already"
    exit
fi

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
# apt downloads as a user of its own where it can.
chmod 755 "$tmp"
idx=${FASHION_MNIST:-}
[[ -n $idx ]] || idx=$(fetch)
[[ -d $idx ]] || die "FASHION_MNIST=$idx is not a folder."
for split in "${missing[@]}"; do
    "$jepa_host" data pack "$idx" "$(out "$split")" --split "$split" --class-names "$classes"
done
