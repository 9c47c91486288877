# SPDX-License-Identifier: MIT
"""Each folded convolution against the layers it stands for, in float64, with a bound derived from both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from repvgg_cuda import testing
from repvgg_cuda.affine import Affine
from repvgg_cuda.branches import require
from repvgg_cuda.convert import Conv, Found, conv_paths, find
from repvgg_cuda.modules import RepConv3x3
from repvgg_cuda.prepared import algorithm_for
from repvgg_cuda.structure import ConvGeometry, conv_geometry, is_batchnorm


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


class Pair(NamedTuple):
    """A block of the oracle, and the convolution that stands for it."""

    found: Found
    conv: Conv
    path: str  # of conv


def find_pairs(oracle: nn.Module, deployed: nn.Module, needs_layers: bool) -> tuple[dict[str, Pair], dict[str, str]]:
    """The deployed convolution of each block of ``oracle``, by path; and blocks without one, with the reason."""
    found, _ = find(oracle)
    paths = conv_paths(found)
    others = dict(deployed.named_modules(remove_duplicate=False))
    pairs: dict[str, Pair] = {}
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
            pairs[each.path if each.path not in pairs else paths[i]] = Pair(each, conv, where)
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


def record_layers(pairs: Mapping[str, Pair], not_compared: dict[str, str]) -> dict[str, Row]:
    """Hooks what reads the input of every paired block: as the oracle runs, its row appears in the returned dict."""
    rows: dict[str, Row] = {}

    def hook_for(path: str, pair: Pair) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
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


def _layer_row(path: str, pair: Pair, x64: Tensor) -> Row:
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
    return replace(compared(path or "(the model itself)", block.branches, got, want, bound), conv=pair.path)


def _check_same_geometry(path: str, conv: Conv, folded: Affine) -> None:
    """Raises RuntimeError unless ``conv`` is a convolution of the same geometry as the block."""
    f = folded
    want = ConvGeometry(
        f.in_channels, f.out_channels, f.kernel_size, f.stride, f.padding, f.dilation, f.groups, "zeros"
    )
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


def compared(
    name: str, branches: str, got: Tensor, want: Tensor, bound: Tensor, trained_error: float | None = None
) -> Row:
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
