# SPDX-License-Identifier: MIT
"""The way back: a deployed convolution as a trainable block of branches, for fine-tuning."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from repvgg_cuda.branches import require
from repvgg_cuda.modules import RepConv3x3, RepVGGBlock
from repvgg_cuda.structure import conv_geometry


@torch.no_grad()
def unfuse(conv: RepConv3x3 | nn.Conv2d, example_input: Tensor | None = None) -> RepVGGBlock:
    """A trainable :class:`RepVGGBlock` that computes, in eval mode, what ``conv`` computes, up to rounding.

    The centre taps are shared out among the 3x3, the 1x1 and, where stride and channels allow one, the identity branch,
    in halves and quarters: nothing cancels, so folding the block again gives ``conv`` back to the last places.

    Args:
        conv: 3x3, zero padding 1, stride 1 or 2; its activation, "relu" or none, becomes that of the block.
        example_input: ``[N, C_in, H, W]``, what ``conv`` reads. The BatchNorms then hold its statistics, so that the
            block computes about the same in training mode, too. None: mean 0 and variance 1, and the first steps of
            training have to find them.
    Returns:
        The block, of the dtype, device and mode of ``conv``; every parameter requires a gradient.
    Raises:
        RuntimeError: ``conv`` is no such convolution, or ``example_input`` does not fit it; the message says why.
    """
    require(
        isinstance(conv, (RepConv3x3, nn.Conv2d)),
        f"unfuse: conv must be a RepConv3x3 or an nn.Conv2d, got {type(conv).__name__}",
    )
    if isinstance(conv, nn.Conv2d):
        _check_geometry(conv)
    stride = conv.stride if isinstance(conv.stride, int) else conv.stride[0]
    channels, groups = (conv.in_channels, conv.out_channels), conv.groups
    block = RepVGGBlock(*channels, stride=stride, groups=groups).to(conv.weight.device, conv.weight.dtype)
    if not (isinstance(conv, RepConv3x3) and conv.activation == "relu"):
        block.nonlinearity = nn.Identity()
    weight = conv.weight.detach().double()
    centre = weight[:, :, 1:2, 1:2]
    pointwise = centre / 2
    diagonal = None
    if block.rbr_identity is not None:
        index = torch.arange(conv.out_channels, device=weight.device)
        column = index % weight.shape[1]
        diagonal = centre[index, column, 0, 0] / 2
        pointwise[index, column] /= 2
    dense = weight.clone()
    dense[:, :, 1:2, 1:2] -= pointwise
    if diagonal is not None:
        dense[index, column, 1, 1] -= diagonal
    layers: list[Any] = [*block.rbr_dense, *block.rbr_1x1]
    dense_conv, dense_bn, pointwise_conv, pointwise_bn = layers
    dense_conv.weight.copy_(dense)
    pointwise_conv.weight.copy_(pointwise)

    x = _checked(example_input, conv)
    outputs: list[Tensor | None] = [None, None, None]
    if x is not None:
        outputs = [
            F.conv2d(x, dense, None, stride, 1, 1, groups),
            F.conv2d(x, pointwise, None, stride, 0, 1, groups),
            x,
        ]
    bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().double()
    scales = [torch.ones_like(bias), torch.ones_like(bias), diagonal]
    batchnorms = [dense_bn, pointwise_bn, block.rbr_identity]
    for bn, scale, output in zip(batchnorms, scales, outputs, strict=True):
        if bn is not None and scale is not None:
            _set_batchnorm(bn, scale, output)
    dense_bn.bias += bias.to(conv.weight.dtype)
    return block.train(conv.training)


def _check_geometry(conv: nn.Conv2d) -> None:
    geometry = conv_geometry(conv)
    same = (geometry.kernel_size, geometry.padding, geometry.dilation) == ((3, 3), (1, 1), (1, 1))
    require(
        same and geometry.stride in ((1, 1), (2, 2)) and geometry.padding_mode == "zeros",
        "unfuse: conv must be 3x3 with zero padding 1, dilation 1 and stride 1 or 2, got kernel_size "
        f"{geometry.kernel_size}, padding {geometry.padding} ({geometry.padding_mode}), dilation {geometry.dilation}, "
        f"stride {geometry.stride}",
    )


def _checked(example_input: Tensor | None, conv: RepConv3x3 | nn.Conv2d) -> Tensor | None:
    """The example in float64."""
    if example_input is None:
        return None
    shape = tuple(example_input.shape)
    require(
        len(shape) == 4 and shape[1] == conv.in_channels and example_input.numel() > conv.in_channels,
        f"unfuse: example_input must be [N, {conv.in_channels}, H, W] with more than one pixel, got {list(shape)}",
    )
    return example_input.to(conv.weight.device).double()


def _set_batchnorm(bn: nn.Module, scale: Tensor, output: Tensor | None) -> None:
    """Lets ``bn`` multiply by ``scale``, with the statistics of ``output``, if given, as its own."""
    assert isinstance(bn, nn.BatchNorm2d)
    assert isinstance(bn.running_mean, Tensor)
    assert isinstance(bn.running_var, Tensor)
    if output is not None:
        bn.running_mean.copy_(output.mean((0, 2, 3)))
        bn.running_var.copy_(output.var((0, 2, 3)))
    bn.weight.copy_(scale * torch.sqrt(bn.running_var.double() + bn.eps))
    bn.bias.copy_(scale * bn.running_mean.double())
