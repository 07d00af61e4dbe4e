"""Input pipelines side by side: images per second and core, of the reference and of jepa-host, in turn in every round.

    python benches/loader.py --jepa-host target/release/jepa-host --photos photos.h5

The reference is h5py, Pillow and lightly's transforms, one image after the other in one process without a DataLoader around it,
so at its best. Also timed where they are installed: DALI on the CPU and SPDL, for their nearest equivalent of CNN-JEPA's
view, from memory. jepa-host is `data bench`: the loader that training uses, with one thread and with all of them.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

METHODS = ("cnn_jepa", "simclr", "byol")


def arguments():
    parser = argparse.ArgumentParser(description="Times input pipelines.")
    parser.add_argument("--jepa-host", required=True, type=Path, help="the released binary, with its plugins beside it")
    parser.add_argument("--photos", required=True, type=Path, help="HDF5 file in the reference's layout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4, help="for each measurement")
    parser.add_argument("--peer", choices=("decode", *METHODS, "dali", "spdl"), help=argparse.SUPPRESS)
    return parser.parse_args()


def rate(make, count, seconds):
    """Images per second of `make(i)`, after a few that are left out."""
    for i in range(20):
        make(i % count)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        make(done * 7919 % count)
        done += 1
    return done / (time.perf_counter() - start)


def reference(args):
    import warnings

    import h5py
    import torch
    from PIL import Image

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    from lightly.transforms import BYOLTransform, SimCLRTransform
    from lightly.transforms.ijepa_transform import IJEPATransform

    transform = {
        "decode": lambda: lambda image: None,
        "cnn_jepa": lambda: IJEPATransform(224),
        "simclr": lambda: SimCLRTransform(224),
        "byol": BYOLTransform,
    }[args.peer]()
    file = h5py.File(args.photos)

    def make(i):
        encoded = file[f"images/{i}"][()]
        transform(Image.open(io.BytesIO(encoded.tobytes())).convert("RGB"))
        file[f"labels/{i}"][()]

    return rate(make, len(file["labels"]), args.seconds)


def encoded_images(path):
    import h5py

    with h5py.File(path) as file:
        return [file[f"images/{i}"][()] for i in range(len(file["labels"]))]


def dali(args):
    from nvidia.dali import fn, pipeline_def, types

    images, batch = encoded_images(args.photos), 64

    @pipeline_def(batch_size=batch, num_threads=1, device_id=None)
    def view():
        encoded = fn.external_source(lambda info: images[info.idx_in_epoch % len(images)], batch=False)
        image = fn.decoders.image_random_crop(encoded, random_area=(0.2, 1.0), random_aspect_ratio=(3 / 4, 4 / 3))
        image = fn.resize(image, size=(224, 224), interp_type=types.INTERP_CUBIC)
        return fn.crop_mirror_normalize(
            image, mirror=fn.random.coin_flip(), mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]
        )

    pipeline = view()
    pipeline.build()
    return batch * rate(lambda i: pipeline.run(), 1, args.seconds)


def spdl(args):
    import random

    import spdl.io

    images = [image.tobytes() for image in encoded_images(args.photos)]

    # No random crop by area and no bicubic filter by its own: a crop of the mean size and FFmpeg's default.
    def make(i):
        left, top = random.randrange(500 - 375), random.randrange(375 - 335)
        graph = f"crop=375:335:{left}:{top},scale=224:224:flags=bicubic,format=pix_fmts=rgb24"
        frames = spdl.io.decode_packets(spdl.io.demux_image(images[i]), filter_desc=graph)
        spdl.io.to_numpy(spdl.io.convert_frames(frames))

    return rate(make, len(images), args.seconds)


def output(command, **more):
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True, **more)
    if ended.returncode:
        return None, ended.stderr
    return json.loads(ended.stdout), None


def main():
    args = arguments()
    if args.peer:
        os.sched_setaffinity(0, {0})
        print(json.dumps({"dali": dali, "spdl": spdl}.get(args.peer, reference)(args)))
        return
    peers, rows, missing = ("decode", *METHODS, "dali", "spdl"), [], {}
    for number in range(args.rounds):
        print(f"loader: round {number + 1} of {args.rounds}", file=sys.stderr)
        row = {}
        for peer in peers:
            command = [sys.executable, __file__, "--jepa-host", args.jepa_host, "--photos", args.photos,
                       "--seconds", args.seconds, "--peer", peer]
            row[peer], why = output(command)
            if row[peer] is None:
                if peer not in ("dali", "spdl"):
                    sys.exit(f"loader: {peer}: {why}")
                missing[peer] = (why.strip().splitlines() or ["it ends without a word"])[-1][:120]
            if peer in METHODS:
                measured, why = output(
                    [args.jepa_host, "--quiet", "data", "bench", args.photos, "--plugin", peer, "--steps", 0,
                     "--seconds", args.seconds, "--format", "json", "backbone.name=resnet18", "optimizer.batch_size=64"])
                if measured is None:
                    sys.exit(f"loader: jepa-host: {why}")
                row["ours", peer] = [threads["images_per_s"] for threads in measured["threads"]]
        rows.append(row)

    def middle(values):
        return f"{statistics.median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"

    print("| views of a photo of 500×375 | reference, one core | jepa-host, one thread | times as fast | its threads, over one |")
    print("| --- | --- | --- | --- | --- |")
    for method in METHODS:
        ours, theirs = [row["ours", method] for row in rows], [row[method] for row in rows]
        ratios = [one[0] / other for one, other in zip(ours, theirs, strict=True)]
        threads = statistics.median(one[-1] / one[0] for one in ours)
        print(f"| `{method}` | {middle(theirs)} | {middle([one[0] for one in ours])} |"
              f" **{statistics.median(ratios):.1f}** ({min(ratios):.1f}–{max(ratios):.1f}) | {threads:.2f} |")
    print(f"\nPillow's bare decode: {middle([row['decode'] for row in rows])} images/s.")
    for peer, name in (("dali", "DALI (CPU), CNN-JEPA's view"), ("spdl", "SPDL, decode, crop and resize")):
        values = [row[peer] for row in rows if row[peer]]
        print(f"{name}: {middle(values) + ' images/s' if values else 'does not run here: ' + missing[peer]}.")


if __name__ == "__main__":
    main()
