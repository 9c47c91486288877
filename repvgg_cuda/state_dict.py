# SPDX-License-Identifier: MIT
"""state_dicts of RepVGG: which form they are in, folding one form into the other by the keys alone, loading them.

The keys are those of the official RepVGG code. In *train form* a block holds ``rbr_dense.conv.weight``,
``rbr_dense.bn.*``, ``rbr_1x1.conv.weight``, ``rbr_1x1.bn.*`` and, where it has an identity, ``rbr_identity.*``; in
*deploy form* it holds ``rbr_reparam.weight`` and ``rbr_reparam.bias``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from repvgg_cuda.branches import BatchNorm, Branch, Branches, dtype_name, require, shape_name
from repvgg_cuda.ops import fuse_weights

Form = Literal["train", "deploy"]

_BRANCH_KEY = re.compile(r"(?P<block>(?:.*\.)?)(?P<slot>rbr_(?:dense|1x1|identity)\..+)")
_DEPLOY_KEY = re.compile(r"(?:.*\.)?rbr_reparam\..+")
#: RepVGGplus trains with auxiliary heads; its deploy form has none.
_AUX_KEY = re.compile(r"(?:.*\.)?stage[^.]*_aux\..+")
#: The parts of RepVGG and RepVGGplus that a backbone may lack.
_PART = re.compile(r"stage[1-4](?:_first|_second)?(?:_aux)?|linear")
#: What may stand in a block beside its branches, because it comes after their sum and stays as it is.
_AFTER_THE_SUM = ("se.", "post_se.", "nonlinearity.")

#: Keys by which other libraries' checkpoints are recognised; the first that matches any key names the library.
_OTHER_LIBRARIES = (
    ("timm", re.compile(r"(?:.*\.)?(?:conv_kxk|reparam_conv)\..+")),
    ("mmpretrain", re.compile(r"(?:.*\.)?(?:branch_3x3\.norm|branch_norm|branch_reparam)\..+")),
    ("super-gradients", re.compile(r"(?:.*\.)?branch_3x3\..+")),
    ("YOLOv7", re.compile(r"(?:.*\.)?rbr_(?:dense|1x1)\.\d+\..+")),
    ("MobileOne", re.compile(r"(?:.*\.)?(?:rbr_conv|rbr_scale|rbr_skip)\..+")),
    ("DiverseBranchBlock", re.compile(r"(?:.*\.)?dbb_\w+\..+")),
)


# ------------------------------------------------------------------------------------------------------------ form


def form_of(state: Mapping[str, Any]) -> Form:
    """``"train"`` if the keys are those of RepVGG blocks with branches, ``"deploy"`` if those of folded ones.

    Raises:
        RuntimeError: both kinds are present, or neither; the message says what was found, and of which library.
    """
    return _form_of(state, "the checkpoint")


def _form_of(state: Mapping[str, Any], what: str) -> Form:
    train = next((key for key in state if _BRANCH_KEY.fullmatch(key)), None)
    deploy = next((key for key in state if _DEPLOY_KEY.fullmatch(key)), None)
    require(
        train is None or deploy is None,
        f"{what} has blocks in train form ({train}) and in deploy form ({deploy}); all must be in one form",
    )
    if deploy is not None:
        return "deploy"
    if any(key.endswith("rbr_dense.conv.weight") for key in state):
        return "train"
    for library, pattern in _OTHER_LIBRARIES:
        key = next((key for key in state if pattern.fullmatch(key)), None)
        require(
            key is None,
            f"{what} has {library} keys ({key}), which are not supported yet; official RepVGG keys end in "
            "rbr_dense.conv.weight (train form) or rbr_reparam.weight (deploy form)",
        )
    raise RuntimeError(
        f"{what} has no RepVGG block: no key ends in rbr_dense.conv.weight (train form) or rbr_reparam.weight "
        f"(deploy form); found {_some(state)}"
    )


def _some(names: Mapping[str, Any] | list[str], limit: int = 3) -> str:
    """The first few names and how many more there are."""
    shown = ", ".join(list(names)[:limit]) or "nothing"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


# ------------------------------------------------------------------------------------------------------ conversion


@dataclass(frozen=True)
class FoldedState:
    """A deploy-form state_dict, the names of the blocks that were folded, and notes on what was assumed or dropped."""

    state: dict[str, Tensor]
    blocks: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def largest(self) -> float:
        """The largest magnitude in a folded weight or bias; far above 1 it warns of low-precision arithmetic."""
        return max(float(value.abs().max()) for key, value in self.state.items() if _DEPLOY_KEY.fullmatch(key))


def parameter_count(state: Mapping[str, Tensor]) -> int:
    """Trainable numbers in a state_dict: everything but the statistics of its BatchNorms."""
    statistics = (".running_mean", ".running_var", ".num_batches_tracked")
    return sum(value.numel() for key, value in state.items() if not key.endswith(statistics))


def convert_state_dict(state: Mapping[str, Tensor], *, eps: float = 1e-5) -> dict[str, Tensor]:
    """Folds a state_dict in official train form into official deploy form. Needs no model, only the keys and tensors.

    Args:
        state: train form; float64, float32, float16 or bfloat16.
        eps: of every folded BatchNorm. A state_dict does not carry it; RepVGG trains with 1e-5.
    Returns:
        deploy form: in place of each block's branches ``rbr_reparam.weight [C_out, C_in / groups, 3, 3]`` and
        ``rbr_reparam.bias [C_out]``, in the dtype of its 3x3 kernel. Other tensors (SE, linear) are passed on as they
        are, in their order; the auxiliary heads of RepVGGplus are dropped.
    Raises:
        RuntimeError: not in train form; or a key of a block is missing, unknown or of the wrong shape, and named.
    Note:
        Folds in float64 and rounds once. Source: RepVGG, arXiv:2101.03697, sec. 3.3.
    """
    return fold_state_dict(state, eps=eps).state


def fold_state_dict(
    state: Mapping[str, Tensor], *, eps: float = 1e-5, on_block: Callable[[str], None] | None = None
) -> FoldedState:
    """:func:`convert_state_dict` with a report; ``on_block`` is called with each block's name before it is folded."""
    require(0 <= eps < math.inf, f"eps must be a finite number of at least 0, got {eps:g}")
    require(form_of(state) == "train", "the checkpoint is already in deploy form: there is nothing to fold")
    blocks: dict[str, dict[str, Tensor]] = {match["block"]: {} for match in map(_BRANCH_KEY.fullmatch, state) if match}
    owners = {key: owner for key in state if (owner := _owner(key, blocks)) is not None}
    for key, block in owners.items():
        blocks[block][key.removeprefix(block)] = state[key]

    folded: dict[str, Tensor] = {}
    dropped: list[str] = []
    for key, value in state.items():
        if (owner := owners.get(key)) is not None:
            if f"{owner}rbr_reparam.weight" in folded:
                continue
            if on_block is not None:
                on_block(_block_name(owner))
            weight, bias = _fold_block(owner, blocks[owner], eps)
            folded[f"{owner}rbr_reparam.weight"], folded[f"{owner}rbr_reparam.bias"] = weight, bias
        elif _AUX_KEY.fullmatch(key):
            dropped.append(key)
        else:
            folded[key] = value
    notes = [f"assumed BatchNorm eps {eps:g}, which a state_dict does not carry: RepVGG trains with 1e-5"]
    if dropped:
        heads = sorted({key[: key.index("_aux.")] + "_aux" for key in dropped})
        notes.append(f"dropped the auxiliary heads {', '.join(heads)}, which serve training only")
    return FoldedState(folded, tuple(_block_name(block) for block in blocks), tuple(notes))


def _block_name(block: str) -> str:
    return block.removesuffix(".") or "the model itself"


def _owner(key: str, blocks: Mapping[str, Any]) -> str | None:
    """The block whose fold takes ``key`` in. None for what is outside every block or stays behind a block's sum."""
    parts = key.split(".")
    prefixes = ["".join(f"{part}." for part in parts[:n]) for n in range(len(parts))]
    block = next((prefix for prefix in prefixes if prefix in blocks), None)
    stays = block is not None and key.removeprefix(block).startswith(_AFTER_THE_SUM)
    return None if stays else block


def _fold_block(block: str, tensors: dict[str, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    branches = _branches(block, tensors, eps)
    try:
        weight, bias = fuse_weights(branches)
    except RuntimeError as error:
        raise RuntimeError(f"{_block_name(block)} cannot be folded: {error}") from error
    require(
        bool(weight.isfinite().all() and bias.isfinite().all()),
        f"{_block_name(block)} folds to NaN or infinity in {dtype_name(weight.dtype)}: its tensors hold such values, "
        "a running_var is negative, or the dtype is too narrow (then make the checkpoint float32 first)",
    )
    return weight, bias


def _branches(block: str, tensors: dict[str, Tensor], eps: float) -> Branches:
    """A block as data, from its tensors by their keys inside it. RuntimeError names a key missing or left over."""
    left = dict(tensors)

    def take(key: str) -> Tensor:
        require(key in left, f"{block}{key} is missing: {_block_name(block)} is not a complete RepVGG block")
        return left.pop(key)

    def take_batchnorm(prefix: str) -> BatchNorm:
        left.pop(f"{prefix}.num_batches_tracked", None)
        mean, var = take(f"{prefix}.running_mean"), take(f"{prefix}.running_var")
        if f"{prefix}.weight" not in left and f"{prefix}.bias" not in left:  # affine=False
            return BatchNorm(mean, var, eps)
        return BatchNorm(mean, var, eps, take(f"{prefix}.weight"), take(f"{prefix}.bias"))

    def take_conv(prefix: str, size: int) -> Branch:
        kernel = take(f"{prefix}.conv.weight")
        require(
            kernel.dim() == 4 and tuple(kernel.shape[2:]) == (size, size),
            f"{block}{prefix}.conv.weight must be [C_out, C_in / groups, {size}, {size}], "
            f"got {shape_name(kernel)}; only blocks of 3x3 and 1x1 branches can be folded",
        )
        return Branch(kernel, left.pop(f"{prefix}.conv.bias", None), take_batchnorm(f"{prefix}.bn"))

    parts = [take_conv("rbr_dense", 3), take_conv("rbr_1x1", 1)]
    identity = any(key.startswith("rbr_identity.") for key in left)
    if identity:
        parts.append(Branch(None, None, take_batchnorm("rbr_identity")))
    require(
        not left,
        f"{_block_name(block)} has tensors that no RepVGG block has ({_some(left)}); folding its branches "
        "without them would change what it computes",
    )
    out_channels, in_per_group = tensors["rbr_dense.conv.weight"].shape[:2]
    # [C_out, C_in / groups, 3, 3] leaves groups open. The fold asks for them only to place the ones of an identity, and
    # then C_in = C_out settles them; without an identity every consistent answer folds alike, and 1 is consistent.
    groups = out_channels // max(in_per_group, 1) if identity else 1
    return Branches(tuple(parts), groups * in_per_group, out_channels, groups)


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
        f"the checkpoint is of another model (missing keys: {_some(missing)}; unexpected keys: {_some(unexpected)}): "
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
