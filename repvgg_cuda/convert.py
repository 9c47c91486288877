# SPDX-License-Identifier: MIT
"""Model in, deployed model out: finds the multi-branch blocks of any model, folds them, and reports what it did.

One :class:`Adapter` per family of blocks, in an ordered table. An adapter recognises a block by its structure, then
either plans its replacement or refuses with a reason. Every block is planned before the first one is replaced, so a
conversion that raises has changed nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from repvgg_cuda import testing
from repvgg_cuda.branches import Branches, dtype_name
from repvgg_cuda.models import RepVGGplus
from repvgg_cuda.modules import RepConv3x3, RepVGGBlock, RepVGGplusBlock
from repvgg_cuda.structure import BRANCH_NAMES, UnfoldableError, branch_names, has_branches, read_branches, refuse_hooks

Status = Literal["fused", "deployed", "left"]


# ------------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Entry:
    """One block: ``status`` is "fused", "deployed" (it was before) or "left", and then ``reason`` says why."""

    path: str
    family: str
    branches: str
    status: Status
    reason: str
    parameters_before: int
    parameters_after: int

    @property
    def name(self) -> str:
        """The path, or words for the root."""
        return self.path or "(the model itself)"


@dataclass(frozen=True)
class Report:
    """What a conversion did. ``str()`` is a table, :meth:`to_dict` is ready for JSON.

    ``entries``: one per block, in the order of the model. ``dropped``: training-only parts that were removed.
    ``parameters_before`` and ``parameters_after`` count the whole model.
    """

    entries: tuple[Entry, ...]
    dropped: tuple[str, ...]
    parameters_before: int
    parameters_after: int

    def _with(self, status: Status) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.status == status)

    @property
    def fused(self) -> tuple[Entry, ...]:
        """The blocks that were folded."""
        return self._with("fused")

    @property
    def left(self) -> tuple[Entry, ...]:
        """The blocks that look like multi-branch blocks but were not folded, with the reason."""
        return self._with("left")

    @property
    def deployed(self) -> tuple[Entry, ...]:
        """The blocks that were in deploy form before."""
        return self._with("deployed")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """One line: counts and parameters."""
        if not self.entries:
            return f"found no RepVGG-style block: no module has two of {', '.join(BRANCH_NAMES)}"
        counts = [f"fused {len(self.fused)} of {len(self.entries)} blocks"]
        counts += [f"{len(self.deployed)} in deploy form already"] if self.deployed else []
        counts += [f"left {len(self.left)}"] if self.left else []
        return f"{', '.join(counts)}; {self.parameters_before:,} -> {self.parameters_after:,} parameters"

    def problems(self) -> str:
        """The blocks that were left, each with its reason."""
        return "; ".join(f"{entry.name}: {entry.reason}" for entry in self.left)

    def __str__(self) -> str:
        rows = [("block", "family", "branches", "parameters", "")]
        for entry in self.entries:
            count = f"{entry.parameters_before:,}"
            count += f" -> {entry.parameters_after:,}" if entry.status == "fused" else ""
            note = {"fused": "fused", "deployed": "in deploy form already", "left": f"left: {entry.reason}"}
            rows.append((entry.name, entry.family, entry.branches, count, note[entry.status]))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4])).rstrip()
            for row in rows
        ]
        lines = (lines if self.entries else []) + [self.summary()]
        return "\n".join(lines + ([f"dropped {', '.join(self.dropped)}"] if self.dropped else []))


class Conversion(NamedTuple):
    """The deployed model, and the report on how it came about."""

    model: nn.Module
    report: Report


# ----------------------------------------------------------------------------------------------------------- adapters


class Plan(NamedTuple):
    """A block that can be folded: ``install()`` does it and returns what stands in its place (maybe itself)."""

    install: Callable[[], nn.Module]


@dataclass(frozen=True)
class Adapter:
    """A family of blocks. ``plan(module, path)`` raises UnfoldableError, with the reason, if it cannot be folded."""

    family: str
    recognises: Callable[[nn.Module], bool]
    plan: Callable[[nn.Module, str], Plan]


def _is_ours(kind: type[RepVGGBlock]) -> Callable[[nn.Module], bool]:
    """A block of ours that computes what its class says; a subclass may have overridden that."""

    def recognises(module: nn.Module) -> bool:
        return isinstance(module, kind) and type(module).forward is kind.forward and "forward" not in vars(module)

    return recognises


def _plan_ours(block: nn.Module, path: str) -> Plan:
    assert isinstance(block, RepVGGBlock)
    read_branches(block, path)[0].check()
    conv = block.folded(path)
    _refuse_overflow(conv)

    def install() -> nn.Module:
        block.install(conv)
        return block

    return Plan(install)


def _looks_official(module: nn.Module) -> bool:
    return has_branches(module) or _is_deployed(module)


def _is_deployed(module: nn.Module) -> bool:
    return module._modules.get("rbr_reparam") is not None


#: What may stand in a block beside its branches: it comes after their sum, and stays.
_ACTIVATION_NAMES = ("nonlinearity", "act")
_STAYING = ("se", "post_se", *_ACTIVATION_NAMES)


def _plan_official(block: nn.Module, path: str) -> Plan:
    """Any module with branches under the official names. Its ``forward`` cannot be read, so its output is compared."""
    for name, child in block.named_children():
        if name not in (*BRANCH_NAMES, *_STAYING) and _has_state(child, recurse=True):
            raise UnfoldableError(f"it has a {type(child).__name__} '{name}', whose place in the sum is unknown")
    if _has_state(block, recurse=False):
        raise UnfoldableError("it has parameters or buffers of its own, whose place in the sum is unknown")
    refuse_hooks(block, path, itself=True)
    branches, stride = read_branches(block, path)
    branches.check()
    activation = _prove(block, branches)
    conv = RepConv3x3.from_branches(branches, stride=stride)
    _refuse_overflow(conv)
    return Plan(lambda: _deployed_like(block, conv, activation))


def _has_state(module: nn.Module, *, recurse: bool) -> bool:
    return any(True for _ in (*module.parameters(recurse), *module.buffers(recurse)))


def _deployed_like(block: nn.Module, conv: RepConv3x3, activation: nn.Module) -> RepVGGBlock:
    """A deployed block of ours with the SE of ``block``: ``post_se(activation(se(conv(x))))``."""
    kind = RepVGGBlock if block._modules.get("post_se") is None else RepVGGplusBlock
    with torch.device("meta"):  # its fresh weights are replaced at once
        deployed = kind(conv.in_channels, conv.out_channels, stride=conv.stride, groups=conv.groups, deploy=True)
    deployed.train(block.training)
    deployed.nonlinearity = activation
    for name in ("se", "post_se"):
        if (child := block._modules.get(name)) is not None:
            setattr(deployed, name, child)
    deployed.install(conv)
    return deployed


def _activations(block: nn.Module) -> list[nn.Module]:
    """The activations that ``block`` may apply: its child of that name; without one, a call of a function, or none."""
    named = [child for name in _ACTIVATION_NAMES if (child := block._modules.get(name)) is not None]
    return named or [nn.Identity().train(block.training), nn.ReLU().train(block.training)]


def _probe(channels: int) -> Tensor:
    """``[8, channels, 5, 4]`` in float64: magnitudes from 0.1 to 100, half of them with another mean per channel."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(8, channels, 5, 4, generator=generator, dtype=torch.float64)
    means = torch.randn(8, channels, 1, 1, generator=generator, dtype=torch.float64)
    means[:4] = 0
    return (pixels + means) * torch.tensor([0.1, 1, 10, 100] * 2, dtype=torch.float64).reshape(-1, 1, 1, 1)


@torch.no_grad()
def _prove(block: nn.Module, branches: Branches) -> nn.Module:
    """The activation with which the deployed form of ``block`` computes what ``block`` does, compared in float64.

    The two may differ by what a *float32* evaluation of the folded convolution may round to. Rounding in float64 stays
    below that by nine orders of magnitude, whatever SE and activation make of it; another structure does not. Inputs
    of several magnitudes and means show up clipping and wake the hidden units of SE, both parities of the size show up
    another padding.

    Raises:
        UnfoldableError: it computes something else, or cannot be run on one input.
    """
    if branches.tensors()[0].device.type == "meta":
        raise UnfoldableError("on the meta device it cannot be shown that its forward is a sum of branches")
    x = _probe(branches.in_channels)
    try:
        exact = copy.deepcopy(block).cpu().double()
        want = exact(x.clone())
    except Exception as error:  # a foreign forward may raise anything
        raise UnfoldableError(f"its forward cannot be run on one input: {type(error).__name__}: {error}") from error
    if not isinstance(want, Tensor):
        raise UnfoldableError(f"its forward returns a {type(want).__name__}, not a tensor")

    exact_branches, stride = read_branches(exact)
    for activation, exact_activation in zip(_activations(block), _activations(exact), strict=True):
        conv = RepConv3x3.from_branches(exact_branches, stride=stride)
        assert conv.bias is not None
        got = _deployed_like(exact, conv, exact_activation)(x.clone())
        bound = testing.error_bound(x.float(), conv.weight.float(), conv.bias.float(), stride, conv.groups)
        if got.shape == want.shape and bool(((got - want).abs() <= bound).all()):
            return activation
    raise UnfoldableError(
        "its forward computes something else than post_se(activation(se(sum of its branches))), as a comparison in "
        "float64 shows"
    )


def _refuse_overflow(conv: RepConv3x3) -> None:
    for tensor in conv.parameters():
        if tensor.device.type != "meta" and not bool(tensor.isfinite().all()):
            raise UnfoldableError(
                f"it folds to NaN or infinity in {dtype_name(tensor.dtype)}: its tensors hold such values, a "
                "running_var is negative, or the dtype is too narrow (then fold in float32 first)"
            )


#: The first that recognises a module takes it.
ADAPTERS = (
    Adapter("RepVGGplusBlock", _is_ours(RepVGGplusBlock), _plan_ours),
    Adapter("RepVGGBlock", _is_ours(RepVGGBlock), _plan_ours),
    Adapter("RepVGG-like", _looks_official, _plan_official),
)


# --------------------------------------------------------------------------------------------------------- conversion


def reparameterize(model: nn.Module, *, inplace: bool = False, strict: bool = False) -> Conversion:
    """Folds every multi-branch block of ``model`` into one 3x3 convolution (RepVGG, arXiv:2101.03697, sec. 3.3).

    Recognised are our :class:`RepVGGBlock` and any module with two or more of ``rbr_dense``, ``rbr_1x1`` and
    ``rbr_identity``, anywhere in the model; the root may itself be a block. A module of another library is folded only
    if its output equals that of its fold in a comparison in float64, and becomes a deployed :class:`RepVGGBlock`; so
    the result has the official deploy-form keys. Everything outside the blocks stays as it is: classes, hooks,
    ``training``, ``requires_grad``, dtypes, devices, memory formats, modules used in several places. The auxiliary
    heads of a :class:`RepVGGplus`, which only training uses, are dropped.

    Args:
        model: in eval mode, at least its BatchNorms.
        inplace: convert ``model`` itself rather than a copy. Use the returned model: a root that is another library's
            block cannot become another object in place.
        strict: raise if a block is left, or if there is none, rather than warn.
    Returns:
        ``(model, report)``.
    Raises:
        RuntimeError: a BatchNorm is in training mode or has no running statistics (the message names it and says what
            to do); or ``strict`` and something was left. The model is then unchanged.
    """
    before = _parameter_count(model)
    model = model if inplace else copy.deepcopy(model)
    found = [_examine(path, module, adapter) for path, module, adapter in _blocks(model)]
    _complain(Report(tuple(each.entry for each in found), (), before, before), strict)

    replaced = {id(each.module): each.plan.install() for each in found if each.plan is not None}
    model = _swap(model, replaced)
    dropped = tuple(_drop_training_parts(model))
    entries = tuple(
        dataclasses.replace(each.entry, parameters_after=_parameter_count(replaced.get(id(each.module), each.module)))
        for each in found
    )
    return Conversion(model, Report(entries, dropped, before, _parameter_count(model)))


class _Found(NamedTuple):
    """A block in the model before anything is replaced; ``plan`` is None if it will not be."""

    module: nn.Module
    entry: Entry
    plan: Plan | None


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """Every block with its first path, and the adapter that takes it."""
    for path, module in model.named_modules():
        adapter = next((each for each in ADAPTERS if each.recognises(module)), None)
        if adapter is not None:
            yield path, module, adapter


def _examine(path: str, module: nn.Module, adapter: Adapter) -> _Found:
    count = _parameter_count(module)
    entry = Entry(path, adapter.family, branch_names(module), "left", "", count, count)
    if _is_deployed(module):
        return _Found(module, dataclasses.replace(entry, status="deployed"), None)
    try:
        plan = adapter.plan(module, path)
    except UnfoldableError as error:
        return _Found(module, dataclasses.replace(entry, reason=str(error)), None)
    return _Found(module, dataclasses.replace(entry, status="fused"), plan)


def _complain(report: Report, strict: bool) -> None:
    """Says what will not be folded: by RuntimeError if ``strict``, else by one UserWarning."""
    if report.entries and not report.left:
        return
    blocks = "1 block" if len(report.left) == 1 else f"{len(report.left)} blocks"
    what = f"cannot fold {blocks}: {report.problems()}" if report.entries else report.summary()
    if strict:
        raise RuntimeError(f"reparameterize: {what}")
    warnings.warn(f"reparameterize: {what}", UserWarning, stacklevel=3)


def _swap(model: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module:
    """Puts each replacement in every place where its original stands. Returns the root, which may be one itself."""
    for root in (model, *replaced.values()):  # a replaced block may hold another one, in its SE
        for module in list(root.modules()):
            for name, child in module._modules.items():
                if child is not None and id(child) in replaced:
                    module._modules[name] = replaced[id(child)]
    return replaced.get(id(model), model)


def _drop_training_parts(model: nn.Module) -> Iterator[str]:
    """Removes the auxiliary heads of every RepVGGplus whose blocks are all deployed; yields their paths."""
    for path, module in list(model.named_modules()):
        if isinstance(module, RepVGGplus) and module.deploy:
            yield from (f"{path}.{name}" if path else name for name in module.drop_auxiliary_heads())


def _parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
