# SPDX-License-Identifier: MIT
"""Deployed against trained: every layer, and the whole network, compared with the trained network in float64.

Two kinds of statement. Each folded layer has a rigorous bound, derived from its weights and its input: a wrong fold
breaks it. The network as a whole has none that would say anything (see :data:`NETWORK_FACTOR`), so its error is held
against the one the trained network itself makes in the same dtype.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from repvgg_cuda import testing
from repvgg_cuda.branches import dtype_name, require, shape_name
from repvgg_cuda.layer_errors import Row, compared, find_pairs, record_layers

#: How many times the error of the trained network the deployed one may make. A rigorous end-to-end bound exists but
#: says nothing: it multiplies each layer's rounding error by the Lipschitz constants of all later layers, whose product
#: grows exponentially with depth. But trained and deployed network sum the same products in two orders, so their errors
#: are of one size. Measured on RepVGG-A0, B1g4 and D2se with random BatchNorm statistics: 0.8 to 2.5 times in float32
#: (4.5 in one network whose logits had grown to 5e4), 0.25 to 1.25 times in float16 and bfloat16. A wrong fold is off
#: by orders of magnitude.
NETWORK_FACTOR = 8


@dataclass(frozen=True)
class Verification:
    """The result of :func:`verify`. ``str()`` is a table in plain text, :meth:`render` one for ``rich``.

    ``rows``: one per folded layer in the order of execution, then the whole network. ``not_compared``: blocks without a
    row, with the reason. ``agreement``: images with the same top class as the oracle's, and images;
    None unless the output is ``[N, classes]``.
    """

    rows: tuple[Row, ...]
    not_compared: tuple[str, ...]
    agreement: tuple[int, int] | None
    dtype: str

    @property
    def ok(self) -> bool:
        """True if every row is within its bound. A NaN anywhere is not."""
        return all(row.ok for row in self.rows)

    @property
    def first_failure(self) -> Row | None:
        """The first row that is not ok, in the order of execution: where to look for the fault."""
        return next((row for row in self.rows if not row.ok), None)

    @property
    def network(self) -> Row:
        """The row of the whole network."""
        return self.rows[-1]

    def summary(self) -> str:
        """One line: the verdict, the network's error beside the trained network's own, the top classes."""
        failures = [row for row in self.rows if not row.ok]
        verdict = f"all {len(self.rows)} rows within their bounds" if not failures else f"{failures[0].name} FAILS"
        if len(failures) > 1:
            verdict += f" first of {len(failures)}"
        text = (
            f"{verdict}; {self.dtype} output off the float64 oracle by {self.network.max_error:.2e} deployed, "
            f"{self.network.trained_error:.2e} trained"
        )
        if self.agreement is not None:
            text += f"; top class agrees on {self.agreement[0]} of {self.agreement[1]}"
        return text

    def _cells(self) -> Iterator[tuple[str, ...]]:
        for row in self.rows:
            yield (
                row.name,
                row.branches,
                f"{row.max_error:.2e}",
                f"{row.error:.2e}",
                f"{row.bound:.2e}",
                f"{row.share:.1%}",
                "ok" if row.ok else "FAIL",
            )

    _TITLES = ("layer", "branches", "max error", "worst", "of bound", "used", "")

    def __str__(self) -> str:
        rows = [self._TITLES, *self._cells()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self._TITLES))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *(f"not compared: {each}" for each in self.not_compared), self.summary()])

    def render(self) -> Table:
        """The table for a ``rich.console.Console``, failures in red, the summary below."""
        notes = [*(f"not compared: {each}" for each in self.not_compared), self.summary()]
        caption = Text("\n".join(notes))  # not markup: a reason may hold brackets
        table = Table(title="deployed against the float64 oracle", title_justify="left", caption=caption)
        table.caption_justify = "left"
        for i, title in enumerate(self._TITLES):
            table.add_column(title, justify="left" if i < 2 else "right", overflow="fold")
        for cells, row in zip(self._cells(), self.rows, strict=True):
            table.add_row(*cells, style=None if row.ok else "bold red")
        return table


# --------------------------------------------------------------------------------------------------------- comparison


def verify(trained: nn.Module, deployed: nn.Module, inputs: Tensor | Sequence[Any]) -> Verification:
    """Compares ``deployed`` with ``trained``, layer by layer and as a whole, against ``trained`` in float64.

    Per folded layer: the float64 network's input to it, rounded to the layer's dtype, goes through the deployed
    convolution (before its ReLU and any SE) and, in float64, through the trained branches. The difference must stay
    below what rounding in the convolution, in the folded weights and in the oracle itself can add up to
    (:mod:`repvgg_cuda.testing`). As a whole: the error of the deployed network must not exceed :data:`NETWORK_FACTOR`
    times that of the trained network in the same dtype, or half a unit in the last place of the largest output,
    whichever is more.

    Args:
        trained, deployed: in eval mode, on one device; neither is modified. Outputs may be tensors or nested lists,
            tuples and dicts of them; their floating point tensors are compared.
        inputs: what both take: ``[N, C_in, H, W]``, or a tuple of arguments; rounded to the dtype of ``deployed``.
    Raises:
        RuntimeError: a model is in training mode, nothing of ``trained`` is folded in ``deployed``, or the two are not
            the same network; the message says which.
    Note:
        Runs with TF32 off, which the bounds for float32 do not cover.
    """
    return compare(trained, deployed, inputs, needs_layers=True)


@torch.no_grad()
def compare(
    trained: nn.Module, deployed: nn.Module, inputs: Tensor | Sequence[Any], *, needs_layers: bool
) -> Verification:
    """:func:`verify`; without ``needs_layers`` also where nothing is folded."""
    trained, deployed = _unwrap(trained), _unwrap(deployed)
    _check_eval("trained", trained)
    _check_eval("deployed", deployed)
    dtype = _dtype(deployed)
    x = arguments(inputs, deployed)
    with _without_tf32():
        oracle = copy.deepcopy(trained).double()
        pairs, not_compared = find_pairs(oracle, deployed, needs_layers)
        rows = record_layers(pairs, not_compared)
        want = oracle(*cast(x, torch.float64))
        # float64 has no wider oracle; there the error in float32 is scaled down by the ratio of the roundings.
        own_dtype = torch.float32 if dtype == torch.float64 else dtype
        same_dtype = trained if _dtype(trained) == own_dtype else copy.deepcopy(trained).to(own_dtype)
        got, own = deployed(*x), same_dtype(*cast(x, own_dtype))
    for path in pairs:
        if path not in rows and path not in not_compared:
            not_compared[path] = "these inputs do not reach it"
    return Verification(
        (*rows.values(), _network_row(want, got, own, dtype, own_dtype)),
        tuple(f"{path or '(the model itself)'}: {reason}" for path, reason in not_compared.items()),
        _agreement(want, got),
        dtype_name(dtype),
    )


def arguments(inputs: Tensor | Sequence[Any], model: nn.Module, name: str = "verify: inputs") -> tuple[Any, ...]:
    """``inputs`` as arguments of ``model``, floating point tensors rounded to its dtype."""
    values = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs) if isinstance(inputs, Sequence) else ()
    tensors = [each for each in values if isinstance(each, Tensor) and each.is_floating_point()]
    got = type(inputs).__name__
    if isinstance(inputs, Tensor):
        got = f"{shape_name(inputs)} of {dtype_name(inputs.dtype)}"
    require(
        len(tensors) > 0 and all(each.numel() > 0 for each in tensors),
        f"{name} must be a floating point tensor with at least one element, such as a batch of images, or a tuple of "
        f"arguments with one among them, got {got}",
    )
    return cast(values, _dtype(model))


def cast(values: Sequence[Any], dtype: torch.dtype) -> tuple[Any, ...]:
    """The floating point tensors among ``values`` in ``dtype``, the rest as it is."""
    return tuple(v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in values)


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        inner = model._modules.get("_orig_mod")
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _check_eval(which: str, model: nn.Module) -> None:
    path = next((path for path, module in model.named_modules() if module.training), None)
    where = f" ({path})" if path else ""
    require(path is None, f"verify: {which} is in training mode{where}; call {which}.eval() first")


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the first floating point parameter, or float32."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _leaves(output: Any) -> list[Tensor]:
    """The floating point tensors in nested lists, tuples and dicts, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    return [leaf for item in output for leaf in _leaves(item)] if isinstance(output, Sequence) else []


def _network_row(want: Any, got: Any, own: Any, dtype: torch.dtype, own_dtype: torch.dtype) -> Row:
    """The row of the whole network: of its worst output tensor, where there are several."""
    unit, own_unit = testing.unit_roundoff(dtype), testing.unit_roundoff(own_dtype)
    wants, gots, owns = _leaves(want), _leaves(got), _leaves(own)
    require(len(wants) > 0, f"verify: trained must return floating point tensors, got {type(want).__name__}")
    shapes = [[list(leaf.shape) for leaf in leaves] for leaves in (wants, gots)]
    require(shapes[0] == shapes[1], f"verify: trained returns {shapes[0]}, deployed {shapes[1]}: not its conversion")
    rows = []
    for w, g, o in zip(wants, gots, owns, strict=True):
        if w.numel() > 0:
            own_error = (o.double() - w).abs().max() * (unit / own_unit)
            bound = NETWORK_FACTOR * torch.maximum(own_error, unit * w.abs().max())
            rows.append(compared("whole network", "", g, w, bound, float(own_error)))
    require(len(rows) > 0, "verify: the outputs are empty, there is nothing to compare")
    return max(rows, key=lambda row: math.inf if math.isnan(row.share) else row.share)


def _agreement(want: Any, got: Any) -> tuple[int, int] | None:
    if not isinstance(want, Tensor) or want.dim() != 2:
        return None
    return int((want.argmax(1) == got.argmax(1)).sum()), len(want)
