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
import csv
import io
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from peers import Network, Peer, Run
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from repvgg_cuda import ChainLayer, bench, create_model, digits, environment, picture, reparameterize, suites, timing

#: Channels and size of the layers suite, each as a stack of DEPTH equal layers, whose time is divided by DEPTH.
LAYERS = ((48, 56), (64, 56), (96, 28), (128, 28), (192, 14), (256, 14), (512, 14))
DEPTH = 4
MODELS = ("RepVGG-A0", "RepVGG-A2", "RepVGG-B1", "RepVGG-B1g4")

#: An output further off than this, relative to the largest value, is wrong. Far above any float32 algorithm's error:
#: it finds a peer that computes another network, while the error itself stands in the table.
WRONG = 1e-2

#: Of the intervals of the ratios.
RESAMPLES, LEVEL = 1000, 0.95

#: What the ratios should reach: suite, case ("" the geometric mean), batch, threads, peer, "reach", "beyond".
GOALS: tuple[tuple[str, str, int, int, str, float, float | None], ...] = (
    ("layers", "", 1, 1, "ncnn", 1.8, 2.1),
    ("layers", "", 1, 1, "MNN", 1.55, 1.8),
    ("layers", "", 1, 1, "eager", 3.5, 4.0),
    ("layers", "", 1, 2, "ncnn", 1.7, 2.0),
    ("layers", "", 8, 1, "ncnn", 1.7, 2.0),
    ("layers", "", 8, 1, "eager", 3.0, 3.5),
    ("models", "RepVGG-A0", 1, 1, "ncnn", 1.8, 2.2),
    ("models", "RepVGG-A0", 1, 1, "MNN", 1.5, 1.8),
    ("models", "RepVGG-A0", 1, 1, "ONNX Runtime", 2.0, 2.5),
    ("models", "RepVGG-A0", 1, 1, "OpenVINO", 2.0, 2.5),
    ("models", "RepVGG-A0", 1, 1, "eager", 2.6, 3.2),
    ("models", "RepVGG-A0", 1, 1, peers.THREE_BRANCHES, 4.0, 5.0),
    *(("models", "RepVGG-B1", 1, n, "ncnn", 1.7, 2.0) for n in (1, 2)),
    *(("models", "RepVGG-B1", 1, n, "OpenVINO", 2.0, None) for n in (1, 2)),
)


@dataclass(frozen=True)
class Row:
    """One candidate of one case. ``ratio`` is its time over ours, with the ends of its interval."""

    suite: str
    case: str
    batch: int
    threads: int
    candidate: str
    status: str
    note: str = ""
    error: float | None = None
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    rounds: int = 0
    clock: str = ""


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
    return Network(layers, head, trained), x


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
        for height, width in ((64, 64), (97, 131)):
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


def goal_rows(rows: Sequence[Row]) -> list[tuple[str, float, float, float | None]]:
    """Those of GOALS that were measured: text, ratio, "reach", "beyond"."""
    reached = []
    for suite, case, batch, threads, peer, reach, beyond in GOALS:
        ratios = [
            row.ratio
            for row in rows
            if (row.suite, row.batch, row.threads, row.candidate) == (suite, batch, threads, peer)
            and row.case == (case or row.case)
            and row.ratio is not None
        ]
        if not ratios or (not case and len(ratios) < len(LAYERS)):
            continue
        text = f"{case or 'layers, geometric mean'}, batch {batch}, {threads} threads, over {peer}"
        reached.append((text, statistics.geometric_mean(ratios), reach, beyond))
    return reached


# -------------------------------------------------------------------------------------------------------------- timing


def time_case(
    names: tuple[str, str], network: Network, x: Tensor, chosen: Sequence[Peer], args: argparse.Namespace, threads: int
) -> list[Row]:
    """Builds, checks and times the candidates of one case; ours is timed a second time to show the noise."""
    torch.set_num_threads(threads)
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
    return [add_time(row, timed, DEPTH if suite == "layers" else 1, clock) for row in rows.values()]


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


def as_table(rows: Sequence[Row]) -> Table:
    first = rows[0]
    table = Table(
        title=f"{first.suite}: {first.case}, batch {first.batch}, {first.threads} threads", title_justify="left"
    )
    for column in ("candidate", "median", "p10 .. p90", "time / ours", "interval", "error"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    for row in rows:
        error = "" if row.error is None else f"{row.error:.1e}"
        if row.median_us is None or row.p10_us is None or row.p90_us is None:
            table.add_row(row.candidate, row.status, row.note, "", "", error)
            continue
        spread = f"{bench.duration(row.p10_us)} .. {bench.duration(row.p90_us)}"
        ratio = ("", "") if row.ratio is None else (f"{row.ratio:.2f}x", f"{row.ratio_low:.2f} .. {row.ratio_high:.2f}")
        table.add_row(row.candidate, bench.duration(row.median_us), spread, *ratio, error)
    return table


def as_csv(rows: Sequence[Row], record: dict[str, Any]) -> str:
    """The environment in lines that begin with "#", then the rows."""
    text = io.StringIO()
    for key, value in record.items():
        text.write(f"# {key}: {json.dumps(value)}\n")
    writer = csv.DictWriter(text, fieldnames=list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def draw(rows: Sequence[Row], out: Path) -> None:
    """Per case a group of bars: how many times as long as ours each candidate takes."""
    picture.require_matplotlib()
    from matplotlib.figure import Figure

    compared = [row for row in rows if row.ratio is not None and row.candidate != peers.OURS]
    groups = list(dict.fromkeys((row.case, row.batch, row.threads) for row in compared))
    names = list(dict.fromkeys(row.candidate for row in compared))
    figure = Figure(figsize=(max(7.0, 1.5 * len(groups) + 2), 4.5), layout="constrained", dpi=130)
    panel = figure.subplots()
    for i, name in enumerate(names):
        chosen = [row for row in compared if row.candidate == name]
        places = [groups.index((row.case, row.batch, row.threads)) + 0.8 * i / len(names) for row in chosen]
        panel.bar(places, [row.ratio for row in chosen], width=0.8 / len(names), align="edge", label=name)
    panel.axhline(1, color="#111827", linewidth=0.8)
    labels = [f"{case}\nbatch {batch}, {threads} thr." for case, batch, threads in groups]
    panel.set_xticks([i + 0.4 for i in range(len(groups))], labels, fontsize=7)
    panel.set_ylabel("time / ours")
    panel.legend(fontsize=7, ncols=4)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(out)


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


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    args.rounds = 3 if args.quick else args.rounds
    if min(args.rounds, *args.threads, *args.batch) < 1:
        print("error: --rounds, --threads and --batch must be at least 1", file=sys.stderr)
        return 2
    chosen = [peer for peer in peers.PEERS if args.candidates is None or peer.name in args.candidates]
    console, rows, before = Console(), [], torch.get_num_threads()
    record = environment.collect(torch.device("cpu")) | {"threads": args.threads}
    if (warning := environment.load_warning(record)) is not None:
        console.print(warning)
    try:
        for threads in args.threads:
            for suite, batch in ((suite, batch) for suite in args.suite for batch in args.batch):
                prepared = cases(suite, batch, args.quick)
                for name, _, network, x in track(prepared, f"{suite}, {threads} threads", console=console):
                    case_rows = time_case((suite, name), network, x, chosen, args, threads)
                    console.print(as_table(case_rows))
                    rows += case_rows
    finally:
        torch.set_num_threads(before)
    if args.goals:
        for text, ratio, reach, beyond in goal_rows(rows):
            console.print(f"{text}: {ratio:.2f}x (reach {reach}, beyond {beyond or '-'})")
    args.out.mkdir(parents=True, exist_ok=True)
    bench.write_text_atomically(args.out / "bench_cpu.csv", as_csv(rows, record))
    report = {"environment": record, "rows": [asdict(row) for row in rows]}
    bench.write_text_atomically(args.out / "bench_cpu.json", json.dumps(report, indent=1) + "\n")
    draw(rows, args.out / "bench_cpu.png")
    console.print(f"wrote bench_cpu.csv, .json and .png to {args.out}")
    return 1 if any(row.status in ("wrong", "error") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
