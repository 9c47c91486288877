# SPDX-License-Identifier: MIT
"""Checkpoint files: read without running code from them, whatever wraps the weights, and written whole or not at all.

What a file holds is decided by its keys (:mod:`repvgg_cuda.state_dict`), never by its name.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import pickle
import re
import secrets
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from repvgg_cuda.branches import require
from repvgg_cuda.state_dict import (
    FoldedState,
    Form,
    check_fits,
    convert_state_dict,
    fold_state_dict,
    form_of,
    load_into,
    parameter_count,
)

__all__ = [
    "FoldedState",
    "Form",
    "LoadedState",
    "check_fits",
    "convert_state_dict",
    "fold_state_dict",
    "form_of",
    "is_safetensors",
    "load_into",
    "load_state_dict_file",
    "parameter_count",
    "read_state_dict_file",
    "save_state_dict_file",
]

logger = logging.getLogger(__name__)

SAFETENSORS_SUFFIXES = (".safetensors",)
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar")

#: Where training scripts keep the state_dict, in the order of preference: weights as trained before their average.
CONTAINERS = ("state_dict", "model", "state_dict_ema", "model_ema", "ema")
#: What wrappers put before every key: DataParallel, torch.compile, and modules that hold the model as ``self.model``.
PREFIXES = ("module.", "_orig_mod.", "model.")


# --------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class LoadedState:
    """A state_dict, ``notes`` on what was unwrapped to find it, ``warnings`` on choices the user may not want."""

    state: dict[str, Tensor]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def load_state_dict_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state_dict in a checkpoint file, on the CPU: :func:`read_state_dict_file` with its notes and warnings logged.

    Args:
        path: ``.safetensors``; or ``.pth``, ``.pt``, ``.bin``, ``.ckpt``, ``.pth.tar``, with ``weights_only=True``.
    Raises:
        OSError: there is no such file (FileNotFoundError), or it cannot be opened.
        RuntimeError: the file is corrupt, needs code to be unpickled, or does not hold a dict of tensors.
    """
    loaded = read_state_dict_file(path)
    for note in loaded.notes:
        logger.info("%s: %s", path, note)
    for warning in loaded.warnings:
        logger.warning("%s: %s", path, warning)
    return loaded.state


def read_state_dict_file(path: str | os.PathLike[str]) -> LoadedState:
    """Reads a checkpoint file as :func:`load_state_dict_file` does, and also returns what was unwrapped on the way.

    Containers (``{"model": ..., "optimizer": ...}``) are opened, and prefixes that every key carries (``module.``,
    ``_orig_mod.``, ``model.``, in any stacking) are removed.
    """
    path = Path(path)
    read = _read_safetensors if is_safetensors(path) else _read_torch
    content, notes, choices = _open_containers(read(path), str(path))
    require(len(content) > 0, f"{path}: holds no tensors")
    for name, value in content.items():
        require(isinstance(name, str), f"{path}: must hold a dict of tensors by name, got the key {name!r}")
        require(
            isinstance(value, Tensor),
            f"{path}: must hold a dict of tensors, got {type(value).__name__} at the key '{name}', and none of the "
            f"containers {', '.join(CONTAINERS)}; save model.state_dict() by itself",
        )
    state = {name: value.detach() for name, value in content.items()}
    while prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        notes.append(f"removed the prefix '{prefix}' from every key")
    return LoadedState(state, tuple(notes), tuple(choices))


def is_safetensors(path: Path) -> bool:
    """True if a file of this name is a safetensors file, False if it is one of torch.save; RuntimeError if neither."""
    name = path.name.lower()
    if name.endswith(SAFETENSORS_SUFFIXES):
        return True
    accepted = ", ".join((*SAFETENSORS_SUFFIXES, *TORCH_SUFFIXES))
    require(name.endswith(TORCH_SUFFIXES), f"{path}: a checkpoint's name must end in one of {accepted}")
    return False


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with path.open("rb"):
        pass  # a missing or unreadable file is said by the operating system, with its name
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise RuntimeError(f"{path}: is not a safetensors file, or is truncated or corrupt ({error})") from error


def _read_torch(path: Path) -> Any:
    with path.open("rb") as file, warnings.catch_warnings():
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


def _open_containers(content: Any, where: str) -> tuple[Mapping[Any, Any], list[str], list[str]]:
    """Follows containers down to the state_dict. Returns it with the notes and the warnings about the way."""
    notes: list[str] = []
    choices: list[str] = []
    while True:
        require(isinstance(content, Mapping), f"{where}: must hold a dict of tensors, got {type(content).__name__}")
        found = [name for name in CONTAINERS if isinstance(content.get(name), Mapping)]
        if not found:
            return content, notes, choices
        notes.append(f"took '{found[0]}' of {', '.join(map(str, content))}")
        if len(found) > 1:
            others = ", ".join(f"'{name}'" for name in found[1:])
            choices.append(f"took '{found[0]}', not {others}; to use another, save it by itself")
        where, content = f"{where}: {found[0]}", content[found[0]]


# --------------------------------------------------------------------------------------------------------- writing


def save_state_dict_file(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Writes a RepVGG state_dict, whole or not at all: a file already at ``path`` is replaced only by a complete one.

    Args:
        state: train form or deploy form. safetensors also records which, as the metadata entry ``repvgg_cuda``.
        path: ``.safetensors``, or ``.pth``, ``.pt``, ``.bin``, ``.ckpt``, ``.pth.tar`` (a plain dict of tensors).
    Raises:
        RuntimeError: another extension, or not a RepVGG state_dict. OSError: ``path`` cannot be written.
    """
    path = Path(os.path.realpath(path))  # a symbolic link stays one: its target is what is replaced
    metadata = {"format": "pt", "repvgg_cuda": form_of(state)}
    tensors = _standalone(state)
    if is_safetensors(path):
        data = safetensors.torch.save(tensors, metadata)
    else:
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        data = buffer.getvalue()
    with _atomic_file(path) as file:
        file.write(data)


def _standalone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors dense, on the CPU, each with a storage of its own: a file holds neither views nor aliases."""
    tensors, seen = {}, set()
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        tensors[name] = tensor
    return tensors


@contextlib.contextmanager
def _atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends well, and leaves no trace when it does not."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")  # os.replace needs the same file system
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the name must not reach the disk before the contents
        os.replace(temporary, path)
    except OSError as error:  # name the file the user asked for, not the temporary one
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # a failing clean-up must not hide the first error
            temporary.unlink()
