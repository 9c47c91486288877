# SPDX-License-Identifier: MIT
"""Affine maps of images that one convolution can stand for, in float64: how branches are composed and added.

Every layer of a foldable branch (convolution, BatchNorm, average pooling, constant scale or shift) is such a map, and
so is every sum of them. Where the composition of two maps is no single convolution, at the zero-padded border above
all, it is refused with the reason. Each map carries its magnitudes: the same sums over absolute values, nothing
cancelling. They bound what rounding does to the map, whether it is folded first or evaluated layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg_cuda.branches import BatchNorm
from repvgg_cuda.structure import UnfoldableError

Pair = tuple[int, int]

#: Roundings of a BatchNorm, as layer or folded: add eps, root, divide, gamma, mean, product, beta and their inputs.
_BATCHNORM_ROUNDINGS = 14


@dataclass(frozen=True)
class Affine:
    """``F.conv2d(x, weight, bias, stride, padding, dilation, groups)`` with zero padding.

    ``weight`` and ``weight_magnitude`` are ``[C_out, C_in / groups, R, S]``, ``bias`` and ``bias_magnitude``
    ``[C_out]``, all float64. ``roundings`` bounds how many roundings a term of an output goes through.
    """

    weight: Tensor
    bias: Tensor
    weight_magnitude: Tensor
    bias_magnitude: Tensor
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    roundings: int = 0
    is_identity: bool = False  # made by identity(), and nothing since

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def kernel_size(self) -> Pair:
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def reach(self) -> Pair:
        """How far the output is smaller than the input, before striding: 0 is "same"."""
        spans = ((k - 1) * d - 2 * p for k, d, p in zip(self.kernel_size, self.dilation, self.padding, strict=True))
        return tuple(spans)  # type: ignore[return-value]

    @property
    def is_pointwise(self) -> bool:
        """Whether an output reads one pixel of the input, at its own place."""
        return self.kernel_size == (1, 1) and self.padding == (0, 0)

    def __call__(self, x: Tensor) -> Tensor:
        """The map of ``x``, which is float64."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def evaluation_bound(self, x: Tensor) -> Tensor:
        """How far an evaluation in float64, layer by layer or folded, may be from the exact map of ``x``."""
        magnitudes = replace(self, weight=self.weight_magnitude, bias=self.bias_magnitude)
        return _gamma(self.roundings) * magnitudes(x.double().abs())

    def fold_bound(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """How far weight and bias, folded in float64 and rounded once to ``dtype``, may be from the exact ones."""
        unit = torch.finfo(dtype).eps / 2
        factor = _gamma(self.roundings) + unit * (
            1 + 2**-12
        )  # a float64 may pass through float32 on its way to 16 bits
        half_step = torch.finfo(dtype).smallest_normal * unit
        return self.weight_magnitude * factor + half_step, self.bias_magnitude * factor + half_step


def _gamma(roundings: int) -> float:
    """Higham, Accuracy and Stability of Numerical Algorithms, sec. 3.1, for float64."""
    unit = torch.finfo(torch.float64).eps / 2
    return roundings * unit / (1 - roundings * unit)


# --------------------------------------------------------------------------------------------------------------- layers


def identity(channels: int, device: torch.device | str = "cpu") -> Affine:
    """``x`` itself, as a depthwise 1x1 convolution."""
    ones = torch.ones(channels, 1, 1, 1, dtype=torch.float64, device=device)
    zeros = torch.zeros(channels, dtype=torch.float64, device=device)
    return Affine(ones, zeros, ones, zeros, groups=channels, is_identity=True)


def convolution(
    weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Affine:
    """A convolution with zero padding; ``weight`` and ``bias`` of any float dtype."""
    kernel = weight.detach().double()
    shift = kernel.new_zeros(kernel.shape[0]) if bias is None else bias.detach().double()
    roundings = kernel[0].numel() + 2
    return Affine(kernel, shift, kernel.abs(), shift.abs(), stride, padding, dilation, groups, roundings)


def average_pool(channels: int, size: Pair, stride: Pair, padding: Pair, device: torch.device | str = "cpu") -> Affine:
    """Average pooling that counts its padding, as a depthwise convolution."""
    weight = torch.full((channels, 1, *size), 1 / (size[0] * size[1]), dtype=torch.float64, device=device)
    return convolution(weight, None, stride, padding, (1, 1), channels)


# ---------------------------------------------------------------------------------------------------------- composition


def _per_channel(f: Affine, constant: Tensor) -> Tensor:
    """A constant as one number per output channel of ``f``."""
    if constant.numel() not in (1, f.out_channels):
        raise UnfoldableError(f"a constant of {constant.numel()} numbers meets {f.out_channels} channels")
    return constant.detach().to(f.bias).reshape(-1).expand(f.out_channels)


def scaled(f: Affine, scale: Tensor, roundings: int = 2) -> Affine:
    """``scale * f(x)``, with one number per channel or one for all."""
    factor = _per_channel(f, scale)
    columns = factor.reshape(-1, 1, 1, 1)
    return replace(
        f,
        weight=f.weight * columns,
        bias=f.bias * factor,
        weight_magnitude=f.weight_magnitude * columns.abs(),
        bias_magnitude=f.bias_magnitude * factor.abs(),
        roundings=f.roundings + roundings,
        is_identity=False,
    )


def shifted(f: Affine, shift: Tensor) -> Affine:
    """``f(x) + shift``, with one number per channel or one for all."""
    value = _per_channel(f, shift)
    return replace(
        f,
        bias=f.bias + value,
        bias_magnitude=f.bias_magnitude + value.abs(),
        roundings=f.roundings + 2,
        is_identity=False,
    )


def normalised(f: Affine, bn: BatchNorm) -> Affine:
    """``BN(f(x))`` in eval mode."""
    scale = torch.rsqrt(bn.var.detach().double() + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.detach().double()
    g = scaled(shifted(f, -bn.mean), scale, roundings=_BATCHNORM_ROUNDINGS)
    return g if bn.bias is None else shifted(g, bn.bias)


def padded(f: Affine, padding: Pair) -> Affine:
    """``f(x)`` with ``padding`` rows and columns of zeros on each side.

    Raises:
        UnfoldableError: no convolution does that.
    """
    if padding == (0, 0):
        return f
    zero = f.bias.device.type != "meta" and not bool((f.bias != 0).any())
    if f.kernel_size != (1, 1) or f.stride != (1, 1) or not zero:
        raise UnfoldableError("zeros are padded to what is not a 1x1 convolution of stride 1 without bias or BatchNorm")
    both = (f.padding[0] + padding[0], f.padding[1] + padding[1])
    return replace(f, padding=both, is_identity=False)


def composed(outer: Affine, inner: Affine) -> Affine:
    """``outer(inner(x))`` as one convolution.

    Raises:
        UnfoldableError: there is none, because ``outer`` pads with zeros what ``inner`` computes.
    """
    if inner.is_identity:
        return outer
    if outer.is_pointwise:
        geometry = {
            "stride": (inner.stride[0] * outer.stride[0], inner.stride[1] * outer.stride[1]),
            "padding": inner.padding,
            "dilation": inner.dilation,
        }
        subscripts = "gkmrs,gmcij->gkcij"  # r = s = 1
    else:
        size = "x".join(map(str, outer.kernel_size))
        is_1x1 = inner.kernel_size == (1, 1) and inner.stride == (1, 1)
        if not is_1x1 or (inner.padding != (0, 0) and outer.padding != (0, 0)):
            first = "x".join(map(str, inner.kernel_size))
            raise UnfoldableError(
                f"a {size} kernel follows one of {first}, stride {inner.stride}, without a nonlinearity between them: "
                "at the border one convolution cannot pad with zeros what the first computes"
            )
        if outer.padding != (0, 0) and (inner.bias.device.type == "meta" or bool((inner.bias != 0).any())):
            raise UnfoldableError(
                f"a {size} kernel pads with zeros what a 1x1 layer with a bias or BatchNorm computes, so at the border "
                "one convolution is not the same"
            )
        padding = (outer.padding[0] + inner.padding[0], outer.padding[1] + inner.padding[1])
        geometry = {"stride": outer.stride, "padding": padding, "dilation": outer.dilation}
        subscripts = "gkmrs,gmcij->gkcrs"  # i = j = 1
    groups = gcd(outer.groups, inner.groups)
    a, b = with_groups(outer, groups), with_groups(inner, groups)

    def product(left: Tensor, right: Tensor) -> Tensor:
        return torch.einsum(subscripts, _by_group(left, groups), _by_group(right, groups)).flatten(0, 1).contiguous()

    def through(kernel: Tensor, bias: Tensor) -> Tensor:
        sums = _by_group(kernel.sum((2, 3)), groups)
        return torch.einsum("gkm,gm->gk", sums, _by_group(bias, groups)).flatten()

    return Affine(
        product(a.weight, b.weight),
        through(a.weight, b.bias) + a.bias,
        product(a.weight_magnitude, b.weight_magnitude),
        through(a.weight_magnitude, b.bias_magnitude) + a.bias_magnitude,
        groups=groups,
        roundings=a.roundings + b.roundings,
        **geometry,  # type: ignore[arg-type]
    )


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    return tensor.reshape(groups, -1, *tensor.shape[1:])


def with_groups(f: Affine, groups: int) -> Affine:
    """The same map with fewer groups, which ``groups`` divides: zeros stand between them."""
    if f.groups == groups:
        return f

    def spread(kernel: Tensor) -> Tensor:
        """``[K, C / f.groups, R, S] -> [K, C / groups, R, S]``: each old group at its place within the new one."""
        parts = f.groups // groups
        k, c = kernel.shape[:2]
        old = kernel.reshape(groups, parts, k // f.groups, c, *kernel.shape[2:])
        new = old.new_zeros(groups, parts, k // f.groups, parts, c, *kernel.shape[2:])
        for i in range(parts):
            new[:, i, :, i] = old[:, i]
        return new.reshape(k, parts * c, *kernel.shape[2:])

    return replace(
        f, weight=spread(f.weight), weight_magnitude=spread(f.weight_magnitude), groups=groups, is_identity=False
    )


# ----------------------------------------------------------------------------------------------------------------- sums


def added(f: Affine, g: Affine) -> Affine:
    """``f(x) + g(x)`` as one convolution.

    Raises:
        UnfoldableError: the two disagree in channels or stride, or their outputs do not line up.
    """
    for name in ("in_channels", "out_channels", "stride"):
        a, b = getattr(f, name), getattr(g, name)
        if a != b:
            raise UnfoldableError(f"the branches disagree: one has {name} {a}, another {b}")
    if f.reach != g.reach:
        raise UnfoldableError(
            f"the branches do not line up: a {_text(f)} beside a {_text(g)}; padding must be dilation * (kernel - 1) / "
            "2, or as much off it in all"
        )
    groups = gcd(f.groups, g.groups)
    f, g = _aligned(with_groups(f, groups), with_groups(g, groups))
    return replace(
        f,
        weight=f.weight + g.weight,
        bias=f.bias + g.bias,
        weight_magnitude=f.weight_magnitude + g.weight_magnitude,
        bias_magnitude=f.bias_magnitude + g.bias_magnitude,
        roundings=max(f.roundings, g.roundings) + 2,
        is_identity=False,
    )


def _text(f: Affine) -> str:
    return f"{f.kernel_size[0]}x{f.kernel_size[1]} kernel with padding {f.padding}, dilation {f.dilation}"


def _aligned(f: Affine, g: Affine) -> tuple[Affine, Affine]:
    """Both with the same kernel size, padding and dilation: taps that one lacks are zeros."""
    dilation: list[int] = []
    for axis in (0, 1):
        spreads = [h.dilation[axis] for h in (f, g) if h.kernel_size[axis] > 1]
        common = spreads[0] if spreads and all(d == spreads[0] for d in spreads) else 1
        # Paddings must differ by whole taps, or the grids of a dilated kernel do not meet.
        dilation.append(common if (f.padding[axis] - g.padding[axis]) % common == 0 else 1)
    padding = (max(f.padding[0], g.padding[0]), max(f.padding[1], g.padding[1]))
    pair = (dilation[0], dilation[1])
    return _on_grid(f, pair, padding), _on_grid(g, pair, padding)


def _on_grid(f: Affine, dilation: Pair, padding: Pair) -> Affine:
    """The same map with that dilation, which divides its own, and that padding, which is no smaller."""
    more = [(p - q) // d for p, q, d in zip(padding, f.padding, dilation, strict=True)]

    def placed(kernel: Tensor) -> Tensor:
        sizes = [
            (k - 1) * (e // d if k > 1 else 1) + 1 for k, e, d in zip(f.kernel_size, f.dilation, dilation, strict=True)
        ]
        steps = [e // d if k > 1 else 1 for k, e, d in zip(f.kernel_size, f.dilation, dilation, strict=True)]
        grid = kernel.new_zeros(*kernel.shape[:2], sizes[0] + 2 * more[0], sizes[1] + 2 * more[1])
        rows, columns = slice(more[0], more[0] + sizes[0], steps[0]), slice(more[1], more[1] + sizes[1], steps[1])
        grid[:, :, rows, columns] = kernel
        return grid

    return replace(
        f,
        weight=placed(f.weight),
        weight_magnitude=placed(f.weight_magnitude),
        padding=padding,
        dilation=dilation,
        is_identity=False,
    )
