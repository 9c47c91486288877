# SPDX-License-Identifier: MIT
"""Runs of blocks: the containers of the networks, and prepared blocks as one operator.

The numbers are those of block by block, bit for bit. A block that is anything more than its convolution (SE, another
activation, branches), that has hooks, or whose ``algorithm`` the user has set, runs by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from repvgg_cuda import ops
from repvgg_cuda.modules import RepConv3x3, RepVGGBlock, RepVGGplusBlock

# ---------------------------------------------------------------------------------------------------------- containers


class BlockSequence(nn.Sequential):
    """A run of blocks; with ``use_checkpoint``, their activations are recomputed in the backward pass of training."""

    def __init__(self, blocks: Iterable[RepVGGBlock], use_checkpoint: bool = False) -> None:
        super().__init__(*blocks)
        self.use_checkpoint = use_checkpoint

    def forward(self, x: Tensor) -> Tensor:
        # Recomputing pays only where activations would be kept for a backward pass.
        if not (self.use_checkpoint and self.training and torch.is_grad_enabled()):
            return run(self, x)
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class RepVGGplusStage(nn.Module):
    """A run of RepVGGplus blocks, ``blocks``."""

    def __init__(self, blocks: Iterable[RepVGGplusBlock], use_checkpoint: bool = False) -> None:
        super().__init__()
        self.blocks = BlockSequence(blocks, use_checkpoint)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x)
        return y


def unrolled(module: nn.Module) -> Iterable[nn.Module]:
    """The blocks of a container whose call is no more than their calls; any other module itself."""
    if not _is_plain(module) or _has_global_hooks():
        return (module,)
    if type(module) is RepVGGplusStage:
        return unrolled(module.blocks)
    if type(module) is BlockSequence and not (module.use_checkpoint and module.training):
        return module
    return (module,)


# ---------------------------------------------------------------------------------------------------------------- runs


def run(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """``for block in blocks: x = block(x)``, neighbouring chainable blocks as one call."""
    chain: list[RepConv3x3] = []
    alone = _has_global_hooks()
    for block in blocks:
        conv = None if alone else chainable(block)
        if conv is not None:
            chain.append(conv)
            continue
        x = block(_run_chain(chain, x))
        chain = []
    return _run_chain(chain, x)


def chainable(block: nn.Module) -> RepConv3x3 | None:
    """The convolution of a block that is nothing else, prepared and in eval mode; None for any other module."""
    if (type(block) is not RepVGGBlock and type(block) is not RepVGGplusBlock) or not _is_plain(block):
        return None
    children = block._modules
    conv = children.get("rbr_reparam")
    if type(conv) is not RepConv3x3 or conv.prepared is None or conv.training or conv.algorithm != "auto":
        return None
    if conv._parameters.get("weight") is None:  # computed by a hook: pruned
        return None
    for child in children.values():
        if child is not None and not ((child is conv or type(child) is nn.Identity) and _is_plain(child)):
            return None
    return conv


def _has_global_hooks() -> bool:
    return bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of ``module`` is a call of its class's ``forward`` and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )


def _run_chain(convs: Sequence[RepConv3x3], x: Tensor) -> Tensor:
    """The layers one after another, in one call if they are several."""
    if len(convs) <= 1 or x.dim() != 4:
        for conv in convs:
            x = conv(x)
        return x
    none = torch.empty(0, dtype=x.dtype, device=x.device)
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    packed: list[Tensor] = []
    n, _, height, width = x.shape
    for conv in convs:
        parameters, stride = conv._parameters, conv.stride  # not conv.weight: nn.Module looks it up in Python
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
        pack = conv.packed_for((n, conv.in_channels, height, width))
        weights.append(weight)
        biases.append(none if bias is None else bias)
        packed.append(none if pack is None else pack)
        height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
    strides, groups = [conv.stride for conv in convs], [conv.groups for conv in convs]
    return ops.run_chain(x, weights, biases, packed, strides, groups, [conv.activation for conv in convs])
