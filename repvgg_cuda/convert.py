# SPDX-License-Identifier: MIT
"""Model in, model with folded convolutions out: finds what can be folded in any model, folds it, reports what it did.

Every block is planned before the first one is replaced, so a conversion that raises has changed nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from repvgg_cuda.blocks import Block, find_blocks
from repvgg_cuda.branches import require
from repvgg_cuda.models import RepVGGplus
from repvgg_cuda.modules import RepConv3x3
from repvgg_cuda.proving import prove
from repvgg_cuda.report import Entry, Report
from repvgg_cuda.rewriting import (
    DEPLOYED_NAMES,
    Rewrite,
    block_parameters,
    convolution,
    folded_tensors,
    install,
    plain_conv,
    plan_rewrite,
    replace_modules,
    rest_of_batchnorm,
    slot_names,
)
from repvgg_cuda.structure import UnfoldableError, has_hooks
from repvgg_cuda.tracing import Node, Region, Traced, find_regions

Conv = RepConv3x3 | nn.Conv2d


class Conversion(NamedTuple):
    """The converted model, and the report on how it came about."""

    model: nn.Module
    report: Report


def reparameterize(
    model: nn.Module,
    *,
    inplace: bool = False,
    strict: bool = False,
    chains: bool = True,
    flush_denormals: bool = False,
) -> Conversion:
    """Folds every sum of affine branches in ``model`` into one convolution (RepVGG, arXiv:2101.03697, sec. 3.3).

    Found by structure, in any class, ours or not: sums of convolutions, identities and average poolings of one tensor,
    each with or without BatchNorm, bias, groups and constant scales, nested or with a BatchNorm on the sum. Each fold
    is proven on a random input before anything is replaced.

    The convolution becomes a child of the module that holds the sum, under the name that its family uses in deploy form
    (``rbr_reparam``, ``reparam_conv``, ...), else ``reparam``: a :class:`RepConv3x3` where it is 3x3, an ``nn.Conv2d``
    elsewhere. That module computes what it did in eval mode; where its own forward has no deployed form, it gets one,
    in a subclass of its class. Everything outside the blocks stays: classes, names, hooks, ``training``,
    ``requires_grad``, dtypes, devices, memory formats, modules used in several places. The auxiliary heads of a
    :class:`RepVGGplus`, which only training uses, are dropped.

    Args:
        model: in eval mode, at least its BatchNorms.
        inplace: convert ``model`` itself rather than a copy.
        strict: raise if a block is left, or if there is nothing to fold, rather than warn.
        chains: fold convolutions with a BatchNorm and no branches, too.
        flush_denormals: set folded weights that are denormal numbers to zero.
    Returns:
        ``(model, report)``.
    Raises:
        RuntimeError: a BatchNorm of a block is in training mode or has no running statistics (the message names it and
            says what to do); or ``strict`` and something was left. The model is then unchanged.
    """
    require_convertible(model, "reparameterize")
    before = _parameter_count(model)
    model = model if inplace else copied(model, "reparameterize")
    plan = _plan(model, chains, flush_denormals)
    draft = Report(tuple(plan.entries), (), before, before, tuple(plan.notes), flush_denormals)
    _complain(draft, strict)

    with torch.no_grad():
        for rewrite in plan.rewrites:
            install(rewrite)
        _fold_chains(model, plan.chains)
    dropped = tuple(_drop_training_parts(model))
    absorb_relus(model)
    return Conversion(model, dataclasses.replace(draft, dropped=dropped, parameters_after=_parameter_count(model)))


def require_convertible(model: object, what: str) -> None:
    """Raises RuntimeError unless ``model`` is a module that can be taken apart, whose parameters have values."""
    require(isinstance(model, nn.Module), f"{what}: model must be a torch.nn.Module, got {type(model).__name__}")
    assert isinstance(model, nn.Module)
    require(
        not isinstance(model, torch.jit.ScriptModule),
        f"{what}: model is TorchScript, which cannot be taken apart: convert the model that it was made from",
    )
    lazy = next((path for path, p in model.named_parameters() if isinstance(p, UninitializedParameter)), None)
    require(lazy is None, f"{what}: {lazy} has no values yet; call the model once on an input")


def copied(model: nn.Module, what: str) -> nn.Module:
    """A copy of ``model``. Raises RuntimeError, with the usual cause, if there can be none."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise RuntimeError(
            f"{what}: model cannot be copied ({str(error).split('.')[0]}); if its weights are computed by hooks, make "
            "them plain first, with torch.nn.utils.prune.remove or torch.nn.utils.remove_weight_norm"
        ) from error


def _complain(report: Report, strict: bool) -> None:
    """Says what will not be folded: by RuntimeError if ``strict``, else by one UserWarning."""
    if report.entries and not report.left:
        return
    blocks = "1 block" if len(report.left) == 1 else f"{len(report.left)} blocks"
    what = f"cannot fold {blocks}: {report.problems()}" if report.entries else report.summary()
    what = "; ".join([what, *report.notes])
    if strict:
        raise RuntimeError(f"reparameterize: {what}")
    warnings.warn(f"reparameterize: {what}", UserWarning, stacklevel=3)


# ------------------------------------------------------------------------------------------------------------- planning


class _Chain(NamedTuple):
    """A convolution that takes over the BatchNorms around it."""

    conv: nn.Conv2d
    weight: nn.Parameter
    bias: nn.Parameter
    replaced: dict[int, nn.Module]


class _Plan(NamedTuple):
    entries: list[Entry]
    rewrites: list[Rewrite]
    chains: list[_Chain]
    notes: list[str]


class Found(NamedTuple):
    """A block, and the part of the model it was found in."""

    region: Region
    block: Block

    @property
    def path(self) -> str:
        return self.region.absolute(self.block.path)


def find(model: nn.Module, *, chains: bool = True) -> tuple[list[Found], list[str]]:
    """All blocks of ``model``, foldable or not, and notes on what could not be looked into."""
    regions, notes = find_regions(model)
    found = [Found(r, block) for r in regions for block in find_blocks(r.traced, r.elsewhere, chains=chains)]
    return found, notes


def _plan(model: nn.Module, with_chains: bool, flush_denormals: bool) -> _Plan:
    found, notes = find(model, chains=with_chains)
    plan = _Plan([_deployed_entry(path, module) for path, module in _deployed(model)], [], [], notes)
    convs: dict[int, Conv] = {}
    reasons: dict[int, str] = {}
    for i, (_, block) in enumerate(found):
        try:
            if block.reason:
                raise UnfoldableError(block.reason)
            prove(block)
            weight, bias = folded_tensors(block, flush_denormals=flush_denormals)
            assert block.folded is not None
            if block.is_chain:
                plan.chains.append(_plan_chain(block, weight, bias))
            convs[i] = convolution(block.folded, weight, bias)
        except UnfoldableError as error:
            reasons[i] = str(error)
    paths = _plan_rewrites(found, convs, plan, reasons)
    for i, each in enumerate(found):
        plan.entries.append(_entry(each, reasons.get(i), paths.get(i, each.path), convs.get(i)))
    return plan


def _entry(found: Found, reason: str | None, name: str, conv: Conv | None) -> Entry:
    block = found.block
    owner = block.traced.module.get_submodule(block.path if block.is_chain else block.scope)
    count = sum(tensor.numel() for tensor in block_parameters(block) if isinstance(tensor, nn.Parameter))
    entry = Entry(
        found.path,
        type(owner).__name__,
        block.branches,
        "left",
        reason or "",
        kind="chain" if block.is_chain else "sum",
        parameters_before=count,
        parameters_after=count,
        weights_before=sum(layer.weights for layer in block.layers),
    )
    if reason is not None or conv is None:
        return entry
    assert block.folded is not None
    assert conv.bias is not None
    weight = block.folded.weight.to(conv.weight.dtype)
    tiny = torch.finfo(weight.dtype).smallest_normal
    on_meta = weight.device.type == "meta"
    kernels = [layer.kernel for layer in block.convolutions if layer.kernel is not None and not on_meta]
    largest = max((float(kernel.detach().abs().max()) for kernel in kernels), default=0.0)
    return dataclasses.replace(
        entry,
        status="fused",
        conv=name,
        parameters_after=conv.weight.numel() + conv.bias.numel(),
        range_growth=float(weight.abs().max()) / largest if largest > 0 else None,
        denormals=0 if on_meta else int(((weight != 0) & (weight.abs() < tiny)).sum()),
    )


class _Owner(NamedTuple):
    """A module that holds sums, with its path; the ids of the modules in it that lead to them; and their indices."""

    module: nn.Module
    path: str
    within: set[int]
    indices: list[int]


def _owners(found: Sequence[Found], indices: Iterable[int]) -> list[_Owner]:
    """Who holds the sums of those ``indices``."""
    owners: dict[int, _Owner] = {}
    for i in indices:
        region, block = found[i]
        module = block.traced.module.get_submodule(block.scope)
        owner = owners.setdefault(id(module), _Owner(module, region.absolute(block.scope), set(), []))
        owner.within.update(_inner_modules(block))
        owner.indices.append(i)
    # A module that is entered on the way to another one's sum is rewritten there.
    while True:
        entered = {inner: key for key, owner in owners.items() for inner in owner.within if inner in owners}
        if not entered:
            return list(owners.values())
        inner, key = next(iter(entered.items()))
        owner = owners.pop(inner)
        owners[key].within.update(owner.within)
        owners[key].indices.extend(owner.indices)
        owners[key].indices.sort()


def _plan_rewrites(
    found: Sequence[Found], convs: Mapping[int, Conv], plan: _Plan, reasons: dict[int, str]
) -> dict[int, str]:
    """Plans the modules that hold the sums; what cannot be is added to ``reasons``. Returns the convolutions' paths."""
    paths: dict[int, str] = {}
    for owner in _owners(found, [i for i in convs if not found[i].block.is_chain]):
        names = slot_names(owner.module, len(owner.indices))
        blocks = [(found[i].block, name, convs[i]) for i, name in zip(owner.indices, names, strict=True)]
        try:
            plan.rewrites.append(plan_rewrite(owner.module, frozenset(owner.within), blocks))
        except UnfoldableError as error:
            reasons.update((i, str(error)) for i in owner.indices)
        else:
            paths.update((i, _join(owner.path, name)) for i, name in zip(owner.indices, names, strict=True))
    return paths


def conv_paths(found: Sequence[Found]) -> dict[int, str]:
    """Where the convolution of each foldable block will be, by index."""
    paths = {i: each.path for i, each in enumerate(found) if each.block.is_chain}
    for owner in _owners(found, [i for i, each in enumerate(found) if not (each.block.is_chain or each.block.reason)]):
        names = slot_names(owner.module, len(owner.indices))
        paths.update((i, _join(owner.path, name)) for i, name in zip(owner.indices, names, strict=True))
    return paths


def _join(*names: str) -> str:
    return ".".join(filter(None, names))


def _inner_modules(block: Block) -> Iterator[int]:
    """The ids of the modules within the block's scope that its nodes lie in."""
    for node in block.nodes:
        scopes = block.traced.scopes.get(node, ())
        start = scopes.index(block.scope) + 1 if block.scope else 0
        yield from (id(block.traced.module.get_submodule(path)) for path in scopes[start:])


def _plan_chain(block: Block, weight: nn.Parameter, bias: nn.Parameter) -> _Chain:
    root = block.traced.module
    conv = root.get_submodule(block.path)
    assert isinstance(conv, nn.Conv2d)
    replaced: dict[int, nn.Module] = {}
    for layer in block.layers:
        if layer.kind == "bn":
            module = root.get_submodule(layer.path)
            if has_hooks(module):
                raise UnfoldableError(f"{layer.path} has hooks, which folding would lose; remove them first")
            if not isinstance(module, nn.modules.batchnorm._BatchNorm) and layer.node.op == "call_function":
                raise UnfoldableError(f"its BatchNorm is a function that {type(module).__name__} calls")
            replaced[id(module)] = rest_of_batchnorm(module)
    if parametrize.is_parametrized(conv):  # its weight is computed: it cannot be assigned
        replaced[id(conv)] = plain_conv(conv, weight, bias)
    return _Chain(conv, weight, bias, replaced)


# -------------------------------------------------------------------------------------------------------- carrying out


def _fold_chains(model: nn.Module, chains: Sequence[_Chain]) -> None:
    replaced: dict[int, nn.Module] = {}
    for conv, weight, bias, others in chains:
        if id(conv) not in others:
            conv.weight, conv.bias = weight, bias
        replaced.update(others)
    replace_modules(model, replaced)


def absorb_relus(model: nn.Module) -> None:
    """Lets every :class:`RepConv3x3` that only an ``nn.ReLU`` reads apply it; an ``nn.Identity`` takes its place."""
    replaced: dict[int, nn.Module] = {}
    for region in find_regions(model)[0]:
        traced = region.traced
        for node in traced.graph.nodes:
            conv, relu = _called(traced, node), _called(traced, _reader(traced, node))
            if not isinstance(conv, RepConv3x3) or type(relu) is not nn.ReLU or conv.activation != "identity":
                continue
            once = all(traced.calls[id(m)] == 1 and id(m) not in region.elsewhere for m in (conv, relu))
            if once and not has_hooks(relu):
                conv.activation = "relu"
                replaced[id(relu)] = nn.Identity().train(relu.training)
    replace_modules(model, replaced)


def _reader(traced: Traced, node: Node) -> Node | None:
    """The only reader of what ``node`` computes, behind layers that do nothing; None if there are several."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if type(_called(traced, node)) is not nn.Identity:
            return node
    return None


def _called(traced: Traced, node: Node | None) -> nn.Module | None:
    return None if node is None or node.op != "call_module" else traced.module.get_submodule(str(node.target))


def _deployed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks in deploy form, with their first paths."""
    for path, module in model.named_modules():
        if any(isinstance(module._modules.get(name), (RepConv3x3, nn.Conv2d)) for name in DEPLOYED_NAMES):
            yield path, module


def _deployed_entry(path: str, module: nn.Module) -> Entry:
    name = next(name for name in DEPLOYED_NAMES if isinstance(module._modules.get(name), (RepConv3x3, nn.Conv2d)))
    conv = module.get_submodule(name)
    count = _parameter_count(conv)
    return Entry(path, type(module).__name__, "", "deployed", "", "deployed", _join(path, name), count, count)


def _drop_training_parts(model: nn.Module) -> Iterator[str]:
    """Removes the auxiliary heads of every RepVGGplus whose blocks are all deployed; yields their paths."""
    for path, module in list(model.named_modules()):
        if isinstance(module, RepVGGplus) and module.deploy:
            yield from (_join(path, name) for name in module.drop_auxiliary_heads())


def _parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
