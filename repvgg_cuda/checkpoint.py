# SPDX-License-Identifier: MIT
"""Checkpoint files: read without running code from them, whatever wraps the weights, and written whole or not at all.

What a file holds is decided by its keys (:mod:`repvgg_cuda.zoo`), never by its name.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from repvgg_cuda.branches import require
from repvgg_cuda.files import atomic_file
from repvgg_cuda.recognition import recognise
from repvgg_cuda.state_dict import (
    FoldedState,
    Form,
    StatePlan,
    StateReport,
    check_fits,
    form_of,
    fuse_state_dict,
    load_into,
    parameter_count,
    plan,
)
from repvgg_cuda.tensor_files import (
    SAFETENSORS_SUFFIXES,
    TORCH_SUFFIXES,
    SafetensorsReader,
    TensorSpec,
    is_safetensors,
    read_torch_file,
    require_plausible,
    write_safetensors,
)

__all__ = [
    "SAFETENSORS_SUFFIXES",
    "TORCH_SUFFIXES",
    "FoldedState",
    "Form",
    "LoadedState",
    "OpenedState",
    "StateReport",
    "check_fits",
    "convert_file",
    "form_of",
    "fuse_state_dict",
    "is_safetensors",
    "load_into",
    "load_state_dict_file",
    "open_state_dict_file",
    "parameter_count",
    "plan",
    "read_state_dict_file",
    "recognise",
    "save_state_dict_file",
]

logger = logging.getLogger(__name__)

#: Where training scripts keep the state_dict, in the order of preference: weights as trained before their average.
CONTAINERS = ("state_dict", "model", "state_dict_ema", "model_ema", "ema")
#: What wrappers put before every key: DataParallel, torch.compile, and modules that hold the model as ``self.model``.
#: YOLO's own networks are ``self.model``, a list: ``model.0.`` is not a wrapper's.
PREFIXES = (r"module\.", r"_orig_mod\.", r"model\.(?!\d+\.)")


# --------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class OpenedState:
    """A state_dict that is read tensor by tensor.

    ``specs``: the tensors on the meta device. ``load``: the one of a key, on the CPU, once. ``notes`` on what was
    unwrapped to find it, ``warnings`` on choices the user may not want.
    """

    specs: dict[str, Tensor]
    load: Callable[[str], Tensor]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class LoadedState:
    """A state_dict, and the notes and warnings of :class:`OpenedState`."""

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
    opened = open_state_dict_file(path)
    return LoadedState({key: opened.load(key) for key in opened.specs}, opened.notes, opened.warnings)


def open_state_dict_file(path: str | os.PathLike[str]) -> OpenedState:
    """Opens a checkpoint file as :func:`read_state_dict_file` does; of a safetensors file only the header is read."""
    path = Path(path)
    notes: list[str] = []
    choices: list[str] = []
    if is_safetensors(path):
        reader = SafetensorsReader(path)
        specs: dict[str, Tensor] = reader.specs
        read: Callable[[str], Tensor] = reader.load
    else:
        content = _open_containers(read_torch_file(path), str(path), notes, choices)
        tensors = _tensors_of(path, content)
        specs, read = {name: value.to("meta") for name, value in tensors.items()}, lambda name: tensors.pop(name)
    require(len(specs) > 0, f"{path}: holds no tensors")
    names = {name: name for name in specs}
    while prefix := next((p for p in PREFIXES if all(re.match(p, name) for name in names)), None):
        names = {name[re.match(prefix, name).end() :]: original for name, original in names.items()}  # type: ignore[union-attr]
        removed = re.sub(r"\(.*\)|\\", "", prefix)
        notes.append(f"removed the prefix '{removed}' from every key")
    return OpenedState(
        {name: specs[original] for name, original in names.items()},
        lambda name: read(names[name]),
        tuple(notes),
        tuple(choices),
    )


def _tensors_of(path: Path, content: Mapping[Any, Any]) -> dict[str, Tensor]:
    for name, value in content.items():
        require(isinstance(name, str), f"{path}: must hold a dict of tensors by name, got the key {name!r}")
        require(
            isinstance(value, Tensor),
            f"{path}: must hold a dict of tensors, got {type(value).__name__} at the key '{name}', and none of the "
            f"containers {', '.join(CONTAINERS)}; save model.state_dict() by itself",
        )
        require(
            value.layout is torch.strided and not value.is_meta and not value.is_quantized,
            f"{path}: {name} must be a plain dense tensor",
        )
    require_plausible(path, content.values())
    return {name: value.detach() for name, value in content.items()}


def _open_containers(content: Any, where: str, notes: list[str], choices: list[str]) -> Mapping[Any, Any]:
    """Follows containers down to the state_dict; adds notes and warnings about the way."""
    while True:
        require(isinstance(content, Mapping), f"{where}: must hold a dict of tensors, got {type(content).__name__}")
        found = [name for name in CONTAINERS if isinstance(content.get(name), Mapping)]
        if not found:
            state: Mapping[Any, Any] = content
            return state
        notes.append(f"took '{found[0]}' of {', '.join(map(str, content))}")
        if len(found) > 1:
            others = ", ".join(f"'{name}'" for name in found[1:])
            choices.append(f"took '{found[0]}', not {others}; to use another, save it by itself")
        where, content = f"{where}: {found[0]}", content[found[0]]


# ------------------------------------------------------------------------------------------------------ conversion


def convert_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    planned: Callable[[Mapping[str, Tensor]], StatePlan] = plan,
    *,
    on_block: Callable[[str], None] | None = None,
) -> StateReport:
    """Converts one checkpoint file into another, block by block: :func:`repvgg_cuda.fuse_state_dict` between files.

    From safetensors to safetensors no more than a few blocks are in memory at a time. ``target`` is written whole or
    not at all: only after every check, to a temporary file that then takes its place.

    Args:
        planned: from the specs of the state_dict, what to do with it.
        on_block: called with each block's name before it is folded.
    Raises:
        RuntimeError, OSError: as :func:`load_state_dict_file`, ``planned`` and :func:`save_state_dict_file`.
    """
    opened = open_state_dict_file(source)
    todo = planned(opened.specs)
    report = todo.report
    report.notes, report.warnings = opened.notes + report.notes, opened.warnings + report.warnings
    path = Path(os.path.realpath(target))
    values = todo.run(opened.load, on_block)
    if not is_safetensors(path):
        state = dict(values)
        with atomic_file(path) as file:
            torch.save(_standalone(state), file)
        return report
    form = "deploy" if report.blocks else report.form
    specs = [TensorSpec(output.key, output.shape, output.dtype) for output in todo.outputs]
    with atomic_file(path) as file:
        write_safetensors(file, specs, values, {"format": "pt", "repvgg_cuda": form})
    return report


# --------------------------------------------------------------------------------------------------------- writing


def save_state_dict_file(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Writes a state_dict of a known zoo, whole or not at all: a file at ``path`` is replaced only by a complete one.

    Args:
        state: train form or deploy form. safetensors also records which, as the metadata entry ``repvgg_cuda``.
        path: ``.safetensors``, or ``.pth``, ``.pt``, ``.bin``, ``.ckpt``, ``.pth.tar`` (a plain dict of tensors).
    Raises:
        RuntimeError: another extension, or a state_dict of no known zoo. OSError: ``path`` cannot be written.
    """
    path = Path(os.path.realpath(path))  # a symbolic link stays one: its target is what is replaced
    metadata = {"format": "pt", "repvgg_cuda": recognise(list(state)).form}
    tensors = _standalone(state)
    if is_safetensors(path):
        data = safetensors.torch.save(tensors, metadata)
        with atomic_file(path) as file:
            file.write(data)
    else:
        with atomic_file(path) as file:
            torch.save(tensors, file)


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
