# SPDX-License-Identifier: MIT
"""Whose state_dict is it, and in which form? Told by its keys alone, or refused."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from repvgg_cuda.branches import require
from repvgg_cuda.zoo import REPCONV_ULTRALYTICS, ZOOS, BlockKeys, Form, Zoo, some

#: Never taken on their own: their names could be any network's.
_BY_NAME_ONLY = ("ultralytics",)

#: Blocks that are known, and why their checkpoints are not converted by their keys.
_UNSUPPORTED = (
    ("FastViT", r"(?:.*\.)?(?:token_mixer\.(?:mixer|norm)|large_conv|small_conv|lkb_origin)\..+"),
    ("super-gradients", r"(?:.*\.)?branch_(?:3x3|1x1)\..+"),
    ("DiverseBranchBlock", r"(?:.*\.)?dbb_\w+\..+"),
    ("YOLOv6 linear-add", r"(?:.*\.)?scale_(?:conv|1x1|identity)\..+"),
)


@dataclass(frozen=True)
class Recognised:
    """A state_dict's zoo and form; its blocks with branches by the prefix of their keys, ``"stage1.0."`` or ``""``.

    ``known`` says whether the network around the blocks is one of the zoo's: if not, its eps is an assumption.
    """

    zoo: Zoo
    form: Form
    blocks: Mapping[str, BlockKeys]
    known: bool


def first_match(pattern: str, keys: Iterable[str]) -> str | None:
    """The first of ``keys`` that ``pattern`` matches as a whole."""
    compiled = re.compile(pattern)
    return next((key for key in keys if compiled.fullmatch(key)), None)


def recognise(keys: Sequence[str], what: str = "the checkpoint", source: str = "auto") -> Recognised:
    """Whose state_dict this is and in which form, by its keys.

    Args:
        keys: of the state_dict. what: it, in error messages.
        source: the name of a zoo, or ``"auto"``.
    Raises:
        RuntimeError: it has no block of any zoo, or of that one; blocks in both forms, or of several zoos.
    """
    if source != "auto":
        require(source in ZOOS, f"there is no zoo '{source}'; the names are auto, {', '.join(ZOOS)}")
    candidates = [
        zoo for zoo in ZOOS.values() if (zoo.name == source if source != "auto" else zoo.name not in _BY_NAME_ONLY)
    ]
    marked = {zoo.name: _blocks(zoo, keys) for zoo in candidates}
    trained = {
        name: {prefix: block for prefix, block in blocks.items() if block is not None}
        for name, blocks in marked.items()
        if any(block is not None and not block.companion for block in blocks.values())
    }
    marks = [block.deployed_mark for zoo in candidates for block in zoo.blocks]
    deployed = next((key for mark in dict.fromkeys(marks) if (key := first_match(mark, keys))), None)
    if trained:
        prefix, block = next(iter(next(iter(trained.values())).items()))
        key = next(key for key in keys if re.match(f"{re.escape(prefix)}(?:{block.marks})", key))
        require(
            deployed is None,
            f"{what} has blocks in train form ({key}) and in deploy form ({deployed}); all must be in one form",
        )
    if library := _unsupported(keys, trained):
        raise RuntimeError(
            f"{what} has {library[0]} keys ({library[1]}), which do not say how it computes; build the model and "
            "convert that: repvgg_cuda.reparameterize(model)"
        )
    if trained:
        zoo = _settle(trained, keys, what)
        partial = next((prefix for prefix, block in marked[zoo.name].items() if block is None), None)
        if partial is not None:
            where, inner = partial.removesuffix(".") or "its root", [key for key in keys if key.startswith(partial)]
            raise RuntimeError(f"{what} has at {where} a part of a block of {zoo.title}, or another: {some(inner, 9)}")
        return Recognised(zoo, "train", trained[zoo.name], _is_known(zoo, keys, source))
    if deployed is not None:
        fitting = [z for z in candidates if any(first_match(block.deployed_mark, keys) for block in z.blocks)]
        zoo = next((z for z in fitting if first_match(z.network, keys)), fitting[0])
        return Recognised(zoo, "deploy", {}, _is_known(zoo, keys, source))
    raise RuntimeError(_nothing_found(keys, what, source))


def _is_known(zoo: Zoo, keys: Sequence[str], source: str) -> bool:
    return source != "auto" or first_match(zoo.network, keys) is not None


def outermost(key: str, prefixes: Container[str]) -> str | None:
    """The shortest of ``prefixes`` that ``key`` begins with; ``""`` and ``"stage1.0."`` are such."""
    parts = key.split(".")
    starts = ("".join(f"{part}." for part in parts[:n]) for n in range(len(parts)))
    return next((start for start in starts if start in prefixes), None)


def _blocks(zoo: Zoo, keys: Sequence[str]) -> dict[str, BlockKeys | None]:
    """What has the marks of the zoo's blocks, outermost, in the order of the keys; None: it is none of them."""
    marks = [re.compile(rf"((?:.*\.)?)(?:{block.marks})\..+") for block in zoo.blocks]
    prefixes = {match[1] for key in keys for mark in marks if (match := mark.fullmatch(key))}
    inside: dict[str, list[str]] = {}
    for key in keys:
        if (prefix := outermost(key, prefixes)) is not None:
            inside.setdefault(prefix, []).append(key.removeprefix(prefix))
    return {prefix: _kind(zoo, inner) for prefix, inner in inside.items()}


def _kind(zoo: Zoo, inside: Sequence[str]) -> BlockKeys | None:
    """Which of the zoo's blocks has the keys ``inside`` it: the first with a mark and its whole signature."""
    for block in zoo.blocks:
        marked = first_match(rf"(?:{block.marks})\..+", inside)
        excluded = first_match(block.excluded, inside)
        if marked and not excluded and all(first_match(pattern, inside) for pattern in block.signature):
            return block
    return None


def _settle(trained: Mapping[str, Mapping[str, BlockKeys]], keys: Sequence[str], what: str) -> Zoo:
    """The one zoo of several that know blocks of the state_dict."""
    everything = {prefix for blocks in trained.values() for prefix in blocks}
    whole = [ZOOS[name] for name, blocks in trained.items() if set(blocks) == everything]
    if not whole:
        parts = [
            f"{ZOOS[name].title} ({some(prefix.removesuffix('.') for prefix in trained[name])})" for name in trained
        ]
        raise RuntimeError(f"{what} has blocks of several zoos, and none knows all: {'; '.join(parts)}")
    matching = [zoo for zoo in whole if first_match(zoo.network, keys)]
    require(
        len(matching) <= 1,
        f"{what} could be of several zoos: "
        + "; ".join(f"{zoo.name} ({first_match(zoo.network, keys)})" for zoo in matching)
        + "; name one",
    )
    return (matching or whole)[0]


def _unsupported(keys: Sequence[str], trained: Mapping[str, object]) -> tuple[str, str] | None:
    for library, pattern in _UNSUPPORTED:
        if library == "super-gradients" and trained:
            continue  # mmpretrain shares these names
        if key := first_match(pattern, keys):
            return library, key
    return None


def _nothing_found(keys: Sequence[str], what: str, source: str) -> str:
    partial = first_match(
        rf"(?:.*\.)?(?:{'|'.join(b.marks for z in ZOOS.values() for b in z.blocks if not b.companion)})\..+", keys
    )
    if source != "auto":
        return f"{what} has no block with the keys of {ZOOS[source].title}; found {some(keys)}"
    hint = ""
    if partial is not None:
        hint = f" ({partial} alone is none)"
        if re.fullmatch(rf"(?:.*\.)?(?:{REPCONV_ULTRALYTICS.marks})\..+", partial):
            hint = f" ({partial} may be one of Ultralytics or YOLOv9: if so, say --from ultralytics)"
    return (
        f"{what} has no RepVGG block, nor one of {', '.join(list(ZOOS)[1:])}{hint}: no key ends in "
        f"rbr_dense.conv.weight (train form) or rbr_reparam.weight (deploy form); found {some(keys)}"
    )
