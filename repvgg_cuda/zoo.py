# SPDX-License-Identifier: MIT
"""Where checkpoints come from: one table of zoos.

A *zoo* is a code base with its own names for the same blocks. A row says how its blocks spell their branches, with
which eps its BatchNorms train, and which keys only its networks have. Names inside a block are paths relative to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Form = Literal["train", "deploy"]

# -------------------------------------------------------------------------------------------------------------- rows


class Layout(NamedTuple):
    """Where below a branch its convolution and its BatchNorm lie; ``""`` is the branch itself, None: there is none.

    ``bias``: whether the convolution has one; None: it may.
    """

    conv: str | None
    bn: str | None
    bias: bool | None = None


CONV_BN, CONV_NORM, C_BN, INDEXED = Layout("conv", "bn"), Layout("conv", "norm"), Layout("c", "bn"), Layout("0", "1")
CONV, BIASED_CONV, BARE_BN = Layout("", None, False), Layout("", None, True), Layout(None, "")


@dataclass(frozen=True)
class Slot:
    """A branch of a block, or several alike: ``path`` is a regular expression. ``layouts`` are the ones it may have."""

    path: str
    layouts: tuple[Layout, ...]
    sizes: tuple[int, ...] = (3,)  # of the kernel; an identity has none
    required: bool = True


@dataclass(frozen=True)
class BlockKeys:
    """How one kind of block spells its tensors.

    ``marks`` matches the paths that tell such a block from all else, ``signature`` keys that must be there too and
    ``excluded`` keys that must not. ``deployed`` is the path of the folded convolution; ``deployed_mark`` matches keys
    that only it has. Tensors under ``kept`` come before or after the sum and stay. ``identity`` says how an identity
    without BatchNorm shows: never, always (there is one), or by the block's name (:attr:`Zoo.strided`). A BatchNorm
    under ``post_bn`` normalises the sum; it is folded too, or kept where the zoo's own deploy form keeps it. A
    ``companion`` alone makes no network of the zoo.
    """

    name: str
    slots: tuple[Slot, ...]
    marks: str
    deployed: str
    deployed_mark: str
    signature: tuple[str, ...] = ()
    excluded: str = r"(?!)"
    kept: tuple[str, ...] = ()
    identity: Literal["never", "always", "by name"] = "never"
    post_bn: str | None = None
    keeps_post_bn: bool = False
    companion: bool = False


@dataclass(frozen=True)
class Zoo:
    """A code base: ``network`` matches keys that only its networks have.

    Blocks whose name ``strided`` matches have stride 2, hence no identity; those that only ``unit_stride`` matches have
    stride 1, hence an identity wherever the channels agree, which with ``same_channels`` they do. Names that neither
    matches say nothing.
    """

    name: str
    title: str
    eps: float
    blocks: tuple[BlockKeys, ...]
    network: str
    strided: str = r"(?!)"
    unit_stride: str = r"(?!)"
    same_channels: bool = False


_SE = ("se.", "post_se.", "nonlinearity.")
_RBR = r"rbr_(?:dense|1x1|identity|reparam)"

REPVGG = BlockKeys(
    "RepVGG block",
    (
        Slot("rbr_dense", (CONV_BN,)),
        Slot("rbr_1x1", (CONV_BN,), (1,)),
        Slot("rbr_identity", (BARE_BN,), required=False),
    ),
    marks=r"rbr_(?:dense|1x1|identity)",
    deployed="rbr_reparam",
    deployed_mark=r"(?:.*\.)?rbr_reparam\..+",
    excluded=r"bn\.running_mean|rbr_(?:dense|1x1)\.(?:weight|\d+\..+)",
    kept=_SE,
)
QAREPVGG = BlockKeys(
    "QARepVGG block",
    (
        Slot("rbr_dense", (CONV_BN, CONV)),
        Slot("rbr_1x1", (CONV_BN, CONV), (1,)),
        Slot("rbr_identity", (BARE_BN,), required=False),
    ),
    marks=REPVGG.marks,
    signature=(r"bn\.running_mean", r"rbr_dense\.(?:conv\.)?weight"),
    deployed="rbr_reparam",
    deployed_mark=REPVGG.deployed_mark,
    kept=("nonlinearity.",),  # not SE: it stands between the sum and its BatchNorm, where nothing can be folded
    identity="by name",
    post_bn="bn",
)
#: YOLOv6 folds the branches and keeps the BatchNorm on their sum as a layer.
QAREPVGG_YOLOV6 = dataclasses.replace(QAREPVGG, keeps_post_bn=True)
REPCONV_YOLOV7 = BlockKeys(
    "RepConv block",
    (
        Slot("rbr_dense", (INDEXED,)),
        Slot("rbr_1x1", (INDEXED,), (1,)),
        Slot("rbr_identity", (BARE_BN,), required=False),
    ),
    marks=REPVGG.marks,
    signature=(r"rbr_(?:dense|1x1)\.[01]\..+",),
    deployed="rbr_reparam",
    deployed_mark=REPVGG.deployed_mark,
    kept=("act.",),
)
REPCONV_ULTRALYTICS = BlockKeys(
    "RepConv block",
    (Slot("conv1", (CONV_BN,)), Slot("conv2", (CONV_BN,), (1,)), Slot("bn", (BARE_BN,), required=False)),
    marks=r"conv[12]\.conv",
    signature=(r"conv1\.conv\.weight", r"conv2\.conv\.weight"),
    deployed="conv",
    deployed_mark=r"(?!)",  # any convolution of such a network is called so
    kept=("act.",),
)
REPVGG_TIMM = BlockKeys(
    "RepVGG block",
    (
        Slot("conv_kxk", (CONV_BN,)),
        Slot("conv_1x1", (CONV_BN,), (1,)),
        Slot("identity", (BARE_BN,), required=False),
    ),
    marks=r"conv_(?:kxk|1x1)",
    signature=(r"conv_kxk\.(?:conv|bn)\..+|conv_1x1\.bn\..+",),
    deployed="reparam_conv",
    deployed_mark=r"(?:.*\.)?reparam_conv\..+",
    kept=("attn.", "act."),
)
_MOBILEONE_SIZES = (3, 1)
MOBILEONE_TIMM = BlockKeys(
    "MobileOne block",
    (
        Slot(r"conv_kxk\.\d+", (CONV_BN,), _MOBILEONE_SIZES),
        Slot("conv_scale", (CONV_BN,), (1,), required=False),
        Slot("identity", (BARE_BN,), required=False),
    ),
    marks=r"conv_(?:kxk\.\d+|scale)",
    signature=(r"conv_(?:kxk\.\d+|scale)\..+",),
    deployed="reparam_conv",
    deployed_mark=REPVGG_TIMM.deployed_mark,
    kept=("attn.", "act."),
)
REPVGG_MMPRETRAIN = BlockKeys(
    "RepVGG block",
    (
        Slot("branch_3x3", (CONV_NORM,)),
        Slot("branch_1x1", (CONV_NORM,), (1,)),
        Slot("branch_norm", (BARE_BN,), required=False),
    ),
    marks=r"branch_(?:3x3|1x1|norm)",
    signature=(r"branch_(?:3x3|1x1)\.norm\..+",),
    deployed="branch_reparam",
    deployed_mark=r"(?:.*\.)?branch_reparam\..+",
    kept=("se_layer.", "act."),
)
MOBILEONE_MMPRETRAIN = BlockKeys(
    "MobileOne block",
    (
        Slot(r"branch_conv_list\.\d+", (CONV_NORM,), _MOBILEONE_SIZES),
        Slot("branch_scale", (CONV_NORM,), (1,), required=False),
        Slot("branch_norm", (BARE_BN,), required=False),
    ),
    marks=r"branch_(?:conv_list\.\d+|scale|norm)",
    signature=(r"branch_(?:conv_list\.\d+|scale)\..+",),
    deployed="branch_reparam",
    deployed_mark=REPVGG_MMPRETRAIN.deployed_mark,
    kept=("se.", "act."),
)
MOBILEONE = BlockKeys(
    "MobileOne block",
    (
        Slot(r"rbr_conv\.\d+", (CONV_BN,), _MOBILEONE_SIZES),
        Slot("rbr_scale", (CONV_BN,), (1,), required=False),
        Slot("rbr_skip", (BARE_BN,), required=False),
    ),
    marks=r"rbr_(?:conv\.\d+|scale|skip)",
    deployed="reparam_conv",
    deployed_mark=REPVGG_TIMM.deployed_mark,
    kept=("se.", "activation."),
)
#: The token mixer of RepViT: an identity without parameters, and in newer models a BatchNorm on the sum.
REPVIT_MIXER = BlockKeys(
    "RepViT token mixer",
    (Slot("conv", (C_BN,)), Slot("conv1", (C_BN, BIASED_CONV), (1,))),
    marks=r"conv\.(?:c|bn)",
    signature=(r"conv\.c\.weight", r"conv1\.(?:c\.)?weight"),
    deployed="",
    deployed_mark=r"(?:.*\.)?token_mixer(?:\.0)?\.weight",
    identity="always",
    post_bn="bn",
)
#: RepViT's deploy form has no BatchNorm left: its plain convolutions are folded with theirs.
CONV_BN_REPVIT = BlockKeys(
    "convolution",
    (Slot("", (C_BN,), _MOBILEONE_SIZES),),
    marks=r"c",
    signature=(r"c\.weight", r"bn\.running_mean"),
    deployed="",
    deployed_mark=r"(?!)",
    companion=True,
)
REPGHOST = BlockKeys(
    "RepGhost module",
    (Slot("cheap_operation", (INDEXED,)), Slot(r"fusion_bn\.\d+", (BARE_BN,))),
    marks=r"fusion_bn\.\d+",
    deployed="cheap_operation",
    deployed_mark=r"(?:.*\.)?cheap_operation\.(?:weight|bias)",
    kept=("primary_conv.", "relu."),
)

_OFFICIAL_NAMES = dict(
    strided=r"(?:.*\.)?stage(?:0|[1-4](?:_first)?\.(?:blocks\.)?0)",
    unit_stride=r"(?:.*\.)?stage(?:[1-4](?:_first)?\.(?:blocks\.)?[1-9]\d*|3_second\.blocks\.\d+)",
)

#: In the order of preference where the keys fit several.
ZOOS: Mapping[str, Zoo] = {
    zoo.name: zoo
    for zoo in (
        Zoo(
            "official",
            "official RepVGG",
            1e-5,
            (REPVGG,),
            network=r"(?:.*\.)?stage(?:0|[1-4](?:_first|_second)?\.(?:blocks\.)?\d+)\." + _RBR + r"\..+",
            **_OFFICIAL_NAMES,
            same_channels=True,
        ),
        Zoo(
            "timm",
            "timm",
            1e-5,
            (REPVGG_TIMM, MOBILEONE_TIMM),
            network=r"(?:.*\.)?(?:stem|stages\.\d+\.\d+)\.(?:conv_(?:kxk|1x1)|reparam_conv)\..+",
            strided=r"(?:.*\.)?(?:stem|stages\.\d+\.0)",
            unit_stride=r"(?:.*\.)?stages\.\d+\.[1-9]\d*",
        ),
        Zoo(
            "mmpretrain",
            "mmpretrain",
            1e-5,
            (REPVGG_MMPRETRAIN, MOBILEONE_MMPRETRAIN),
            network=r"(?:.*\.)?(?:stem|stage0|stage_?[1-4]\.\d+)\.branch_.+",
            strided=r"(?:.*\.)?(?:stem|stage0|stage_?[1-4]\.0)",
            unit_stride=r"(?:.*\.)?stage_?[1-4]\.[1-9]\d*",
        ),
        Zoo(
            "mobileone",
            "Apple's ml-mobileone",
            1e-5,
            (MOBILEONE,),
            network=r"(?:.*\.)?stage(?:0|[1-4]\.\d+)\.(?:rbr_(?:conv|scale|skip)|reparam_conv)\..+",
            strided=r"(?:.*\.)?stage(?:0|[1-4]\.0)",
            unit_stride=r"(?:.*\.)?stage[1-4]\.[1-9]\d*",
        ),
        Zoo(
            "qarepvgg",
            "QARepVGG",
            1e-5,
            (QAREPVGG, REPVGG),
            network=r"(?:.*\.)?stage(?:0|[1-4]\.\d+)\.bn\.running_mean",
            **_OFFICIAL_NAMES,
            same_channels=True,
        ),
        Zoo(
            "yolov6",
            "YOLOv6",
            1e-3,
            (QAREPVGG_YOLOV6, REPVGG),
            network=r"(?:.*\.)?(?:ERBlock_\w+|Rep_[pn]\d+)\.(?:.+\.)?" + _RBR + r"\..+",
            strided=r"(?:.*\.)?(?:stem|ERBlock_\w+\.0)",
            unit_stride=r".*",
        ),
        Zoo(
            "yolov7",
            "YOLOv7",
            1e-3,
            (REPCONV_YOLOV7,),
            network=r"(?:model\.)?\d+\." + _RBR + r"\..+",
        ),
        Zoo("ultralytics", "Ultralytics, YOLOv9", 1e-3, (REPCONV_ULTRALYTICS,), network=r"(?!)"),
        Zoo(
            "repvit",
            "RepViT",
            1e-5,
            (REPVIT_MIXER, CONV_BN_REPVIT),
            network=r"(?:.*\.)?(?:features|stages\.\d+\.blocks)\.\d+\.(?:token|channel)_mixer\..+",
        ),
        Zoo("repghost", "RepGhost", 1e-5, (REPGHOST,), network=r"(?:.*\.)?ghost[12]\.fusion_bn\..+"),
    )
}


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few names and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:limit]) or "nothing"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
