"""Training steps side by side: PyTorch in both memory formats, and jepa-host, in turn in every round.

    python benches/step.py --jepa-host target/release/jepa-host --rounds 3

Prints a table of the medians over the rounds of each round's median over its steps, and how many times faster jepa-host is,
with the least and the greatest of the rounds; and each side's peak memory. All of them have their batch in memory.
With --device cuda, batches are of 128 images and in bf16, and memory is the GPU's.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESNET50 = {"backbone": "resnet50", "stem": "imagenet", "width": 64, "depths": [3, 4, 6, 3], "size": 224, "batch": 8}
RESNET18 = RESNET50 | {"backbone": "resnet18", "depths": [2, 2, 2, 2]}
CONVNEXT = {"backbone": "convnext_tiny", "size": 224, "batch": 8}
DEMO = {"backbone": "resnet18", "stem": "small", "width": 32, "depths": [1, 1, 1], "size": 32, "batch": 128}
METHODS = ("cnn_jepa", "byol", "simclr", "vicreg", "supervised")
CASES = {
    **{f"resnet50_{method}": ("ResNet-50, 224 px, batch 8", method, "fp32", RESNET50) for method in METHODS},
    "resnet50_bf16": ("ResNet-50, 224 px, batch 8", "cnn_jepa", "bf16", RESNET50),
    "resnet18": ("ResNet-18, 224 px, batch 8", "cnn_jepa", "fp32", RESNET18),
    "convnext_tiny": ("ConvNeXt-tiny, 224 px, batch 8", "cnn_jepa", "fp32", CONVNEXT),
    "demo": ("the demo: ResNet-18, small stem, width 32, depths [1, 1, 1], 32 px, batch 128", "cnn_jepa", "fp32", DEMO),
}


# Steps that are not measured: on a GPU, libraries choose their kernels in the first ones.
WARMUP = {"cpu": 2, "cuda": 4}


def on_gpu(cases):
    """The same work in batches of 128, in bf16; what is no other case then."""
    changed = {name: (title.replace("batch 8", "batch 128"), method, "bf16", network | {"batch": 128})
               for name, (title, method, _, network) in cases.items()}
    del changed["resnet50_bf16"]
    return changed


def arguments():
    parser = argparse.ArgumentParser(description="Times training steps of PyTorch and of jepa-host.")
    parser.add_argument("--jepa-host", required=True, type=Path, help="the released binary, with its plugins beside it")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="that are measured in each round, after 2 others")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU")
    parser.add_argument("--images", default="examples/demo-data/fashion_mnist_train.h5", help="where jepa-host's batch is from")
    parser.add_argument("--compile", action="store_true", help="PyTorch with torch.compile as well, in its default format")
    return parser.parse_args()


def output(command):
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"step: {' '.join(map(str, command))} ended with {ended.returncode}:\n{ended.stderr}")
    return json.loads(ended.stdout)


def pytorch(args, method, precision, network, *more):
    command = [sys.executable, HERE / "peer_step.py", "--method", method, "--precision", precision, *more]
    for name, value in network.items():
        command += [f"--{name}", json.dumps(value) if isinstance(value, list) else value]
    if args.device == "cuda":
        command += ["--device", "cuda"]
    else:
        command += ["--threads", args.threads]
    result = output([*command, "--steps", args.steps + WARMUP[args.device]])
    peak = result["peak_device_bytes"] if args.device == "cuda" else result["peak_resident_bytes"]
    return statistics.median(result["step_s"][WARMUP[args.device]:]), peak


def jepa_host(args, method, precision, network):
    settings = [f"backbone.{name}={json.dumps(network[key])}".replace('"', "")
                for name, key in (("name", "backbone"), ("stem", "stem"), ("width", "width"), ("depths", "depths"))
                if key in network]
    settings += [f"data.size={network['size']}", f"optimizer.batch_size={network['batch']}", f"trainer.precision={precision}"]
    settings += ["data.upscale=true", f"data.train={args.images}", f"trainer.device={args.device}"]
    if args.device == "cpu":
        settings.append(f"trainer.threads={args.threads}")
    if method == "cnn_jepa":
        settings.append("method.mask.strategy=random")
    result = output([args.jepa_host, "--quiet", "bench", "step", "--plugin", method, "--same-batch", "--format", "json",
                     "--warmup", WARMUP[args.device], "--steps", args.steps, *settings])
    if args.device == "cuda":
        return result["unwaited"]["step_s"], result["peak_gpu_bytes"]
    return result["step"]["median_s"], result["peak_resident_bytes"]


def main():
    args = arguments()
    cases = on_gpu(CASES) if args.device == "cuda" else CASES
    args.cases = [case for case in args.cases if case in cases]
    formats = {"PyTorch": [], "channels-last PyTorch": ["--channels-last"]}
    if args.compile:
        formats["compiled PyTorch"] = ["--compile"]
    rounds = {case: [] for case in args.cases}
    for number in range(args.rounds):
        for case in args.cases:
            print(f"step: round {number + 1} of {args.rounds}: {case}", file=sys.stderr)
            _, *of = cases[case]
            row = {name: pytorch(args, *of, *more) for name, more in formats.items()}
            rounds[case].append(row | {"jepa-host": jepa_host(args, *of)})

    head = [*formats, "jepa-host", *(f"times faster than {name}" for name in formats), "peak memory: PyTorch, jepa-host"]
    where = f"{args.threads} threads" if args.device == "cpu" else "on a GPU"
    print(f"| training step, {where} | {' | '.join(head)} |")
    print("| --- " * (len(head) + 1) + "|")
    for case in args.cases:
        title, method, precision, _ = cases[case]

        def median(name, what=0):
            return statistics.median(row[name][what] for row in rounds[case])

        def ratio(name):
            ratios = [row[name][0] / row["jepa-host"][0] for row in rounds[case]]
            return f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f}–{max(ratios):.2f})"

        cells = [f"`{method}`, {title}, {precision}"]
        cells += [f"{median(name):.3f} s" if args.device == "cpu" else f"{1e3 * median(name):.1f} ms" for name in (*formats, "jepa-host")]
        cells += [ratio(name) for name in formats]
        cells.append(", ".join(f"{median(name, 1) / 2**30:.2f} GiB" for name in ("PyTorch", "jepa-host")))
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
