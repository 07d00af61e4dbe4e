"""The context encoder alone, forward and backward: PyTorch dense, PyTorch with a masked dense emulation, and ours.

    python benches/encoder.py --ours target/release/deps/encoder-… --backbone resnet50 --batch 8 --size 224

In every round each of them is run in turn, in the same number of threads. Prints a table of the medians over the rounds,
and how many times faster ours is.
"""

import argparse
import json
import os
import statistics
import subprocess
import time

import torch

from peer_step import ResNet, VisibleCells, mask_layers, random_mask


def arguments():
    parser = argparse.ArgumentParser(description="Times context encoders, forward and backward.")
    parser.add_argument("--ours", required=True, help="the built benchmark `encoder` of jepa-tests")
    parser.add_argument("--libraries", default="", help="folders that it finds libtorch in, as LD_LIBRARY_PATH has them")
    parser.add_argument("--backbone", choices=("resnet18", "resnet50"), default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.41, 0.6, 0.8], help="of cells that are visible")
    return parser.parse_args()


def seconds(network, images, repeat=3):
    times = []
    for _ in range(repeat + 1):
        network.zero_grad(set_to_none=True)
        start = time.perf_counter()
        network(images).square().mean().backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    visible = VisibleCells()
    dense = ResNet(args.backbone, "imagenet", 64, None).train()
    emulated = mask_layers(ResNet(args.backbone, "imagenet", 64, None), visible).train()
    images = torch.randn(args.batch, 3, args.size, args.size)
    environment = os.environ | ({"LD_LIBRARY_PATH": args.libraries} if args.libraries else {})
    command = [args.ours, args.backbone, args.batch, args.size, args.threads, 3, *args.shares]
    rounds = []
    for _ in range(args.rounds):
        row = {"dense": seconds(dense, images)}
        for share in args.shares:
            # Its time does not hang on the share: all is computed.
            visible.mask = random_mask(args.batch, args.size // 32, 1 - share, "cpu")
            row[f"emulated {share}"] = seconds(emulated, images * visible.at(args.size), 1)
        ours = json.loads(subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, env=environment).stdout)
        row |= {f"ours {name}": times["forward_backward_s"] for name, times in ours.items()}
        rounds.append(row)

    def median(name):
        return statistics.median(row[name] for row in rounds)

    def ratio(of, to):
        ratios = [row[of] / row[to] for row in rounds]
        return f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f}–{max(ratios):.2f})"

    print(f"| {args.backbone}, {args.size} px, batch {args.batch}, {args.threads} threads | PyTorch dense | PyTorch emulated "
          "| jepa-host | times faster than dense | times faster than emulated |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(f"| everything visible | {median('dense'):.3f} s | | {median('ours dense'):.3f} s | {ratio('dense', 'ours dense')} | |")
    for share in args.shares:
        emulated, ours = f"emulated {share}", f"ours {share:g}"
        print(f"| {share:.0%} visible | {median('dense'):.3f} s | {median(emulated):.3f} s | {median(ours):.3f} s "
              f"| {ratio('dense', ours)} | {ratio(emulated, ours)} |")


if __name__ == "__main__":
    main()
