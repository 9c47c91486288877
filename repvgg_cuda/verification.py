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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from repvgg_cuda import testing
from repvgg_cuda.affine import Affine
from repvgg_cuda.branches import dtype_name, require
from repvgg_cuda.convert import Conv, Found, conv_paths, find
from repvgg_cuda.modules import RepConv3x3
from repvgg_cuda.prepared import algorithm_for
from repvgg_cuda.structure import ConvGeometry, conv_geometry, is_batchnorm

#: How many times the error of the trained network the deployed one may make. A rigorous end-to-end bound exists but
#: says nothing: it multiplies each layer's rounding error by the Lipschitz constants of all later layers, whose product
#: grows exponentially with depth. But trained and deployed network sum the same products in two orders, so their errors
#: are of one size. Measured on RepVGG-A0, B1g4 and D2se with random BatchNorm statistics: 0.8 to 2.5 times in float32
#: (4.5 in one network whose logits had grown to 5e4), 0.25 to 1.25 times in float16 and bfloat16. A wrong fold is off
#: by orders of magnitude.
NETWORK_FACTOR = 8


@dataclass(frozen=True)
class Row:
    """One comparison with the float64 oracle.

    ``max_error`` is the largest absolute error. ``error``, ``bound`` and their ratio ``share`` belong to the element
    that uses most of its bound. ``trained_error``: the largest of the trained network in the same dtype; for the whole
    network only. ``conv``: the path of the folded convolution.
    """

    name: str
    branches: str
    max_error: float
    error: float
    bound: float
    share: float
    ok: bool
    trained_error: float | None = None
    conv: str | None = None


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
        pairs, not_compared = _pairs(oracle, deployed, needs_layers)
        rows = _record_layers(pairs, not_compared)
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


def arguments(inputs: Tensor | Sequence[Any], model: nn.Module) -> tuple[Any, ...]:
    """``inputs`` as arguments of ``model``, floating point tensors rounded to its dtype."""
    values = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    tensors = [each for each in values if isinstance(each, Tensor) and each.is_floating_point()]
    require(
        len(tensors) > 0 and all(each.numel() > 0 for each in tensors),
        "verify: inputs must be a floating point tensor with at least one element, such as a batch of images, or a "
        "tuple of arguments with one among them",
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


class _Pair(NamedTuple):
    """A block of the oracle, and the convolution that stands for it."""

    found: Found
    conv: Conv
    path: str  # of conv


def _pairs(oracle: nn.Module, deployed: nn.Module, needs_layers: bool) -> tuple[dict[str, _Pair], dict[str, str]]:
    """The deployed convolution of each block of ``oracle``, by path; and blocks without one, with the reason."""
    found, _ = find(oracle)
    paths = conv_paths(found)
    others = dict(deployed.named_modules(remove_duplicate=False))
    pairs: dict[str, _Pair] = {}
    not_compared: dict[str, str] = {}
    for i, each in enumerate(found):
        holder = each.region.absolute(each.block.scope)
        if each.block.is_chain and (holder not in others or _keeps_batchnorms(each, others)):
            continue  # left as it was, or dropped as only training needs it
        require(
            holder in others,
            f"verify: deployed has no module '{holder}', which is a block of trained: not its conversion",
        )
        if each.block.reason:
            not_compared[each.path] = f"it cannot be folded: {each.block.reason}"
            continue
        where = next((path for path in (paths[i], holder) if isinstance(others.get(path), Conv)), "")
        conv = others[where]
        if isinstance(conv, Conv):
            pairs[each.path if each.path not in pairs else paths[i]] = _Pair(each, conv, where)
        else:
            not_compared[each.path] = f"it is not folded in deployed, but a {type(others[holder]).__name__}"
    require(
        len(pairs) > 0 or not needs_layers,
        "verify: there is no block with branches in trained and folded in deployed to compare; give the trained model "
        "first, then the deployed one",
    )
    return pairs, not_compared


def _keeps_batchnorms(found: Found, others: Mapping[str, nn.Module]) -> bool:
    layers = [layer for layer in found.block.layers if layer.kind == "bn"]
    modules = [others.get(found.region.absolute(layer.path)) for layer in layers]
    kept = [isinstance(m, nn.modules.batchnorm._BatchNorm) or (m is not None and is_batchnorm(m)) for m in modules]
    return any(kept)


def _record_layers(pairs: Mapping[str, _Pair], not_compared: dict[str, str]) -> dict[str, Row]:
    """Hooks what reads the input of every paired block: as the oracle runs, its row appears in the returned dict."""
    rows: dict[str, Row] = {}

    def hook_for(path: str, pair: _Pair) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        busy = False

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal busy
            if busy:  # the comparison runs the layers, too
                return
            busy = True
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            row = _layer_row(path, pair, x)
            busy = False
            if path not in rows or not row.share <= rows[path].share:  # a block may run several times: keep the worst
                rows[path] = row

        return hook

    for path, pair in pairs.items():
        block = pair.found.block
        reader = next((n for n in block.nodes if n.op == "call_module" and block.root in n.all_input_nodes), None)
        if reader is None:
            not_compared[path] = "functions, and no module, read its input"
            continue
        module = block.traced.module.get_submodule(str(reader.target))
        module.register_forward_pre_hook(hook_for(path, pair), with_kwargs=True)
    return rows


def _layer_row(path: str, pair: _Pair, x64: Tensor) -> Row:
    """Compares the convolution with the layers it stands for, in float64, on the input ``x64`` of those."""
    block, conv = pair.found.block, pair.conv
    folded = block.folded
    assert folded is not None
    _check_same_geometry(path, conv, folded)
    x = x64.to(conv.weight.dtype)
    exact = x.double()
    want = block.run(exact)
    if isinstance(conv, RepConv3x3):
        conv = copy.copy(conv)  # shares the weights
        conv.activation = "identity"  # behind a ReLU, a fault in a channel that these inputs leave dead would not show
    got = conv(x).double()
    algorithm = algorithm_for(conv, x) if isinstance(conv, RepConv3x3) else "aten"
    if algorithm == "aten":
        options = (folded.stride, folded.padding, folded.dilation, folded.groups)
        bound = testing.conv_error_bound(x, conv.weight, conv.bias, *options)
    else:
        bound = testing.error_bound(x, conv.weight, conv.bias, folded.stride[0], folded.groups, algorithm)
    weight_bound, bias_bound = folded.fold_bound(conv.weight.dtype)
    # Denormal weights may have been set to zero.
    weight_bound += torch.finfo(conv.weight.dtype).smallest_normal * (conv.weight == 0)
    fold = replace(folded, weight=weight_bound, bias=bias_bound)
    bound = bound + fold(exact.abs()) + 2 * folded.evaluation_bound(exact)
    return replace(_row(path or "(the model itself)", block.branches, got, want, bound), conv=pair.path)


def _check_same_geometry(path: str, conv: Conv, folded: Affine) -> None:
    """Raises RuntimeError unless ``conv`` is a convolution of the same geometry as the block."""
    channels = (folded.in_channels, folded.out_channels)
    options = (folded.kernel_size, folded.stride, folded.padding, folded.dilation, folded.groups)
    want = ConvGeometry(*channels, *options, "zeros")
    if isinstance(conv, nn.Conv2d):
        found = conv_geometry(conv)
    else:
        stride = (conv.stride, conv.stride)
        found = ConvGeometry(conv.in_channels, conv.out_channels, (3, 3), stride, (1, 1), (1, 1), conv.groups, "zeros")
    found_shape, want_shape = tuple(conv.weight.shape), tuple(folded.weight.shape)
    require(
        found[2:] == want[2:] and found_shape == want_shape,
        f"verify: {path or 'the model'}: deployed has a convolution {list(found_shape)}, stride {conv.stride}, groups "
        f"{conv.groups}, where trained has a block {list(want_shape)}, stride {folded.stride[0]}, groups "
        f"{folded.groups}: not its conversion",
    )


def _row(name: str, branches: str, got: Tensor, want: Tensor, bound: Tensor, trained_error: float | None = None) -> Row:
    """The row of one comparison: ``bound`` per element or for all. NaN in any of them is not ok."""
    error = (got.double() - want).abs().flatten()
    bound = bound.expand_as(want).flatten()
    share = torch.where(error == 0, 0.0, error / bound)  # 0 of a bound of 0 is nothing, not NaN
    worst = int(share.argmax())  # a NaN counts as the largest
    return Row(
        name,
        branches,
        max_error=float(error.max()),
        error=float(error[worst]),
        bound=float(bound[worst]),
        share=float(share[worst]),
        ok=bool((error.isfinite() & (error <= bound)).all()),
        trained_error=trained_error,
    )


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
            rows.append(_row("whole network", "", g, w, bound, float(own_error)))
    require(len(rows) > 0, "verify: the outputs are empty, there is nothing to compare")
    return max(rows, key=lambda row: math.inf if math.isnan(row.share) else row.share)


def _agreement(want: Any, got: Any) -> tuple[int, int] | None:
    if not isinstance(want, Tensor) or want.dim() != 2:
        return None
    return int((want.argmax(1) == got.argmax(1)).sum()), len(want)
