# SPDX-License-Identifier: MIT
"""Which algorithm a layer runs on and why not the others: the rows of the table as data and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from repvgg_cuda import _ext
from repvgg_cuda.branches import dtype_name, require
from repvgg_cuda.packed import MEMORY


@dataclass(frozen=True)
class Candidate:
    """One algorithm for one layer.

    ``refusal`` says why it cannot run the layer, else None. ``seconds`` is the predicted time, on a CPU that of one
    thread: infinite where ``"auto"`` never takes the algorithm, None where it is refused or nothing is predicted.
    ``packed_bytes``: of its packed weights, 0 where it reads weights as they are. ``chosen``: ``"auto"`` takes it.
    """

    name: str
    refusal: str | None
    seconds: float | None
    packed_bytes: int
    chosen: bool


@dataclass(frozen=True)
class Explanation:
    """The result of :func:`repvgg_cuda.explain`. ``str()`` is a table; ``explanation["direct"]`` is one candidate.

    ``candidates`` are in the order of :func:`repvgg_cuda.algorithms`.
    """

    layer: str
    candidates: tuple[Candidate, ...]
    weight_bytes: int
    prepared: bool
    memory: str

    @property
    def chosen(self) -> Candidate:
        """The one that ``"auto"`` takes."""
        return next(candidate for candidate in self.candidates if candidate.chosen)

    def __getitem__(self, name: str) -> Candidate:
        found = next((candidate for candidate in self.candidates if candidate.name == name), None)
        if found is None:
            raise KeyError(
                f"there is no algorithm '{name}' here; there are {', '.join(c.name for c in self.candidates)}"
            )
        return found

    def __str__(self) -> str:
        packing = "with prepared weights" if self.prepared else "weights packed in the call where an algorithm packs"
        rows = [("algorithm", "predicted", "packed weights", "")]
        for candidate in self.candidates:
            rows.append((candidate.name, *self._cells(candidate)))
        return "\n".join([f"{self.layer}; {packing}", *aligned(rows, left=(0, 3))])

    def _cells(self, candidate: Candidate) -> tuple[str, str, str]:
        if candidate.refusal is not None:
            return "", "", f"refuses: {candidate.refusal}"
        packed = "none"
        if candidate.packed_bytes:
            packed = f"{byte_text(candidate.packed_bytes)} ({candidate.packed_bytes / self.weight_bytes:.2g}x)"
        return time_text(candidate.seconds), packed, self._note(candidate)

    def _note(self, candidate: Candidate) -> str:
        if candidate.chosen:
            return "chosen by 'auto'"
        if candidate.seconds == math.inf:
            return "runs if named only"
        if self.memory == "low" and candidate.packed_bytes > self.weight_bytes:
            return "passed over: memory='low'"
        return ""


def explain_rows(
    weight: Tensor,
    input_size: Sequence[int],
    stride: int,
    groups: int,
    *,
    prepared: bool,
    memory: str,
    channels_last: bool | None = None,
    activation: str = "identity",
) -> tuple[Candidate, ...]:
    """What the table says about a layer whose arguments have been checked; its last row is ``aten``.

    ``channels_last``: of the input; None: as networks run, that is channels_last for 16-bit types on a GPU.
    """
    require(memory in MEMORY, f"explain: memory must be one of {', '.join(MEMORY)}, got '{memory}'")
    device = weight.device
    if channels_last is None:
        channels_last = device.type == "cuda" and weight.element_size() == 2
    if _ext.module is None:
        return (Candidate("aten", None, None, 0, True),)
    rows = _ext.module.explain(
        prepared,
        memory == "low",
        device.type,
        0 if device.index is None else device.index,
        tuple(input_size),
        weight.shape[0],
        stride,
        groups,
        dtype_name(weight.dtype),
        channels_last,
        activation,
    )
    return tuple(Candidate(*row) for row in rows)


def layer_text(input_size: Sequence[int], weight: Tensor, stride: int, groups: int) -> str:
    """``1x96x28x28 -> 96 channels, stride 2, groups 4``"""
    text = f"{'x'.join(map(str, input_size))} -> {weight.shape[0]} channels"
    text += f", stride {stride}" if stride != 1 else ""
    return text + (f", groups {groups}" if groups != 1 else "")


def place_text(weight: Tensor) -> str:
    """``float32 on cpu``"""
    return f"{dtype_name(weight.dtype)} on {weight.device}"


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds == math.inf:
        return "-"
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def byte_text(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.1f} kB" if count < 10**6 else f"{count / 1e6:.2f} MB"


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """The rows as lines of equal columns; those in ``left`` are flush left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
