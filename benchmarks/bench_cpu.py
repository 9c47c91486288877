# SPDX-License-Identifier: MIT
"""Chains of deployed layers on the CPU: this project beside PyTorch and other inference engines.

    python benchmarks/bench_cpu.py --suite layers models --threads 1 --batch 1 --out out/

`layers`: four equal layers C -> C in a row, the time of one; `models`: all convolutions of a RepVGG. Torch tensors (or
NumPy arrays) in and out: changes of layout are counted. All candidates take turns in one process, in random order in
each round; one thread is timed by its CPU time, several by the wall clock. "ours (again)" is the same thing timed
again: how far it is from 1 is the noise. Engines that are not installed are named: `pip install .[bench]`.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from peers import PEERS
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import repvgg_cuda
from repvgg_cuda import ChainLayer, environment

LAYERS = ((48, 56), (64, 56), (96, 28), (128, 28), (192, 14), (256, 14), (512, 14))
MODELS = ("RepVGG-A0", "RepVGG-A2", "RepVGG-B1", "RepVGG-B1g4")
WRONG = 1e-2  # relative error beyond which a candidate is wrong, not inexact


class Problem(NamedTuple):
    name: str
    layers: list[ChainLayer]
    x: Tensor
    divide: int  # the time is given for one of so many layers


def chain(geometry: list[tuple[int, int, int, int]]) -> list[ChainLayer]:
    """Random layers of ``(C_in, C_out, stride, groups)`` that keep the variance of their input."""
    layers = []
    for c_in, c_out, stride, groups in geometry:
        weight = torch.randn(c_out, c_in // groups, 3, 3) * (2 / (9 * c_in / groups)) ** 0.5
        layers.append(ChainLayer(weight, 0.1 * torch.randn(c_out), stride, groups, "relu", None))
    return layers


def prepared(layers: list[ChainLayer], x: Tensor, memory: str = "fast") -> list[ChainLayer]:
    size, result = list(x.shape), []
    for layer in layers:
        packed = repvgg_cuda.prepack(
            layer.weight,
            size,
            stride=layer.stride,
            groups=layer.groups,
            memory=memory,  # type: ignore[arg-type]
        )
        result.append(layer._replace(packed=packed))
        h, w = ((extent - 1) // layer.stride + 1 for extent in size[2:])
        size = [size[0], layer.weight.shape[0], h, w]
    return result


def problems(suites: list[str], batch: int) -> list[Problem]:
    found = []
    if "layers" in suites:
        for c, size in LAYERS:
            found.append(Problem(f"{c}@{size}", chain([(c, c, 1, 1)] * 4), torch.randn(batch, c, size, size), 4))
    if "models" in suites:
        for name in MODELS:
            blocks = repvgg_cuda.create_model(name, deploy=True).blocks()  # type: ignore[union-attr]
            convs = [block.rbr_reparam for block in blocks]
            layers = chain([(c.in_channels, c.out_channels, c.stride, c.groups) for c in convs])
            found.append(Problem(name, layers, torch.randn(batch, 3, 224, 224), 1))
    return found


def eager(layers: list[ChainLayer], x: Tensor) -> Tensor:
    for layer in layers:
        x = F.relu_(F.conv2d(x, layer.weight, layer.bias, layer.stride, 1, 1, layer.groups))
    return x


def three_branches(layers: list[ChainLayer], x: Tensor) -> Callable[[], Tensor]:
    """As trained: conv3x3 + BN, conv1x1 + BN, and BN where it fits. Other numbers, the same work."""
    blocks = []
    for layer in layers:
        k, c = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
        blocks.append(repvgg_cuda.RepVGGBlock(c, k, stride=layer.stride, groups=layer.groups))
    model = torch.nn.Sequential(*blocks).eval()
    return lambda: model(x)


def candidates(problem: Problem, threads: int, missing: dict[str, str]) -> dict[str, Callable[[], Any]]:
    layers, x = problem.layers, problem.x
    fast, low = prepared(layers, x), prepared(layers, x, "low")
    wide, x_wide = (
        [layer._replace(weight=layer.weight.contiguous(memory_format=torch.channels_last)) for layer in layers],
        x.contiguous(memory_format=torch.channels_last),
    )
    found: dict[str, Callable[[], Any]] = {
        "ours": lambda: repvgg_cuda.conv3x3_chain(x, fast),
        "ours (again)": lambda: repvgg_cuda.conv3x3_chain(x, fast),
        "ours, memory=low": lambda: repvgg_cuda.conv3x3_chain(x, low),
        "eager": lambda: eager(layers, x),
        "eager channels_last": lambda: eager(wide, x_wide),
        "eager three branches": three_branches(layers, x),
    }
    compiled = torch.compile(lambda x: eager(layers, x))
    found["torch.compile"] = lambda: compiled(x)
    for name, make in PEERS.items():
        if name == "ncnn" and any(layer.groups > 1 for layer in layers):
            continue
        try:
            found[name] = make(layers, x, threads)
        except ImportError as error:
            missing[name] = str(error)
    return found


def relative_error(value: Any, want: Tensor) -> float:
    got = value.double() if isinstance(value, Tensor) else torch.from_numpy(np.array(value)).double()
    return float((got.reshape(want.shape) - want).abs().max() / want.abs().max())


def bootstrap(ours: list[float], theirs: list[float], draws: int = 2000) -> tuple[float, float]:
    """A 90 % interval of the ratio of medians, theirs / ours."""
    generator = random.Random(0)
    ratios = sorted(
        statistics.median(generator.choices(theirs, k=len(theirs)))
        / statistics.median(generator.choices(ours, k=len(ours)))
        for _ in range(draws)
    )
    return ratios[draws // 20], ratios[-draws // 20]


def measure(runs: dict[str, Callable[[], Any]], rounds: int, threads: int) -> dict[str, list[float]]:
    clock = time.process_time if threads == 1 else time.perf_counter
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            runs[name]()  # warms the caches that the one before left cold
            if threads > 1:
                time.sleep(0.005)  # until the threads of the one before stop spinning
                runs[name]()
            start = clock()
            runs[name]()
            samples[name].append(clock() - start)
    return samples


def run(problem: Problem, threads: int, rounds: int, missing: dict[str, str]) -> list[dict[str, Any]]:
    runs = candidates(problem, threads, missing)
    want = eager(
        [
            layer._replace(weight=layer.weight.double(), bias=layer.bias.double())
            for layer in problem.layers
            if layer.bias is not None
        ],
        problem.x.double(),
    )
    errors = {name: relative_error(f(), want) for name, f in runs.items() if "three" not in name}
    wrong = [name for name, error in errors.items() if error > WRONG]
    samples = measure({name: f for name, f in runs.items() if name not in wrong}, rounds, threads)
    rows = []
    for name in runs:
        row: dict[str, Any] = {"problem": problem.name, "batch": problem.x.shape[0], "threads": threads}
        row |= {"candidate": name, "error": errors.get(name), "ms": None, "ratio": None}
        if name in samples:
            times = [1e3 * t / problem.divide for t in samples[name]]
            low, high = bootstrap(samples["ours"], samples[name])
            median = statistics.median(samples[name])
            p10, p90 = np.percentile(times, [10, 90])
            row |= {
                "ms": statistics.median(times),
                "p10": p10,
                "p90": p90,
                "ratio": median / statistics.median(samples["ours"]),
            }
            row |= {"ratio_low": low, "ratio_high": high}
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("problem", "candidate", "ms", "p10 - p90", "time / ours", "error")
    for row in rows:
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        if row["ms"] is None:
            table.add_row(row["problem"], row["candidate"], "WRONG", "", "", error)
            continue
        spread, interval = f"{row['p10']:.3f} - {row['p90']:.3f}", f"{row['ratio_low']:.2f} - {row['ratio_high']:.2f}"
        table.add_row(
            row["problem"], row["candidate"], f"{row['ms']:.3f}", spread, f"{row['ratio']:.2f} ({interval})", error
        )
    console.print(table)


def geomeans(rows: list[dict[str, Any]], console: Console) -> None:
    """Over the layers, per candidate, batch and threads."""
    groups: dict[tuple[str, int, int], list[float]] = {}
    for row in rows:
        if "@" in row["problem"] and row["ratio"]:
            groups.setdefault((row["candidate"], row["batch"], row["threads"]), []).append(row["ratio"])
    for (name, batch, threads), ratios in groups.items():
        mean = statistics.geometric_mean(ratios)
        console.print(
            f"layers, batch {batch}, {threads} thread(s): {name} takes {mean:.2f} times ours (least {min(ratios):.2f})"
        )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(f"{row['problem']}, batch {row['batch']}, {row['threads']} thr." for row in rows))
    others = [name for name in dict.fromkeys(row["candidate"] for row in rows) if not name.startswith("ours")]
    figure, axes = pyplot.subplots(figsize=(max(7.0, 1.6 * len(names)), 4.5))
    for i, other in enumerate(others):
        ratios = [
            next(
                (
                    r["ratio"] or 0
                    for r in rows
                    if r["candidate"] == other and f"{r['problem']}, batch {r['batch']}, {r['threads']} thr." == name
                ),
                0,
            )
            for name in names
        ]
        axes.bar(
            [j + 0.8 * i / len(others) for j in range(len(names))], ratios, 0.8 / len(others), label=other, align="edge"
        )
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks([j + 0.4 for j in range(len(names))], names, rotation=20, ha="right", fontsize=8)
    axes.set_ylabel("time / time of repvgg_cuda")
    axes.legend(fontsize=7, ncols=4)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", nargs="+", choices=["layers", "models"], default=["layers", "models"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", help="names of layers or models, e.g. 192@14 RepVGG-A0")
    parser.add_argument("--out", type=Path, help="folder for cpu.csv and cpu.png")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    console, missing, rows = Console(), dict[str, str](), list[dict[str, Any]]()
    for threads in options.threads:
        torch.set_num_threads(threads)
        for batch in options.batch:
            chosen = [p for p in problems(options.suite, batch) if not options.only or p.name in options.only]
            for problem in track(chosen, f"batch {batch}, {threads} thread(s)", console=console):
                rows += run(problem, threads, options.rounds, missing)
    show(rows, console)
    geomeans(rows, console)
    for name, why in missing.items():
        console.print(f"not measured: {name} is not installed ({why}); pip install '.[bench]'")
    console.print(f"{environment.cpu_name()}, torch {torch.__version__}, {_kernels()}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        fields = list(dict.fromkeys(key for row in rows for key in row))
        with (options.out / "cpu.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(rows)
        plot(rows, options.out / "cpu.png")


def _kernels() -> str:
    from repvgg_cuda import _ext

    return f"kernels: {_ext.module.cpu_target()}" if _ext.module else f"no compiled module: {_ext.why_missing}"


if __name__ == "__main__":
    sys.exit(main())
