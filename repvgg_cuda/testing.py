# SPDX-License-Identifier: MIT
"""Cases, oracles and derived error bounds, shared by tests, benchmarks and ``verify``. Numbers, no assertions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg_cuda.branches import BatchNorm, Branch, Branches
from repvgg_cuda.reference import fold_fp64

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next larger number: 2^-24 for float32."""
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Case:
    """One 3x3 convolution problem; C, K are C_in, C_out."""

    name: str
    N: int
    C: int
    H: int
    W: int
    K: int
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        groups = f"g{self.groups}" if self.groups > 1 else ""
        return f"{self.name}-{self.N}x{self.C}x{self.H}x{self.W}-k{self.K}s{self.stride}{groups}"

    @property
    def x_size(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.H, self.W

    @property
    def weight_size(self) -> tuple[int, int, int, int]:
        return self.K, self.C // self.groups, 3, 3

    @property
    def terms(self) -> int:
        """Products summed in one output: 9 * C_in / groups."""
        return 9 * self.C // self.groups

    @property
    def flops(self) -> int:
        """Multiplications and additions, with the taps that fall on padding counted."""
        p, q = (self.H - 1) // self.stride + 1, (self.W - 1) // self.stride + 1
        return 2 * self.N * self.K * p * q * self.terms

    def tensors(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Random ``(x, weight, bias)``; the weights are scaled so that outputs are of order 1."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.x_size, generator=generator)
        weight = torch.randn(self.weight_size, generator=generator) / self.terms**0.5
        bias = torch.randn(self.K, generator=generator)
        return x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


#: Where kernels break: single pixels, single rows, sizes just off a tile, groups up to depthwise, empty batch.
EDGE_CASES = (
    Case("pixel", 1, 3, 1, 1, 4),
    Case("row", 1, 3, 1, 19, 4),
    Case("column", 2, 3, 19, 1, 4, stride=2),
    Case("odd", 2, 5, 7, 9, 6),
    Case("odd", 2, 5, 7, 9, 6, stride=2),
    Case("odd", 1, 16, 33, 17, 24),
    Case("odd", 1, 16, 33, 17, 24, stride=2),
    Case("even-stride", 1, 8, 8, 10, 8, stride=2),
    Case("notebook", 1, 2, 256, 256, 2),
    Case("g2", 2, 8, 9, 8, 12, groups=2),
    Case("g4", 1, 12, 11, 13, 8, stride=2, groups=4),
    Case("depthwise", 2, 10, 9, 7, 10, groups=10),
    Case("depthwise-multiplier", 1, 6, 8, 8, 18, stride=2, groups=6),
    Case("batch9", 9, 4, 6, 6, 4),
    Case("empty-batch", 0, 4, 6, 6, 4),
    Case("many-channels", 1, 1280, 3, 3, 8),
    Case("one-channel", 3, 1, 12, 12, 1),
)

#: Distinct 3x3 layers of RepVGG-A0 and B1g4 at 224 px (arXiv:2101.03697, tables 2 and 3), batch 1.
REPVGG_LAYERS = (
    Case("stem", 1, 3, 224, 224, 48, stride=2),
    Case("A0-stage1.0", 1, 48, 112, 112, 48, stride=2),
    Case("A0-stage1", 1, 48, 56, 56, 48),
    Case("A0-stage2", 1, 96, 28, 28, 96),
    Case("A0-stage3", 1, 192, 14, 14, 192),
    Case("A0-stage4", 1, 192, 14, 14, 1280, stride=2),
    Case("B1-stage1", 1, 128, 56, 56, 128),
    Case("B1-stage2", 1, 256, 28, 28, 256),
    Case("B1-stage3", 1, 512, 14, 14, 512),
    Case("B1g4-stage3", 1, 512, 14, 14, 512, groups=4),
)


def conv3x3_fp64(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, groups: int = 1, activation: str = "identity"
) -> Tensor:
    """The oracle: the convolution of the given (already rounded) arguments in float64."""
    y = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), stride, 1, 1, groups)
    return y.relu() if activation == "relu" else y


def error_bound(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, groups: int = 1, algorithm: str = "aten"
) -> Tensor:
    """How far a correct kernel may be from :func:`conv3x3_fp64`, per output element.

    A sum of n products in any order, each operation rounded with unit u, is off by at most ``gamma_n * sum |w||x|``
    with ``gamma_n = n u / (1 - n u)`` (Higham, Accuracy and Stability of Numerical Algorithms, sec. 3.1); the bias is
    one more term, so n = 9 C_in / groups + 1. Sums run in float32 (float64 for float64). Storing a 16-bit result rounds
    it by u of that type, and half a subnormal step; the result before the bias may have been stored too. ReLU adds
    nothing.

    Tensor cores (:data:`TENSOR_CORES`) multiply exactly, but add the products of a block of at least 8 to the sum so
    far after cutting all of them off at the unit in the last place of the largest: 9 errors of 2 u for 8 products
    (Fasi, Higham, Mikaitis, Pranesh, Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7:e330, 2021).
    tf32 rounds the weight to 11 bits and cuts x off after 11 before that.

    Winograd rows (:data:`WINOGRAD`) compute ``A^T [U * (B^T d B)] A`` tile by tile, so their bound is gamma of the
    longest chain of roundings (C_in / groups products; at most pairs + 3 in each of four 1-D transforms; one for U, one
    for the bias) times the same expression over absolute values. NaN or Inf where the oracle is not finite.
    """
    if algorithm in WINOGRAD:
        return _winograd_bound(x, weight, bias, stride, groups, WINOGRAD[algorithm])
    tensor_cores = algorithm in TENSOR_CORES and (x.dtype != torch.float32 or algorithm == "mma_tf32")
    return conv_error_bound(
        x, weight, bias, (stride, stride), (1, 1), (1, 1), groups,
        rounding=2 * 9 / 8 if tensor_cores else 1,
        operands=(1 + 2**-11) * (1 + 2**-10) - 1 if algorithm == "mma_tf32" else 0,
    )  # fmt: skip


def conv_error_bound(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    *,
    rounding: float = 1,
    operands: float = 0,
) -> Tensor:
    """:func:`error_bound` for a sum of products with a kernel of any size, as F.conv2d computes it.

    ``rounding``: the error of one addition in units of the type that is summed in. ``operands``: the relative error of
    a product whose factors are rounded first.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    n = weight[0].numel() + 1
    u = unit_roundoff(compute) * rounding
    magnitudes = (weight.abs().double(), None if bias is None else bias.abs().double())
    absolute = F.conv2d(x.abs().double(), *magnitudes, stride, padding, dilation, groups)
    bound = n * u / (1 - n * u) * absolute
    bound = bound * (1 + operands) + operands * absolute
    if x.dtype != compute:
        u_out = unit_roundoff(x.dtype)
        bound = bound * (1 + 2 * u_out) + 2 * u_out * absolute + torch.finfo(x.dtype).smallest_normal * u_out * 2
    elif compute == torch.float64:
        bound = 2 * bound  # the oracle itself rounds in the same way
    return bound


#: Rows of the CUDA table that multiply on tensor cores.
TENSOR_CORES = ("mma", "mma_tf32", "stem")

#: Pairs of evaluation points of each Winograd row (csrc/core/winograd_points.h).
WINOGRAD: Mapping[str, tuple[float, ...]] = {
    "winograd2": (1.0,),
    "winograd4": (0.75, 1.5),
    "winograd6": (1.0, 2.0, 0.5),
    "polyphase": (0.75, 1.5),
}


def winograd_matrices(pairs: Sequence[float], cls: int, stride: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """``(A^T [m, p], G [p, 3], B^T [p, inputs])`` of a tile of class ``cls``: ``y = A^T [(G g) * (B^T d)]``, float64.

    The first ``cls`` pairs of points are used, with ``G`` normalised for all of them, as the kernels do. With stride 2
    the last m products are the odd inputs times the middle tap.
    """
    finite = [0.0, *(sign * q for q in pairs for sign in (1, -1))]
    used = finite[: 2 * cls + 1]
    m = 2 * cls + stride - 1
    taps = torch.tensor([[1, a, a * a] if stride == 1 else [1, 0, a] for a in used], dtype=torch.float64)
    norms = torch.tensor([math.prod(a - b for b in finite if b != a) for a in used], dtype=torch.float64)
    g = torch.cat([taps / norms[:, None], torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)])
    a_t = torch.zeros(m, len(used) + 1, dtype=torch.float64)
    a_t[:, :-1] = torch.tensor([[a**r for a in used] for r in range(m)], dtype=torch.float64)
    a_t[-1, -1] += 1
    rows = [_polynomial([b for b in used if b != a]) for a in used] + [_polynomial(used)]
    b_t = torch.zeros(len(rows), 2 * cls + 2, dtype=torch.float64)
    for i, row in enumerate(rows):
        b_t[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    for i, a in enumerate(used):
        b_t[i] *= math.prod(a - b for b in finite if b not in used)
    if stride == 2:
        even = torch.zeros(len(rows) + m, 2 * m + 1, dtype=torch.float64)
        even[: len(rows), 0::2] = b_t
        even[len(rows) :, 1::2] = torch.eye(m, dtype=torch.float64)
        middle = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64).expand(m, 3)
        return torch.cat([a_t, torch.eye(m, dtype=torch.float64)], 1), torch.cat([g, middle]), even
    return a_t, g, b_t


def _polynomial(roots: Sequence[float]) -> list[float]:
    """Ascending coefficients of prod (x - root)."""
    coefficients = [1.0]
    for root in roots:
        shifted, scaled = [0.0, *coefficients], [*(-root * c for c in coefficients), 0.0]
        coefficients = [a + b for a, b in zip(shifted, scaled, strict=True)]
    return coefficients


def winograd_tiles(outputs: int, pairs: int, stride: int = 1) -> list[tuple[int, int]]:
    """``(first output, class)`` of the tiles that the Winograd rows cut an extent into."""
    tiles, start, cls = [], 0, pairs
    while start < outputs:
        left = outputs - start
        cls = min(cls, (left + 1) // 2 if stride == 1 else (left - 1) // 2)
        tiles.append((start, cls))
        start += 2 * cls + stride - 1
    return tiles


def _winograd_bound(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, groups: int, pairs: Sequence[float]
) -> Tensor:
    u = unit_roundoff(torch.float32)
    n = weight.shape[1] + 4 * (len(pairs) + 3) + 2
    height, width = ((extent - 1) // stride + 1 for extent in x.shape[2:])
    padded = F.pad(x.double().abs(), (1, 8, 1, 8))  # tiles may reach past the border
    kernels = weight.double()
    total = x.new_zeros((x.shape[0], weight.shape[0], height + 8, width + 8), dtype=torch.float64)
    rows, cols = (winograd_tiles(extent, len(pairs), stride) for extent in (height, width))
    for row_cls in {cls for _, cls in rows}:
        for col_cls in {cls for _, cls in cols}:
            (a_r, g_r, b_r), (a_c, g_c, b_c) = (
                [matrix.to(x.device) for matrix in winograd_matrices(pairs, cls, stride)] for cls in (row_cls, col_cls)
            )
            starts = [
                torch.tensor([s for s, cls in tiles if cls == c]) for tiles, c in ((rows, row_cls), (cols, col_cls))
            ]
            in_r, in_c = (
                (s[:, None] * stride + torch.arange(b.shape[1])).to(x.device)
                for s, b in zip(starts, (b_r, b_c), strict=True)
            )
            windows = padded[:, :, in_r][:, :, :, :, in_c]  # [N, C, tiles, inputs, tiles, inputs]
            v = torch.einsum("pi,qj,ncaibj->ncabpq", b_r.abs(), b_c.abs(), windows)
            transformed = torch.einsum("pr,qs,kcrs->kcpq", g_r, g_c, kernels).abs()
            m = torch.cat(
                [
                    torch.einsum("ncabpq,kcpq->nkabpq", part, filters)
                    for part, filters in zip(v.chunk(groups, 1), transformed.chunk(groups, 0), strict=True)
                ],
                1,
            )
            out = torch.einsum("rp,sq,nkabpq->nkarbs", a_r.abs(), a_c.abs(), m)
            out_r, out_c = (
                (s[:, None] + torch.arange(a.shape[0])).to(x.device) for s, a in zip(starts, (a_r, a_c), strict=True)
            )
            total[:, :, out_r[:, :, None, None], out_c] = out
    total = total[:, :, :height, :width]
    if bias is not None:
        total = total + bias.double().abs().reshape(1, -1, 1, 1)
    return n * u / (1 - n * u) * total


def fold_bound(branches: Branches, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """How far a fold in float64, rounded once to ``dtype``, may be from the exact one: bounds of weight and bias.

    A product and its scale take at most 6 roundings in float64 (add eps, root, divide, gamma, product, and one addition
    per branch), a BatchNorm on the sum as many again; each is relative to the sum of magnitudes. The final rounding is
    relative to the result, which the magnitudes bound, or half a step between subnormals.
    """
    weight, bias = _fold_magnitudes(branches)
    u64, u = unit_roundoff(torch.float64), unit_roundoff(dtype)
    steps = 2 * (6 + len(branches.parts)) * (2 if branches.post_bn else 1)
    factor = steps * u64 + u * (1 + 2**-12)  # a float64 may pass through float32 on its way to a 16-bit type
    half_step = torch.finfo(dtype).smallest_normal * u
    return weight * factor + half_step, bias * factor + half_step


def multi_branch_bound(x: Tensor, branches: Branches, stride: int = 1) -> Tensor:
    """How far ``reference.multi_branch`` in the dtype of ``x`` may be from the same in float64, per output element.

    Every term (an input times a tap times its branch's scale, a bias, a mean, a beta) is rounded in the sum of its
    convolution (9 C_in / groups products and a bias), in its BatchNorm (at most 8 times for the scale, 3 times to
    apply it; as often again for a BatchNorm on the sum) and in the sum of the branches; the bound is gamma of that
    count times the sum of the magnitudes. 16-bit types compute each layer in float32 and store it: those roundings,
    and half a subnormal step at each store, come on top.
    """
    weight, bias = _fold_magnitudes(branches)
    absolute = conv3x3_fp64(x.abs(), weight, bias, stride, branches.groups)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    batchnorms = 2 if branches.post_bn else 1
    n = 9 * branches.in_channels // branches.groups + 1 + 11 * batchnorms + len(branches.parts)
    u = unit_roundoff(compute)
    bound = n * u / (1 - n * u) * absolute
    if x.dtype != compute:
        stores, u_out = 6 * batchnorms + len(branches.parts), unit_roundoff(x.dtype)
        half_step = torch.finfo(x.dtype).smallest_normal * u_out
        bns = [bn for bn in (*(part.bn for part in branches.parts), branches.post_bn) if bn is not None]
        growth = max((float(_scale(bn).max()) for bn in bns), default=1.0)
        bound = bound * (1 + 2 * stores * u_out) + 2 * stores * (u_out * absolute + half_step * (1 + growth) ** 2)
    elif compute == torch.float64:
        bound = 2 * bound  # the oracle itself rounds in the same way
    return bound


def _scale(bn: BatchNorm) -> Tensor:
    """The magnitude of a BatchNorm's scale, in float64."""
    scale = torch.rsqrt(bn.var.double() + bn.eps)
    return scale if bn.weight is None else scale * bn.weight.double().abs()


def _fold_magnitudes(branches: Branches) -> tuple[Tensor, Tensor]:
    """The fold of the block's absolute values: every term added, none cancelling."""

    def magnitude(bn: BatchNorm | None) -> BatchNorm | None:
        if bn is None:
            return None
        weight = None if bn.weight is None else bn.weight.abs()
        bias = None if bn.bias is None else bn.bias.abs()
        return BatchNorm(-bn.mean.abs(), bn.var, bn.eps, weight, bias)

    parts = tuple(
        Branch(
            None if part.kernel is None else part.kernel.abs(),
            None if part.bias is None else part.bias.abs(),
            magnitude(part.bn),
        )
        for part in branches.parts
    )
    return fold_fp64(
        Branches(parts, branches.in_channels, branches.out_channels, branches.groups, magnitude(branches.post_bn))
    )


def worst(y: Tensor, want: Tensor, bound: Tensor) -> str:
    """A line about the element that uses most of its bound."""
    error = (y.double() - want).abs()
    if error.numel() == 0:
        return "empty"
    ratio = (error / bound.clamp_min(1e-300)).flatten()
    i = int(ratio.argmax())
    return (
        f"worst element {i}: got {y.flatten()[i].item():.9g}, want {want.flatten()[i].item():.9g}, "
        f"error {error.flatten()[i].item():.3g}, bound {bound.flatten()[i].item():.3g}"
    )


def random_batchnorm(channels: int, generator: torch.Generator, eps: float = 1e-5, affine: bool = True) -> BatchNorm:
    """Statistics as training leaves them: scales near 1 of either sign, means near 0, variances over a decade."""

    def normal() -> Tensor:
        return torch.randn(channels, generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(channels, generator=generator) * (high - low) + low

    mean, var = 0.3 * normal(), uniform(0.2, 2.0)
    return BatchNorm(mean, var, eps, uniform(-1.5, 1.5), 0.3 * normal()) if affine else BatchNorm(mean, var, eps)


def random_branches(
    in_channels: int,
    out_channels: int,
    groups: int = 1,
    seed: int = 0,
    *,
    n_3x3: int = 1,
    n_1x1: int = 1,
    identity: bool = True,
    bias: bool = False,
    bn: bool = True,
    affine: bool = True,
    post_bn: bool = False,
    eps: float = 1e-5,
) -> Branches:
    """A random float32 block; the default is RepVGG's: 3x3, 1x1 and (where channels agree) identity, each with BN."""
    generator = torch.Generator().manual_seed(seed)

    def part(size: int | None) -> Branch:
        fan_in = in_channels // groups * (size or 1) ** 2
        kernel = (
            None
            if size is None
            else torch.randn(out_channels, in_channels // groups, size, size, generator=generator) / fan_in**0.5
        )
        branch_bias = torch.randn(out_channels, generator=generator) if bias and size is not None else None
        return Branch(kernel, branch_bias, random_batchnorm(out_channels, generator, eps, affine) if bn else None)

    sizes: list[int | None] = [*[3] * n_3x3, *[1] * n_1x1]
    if identity and in_channels == out_channels:
        sizes.append(None)
    parts = tuple(part(size) for size in sizes)
    trailing = random_batchnorm(out_channels, generator, eps, affine) if post_bn else None
    return Branches(parts, in_channels, out_channels, groups, trailing)
