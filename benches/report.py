"""Turns the files of one benchmark run into the tables of README.md: `report.py FOLDER --warmup STEPS`.

scripts/bench.sh leaves in FOLDER, for each case and round:

    CASE.ROUND.pytorch.json          printed by peer_step.py
    CASE.ROUND.channels_last.json    the same, in that memory format
    CASE.ROUND.ours.jsonl            metrics.jsonl of the run of jepa-host

A figure is the median over rounds of each round's median over steps.
"""

import argparse
import datetime
import json
import os
import statistics
from pathlib import Path

# What decides how fast a CPU computes convolutions.
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def arguments():
    parser = argparse.ArgumentParser(description="Prints the tables of a benchmark run.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--warmup", type=int, required=True, help="steps that are left out at the beginning of a run")
    parser.add_argument("--command", required=True, help="what was run, to be quoted")
    parser.add_argument("--version", required=True, help="which jepa-host that was")
    return parser.parse_args()


def cpu():
    info = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    features = [name for name in CPU_FEATURES if name in info.get("flags", "").split()]
    return f"{info.get('model name', 'unknown CPU')} ({', '.join(features)}), {os.cpu_count()} cores"


def read_peer(path, warmup):
    run = json.loads(path.read_text())
    return run | {"step_s": statistics.median(run["step_s"][warmup:])}


def read_ours(path, warmup, batch):
    """Step time, share of the time spent waiting for data, and share of visible cells."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [record for record in records if record["step"] > warmup and "train/images_per_s" in record]

    def median(key):
        return statistics.median(record[key] for record in steps)

    return {
        "step_s": batch / median("train/images_per_s"),
        "data_wait": median("train/data_wait"),
        "context_share": median("train/cnn_jepa/context_share"),
    }


def title(case):
    """What the arguments of peer_step.py say that the case is."""
    small = "" if case["stem"] == "imagenet" else f", small stem, width {case['width']}, depths {case['depths']}"
    name = case["backbone"].replace("resnet", "ResNet-")
    return f"{name}{small}, {case['size']} px, batch {case['batch']}, {case['precision']}"


def ratio(ours, peer):
    """Ours over the peer's, with the smallest and the greatest of the rounds."""
    rounds = [a / b for a, b in zip(ours, peer, strict=True)]
    median = statistics.median(ours) / statistics.median(peer)
    return f"**{median:.2f}** ({min(rounds):.2f}–{max(rounds):.2f})"


def step_row(folder, case, rounds, warmup):
    peers = {
        name: [read_peer(folder / f"{case}.{i}.{name}.json", warmup) for i in rounds]
        for name in ("pytorch", "channels_last")
    }
    example = peers["pytorch"][0]
    ours = [read_ours(folder / f"{case}.{i}.ours.jsonl", warmup, example["arguments"]["batch"]) for i in rounds]
    shares = [run["context_share"] for run in [example, *ours]]
    if max(shares) - min(shares) > 1e-3:
        raise SystemExit(f"bench: {case}: the two sides see different shares of the image: {shares}")

    def seconds(runs):
        return [run["step_s"] for run in runs]

    cells = [title(example["arguments"])]
    cells += [f"{statistics.median(seconds(runs)):.3f} s" for runs in (*peers.values(), ours)]
    cells += [ratio(seconds(ours), seconds(runs)) for runs in peers.values()]
    cells.append(f"{statistics.median(run['data_wait'] for run in ours):.1%}")
    return cells


def print_table(header, rows):
    for cells in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(cells)} |")
    print()


def main():
    args = arguments()
    files = sorted(args.folder.glob("*.pytorch.json"), key=lambda path: path.stat().st_mtime)
    rounds = {}
    for path in files:
        case, number, *_ = path.name.split(".")
        rounds.setdefault(case, []).append(int(number))
    versions = json.loads(files[0].read_text())
    packages = [f"{name} {versions[name]}" for name in ("torch", "timm")]
    print(f"{datetime.date.today()} · {cpu()} · jepa-host {args.version} · {', '.join(packages)}\n")
    print(f"    {args.command}\n")

    header = ["training step", "PyTorch", "channels-last PyTorch", "jepa-host"]
    header += ["jepa-host / PyTorch", "jepa-host / channels-last", "of which waiting for data"]
    print_table(header, [step_row(args.folder, case, rounds[case], args.warmup) for case in rounds])


if __name__ == "__main__":
    main()
