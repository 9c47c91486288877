# SPDX-License-Identifier: MIT
"""Shows on a random input that a fold computes what the layers do, before anything is replaced."""

from __future__ import annotations

import copy

import torch
import torch.nn as nn
from torch.nn.utils import parametrize

from repvgg_cuda.blocks import Block
from repvgg_cuda.rewriting import plain_conv
from repvgg_cuda.structure import UnfoldableError


@torch.no_grad()
def prove(block: Block) -> None:
    """Compares the fold with the layers themselves on a random input, in float64.

    Both sizes of the input and several magnitudes, so that a wrong padding, a wrong stride or clipping shows.

    Raises:
        UnfoldableError: they differ by more than rounding, or the layers cannot be run.
    """
    f = block.folded
    assert f is not None
    if f.weight.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    height, width = f.kernel_size[0] * f.dilation[0] + 2, f.kernel_size[1] * f.dilation[1] + 1
    x = torch.randn(2, f.in_channels, height, width, generator=generator, dtype=torch.float64).to(f.weight.device)
    x[1] *= 100
    x[1] += torch.randn(f.in_channels, 1, 1, generator=generator, dtype=torch.float64).to(f.weight.device)
    model = _double(block)
    try:
        want = block.run(x, model)
    except Exception as error:  # layers of other libraries may raise anything
        raise UnfoldableError(f"its layers cannot be run on one input: {type(error).__name__}: {error}") from error
    got = f(x)
    finite = bool(f.weight.isfinite().all()) and bool(f.bias.isfinite().all())
    if finite and not (got.shape == want.shape and bool(((got - want).abs() <= 2 * f.evaluation_bound(x)).all())):
        raise UnfoldableError("its layers compute something else than their fold, as a comparison in float64 shows")


def _double(block: Block) -> nn.Module:
    """A copy in float64 of the modules and constants that ``block`` needs, at their paths."""
    root = nn.Module()
    needed = [str(node.target) for node in block.nodes if node.op == "call_module"]
    memo: dict[int, object] = {}
    for path in needed:
        parent, _, name = path.rpartition(".")
        module = block.traced.module.get_submodule(path)
        if isinstance(module, nn.Conv2d) and parametrize.is_parametrized(module):  # as float64 it has another weight
            weight, bias = (None if p is None else p.detach().clone() for p in (module.weight, module.bias))
            module = plain_conv(module, weight, bias)
        _holder(root, parent).add_module(name, copy.deepcopy(module, memo).double())
    for path, value in block.constants().items():
        parent, _, name = path.rpartition(".")
        if not hasattr(holder := _holder(root, parent), name):
            holder.register_buffer(name, value.detach().clone().double())
    return root.eval()


def _holder(root: nn.Module, path: str) -> nn.Module:
    for name in filter(None, path.split(".")):
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root
