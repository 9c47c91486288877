# SPDX-License-Identifier: MIT
"""Functions with assertions of their own: in the files of tests pytest rewrites them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def require_image(x: Tensor, channels: int) -> None:
    _, c, h, w = x.shape
    assert c == channels, "channels"
    assert h > 1
    assert w > 1
    assert not h * w == 1
    if x.dim() != 4:
        raise ValueError("not images")


def asserted(x: Any) -> int:
    assert x
    return 1


def raised(x: Any) -> int:
    if not x:
        raise ValueError(x)
    return 1


def caught(x: Any) -> int:
    try:
        assert x
    except AssertionError:
        return 2
    return 1


def chosen(x: Any) -> int:
    if x:
        return 2
    return 1
