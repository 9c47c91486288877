# SPDX-License-Identifier: MIT
"""Folding by keys: a plan from keys, shapes and dtypes, checked before a value is read; then one block at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from repvgg_cuda.block_folds import HEAD_KEY, BlockFold, Fold, HeadFold, Load, Output
from repvgg_cuda.branches import dtype_name, require
from repvgg_cuda.recognition import Recognised, outermost, recognise
from repvgg_cuda.renaming import Renamer
from repvgg_cuda.zoo import ZOOS, Form, Zoo

#: RepVGGplus trains with auxiliary heads; its deploy form has none.
_AUX_KEY = re.compile(r"(?:.*\.)?stage[^.]*_aux\..+")
_STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")


def parameter_count(state: Mapping[str, Tensor]) -> int:
    """Trainable numbers in a state_dict: everything but the statistics of its BatchNorms."""
    return sum(value.numel() for key, value in state.items() if not key.endswith(_STATISTICS))


# -------------------------------------------------------------------------------------------------------------- plan


@dataclass
class StateReport:
    """What was done to a state_dict. ``largest`` is known once it is done."""

    source: Zoo
    target: Zoo
    form: Form
    eps: float | None
    blocks: tuple[str, ...]
    parameters_before: int
    parameters_after: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    #: The largest magnitude in a folded weight or bias; far above 1 it warns of low-precision arithmetic.
    largest: float = 0.0

    def lines(self) -> list[str]:
        """For people: a few lines."""
        texts = [f"blocks folded  {len(self.blocks)}"]
        texts.append(f"parameters     {self.parameters_before:,} -> {self.parameters_after:,}")
        if self.blocks:
            texts.append(f"largest value  {self.largest:.3g} in a folded weight or bias")
        if self.source != self.target:
            texts.append(f"keys           {self.source.title} -> {self.target.title}")
        texts += [f"note: {note}" for note in self.notes]
        return texts + [f"warning: {warning}" for warning in self.warnings]

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass
class StatePlan:
    """What a conversion will write, in order. :meth:`run` does it."""

    outputs: tuple[Output, ...]
    report: StateReport
    _folds: Mapping[str, Fold] = field(repr=False)

    def run(self, load: Load, on_block: Callable[[str], None] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The tensors by key, in the order of ``outputs``; ``load`` gives those of the original state_dict."""
        folded: dict[str, Tensor] = {}
        for output in self.outputs:
            if output.part == "as it is":
                yield output.key, load(output.source)
                continue
            if output.part == "weight":
                fold = self._folds[output.source]
                if on_block is not None:
                    on_block(fold.name)
                folded["weight"], folded["bias"] = fold.run(load)
                largest = max(_largest(fold.name, value) for value in folded.values())
                self.report.largest = max(self.report.largest, largest)
            yield output.key, folded.pop(output.part)


def plan(
    state: Mapping[str, Tensor],
    *,
    source: str = "auto",
    target: str | None = None,
    eps: float | None = None,
    fold: bool = True,
) -> StatePlan:
    """Plans :func:`repvgg_cuda.fuse_state_dict`; of ``state``, whose tensors may be on the meta device, only shapes and
    dtypes are looked at. Raises RuntimeError as it does, but for values."""
    if eps is not None:
        require(0 <= eps < math.inf, f"eps must be a finite number of at least 0, got {eps:g}")
    require(target is None or target in ZOOS, f"there is no zoo '{target}'; the names are {', '.join(ZOOS)}")
    found = recognise(list(state), source=source)
    zoo, to = found.zoo, ZOOS[target or found.zoo.name]
    require(
        eps is None or (fold and found.form == "train"),
        f"eps is that of BatchNorms to be folded, and nothing is folded here: leave it out, got {eps}",
    )
    folds: dict[str, Fold] = {}
    if fold:
        require(
            found.form == "train" or to != zoo,
            "the checkpoint is already in deploy form: there is nothing to fold",
        )
        folds = _folds(state, found, zoo.eps if eps is None else eps)
    rename = Renamer(_family(state, found), zoo.name, to.name)
    outputs, dropped = _outputs(state, folds, rename)
    notes, warnings = _remarks(found, dropped, eps if folds else None, bool(folds))
    after = sum(math.prod(out.shape) for out in outputs if not out.key.endswith(_STATISTICS))
    used_eps = (zoo.eps if eps is None else eps) if folds else None
    report = StateReport(
        *(zoo, to, found.form, used_eps, tuple(each.name for each in folds.values() if each.counted)),
        *(parameter_count(state), after, notes, warnings),
    )
    return StatePlan(outputs, report, folds)


def _outputs(
    state: Mapping[str, Tensor], folds: Mapping[str, Fold], rename: Callable[[str], str]
) -> tuple[tuple[Output, ...], list[str]]:
    """What becomes of every key, and the keys that are dropped."""
    owners = {key: prefix for prefix, fold in folds.items() for key in fold.keys}
    outputs: list[Output] = []
    dropped: list[str] = []
    begun: set[str] = set()
    for key, value in state.items():
        if (owner := owners.get(key)) is not None:
            if owner not in begun:
                begun.add(owner)
                outputs += [out._replace(key=rename(out.key)) for out in folds[owner].outputs()]
        elif folds and _AUX_KEY.fullmatch(key):
            dropped.append(key)
        else:
            outputs.append(Output(rename(key), tuple(value.shape), value.dtype, key))
    names = [output.key for output in outputs]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    require(twice is None, f"two tensors would get the key {twice}: one of them belongs to no network of the zoo")
    return tuple(outputs), dropped


def _remarks(
    found: Recognised, dropped: Sequence[str], eps: float | None, folded: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Notes and warnings."""
    zoo, notes, warnings = found.zoo, [], []
    if folded:
        taken = f"{zoo.eps:g}, with which {zoo.title} trains" if eps is None else f"{eps:g}, as given"
        notes.append(f"BatchNorm eps {taken}; a state_dict does not carry it")
    if dropped:
        heads = sorted({key[: key.index("_aux.")] + "_aux" for key in dropped})
        notes.append(f"dropped the auxiliary heads {', '.join(heads)}, which serve training only")
    if folded and eps is None and not found.known:
        warnings.append(
            f"the blocks are those of {zoo.title}, the network around them is none of its own: if it was trained with "
            f"another BatchNorm eps than {zoo.eps:g} (YOLO: 1e-3), say so with --eps"
        )
    if folded and zoo.name in ("yolov6", "yolov7", "ultralytics"):
        notes.append(
            "convolutions with a BatchNorm but no branches are left as they are, as in a model built for deploy"
        )
    return tuple(notes), tuple(warnings)


def _family(state: Mapping[str, Tensor], found: Recognised) -> str | None:
    """For renaming: "RepVGG", "MobileOne" or None. Folded blocks of the two look alike but for 1x1 kernels."""
    if found.form == "train":
        names = {block.name for block in found.blocks.values() if not block.companion}
        names = {name.removesuffix(" block").removeprefix("QA") for name in names}
        return names.pop() if len(names) == 1 else None
    kernels = [value for key, value in state.items() if re.fullmatch(r".*reparam(?:_conv)?\.weight", key)]
    if any(kernel.dim() == 4 and kernel.shape[2] == 1 for kernel in kernels):
        return "MobileOne"
    return "RepVGG"


# ------------------------------------------------------------------------------------------------------------- folds


def _folds(state: Mapping[str, Tensor], found: Recognised, eps: float) -> dict[str, Fold]:
    """The folds by the prefix of their keys."""
    inside: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in found.blocks}
    heads: dict[str, dict[str, Tensor]] = {}
    has_companions = any(block.companion for block in found.blocks.values())
    for key, value in state.items():
        if (prefix := outermost(key, inside)) is not None:
            if not (inner := key.removeprefix(prefix)).startswith(found.blocks[prefix].kept):
                inside[prefix][inner] = value
        elif has_companions and (match := HEAD_KEY.fullmatch(key)):
            heads.setdefault(match["prefix"], {})[key] = value
    folds: dict[str, Fold] = {
        prefix: BlockFold(found.zoo, prefix, block, inside[prefix], eps) for prefix, block in found.blocks.items()
    }
    return folds | {prefix: HeadFold(prefix, tensors, eps) for prefix, tensors in heads.items()}


def _largest(name: str, value: Tensor) -> float:
    """The largest magnitude in a folded tensor. Raises RuntimeError if it holds NaN or infinity."""
    lowest, highest = map(float, value.aminmax())
    require(
        math.isfinite(lowest) and math.isfinite(highest),
        f"{name} folds to NaN or infinity in {dtype_name(value.dtype)}: the dtype is too narrow for its values (make "
        "the checkpoint float32 first), or a running_var is 0 and eps too",
    )
    return max(-lowest, highest)
