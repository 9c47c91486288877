# SPDX-License-Identifier: MIT
"""What a conversion did, block by block: as an object, as a table, as JSON."""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Status = Literal["fused", "deployed", "left"]
Kind = Literal["sum", "chain", "deployed"]


@dataclass(frozen=True)
class Entry:
    """One block: ``status`` is "fused", "deployed" (it was before) or "left", and then ``reason`` says why.

    ``path``: of the module that holds the block, or of the convolution of a chain. ``family``: the class of that
    module.
    ``kind``: "sum" of branches, or "chain" of a convolution and BatchNorms. ``conv``: the path of the one convolution.
    ``parameters_*``: of the block's layers alone. ``weights_before``: of its convolutions alone. ``flops_*``:
    multiplications and additions of its convolutions on the example input; None without one. ``range_growth``: the
    largest folded weight in units of the largest trained one; wide ranges are what makes int8 quantisation after fusion
    fail. ``denormals``: folded weights that are denormal numbers, which some CPUs multiply slowly. ``error``,
    ``bound``: from verification, of the element that uses most of its bound.
    """

    path: str
    family: str
    branches: str
    status: Status
    reason: str = ""
    kind: Kind = "sum"
    conv: str = ""
    parameters_before: int = 0
    parameters_after: int = 0
    weights_before: int = 0
    flops_before: int | None = None
    flops_after: int | None = None
    range_growth: float | None = None
    denormals: int = 0
    error: float | None = None
    bound: float | None = None

    @property
    def name(self) -> str:
        """The path, or words for the root."""
        return self.path or "(the model itself)"


@dataclass(frozen=True)
class Report:
    """What a conversion did. ``str()`` is a table, :meth:`render` one for ``rich``, :meth:`to_json` for programs.

    ``entries``: one per block, in the order of execution. ``dropped``: training-only parts that were removed.
    ``notes``: what could not be looked into, with the reason. ``parameters_before`` and ``parameters_after`` count the
    whole model. ``denormals_flushed``: whether denormal weights were set to zero. ``preparation``, ``verification``:
    the summaries of those steps, where they were taken.
    """

    entries: tuple[Entry, ...]
    dropped: tuple[str, ...]
    parameters_before: int
    parameters_after: int
    notes: tuple[str, ...] = ()
    denormals_flushed: bool = False
    preparation: str = ""
    verification: str = ""

    def _with(self, status: Status) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.status == status)

    @property
    def fused(self) -> tuple[Entry, ...]:
        """The blocks that were folded."""
        return self._with("fused")

    @property
    def left(self) -> tuple[Entry, ...]:
        """The blocks that were not folded, with the reason."""
        return self._with("left")

    @property
    def deployed(self) -> tuple[Entry, ...]:
        """The blocks that were in deploy form before."""
        return self._with("deployed")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self, *, indent: int | None = 1) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def summary(self) -> str:
        """One line: counts and parameters."""
        if not self.entries:
            return "found nothing to fold: no sum of affine branches of one tensor, no convolution with a BatchNorm"
        sums = [entry for entry in self.entries if entry.kind == "sum"]
        chains = [entry for entry in self.entries if entry.kind == "chain"]
        counts = []
        for entries, what in ((sums, "blocks"), (chains, "conv-BatchNorm chains")):
            if entries:
                counts.append(f"fused {sum(entry.status == 'fused' for entry in entries)} of {len(entries)} {what}")
        counts += [f"{len(self.deployed)} in deploy form already"] if self.deployed else []
        counts += [f"left {len(self.left)}"] if self.left else []
        return f"{', '.join(counts)}; {self.parameters_before:,} -> {self.parameters_after:,} parameters"

    def problems(self) -> str:
        """The blocks that were left, each with its reason."""
        return "; ".join(f"{entry.name}: {entry.reason}" for entry in self.left)

    def _remarks(self) -> list[str]:
        lines = [self.summary()]
        lines += [f"dropped {', '.join(self.dropped)}"] if self.dropped else []
        lines += [f"note: {note}" for note in self.notes]
        denormals = sum(entry.denormals for entry in self.entries)
        if denormals:
            done = "set to zero" if self.denormals_flushed else "kept; flush_denormals=True sets them to zero"
            lines.append(f"{denormals:,} folded weights are denormal numbers, {done}")
        return lines + [each for each in (self.preparation, self.verification) if each]

    def render(self) -> Table:
        """The table for a ``rich.console.Console``, what was left in yellow."""
        caption = Text("\n".join(self._remarks()))  # not markup: a reason may hold brackets
        table = Table(caption=caption, box=None, pad_edge=False)
        table.caption_justify = "left"
        has_flops = any(entry.flops_before is not None for entry in self.entries)
        titles = ["block", "class", "branches", "parameters", *(["FLOPs"] if has_flops else []), "range", "error", ""]
        for title in titles:
            right = title in ("parameters", "FLOPs", "range", "error")
            table.add_column(title, justify="right" if right else "left", no_wrap=right or title == "block")
        for entry in self.entries:
            cells = _cells(entry)
            if not has_flops:
                del cells[4]
            table.add_row(*(Text(cell) for cell in cells), style="yellow" if entry.status == "left" else None)
        return table

    def __str__(self) -> str:
        if not self.entries:
            return "\n".join(self._remarks())
        table = self.render()
        table.caption = None
        console = Console(file=io.StringIO(), width=10_000, color_system=None)
        console.print(table)
        assert isinstance(console.file, io.StringIO)
        lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
        return "\n".join([*lines, *self._remarks()])


def _cells(entry: Entry) -> list[str]:
    fused = entry.status == "fused"

    def change(before: int | None, after: int | None) -> str:
        if before is None:
            return "-"
        return f"{_short(before)} -> {_short(after)}" if fused and after is not None else _short(before)

    notes = {"fused": "fused", "deployed": "in deploy form already", "left": f"left: {entry.reason}"}
    return [
        entry.name,
        entry.family,
        entry.branches,
        change(entry.parameters_before, entry.parameters_after),
        change(entry.flops_before, entry.flops_after),
        "-" if entry.range_growth is None else f"x{entry.range_growth:.3g}",
        "-" if entry.error is None else f"{entry.error:.1e} of {entry.bound:.1e}",
        notes[entry.status],
    ]


def _short(count: int) -> str:
    for factor, letter in ((10**9, "G"), (10**6, "M")):
        if count >= 10 * factor:
            return f"{count / factor:,.1f}{letter}"
    return f"{count:,}"
