# SPDX-License-Identifier: MIT
"""The header of packed weights: csrc/ops/packed.h in Python, for reports, fake kernels and the fallback.

Packed weights are a 1-D uint8 tensor on the CPU: a header of :data:`HEADER_BYTES` bytes, then the weights in the order
of the algorithm that the header names. A layer whose algorithm reads weights as they are has the header alone.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from repvgg_cuda.branches import dtype_name, require, shape_name

MAGIC = b"RVGPACK1"
_HEADER = struct.Struct("<8s16s16s5qQ40x")
HEADER_BYTES = _HEADER.size

#: How much memory packed weights may take: any ("fast"), or no more than the weight itself ("low").
MEMORY = ("fast", "low")

_SAMPLES = 16
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


class PackedInfo(NamedTuple):
    """What the header says. ``target`` is the instruction set whose kernels read the payload, "" without a payload."""

    algorithm: str
    target: str
    in_channels: int
    out_channels: int
    groups: int
    stride: int
    payload_bytes: int
    fingerprint: int


def read(packed: Tensor, where: str = "packed_info") -> PackedInfo:
    """The header of ``packed``.

    Raises:
        RuntimeError: it is not what :func:`repvgg_cuda.prepack` returns, or it is truncated.
    """
    check_tensor(packed, where)
    head = bytes(packed[:HEADER_BYTES].tolist())
    require(
        len(head) == HEADER_BYTES and head.startswith(MAGIC),
        f"{where}: packed does not begin with the header that repvgg_cuda.prepack writes; call prepack again",
    )
    _, algorithm, target, *numbers = _HEADER.unpack(head)
    info = PackedInfo(_text(algorithm), _text(target), *numbers)
    require(
        packed.numel() == HEADER_BYTES + info.payload_bytes,
        f"{where}: packed must have {HEADER_BYTES} + {info.payload_bytes} bytes, as its header says, got "
        f"{packed.numel()}; call prepack again",
    )
    return info


def header_only(algorithm: str, weight: Tensor, stride: int, groups: int) -> Tensor:
    """Packed weights without a payload, for an algorithm that reads weights as they are."""
    shape = (weight.shape[1] * groups, weight.shape[0], groups, stride)
    head = _HEADER.pack(MAGIC, algorithm.encode(), b"", *shape, 0, fingerprint(weight))
    return torch.tensor(list(head), dtype=torch.uint8)


def fingerprint(weight: Tensor) -> int:
    """FNV-1a over the bits of 16 weights, evenly spread from the first to the last; 0 on a GPU."""
    if weight.device.type != "cpu":
        return 0
    last = weight.numel() - 1
    samples = torch.tensor([last * i // (_SAMPLES - 1) for i in range(_SAMPLES)])
    values = weight.detach()[torch.unravel_index(samples, weight.shape)]
    width = values.element_size()
    result = 0xCBF29CE484222325
    for bits in values.view(_BITS[width]).tolist():
        result = (result ^ (bits & (1 << 8 * width) - 1)) * 0x100000001B3 & (1 << 64) - 1
    return result


def check_tensor(packed: Tensor, where: str) -> None:
    """Raises RuntimeError unless ``packed`` can be packed weights; what a fake kernel can know."""
    require(
        packed.dtype == torch.uint8
        and packed.dim() == 1
        and packed.device.type in ("cpu", "meta")
        and packed.is_contiguous(),
        f"{where}: packed must be a contiguous 1-D uint8 tensor on the CPU, as repvgg_cuda.prepack returns, got "
        f"{dtype_name(packed.dtype)} {shape_name(packed)} on {packed.device}",
    )


def check_made_for(packed: Tensor, weight: Tensor, stride: int, groups: int, algorithm: str, where: str) -> PackedInfo:
    """The header, if ``packed`` was made from ``weight`` for such a layer. Checks and texts of csrc/ops/packed.h.

    Raises:
        RuntimeError: it was not; the message says what differs.
    """
    info = read(packed, where)
    in_channels, out_channels = weight.shape[1] * groups, weight.shape[0]
    require(
        info[2:6] == (in_channels, out_channels, groups, stride),
        f"{where}: packed was made for C_in={info.in_channels}, C_out={info.out_channels}, groups={info.groups}, "
        f"stride={info.stride}, but the layer has C_in={in_channels}, C_out={out_channels}, groups={groups}, "
        f"stride={stride}; call prepack again",
    )
    require(
        info.fingerprint == fingerprint(weight),
        f"{where}: packed was made for other values of weight, which have changed since; call prepack again",
    )
    require(
        algorithm in ("auto", info.algorithm),
        f"{where}: algorithm must be 'auto' or that of packed, '{info.algorithm}', got '{algorithm}'; call prepack "
        f"again with algorithm='{algorithm}'",
    )
    return info


def _text(field: bytes) -> str:
    """A name out of the header; a damaged one may hold anything."""
    return "".join(chr(byte) if 32 <= byte < 127 else "?" for byte in field.split(b"\0")[0])
