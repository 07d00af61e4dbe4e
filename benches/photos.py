"""A file of real photos for the loader's benchmark: large photos cut into JPEGs of 500x375 pixels, as ImageNet's are.

    python photos.py FOLDER OUT.h5

FOLDER is searched for JPEG files. What shows little but sky is left out. Quality is 90; the label is the photo that an image is from.
"""

import io
import sys
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375


def cuts(photo):
    """The photo in parts, at its own size and at half of it."""
    for scale in (1, 2):
        smaller = photo.reduce(scale)
        for top in range(0, smaller.height - HEIGHT + 1, HEIGHT):
            for left in range(0, smaller.width - WIDTH + 1, WIDTH):
                part = smaller.crop((left, top, left + WIDTH, top + HEIGHT))
                if np.asarray(part.convert("L")).std() > 25:
                    yield part


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    photos, count, size = sorted(Path(sys.argv[1]).rglob("*.jpg")), 0, 0
    with h5py.File(sys.argv[2], "w") as out:
        for label, photo in enumerate(photos):
            for part in cuts(Image.open(photo).convert("RGB")):
                encoded = io.BytesIO()
                part.save(encoded, "JPEG", quality=90)
                out[f"images/{count}"] = np.frombuffer(encoded.getvalue(), np.uint8)
                out[f"labels/{count}"] = label
                count, size = count + 1, size + encoded.tell()
    print(f"photos: {count} images of {len(photos)} photos, {size / max(count, 1) / 1e3:.1f} kB each, in {sys.argv[2]}", file=sys.stderr)


if __name__ == "__main__":
    main()
