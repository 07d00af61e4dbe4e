"""The PyTorch side of the loader benchmark: images per second that one core makes ready for CNN-JEPA.

    python peer_loader.py FILE.h5 --size 224

h5py reads, Pillow decodes, lightly's I-JEPA transform crops, resizes, flips and normalises, in one process with one
thread and no DataLoader around them: this is the best that a worker process can do.

Prints one JSON object: `images_per_s` of decoding alone and of the whole view, and what was run.
"""

import argparse
import io
import json
import time

import h5py
import lightly
import PIL
import torch
import torchvision
from lightly.transforms.ijepa_transform import IJEPATransform
from PIL import Image

WARMUP_IMAGES = 30


def arguments():
    parser = argparse.ArgumentParser(description="Times the CNN-JEPA view in torchvision.")
    parser.add_argument("file", help="HDF5 images in the layout images/<i>, or packed by jepa-host")
    parser.add_argument("--size", type=int, default=224, help="side of the view in pixels")
    parser.add_argument("--images", type=int, default=600)
    return parser.parse_args()


def reader(path):
    """A function from i to the encoded bytes of image i, and the number of images."""
    file = h5py.File(path, "r")
    if "images" in file:
        images = file["images"]
        return lambda i: images[str(i)][()], len(images)
    offsets, packed = file["offsets"][()], file["bytes"]
    return lambda i: packed[offsets[i]:offsets[i + 1]], len(offsets) - 1


def images_per_s(prepare, read, indices):
    start = time.perf_counter()
    for i in indices:
        prepare(Image.open(io.BytesIO(read(i))).convert("RGB"))
    return len(indices) / (time.perf_counter() - start)


def main():
    args = arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    read, total = reader(args.file)
    # As in training, neighbours in time are no neighbours in the file.
    indices = torch.randint(total, (args.images,)).tolist()
    # `convert` has decoded by the time that these are called.
    views = {"decode": lambda image: None, "cnn_jepa": IJEPATransform(args.size)}
    rates = {}
    for name, prepare in views.items():
        images_per_s(prepare, read, indices[:WARMUP_IMAGES])
        rates[name] = images_per_s(prepare, read, indices)
    print(json.dumps({
        "images_per_s": rates,
        "arguments": vars(args),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "lightly": lightly.__version__,
        "pillow": PIL.__version__,
    }))


if __name__ == "__main__":
    main()
