# SPDX-License-Identifier: MIT
"""Deployed RepVGG layers and networks on a CPU: ours against PyTorch, ONNX Runtime, OpenVINO, ncnn and MNN.

    pip install .[bench]                                      # the peers; without them ours and PyTorch are compared
    python benchmarks/bench_cpu.py --suite layers models --threads 1 --batch 1 --out results
    python benchmarks/bench_cpu.py --suite layers --candidates ours ncnn MNN --rounds 20

All candidates of a case run in one process, once per round in random order. Time is CPU time for one thread, wall for
several; before it the output is compared with float64, and a wrong one gets no time. Libraries whose threads spin
disturb the next one, so with several threads a pause (--pause) and an untimed call come before each sample.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
from cpu_report import Row, as_table, write
from peers import Network, Peer, Run
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from repvgg_cuda import ChainLayer, bench, create_model, digits, environment, picture, reparameterize, suites, timing

#: Channels and size of the layers suite, each as a stack of DEPTH equal layers, whose time is divided by DEPTH.
LAYERS = ((48, 56), (64, 56), (96, 28), (128, 28), (192, 14), (256, 14), (512, 14))
DEPTH = 4
#: Heights and widths of the small suite, which has the digits network too.
SMALL = ((64, 64), (97, 131))
MODELS = ("RepVGG-A0", "RepVGG-A2", "RepVGG-B1", "RepVGG-B1g4")

#: An output further off than this, relative to the largest value, is wrong. Far above any float32 algorithm's error:
#: it finds a peer that computes another network, while the error itself stands in the table.
WRONG = 1e-2

#: Of the intervals of the ratios.
RESAMPLES, LEVEL = 1000, 0.95

GEOMEAN, SLOWEST = "geometric mean", "slowest"


class Goal(NamedTuple):
    """What the ratio over ``peer`` should reach. ``case`` names one, or how those of the whole suite are combined."""

    suite: str
    case: str
    batch: int
    threads: int
    peer: str
    reach: float
    beyond: float | None = None


GOALS = (
    Goal("layers", GEOMEAN, 1, 1, "ncnn", 1.8, 2.1),
    Goal("layers", GEOMEAN, 1, 1, "MNN", 1.55, 1.8),
    Goal("layers", GEOMEAN, 1, 1, "eager", 3.5, 4.0),
    Goal("layers", SLOWEST, 1, 1, "ncnn", 1.3),
    Goal("layers", GEOMEAN, 1, 2, "ncnn", 1.7, 2.0),
    Goal("layers", GEOMEAN, 8, 1, "ncnn", 1.7, 2.0),
    Goal("layers", GEOMEAN, 8, 1, "eager", 3.0, 3.5),
    Goal("models", "RepVGG-A0", 1, 1, "ncnn", 1.8, 2.2),
    Goal("models", "RepVGG-A0", 1, 1, "MNN", 1.5, 1.8),
    Goal("models", "RepVGG-A0", 1, 1, "ONNX Runtime", 2.0, 2.5),
    Goal("models", "RepVGG-A0", 1, 1, "OpenVINO", 2.0, 2.5),
    Goal("models", "RepVGG-A0", 1, 1, "eager", 2.6, 3.2),
    Goal("models", "RepVGG-A0", 1, 1, peers.THREE_BRANCHES, 4.0, 5.0),
    *(Goal("models", "RepVGG-B1", 1, n, "ncnn", 1.7, 2.0) for n in (1, 2)),
    *(Goal("models", "RepVGG-B1", 1, n, "OpenVINO", 2.0) for n in (1, 2)),
    *(Goal("small", SLOWEST, 1, n, "eager", 1.0) for n in (1, 2)),
)


class CpuClock:
    """CPU time of the whole process: what other programs do on the machine does not count."""

    resolution = 1000.0

    def time(self, run: Run, calls: int) -> float:
        start = time.process_time_ns()
        for _ in range(calls):
            run()
        return float(time.process_time_ns() - start)


# -------------------------------------------------------------------------------------------------------------- cases


def stack(channels: int, size: int, batch: int, depth: int = DEPTH) -> tuple[Network, Tensor]:
    """``depth`` equal layers with He's weights, so that activations keep their size."""
    generator = torch.Generator().manual_seed(channels)
    layers = []
    for _ in range(depth):
        weight = torch.randn(channels, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
        layers.append(ChainLayer(weight, torch.randn(channels, generator=generator) * 0.1, activation="relu"))
    return Network(layers), torch.randn(batch, channels, size, size, generator=generator)


def whole(trained: Any, x: Tensor) -> tuple[Network, Tensor]:
    """A trained RepVGG as its deployed layers and its classifier."""
    deployed: Any = reparameterize(trained).model
    layers = []
    for block in deployed.blocks():
        conv = block.rbr_reparam
        weight, bias = conv.weight.detach(), conv.bias.detach()
        layers.append(ChainLayer(weight, bias, conv.stride, conv.groups, conv.activation))
    head = (deployed.linear.weight.detach(), deployed.linear.bias.detach())
    return Network(layers, head, trained, deployed), x


def model(name: str, batch: int, height: int = 224, width: int = 224) -> tuple[Network, Tensor]:
    x = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))
    return whole(suites.randomise_(create_model(name)).eval(), x)


def cases(suite: str, batch: int, quick: bool) -> Iterator[tuple[str, int, Network, Tensor]]:
    """Name, calls by which the time is divided, network and input."""
    if suite == "layers":
        for channels, size in ((16, 8),) if quick else LAYERS:
            yield f"{channels}@{size}", DEPTH, *stack(channels, size, batch)
    elif suite == "models":
        for name in MODELS[:1] if quick else MODELS:
            yield name, 1, *model(name, batch)
    else:
        for height, width in SMALL:
            yield f"RepVGG-A0 {height}x{width}", 1, *model("RepVGG-A0", batch, height, width)
        scans = digits.preprocess(digits.load_digits()[1].scans[:batch])
        yield "digits", 1, *whole(digits.load_trained(), scans)


# --------------------------------------------------------------------------------------------------------- statistics


def ratio_interval(ours: Sequence[float], other: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The ratio of medians ``other / ours`` and its bootstrap interval; rounds are resampled as pairs."""
    rng, rounds = random.Random(seed), len(ours)
    ratios = []
    for _ in range(RESAMPLES):
        drawn = rng.choices(range(rounds), k=rounds)
        ratios.append(statistics.median(other[i] for i in drawn) / statistics.median(ours[i] for i in drawn))
    tail = 100 * (1 - LEVEL) / 2
    low, high = (timing.percentile(tuple(ratios), percent) for percent in (tail, 100 - tail))
    return statistics.median(other) / statistics.median(ours), low, high


def relative_error(output: Tensor, want: Tensor) -> float:
    """The largest difference relative to the largest value; infinite where the shape differs or NaN turns up."""
    if output.numel() != want.numel():
        return math.inf
    error = float((output.reshape(want.shape).double() - want).abs().max() / want.abs().max())
    return error if math.isfinite(error) else math.inf


def goal_ratio(rows: Sequence[Row], goal: Goal) -> float | None:
    """The ratio that ``goal`` is about; None unless every case it speaks of was measured."""
    suite = {"layers": len(LAYERS), "models": len(MODELS), "small": len(SMALL) + 1}[goal.suite]
    ratios = [
        row.ratio
        for row in rows
        if (row.suite, row.batch, row.threads, row.candidate) == (goal.suite, goal.batch, goal.threads, goal.peer)
        and (goal.case in (GEOMEAN, SLOWEST) or row.case == goal.case)
        and row.ratio is not None
    ]
    if len(ratios) != (suite if goal.case in (GEOMEAN, SLOWEST) else 1):
        return None
    return statistics.geometric_mean(ratios) if goal.case == GEOMEAN else min(ratios)


# -------------------------------------------------------------------------------------------------------------- timing


def time_case(
    names: tuple[str, str],
    divisor: int,
    network: Network,
    x: Tensor,
    chosen: Sequence[Peer],
    args: argparse.Namespace,
    threads: int,
) -> list[Row]:
    """Builds, checks and times the candidates of one case; ours is timed a second time to show the noise.

    Times are divided by ``divisor``, the number of layers where one layer's time is wanted.
    """
    torch.set_num_threads(threads)
    # Here and not in a builder: it would throw away what another candidate has compiled, to be made again while timed.
    torch.compiler.reset()
    suite, case = names
    common: tuple[str, str, int, int] = (suite, case, x.shape[0], threads)
    # In float64 a batch takes long: its first and last image show a wrong result as well.
    picked = sorted({0, x.shape[0] - 1})
    with torch.inference_mode():
        want = network.reference(x[picked])
    runs: dict[str, Run] = {}
    rows: dict[str, Row] = {}
    for peer in chosen:
        if peer.build is peers.three_branches and network.trained is None:
            continue
        row, run = try_peer(common, peer, network, x, threads, picked, want)
        rows[peer.name] = row
        if run is not None:
            runs[peer.name] = run
    if peers.OURS in runs:
        again = peers.OURS + timing.AGAIN
        runs[again] = runs[peers.OURS]
        rows[again] = Row(*common, again, "ok", error=rows[peers.OURS].error)
    clock: timing.Clock = CpuClock() if threads == 1 else timing.WallClock()
    pause = args.pause if threads > 1 else 0.0

    def settle(run: Run) -> timing.Context:
        @contextlib.contextmanager
        def around() -> Iterator[None]:
            if pause:
                time.sleep(pause)
                run()
            yield

        return around

    timed = timing.measure(
        runs, clock, rounds=args.rounds, contexts={name: settle(run) for name, run in runs.items()}, seed=args.seed
    )
    return [add_time(row, timed, divisor, clock) for row in rows.values()]


def try_peer(
    common: tuple[str, str, int, int],
    peer: Peer,
    network: Network,
    x: Tensor,
    threads: int,
    picked: Sequence[int],
    want: Tensor,
) -> tuple[Row, Run | None]:
    """The row without its time, and what to time if the output is right."""
    if (how := peer.missing()) is not None:
        return Row(*common, peer.name, "missing", how), None
    try:
        with torch.inference_mode():
            run = peer.build(network, x, threads)
            output = peers.as_tensor(run())
    except Exception as error:  # whatever an engine raises is its row's note
        return Row(*common, peer.name, "error", str(error).strip().partition("\n")[0][:200]), None
    got = output.reshape(x.shape[0], -1)[list(picked)] if output.numel() % x.shape[0] == 0 else output
    error_size = relative_error(got, want)
    if error_size > WRONG:
        return Row(*common, peer.name, "wrong", f"relative error {error_size:.2g}", error=error_size), None
    return Row(*common, peer.name, "ok", error=error_size), run


def add_time(row: Row, timed: dict[str, timing.Timing], divisor: int, clock: timing.Clock) -> Row:
    if row.status != "ok":
        return row
    taken = timed[row.candidate]
    fields = asdict(row) | {
        "median_us": taken.median / divisor / 1e3,
        "p10_us": taken.p10 / divisor / 1e3,
        "p90_us": taken.p90 / divisor / 1e3,
        "rounds": len(taken.samples),
        "clock": "cpu" if isinstance(clock, CpuClock) else "wall",
    }
    if (own := timed.get(peers.OURS)) is not None:
        ratio, low, high = ratio_interval(own.samples, taken.samples)
        fields |= {"ratio": ratio, "ratio_low": low, "ratio_high": high}
    return Row(**fields)


# -------------------------------------------------------------------------------------------------------------- output


def as_goal_table(rows: Sequence[Row]) -> Table:
    table = Table(title="goals: time / ours", title_justify="left")
    for column in ("suite", "case", "batch", "threads", "over", "measured", "reach", "beyond"):
        table.add_column(column, justify="left" if column in ("suite", "case", "over") else "right")
    for goal in GOALS:
        ratio = goal_ratio(rows, goal)
        measured = "not measured" if ratio is None else f"{ratio:.2f}x{'' if ratio >= goal.reach else ' (short)'}"
        limits = f"{goal.reach}x", "" if goal.beyond is None else f"{goal.beyond}x"
        table.add_row(goal.suite, goal.case, str(goal.batch), str(goal.threads), goal.peer, measured, *limits)
    return table


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--suite", nargs="+", choices=["layers", "models", "small"], default=["layers", "models"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--candidates", nargs="+", choices=[p.name for p in peers.PEERS], metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="one tiny layer, one network, three rounds")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds before a sample, with several threads")
    parser.add_argument("--goals", action="store_true", help="compare with the project's goals")
    parser.add_argument("--seed", type=int, default=0, help="of the order within the rounds")
    parser.add_argument("--out", type=Path, default=Path("bench_cpu"), metavar="DIR")
    return parser


def refuse(args: argparse.Namespace) -> str | None:
    """What would fail after the timing, found before it."""
    if min(args.rounds, *args.threads, *args.batch) < 1:
        return f"--rounds, --threads and --batch must be at least 1, got {args.rounds}, {args.threads}, {args.batch}"
    if args.pause < 0:
        return f"--pause must not be negative, got {args.pause}"
    try:
        picture.require_matplotlib()
        args.out.mkdir(parents=True, exist_ok=True)
        bench.require_writable(args.out / "bench_cpu.csv")
    except FileExistsError:
        return f"--out must be a directory, and {args.out} is a file; name another"
    except (OSError, RuntimeError) as problem:
        return str(problem)
    return None


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    args.rounds = 3 if args.quick else args.rounds
    if (problem := refuse(args)) is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    chosen = [peer for peer in peers.PEERS if args.candidates is None or peer.name in args.candidates]
    console, before = Console(), torch.get_num_threads()
    rows: list[Row] = []
    record = environment.collect(torch.device("cpu")) | {"threads": args.threads}
    if (warning := environment.load_warning(record)) is not None:
        console.print(f"warning: {warning}", style="yellow")
    try:
        for threads in args.threads:
            for suite, batch in ((suite, batch) for suite in args.suite for batch in args.batch):
                prepared = cases(suite, batch, args.quick)
                for name, divisor, network, x in track(prepared, f"{suite}, {threads} threads", console=console):
                    case_rows = time_case((suite, name), divisor, network, x, chosen, args, threads)
                    console.print(as_table(case_rows))
                    rows += case_rows
                    write(rows, record, args.out)
    finally:
        torch.set_num_threads(before)
    if args.goals:
        console.print(as_goal_table(rows))
    console.print(f"wrote bench_cpu.csv, .json and .png to {args.out}")
    return 1 if any(row.status in ("wrong", "error") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
