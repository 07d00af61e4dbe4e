"""What ranks hand over and wait for, measured on this machine, and a table for H100s that is calculated from it.

    python3 benches/scaling.py MEASURED   # trains some steps on 1, 2 and 4 ranks with every method
    python3 benches/scaling.py CALCULATED # no machine needed

The formula and its assumptions are in benches/scaling.md.
"""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOST = ROOT / "target/release/jepa-host"

# Of a step of ResNet-50 at 224 px over ranks, as `MEASURED` prints: MB of gradients, waits for small messages.
STEPS = {
    "cnn_jepa": (144.7, 168),
    "byol": (105.6, 330),
    "simclr": (111.9, 223),
    "vicreg": (698.2, 237),
    "supervised": (94.3, 106),
}
# Seconds of a step of 128 images on one H100, in bf16: benches/README.md, *On a GPU*.
H100 = {"cnn_jepa": 27.7e-3, "byol": 65.2e-3, "simclr": 49.0e-3, "vicreg": 58.3e-3, "supervised": 24.6e-3}
IMAGES = 128  # on each GPU
NVLINK, NETWORK = 450e9, 50e9  # bytes/s of each GPU one way: NVLink 4 in a node of 8; one 400 Gb/s port for each GPU
SMALL_IN_NODE, SMALL_PER_HOP = 20e-6, 5e-6  # seconds of a small message in a node, and for each doubling of nodes
GLOO = 2 * 0.1e-3  # of a step: a signal that any rank has got, and what is measured, are agreed on over gloo
BACKWARD = 2 / 3  # of a step, during which gradients are on their way
FIRST_PART = 0.1  # of the backward pass, before the first gradients are ready


def measured(method, ranks, threads):
    arguments = [
        HOST, "bench", "step", "--plugin", method, "--same-batch", "--warmup", "3", "--steps", "8", "--format", "json",
        f"data.train={os.environ['PHOTOS']}", "data.size=224", "data.threads=1", "optimizer.batch_size=16",
        "backbone.name=resnet50", f"trainer.threads={threads}",
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **(place if ranks > 1 else {})}
        out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen(arguments, env=environment, stdout=out, stderr=subprocess.DEVNULL))
    report = json.loads(processes[0].communicate()[0])
    assert all(process.wait() == 0 for process in processes)
    parts = {part["part"]: part["median_s"] for part in report["parts"]}
    return report["step"]["median_s"], parts, report["traffic"]


def print_measured():
    print("| ResNet-50, 224 px, 16 images a step | ranks × threads | step | exchange | MB of gradients, parts | waits, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for method in STEPS:
        for ranks, threads in [(1, 2), (2, 1), (4, 1)]:
            step, parts, traffic = measured(method, ranks, threads)
            sent = ("", "")
            if traffic:
                gradients = traffic["bytes_of_gradients"] / 1e6
                sent = (f"{gradients:.1f}, {traffic['parts_of_gradients']:.0f}", f"{traffic['times']:.0f}, {traffic['bytes'] / 1e6:.2f}")
            exchange = f"{parts['exchange'] * 1e3:.0f} ms" if ranks > 1 else ""
            print(f"| `{method}` | {ranks} × {threads} | {step:.2f} s | {exchange} | {sent[0]} | {sent[1]} |", flush=True)


def step_on(method, gpus):
    """Seconds of a step, and of it those that a GPU waits for others."""
    megabytes, waits = STEPS[method]
    compute = H100[method]
    nodes = math.ceil(gpus / 8)
    speed = NVLINK if nodes == 1 else NETWORK
    gradients = 2 * (gpus - 1) / gpus * megabytes * 1e6 / speed
    small = 0 if gpus == 1 else GLOO + waits * (SMALL_IN_NODE + SMALL_PER_HOP * math.log2(nodes))
    hidden = compute * BACKWARD * (1 - FIRST_PART)
    waiting = small + max(0.0, gradients - hidden)
    return compute + waiting, waiting


def print_calculated():
    print("| GPUs | " + " | ".join(f"`{method}`" for method in STEPS) + " |")
    print("| --- |" + " --- |" * len(STEPS))
    for gpus in [1, 8, 16, 32, 64, 128, 256, 512]:
        cells = []
        for method in STEPS:
            alone, _ = step_on(method, 1)
            step, _ = step_on(method, gpus)
            cells.append(f"{gpus * IMAGES / step:,.0f} ({alone / step:.0%})")
        print(f"| {gpus} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    {"MEASURED": print_measured, "CALCULATED": print_calculated}[sys.argv[1]]()
