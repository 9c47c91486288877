# SPDX-License-Identifier: MIT
"""state_dicts: folding the blocks of any zoo by their keys alone, under the names of another zoo, and loading them.

Nothing here needs a model. What will be written is planned from keys, shapes and dtypes; tensors are read only as they
are folded, so that a file may be converted without being in memory as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from repvgg_cuda.branches import dtype_name, require, shape_name
from repvgg_cuda.folding import StatePlan, StateReport, parameter_count, plan
from repvgg_cuda.recognition import recognise
from repvgg_cuda.zoo import Form, some

__all__ = [
    "Form",
    "FoldedState",
    "StatePlan",
    "StateReport",
    "check_fits",
    "form_of",
    "fuse_state_dict",
    "load_into",
    "parameter_count",
    "plan",
]

#: The parts of RepVGG and RepVGGplus that a backbone may lack.
_PART = re.compile(r"stage[1-4](?:_first|_second)?(?:_aux)?|linear")


def form_of(state: Mapping[str, Any]) -> Form:
    """``"train"`` if the keys are those of official RepVGG blocks with branches, ``"deploy"`` if of folded ones.

    Raises:
        RuntimeError: both kinds are present, or neither; the message says what was found, and of which zoo.
    """
    return _form_of(state, "the checkpoint")


def _form_of(state: Mapping[str, Any], what: str) -> Form:
    found = recognise(list(state), what)
    require(
        found.zoo.name == "official",
        f"{what} has keys of {found.zoo.title}, not of official RepVGG, which are needed here; "
        "`repvgg-cuda convert IN OUT --to official` renames them where the networks are the same",
    )
    return found.form


class FoldedState(NamedTuple):
    """``state, report = fuse_state_dict(...)``."""

    state: dict[str, Tensor]
    report: StateReport


def fuse_state_dict(
    state: Mapping[str, Tensor],
    *,
    source: str = "auto",
    target: str | None = None,
    eps: float | None = None,
    fold: bool = True,
    on_block: Callable[[str], None] | None = None,
) -> FoldedState:
    """Folds a state_dict in train form into the deploy form of its zoo. Needs no model, only the keys and tensors.

    Args:
        state: train form, of any zoo (``repvgg_cuda.zoo.ZOOS``); float64, float32, float16 or bfloat16.
        source: the zoo, or ``"auto"``: told by the keys.
        target: the zoo whose names the result gets; default: those of ``source``. Official RepVGG, timm and mmpretrain
            share RepVGG; Apple, timm and mmpretrain share MobileOne.
        eps: of every folded BatchNorm; default: that with which the zoo trains. A state_dict does not carry it.
        fold: False only renames; then either form is taken.
        on_block: called with each block's name before it is folded.
    Returns:
        The state and a report. In place of each block's branches stand ``weight`` and ``bias`` of one convolution, in
        the dtype of its first kernel; other tensors are passed on as they are, in their order. Auxiliary heads that
        serve training only are dropped. The result shares memory with ``state``.
    Raises:
        RuntimeError: the keys are of no zoo, of several, or already in deploy form; a key of a block is missing,
            unknown or of the wrong shape; a value is NaN, infinite or a negative variance. The message names it.
    Note:
        Folds in float64 and rounds once. Source: RepVGG, arXiv:2101.03697, sec. 3.3.
    """
    planned = plan(state, source=source, target=target, eps=eps, fold=fold)
    result: dict[str, Tensor] = {}
    for key, value in planned.run(lambda key: state[key], on_block):
        result[key] = value
    return FoldedState(result, planned.report)


# --------------------------------------------------------------------------------------------------- into a model


def load_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads ``state`` into ``model``, strictly: all of it or, if :func:`check_fits` raises RuntimeError, nothing."""
    check_fits(model, state)
    model.load_state_dict(dict(state), strict=True)


def check_fits(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Checks that ``state`` can be loaded into ``model``, which may be on the meta device.

    Raises:
        RuntimeError: one is in train form and the other in deploy form, keys are missing or unexpected, or a tensor has
            another shape or kind; the message says what to do.
    """
    own: dict[str, Tensor] = model.state_dict()
    model_form, state_form = _form_of(own, "the model"), form_of(state)
    require(
        (model_form, state_form) != ("deploy", "train"),
        "the checkpoint is in train form and the model in deploy form: convert the checkpoint with "
        "`repvgg-cuda convert IN OUT`, or build the model with deploy=False",
    )
    require(
        (model_form, state_form) != ("train", "deploy"),
        "the checkpoint is in deploy form and the model in train form: build the model with deploy=True; "
        "the branches cannot be recovered from their sum",
    )
    # The counter of BatchNorm, which old checkpoints lack, plays no part in what a model computes.
    missing = [key for key in own if key not in state and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in state if key not in own and not _passed_over(model, key)]
    require(
        not missing and not unexpected,
        f"the checkpoint is of another model (missing keys: {some(missing)}; unexpected keys: {some(unexpected)}): "
        "build the model it was saved from",
    )
    for key, value in state.items():
        if key not in own:
            continue
        require(
            value.shape == own[key].shape,
            f"{key} must be {shape_name(own[key])}, got {shape_name(value)}; build the model with the name, "
            "num_classes and in_channels it was trained with",
        )
        require(
            value.is_floating_point() == own[key].is_floating_point(),
            f"{key} must be {dtype_name(own[key].dtype)}, got {dtype_name(value.dtype)}",
        )


def _passed_over(model: nn.Module, key: str) -> bool:
    """Whether ``key`` is of a stage or head that ``model``, a backbone (``features_only=True``), was built without."""
    part = key.split(".")[0]
    absent = part not in dict(model.named_children())
    return bool(getattr(model, "features_only", False)) and absent and _PART.fullmatch(part) is not None
