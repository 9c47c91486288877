# SPDX-License-Identifier: MIT
"""``repvgg_cuda.benchmark``: one model or layer against what one would take instead; the result shows itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from repvgg_cuda import charts, checks, networks, page, runner, suites, tables
from repvgg_cuda.baselines import baselines, convolutions
from repvgg_cuda.branches import require, shape_name
from repvgg_cuda.comparison import Candidate, Row
from repvgg_cuda.convert import reparameterize
from repvgg_cuda.records import Run
from repvgg_cuda.suites import Built, Case, Setup

#: What ``against`` holds besides keys: anything that takes the input and returns the output.
Rival = Callable[[Tensor], Any]


@dataclass(frozen=True)
class BenchmarkResult:
    """What :func:`benchmark` found. Prints as a table; in a notebook it draws itself.

    ``run`` is the whole record: ``result.run.write(path)`` keeps it, for ``repvgg-cuda bench compare`` and ``plot``.
    """

    run: Run

    @property
    def rows(self) -> tuple[Row, ...]:
        """One per way to compute the output; speed-ups are over the first. Then those with cold caches."""
        return tuple(self.run.rows)

    def __getitem__(self, candidate: str) -> Row:
        """The row of that name, with warm caches. Raises KeyError, with the names there are."""
        for row in self.rows:
            if row.candidate == candidate:
                return row
        raise KeyError(f"no row {candidate!r}; there are {', '.join(row.candidate for row in self.rows)}")

    @property
    def fastest(self) -> Row:
        """The right row with the least median. Raises RuntimeError if none has a time."""
        timed = [row for row in self.rows if row.median_us is not None]
        require(len(timed) > 0, f"benchmark: no row has a time: {self.rows[0].status}, {self.rows[0].note}")
        return min(timed, key=lambda row: row.median_us or 0.0)

    def __str__(self) -> str:
        console = Console(width=tables.WIDTH, no_color=True, highlight=False)
        with console.capture() as captured:
            for text in self.run.warnings:
                console.print(f"warning: {text}", markup=False)
            for rows in self.run.by_case().values():
                console.print(tables.table(rows))
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def _repr_html_(self) -> str:
        parts = [f"<p>{escape(text)}</p>" for text in self.run.warnings]
        for rows in self.run.by_case().values():
            if rows[0].caches == "cold":
                parts.append("<p>With cold caches:</p>")
            if charts.drawable([rows]):
                figures = page.versions(partial(charts.speedups, [rows]))
                parts.append(page.image(figures, page.speedup_text([rows])))
            parts.append(page.rows_table(rows))
        return f"<div>{''.join(parts)}</div>"

    def _repr_png_(self) -> bytes | None:
        warm = next(iter(self.run.by_case().values()))
        if not charts.drawable([warm]):
            return None
        return charts.render(charts.speedups([warm], charts.LIGHT), "png", charts.LIGHT)


def benchmark(
    model_or_layer: nn.Module,
    inputs: Tensor,
    against: Sequence[str | Rival] | Mapping[str, Rival] | None = None,
    *,
    rounds: int = 40,
    threads: int | None = None,
    cold: bool = False,
    seed: int = 0,
    verbose: bool = False,
) -> BenchmarkResult:
    """Times a model or layer before and after fusion, against what one would take instead, side by side.

    Every output is compared with float64 before anything is timed. All candidates run in one process, once per round in
    random order; speed-ups are medians of ratios within a round, with intervals (:mod:`repvgg_cuda.intervals`).

    Args:
        model_or_layer: in eval mode: a network or a block with branches, which is folded (a copy); or one that is
            deployed already. What it returns must be one tensor.
        inputs: ``[N, C, H, W]``, of the model's dtype and on its device.
        against: keys of baselines, such as ``"eager"``, ``"compile"``, ``"onnxruntime"`` (``repvgg-cuda bench --help``
            lists them); and callables that take ``inputs`` and return the same output, a mapping gives them names.
            None: those that are there at once. The unfused form and eager PyTorch are always among the rows.
        rounds: samples per row; below 8 there are no intervals.
        threads: CPU threads (default: as torch has).
        cold: time with cold caches too.
        verbose: show progress and tables while it runs.
    Raises:
        RuntimeError: the model is in training mode, holds nothing that can be folded, or an argument does not fit; the
            message says which.
    """
    require(isinstance(model_or_layer, nn.Module), f"benchmark: expected a module, got {type(model_or_layer).__name__}")
    require(not model_or_layer.training, "benchmark: the model is in training mode; call .eval() first")
    require(
        isinstance(inputs, Tensor) and inputs.dim() == 4,
        f"benchmark: inputs must be a tensor [N, C, H, W], got "
        f"{shape_name(inputs) if isinstance(inputs, Tensor) else type(inputs).__name__}",
    )
    require(rounds >= 1, f"benchmark: rounds must be at least 1, got {rounds}")
    require(threads is None or threads >= 1, f"benchmark: threads must be at least 1, got {threads}")
    keys, rivals = _split(against)
    setup = Setup(inputs.device, inputs.dtype, against=keys)
    known = [baseline.key for baseline in baselines(setup.target)]
    for key in keys or ():
        require(key in known, f"benchmark: against must be among {', '.join(dict.fromkeys(known))}, got {key!r}")
    trained, deployed = _forms(model_or_layer)
    name = type(model_or_layer).__name__
    case = Case(
        f"{name}-{'x'.join(map(str, inputs.shape))}", partial(_build, setup, trained, deployed, inputs, rivals),
        inputs.shape[0], name,
    )  # fmt: skip
    settings = runner.Settings(rounds, seed, cold=cold)
    console = Console(quiet=not verbose)
    options = {
        "suites": ["benchmark"],
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "rounds": rounds,
        "seed": seed,
    }
    with runner.torch_settings(threads, bool(torch.backends.cudnn.allow_tf32)):
        run = runner.start(setup, settings, options, console)
        runner.measure(run, [("benchmark", case)], setup, settings, console)
    return BenchmarkResult(run)


def _split(
    against: Sequence[str | Rival] | Mapping[str, Rival] | None,
) -> tuple[tuple[str, ...] | None, dict[str, Rival]]:
    """Keys of baselines, and named callables."""
    if against is None:
        return None, {}
    if isinstance(against, Mapping):
        return (), dict(against)
    require(not isinstance(against, str), f"benchmark: against must be a list, got the string {against!r}")
    keys = tuple(each for each in against if isinstance(each, str))
    rivals: dict[str, Rival] = {}
    for each in against:
        if isinstance(each, str):
            continue
        require(callable(each), f"benchmark: against must hold names and callables, got {type(each).__name__}")
        name = getattr(each, "__name__", type(each).__name__)
        while name in rivals:
            name += "'"
        rivals[name] = each
    return keys, rivals


def _forms(model: nn.Module) -> tuple[nn.Module | None, nn.Module]:
    """The form before fusion, None if ``model`` is deployed already, and the deployed one."""
    if convolutions(model):
        return None, model
    deployed, report = reparameterize(model)
    require(len(convolutions(deployed)) > 0, f"benchmark: nothing in the model can be folded: {report.summary()}")
    return model, deployed


def _build(
    setup: Setup, trained: nn.Module | None, deployed: nn.Module, x: Tensor, rivals: Mapping[str, Rival]
) -> Built:
    with torch.inference_mode():
        output = deployed(x)
    require(isinstance(output, Tensor), f"benchmark: the model must return one tensor, got {type(output).__name__}")
    work = networks.workload(trained, deployed, x, setup.target)
    truth = checks.network_truth(deployed if trained is None else trained, deployed, x, tf32=setup.tf32)
    candidates = list(suites.network_rows(setup, work, truth))
    taken = {candidate.name for candidate in candidates}
    for name, rival in rivals.items():
        require(name not in taken, f"benchmark: against must not use the name of a row, got {name!r}")
        candidates.append(_rival(name, rival, x, truth))
    return Built(candidates, networks.work_of(deployed, x))


def _rival(name: str, rival: Rival, x: Tensor, truth: checks.Truth) -> Candidate:
    """A callable of the user's: held to being the same computation, its error beside its time."""
    return Candidate(name, lambda: rival(x), truth.check_foreign, error=truth.error, remark=truth.remark_foreign)
