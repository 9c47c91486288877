# SPDX-License-Identifier: MIT
"""The same network under the keys of another zoo: renaming, in train form and in deploy form. No tensor is touched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from repvgg_cuda.branches import require


class Names(NamedTuple):
    """How a zoo spells the parts of a family's network: whole places (with stage ``{s}``, block ``{i}``), then the
    parts of a block (with branch ``{n}``). The entries of two zoos correspond one to one.

    ``first_stage`` is the number of the first stage after the stem.
    """

    stem: str
    block: str
    head: str
    parts: tuple[str, ...]
    first_stage: int = 1


_OFFICIAL = Names(
    "stage0.",
    "stage{s}.{i}.",
    "linear.",
    (
        *("rbr_dense.conv.", "rbr_dense.bn.", "rbr_1x1.conv.", "rbr_1x1.bn.", "rbr_identity."),
        *("rbr_reparam.", "se.down.", "se.up."),
    ),
)

#: By family and zoo. A family has the same networks in each of its zoos.
FAMILIES: Mapping[str, Mapping[str, Names]] = {
    "RepVGG": {
        "official": _OFFICIAL,
        "qarepvgg": _OFFICIAL,  # once folded; before, its branches have no place elsewhere
        "timm": Names(
            "stem.",
            "stages.{s}.{i}.",
            "head.fc.",
            (
                *("conv_kxk.conv.", "conv_kxk.bn.", "conv_1x1.conv.", "conv_1x1.bn.", "identity."),
                *("reparam_conv.", "attn.fc1.", "attn.fc2."),
            ),
            first_stage=0,
        ),
        "mmpretrain": Names(
            "backbone.stem.",
            "backbone.stage_{s}.{i}.",
            "head.fc.",
            (
                *("branch_3x3.conv.", "branch_3x3.norm.", "branch_1x1.conv.", "branch_1x1.norm.", "branch_norm."),
                *("branch_reparam.", "se_layer.conv1.conv.", "se_layer.conv2.conv."),
            ),
        ),
    },
    "MobileOne": {
        "mobileone": Names(
            "stage0.",
            "stage{s}.{i}.",
            "linear.",
            (
                *("rbr_conv.{n}.conv.", "rbr_conv.{n}.bn.", "rbr_scale.conv.", "rbr_scale.bn.", "rbr_skip."),
                *("reparam_conv.", "se.reduce.", "se.expand."),
            ),
        ),
        "timm": Names(
            "stem.",
            "stages.{s}.{i}.",
            "head.fc.",
            (
                *("conv_kxk.{n}.conv.", "conv_kxk.{n}.bn.", "conv_scale.conv.", "conv_scale.bn.", "identity."),
                *("reparam_conv.", "attn.fc1.", "attn.fc2."),
            ),
            first_stage=0,
        ),
        "mmpretrain": Names(
            "backbone.stage0.",
            "backbone.stage{s}.{i}.",
            "head.fc.",
            (
                *(
                    "branch_conv_list.{n}.conv.",
                    "branch_conv_list.{n}.norm.",
                    "branch_scale.conv.",
                    "branch_scale.norm.",
                ),
                *("branch_norm.", "branch_reparam.", "se.conv1.conv.", "se.conv2.conv."),
            ),
        ),
    },
}


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(template)))


class Renamer:
    """Renames keys from one zoo to another within a family: ``renamer("stage1.0.rbr_1x1.bn.weight")``.

    Raises:
        RuntimeError: the family is not in one of the zoos; on a call: the key has no place in the family.
    """

    def __init__(self, family: str | None, source: str, target: str) -> None:
        self.source, self.target, self.family = source, target, family
        if source == target:
            return
        zoos = FAMILIES.get(family or "", {})
        require(
            source in zoos and target in zoos,
            f"--to {target}: keys can be renamed within RepVGG ({', '.join(FAMILIES['RepVGG'])}) and within MobileOne "
            f"({', '.join(FAMILIES['MobileOne'])}), and these are {family or 'other networks'} of {source}",
        )
        self._old, self._new = zoos[source], zoos[target]

    def __call__(self, key: str) -> str:
        if self.source == self.target:
            return key
        old, new = self._old, self._new
        if key.startswith(old.head):
            return new.head + key.removeprefix(old.head)
        match = _pattern(old.block).match(key)
        if match is not None:
            stage = int(match["s"]) - old.first_stage + new.first_stage
            place, inside = new.block.format(s=stage, i=match["i"]), key[match.end() :]
        else:
            require(key.startswith(old.stem), self._no_place(key))
            place, inside = new.stem, key.removeprefix(old.stem)
        for old_part, new_part in zip(old.parts, new.parts, strict=True):
            if (match := _pattern(old_part).match(inside)) is not None:
                return place + new_part.format(**match.groupdict()) + inside[match.end() :]
        raise RuntimeError(self._no_place(key))

    def _no_place(self, key: str) -> str:
        return f"{key} has no place in a {self.family} of {self.target}: keys are renamed only if all have one"
