# SPDX-License-Identifier: MIT
"""Re-parameterizable blocks as other libraries have them, in our own words: classes the package knows nothing of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBN(nn.Module):
    def __init__(self, c_in: int, c_out: int, size: int, stride: int = 1, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y


class ManyBranches(nn.Module):
    """As MobileOne: several 3x3 branches, a 1x1, a BatchNorm; with a deployed form that its forward knows."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1, groups: int = 1, n: int = 2) -> None:
        super().__init__()
        self.reparam_conv = None
        self.identity = nn.BatchNorm2d(c_in) if c_in == c_out and stride == 1 else None
        self.conv_kxk = nn.ModuleList([ConvBN(c_in, c_out, 3, stride, groups) for _ in range(n)])
        self.conv_scale = ConvBN(c_in, c_out, 1, stride, groups)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam_conv is not None:
            y: Tensor = self.act(self.reparam_conv(x))
            return y
        out = self.conv_scale(x)
        if self.identity is not None:
            out = out + self.identity(x)
        for branch in self.conv_kxk:
            out += branch(x)
        y = self.act(out)
        return y


class PostNormed(nn.Module):
    """As RepViT: a depthwise convolution and a bare one, the input, and a BatchNorm on the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = ConvBN(channels, channels, 3, groups=channels)
        self.conv1 = nn.Conv2d(channels, channels, 1, groups=channels)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x) + self.conv1(x) + x)
        return y


class Mixer(nn.Module):
    """As FastViT: a sum within a difference, scaled by a parameter, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.mixer = PostNormed(channels)
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))


class LargeKernel(nn.Module):
    """As RepLKNet: 7x7 beside 3x3, depthwise."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.large = ConvBN(channels, channels, 7, groups=channels)
        self.small = ConvBN(channels, channels, 3, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.large(x) + self.small(x))


class Residual(nn.Module):
    """No block: there is a nonlinearity before the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvBN(channels, channels, 3), ConvBN(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + x)


class Net(nn.Module):
    """All of them; ``stem`` is a chain with a ReLU, ``branch`` and ``skip`` are a sum in the network's own forward."""

    def __init__(self, channels: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.Sequential(ManyBranches(channels, channels), PostNormed(channels), Mixer(channels))
        self.branch, self.skip = ConvBN(channels, channels, 3), nn.Conv2d(channels, channels, 1)
        self.tail = nn.Sequential(LargeKernel(channels), Residual(channels))
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = F.relu(self.branch(x) + self.skip(x))
        y: Tensor = self.head(self.tail(x).mean((2, 3)))
        return y
