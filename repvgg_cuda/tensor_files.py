# SPDX-License-Identifier: MIT
"""Files of tensors, at the level of bytes: opened without running code from them, written whole or not at all.

A safetensors file is read tensor by tensor and written tensor by tensor, so that memory stays far below its size.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors
import torch
from torch import Tensor

from repvgg_cuda.branches import dtype_name, require

SAFETENSORS_SUFFIXES = (".safetensors",)
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar")

#: Bytes read from a safetensors file before it is opened anew: that is what gives its mapped pages back.
_REOPEN_AFTER = 16 * 2**20

#: What one byte of a checkpoint may stand for. Its tensors may share memory, but a small file that claims to hold huge
#: ones (strides of zero, a thousand names for one storage) would fill the memory of whoever copies them.
_MAX_EXPANSION = 8

_SAFETENSORS_DTYPES: Mapping[torch.dtype, str] = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}
_TORCH_DTYPES = {name: dtype for dtype, name in _SAFETENSORS_DTYPES.items()}


def is_safetensors(path: Path) -> bool:
    """True if a file of this name is a safetensors file, False if it is one of torch.save; RuntimeError if neither."""
    name = path.name.lower()
    if name.endswith(SAFETENSORS_SUFFIXES):
        return True
    accepted = ", ".join((*SAFETENSORS_SUFFIXES, *TORCH_SUFFIXES))
    require(name.endswith(TORCH_SUFFIXES), f"{path}: a checkpoint's name must end in one of {accepted}")
    return False


# ----------------------------------------------------------------------------------------------------------- reading


class SafetensorsReader:
    """The tensors of a safetensors file, one at a time. ``specs``: the tensors on the meta device.

    Raises:
        OSError: the file cannot be opened. RuntimeError: its header is not that of a safetensors file of this length.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb"):
            pass  # a missing or unreadable file is said by the operating system, with its name
        self._path = path
        self._read = 0
        self._file = self._open()
        self.specs = {key: self._spec(key) for key in self._file.keys()}  # noqa: SIM118 (not a dict)

    def _open(self) -> Any:
        try:
            return safetensors.safe_open(self._path, framework="pt", device="cpu")
        except safetensors.SafetensorError as error:
            raise self._corrupt(error) from error

    def _corrupt(self, error: Exception) -> RuntimeError:
        return RuntimeError(f"{self._path}: is not a safetensors file, or is truncated or corrupt ({error})")

    def _spec(self, key: str) -> Tensor:
        view = self._file.get_slice(key)
        dtype = _TORCH_DTYPES.get(view.get_dtype())
        if dtype is None:  # rare: let the library say it
            return self._load(key).to("meta")
        return torch.empty(view.get_shape(), dtype=dtype, device="meta")

    def _load(self, key: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(key)
        except safetensors.SafetensorError as error:
            raise self._corrupt(error) from error
        return tensor

    def load(self, key: str) -> Tensor:
        """The tensor, on the CPU. It keeps the file's pages in memory for as long as it lives."""
        if self._read > _REOPEN_AFTER:
            self._file, self._read = self._open(), 0
        tensor = self._load(key)
        self._read += tensor.nbytes
        return tensor


def read_torch_file(path: Path) -> Any:
    """What torch.save wrote, with ``weights_only=True``: nothing of the file is run. Its tensors are on the CPU.

    Raises:
        OSError: the file cannot be opened. RuntimeError: it is damaged, or needs code to be unpickled.
    """
    with path.open("rb") as file, warnings.catch_warnings():
        _refuse_compressed(path, file)
        warnings.simplefilter("ignore")  # about the protocol of pickles that are refused below in any case
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file may raise anything: KeyError, EOFError, OSError, ...
            refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
            if refused is not None:
                raise RuntimeError(
                    f"{path}: holds more than tensors ({refused[1]}), and unpickling could run code from the file; "
                    "where it was made, save the weights alone: torch.save(model.state_dict(), 'NAME.pth') or "
                    "safetensors.torch.save_file(model.state_dict(), 'NAME.safetensors')"
                ) from error
            raise RuntimeError(f"{path}: is not a PyTorch checkpoint, or is truncated or corrupt") from error


def _refuse_compressed(path: Path, file: BinaryIO) -> None:
    """torch.save stores the records of its zip file as they are; one that is compressed may unpack to any size."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise RuntimeError(f"{path}: is not a PyTorch checkpoint, or is truncated or corrupt") from error
    size = path.stat().st_size
    compressed = next((record for record in records if record.compress_type != zipfile.ZIP_STORED), None)
    require(
        compressed is None and sum(record.file_size for record in records) <= size,
        f"{path}: is a zip file that unpacks to more than it holds, and torch.save writes none such",
    )
    file.seek(0)


def require_plausible(path: Path, tensors: Iterable[Tensor]) -> None:
    """Raises RuntimeError if the tensors together are much larger than the file they come from."""
    claimed, size = sum(tensor.nbytes for tensor in tensors), path.stat().st_size
    require(
        claimed <= _MAX_EXPANSION * size + 2**20,
        f"{path}: its tensors would take {claimed:,} bytes, and the file has {size:,}: it is damaged, or made to "
        "fill the memory",
    )


# ----------------------------------------------------------------------------------------------------------- writing


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def write_safetensors(
    file: BinaryIO,
    specs: Sequence[TensorSpec],
    values: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file tensor by tensor: the library's own writer takes them all at once.

    ``values`` come in any order, each as its spec says. Wide dtypes lie first, so that every tensor is aligned.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
        require(
            spec.dtype in _SAFETENSORS_DTYPES,
            f"{spec.key}: safetensors has no {dtype_name(spec.dtype)}; write a .pth file",
        )
        nbytes = spec.dtype.itemsize * torch.Size(spec.shape).numel()
        header[spec.key] = {
            "dtype": _SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    data = 8 + len(text)
    by_key = {spec.key: spec for spec in specs}
    for key, tensor in values:
        spec = by_key.pop(key)
        require(
            tuple(tensor.shape) == spec.shape and tensor.dtype == spec.dtype,
            f"{key} was to be {list(spec.shape)} of {dtype_name(spec.dtype)}, got {list(tensor.shape)} of "
            f"{dtype_name(tensor.dtype)}",
        )
        file.seek(data + header[key]["data_offsets"][0])
        file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    require(not by_key, f"{', '.join(by_key)} were never written")
