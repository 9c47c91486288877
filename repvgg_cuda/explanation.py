# SPDX-License-Identifier: MIT
"""Which algorithm a layer runs on and why not the others: the rows of the table as data and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repvgg_cuda import _ext
from repvgg_cuda.branches import dtype_name, require
from repvgg_cuda.gpus import LaunchPlan
from repvgg_cuda.packed import MEMORY


@dataclass(frozen=True)
class Candidate:
    """One algorithm for one layer.

    ``refusal`` says why it cannot run the layer, else None. ``seconds`` is the predicted time, on a CPU that of one
    thread: infinite where ``"auto"`` never takes the algorithm, None where it is refused or nothing is predicted.
    ``packed_bytes``: of its packed weights, 0 where it reads weights as they are. ``chosen``: ``"auto"`` takes it.
    ``plan``: how it would launch on a GPU; None on a CPU, and for ``aten``, which decides that itself.
    """

    name: str
    refusal: str | None
    seconds: float | None
    packed_bytes: int
    chosen: bool
    plan: LaunchPlan | None = None


@dataclass(frozen=True)
class Place:
    """Where a layer would run: a device at hand, or (``index`` -1) a GPU of that capability and so many
    multiprocessors."""

    type: str
    index: int
    capability: int = 0
    multiprocessors: int = 0


@dataclass(frozen=True)
class Explanation:
    """The result of :func:`repvgg_cuda.explain`. ``str()`` is a table; ``explanation["direct"]`` is one candidate.

    ``candidates`` are in the order of :func:`repvgg_cuda.algorithms`. ``place``: where.
    """

    layer: str
    candidates: tuple[Candidate, ...]
    weight_bytes: int
    prepared: bool
    memory: str
    place: Place

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
        lines = [f"{self.layer}; {packing}", *aligned(rows, left=(0, 3))]
        return "\n".join([*lines, *(self._launch(c.name, c.plan) for c in self.candidates if c.plan is not None)])

    def _launch(self, name: str, plan: LaunchPlan) -> str:
        capability, multiprocessors = self.place.capability, self.place.multiprocessors
        waves, resident = plan.waves(capability, multiprocessors), plan.resident(capability)
        fills = f"{resident} at a time on each of {multiprocessors} multiprocessors, {waves} wave{'s' * (waves != 1)}"
        return f"{name} launches {plan}, {byte_text(plan.shared_bytes)} of shared memory each; {fills}"

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


def place_of(device: torch.device) -> Place:
    """A device at hand as a place."""
    if device.type != "cuda":
        return Place(device.type, 0 if device.index is None else device.index)
    properties = torch.cuda.get_device_properties(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    return Place("cuda", index, 10 * properties.major + properties.minor, properties.multi_processor_count)


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
    place: Place | None = None,
) -> tuple[Candidate, ...]:
    """What the table says about a layer whose arguments have been checked; its last row is ``aten``.

    ``channels_last``: of the input; None: as networks run, that is channels_last for 16-bit types on a GPU.
    ``place``: None: where the weight is, and no plans.
    """
    require(memory in MEMORY, f"explain: memory must be one of {', '.join(MEMORY)}, got '{memory}'")
    if _ext.module is None:
        return (Candidate("aten", None, None, 0, True),)
    device = weight.device
    at = place or Place(device.type, 0 if device.index is None else device.index)
    if channels_last is None:
        channels_last = at.type == "cuda" and weight.element_size() == 2
    problem = (
        tuple(input_size), weight.shape[0], stride, groups, dtype_name(weight.dtype), channels_last, activation,
    )  # fmt: skip
    rows = _ext.module.explain(
        prepared, memory == "low", at.type, at.index, at.capability, at.multiprocessors, *problem
    )
    candidates = []
    for name, refusal, seconds, packed_bytes, chosen in rows:
        plan = None
        if place is not None and place.type == "cuda" and refusal is None and name != "aten":
            plan = _ext.module.launch_plan(name, place.capability, place.multiprocessors, *problem)
        launch = None if plan is None else LaunchPlan(**plan)
        candidates.append(Candidate(name, refusal, seconds, packed_bytes, chosen, launch))
    return tuple(candidates)


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
