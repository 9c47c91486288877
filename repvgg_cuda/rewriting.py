# SPDX-License-Identifier: MIT
"""Puts folded convolutions in the place of blocks: modules change, the model keeps its classes, names and hooks.

The module whose call holds a block gets the convolution as a child and loses the branches. If the forward of its class
then computes the right thing by itself, as those written with a deployed form in mind do, it is left alone. Otherwise
the module gets a forward generated from its graph, in a subclass of its class.
"""

from __future__ import annotations

import copyreg
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor, fx

from repvgg_cuda.affine import Affine
from repvgg_cuda.blocks import Block, matching_sum
from repvgg_cuda.branches import dtype_name
from repvgg_cuda.modules import RepConv3x3
from repvgg_cuda.reference import output_format
from repvgg_cuda.signatures import Arguments
from repvgg_cuda.structure import UnfoldableError, conv_geometry
from repvgg_cuda.tracing import Node, Traced, UntraceableError, trace

# --------------------------------------------------------------------------------------------------------- convolutions


def folded_tensors(block: Block, *, flush_denormals: bool = False) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of the one convolution, in the dtype, device and memory format of the block's largest kernel.

    They require gradients if a parameter of the block did: frozen stays frozen.

    Raises:
        UnfoldableError: they are not finite.
    """
    assert block.folded is not None
    kernels = [layer.kernel for layer in block.convolutions if layer.kernel is not None]
    like = max(kernels, key=lambda kernel: kernel.numel())
    trainable = any(parameter.requires_grad for parameter in block_parameters(block))
    tensors = []
    for tensor in (block.folded.weight, block.folded.bias):
        value = tensor.to(like.dtype)
        if value.device.type != "meta" and not bool(value.isfinite().all()):
            raise UnfoldableError(
                f"it folds to NaN or infinity in {dtype_name(value.dtype)}: its tensors hold such values, a "
                "running_var is negative, or the dtype is too narrow (then fold in float32 first)"
            )
        if flush_denormals:
            value = torch.where(value.abs() < torch.finfo(value.dtype).smallest_normal, 0, value)
        layout = output_format(like) if value.dim() == 4 else torch.contiguous_format
        value = value.clone(memory_format=layout)  # no memory of the branches
        tensors.append(nn.Parameter(value, requires_grad=trainable))
    return tensors[0], tensors[1]


def block_parameters(block: Block) -> Iterator[Tensor]:
    """The parameters and buffers of the block, each once."""
    seen: set[int] = set()
    for tensor in _tensors_of(block.traced, block.nodes):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def _tensors_of(traced: Traced, nodes: Sequence[Node]) -> Iterator[Tensor]:
    todo: list[Node] = list(nodes)
    inside = set(nodes)
    while todo:
        node = todo.pop()
        if node.op == "call_module":
            module = traced.module.get_submodule(str(node.target))
            yield from module.parameters()
            yield from module.buffers()
        elif node.op == "get_attr":
            yield traced.attribute(str(node.target))
            owner = traced.module.get_submodule(str(node.target).rpartition(".")[0])
            if isinstance(owner, nn.modules.batchnorm._BatchNorm):  # its counter is no argument of the function
                yield from owner.buffers(recurse=False)
        todo += [each for each in node.all_input_nodes if _leads_to_constants_only(each) and each not in inside]


def _leads_to_constants_only(node: Node) -> bool:
    if node.op == "get_attr":
        return True
    inputs = node.all_input_nodes
    return node.op in ("call_function", "call_method") and bool(inputs) and all(map(_leads_to_constants_only, inputs))


def is_own_geometry(folded: Affine) -> bool:
    """Whether :class:`RepConv3x3` computes a convolution of that geometry."""
    same = (folded.kernel_size, folded.padding, folded.dilation) == ((3, 3), (1, 1), (1, 1))
    return same and folded.stride in ((1, 1), (2, 2))


def convolution(folded: Affine, weight: nn.Parameter, bias: nn.Parameter) -> RepConv3x3 | nn.Conv2d:
    """A module that computes ``folded`` with that weight and bias: ours where it is 3x3, else an ``nn.Conv2d``."""
    conv: RepConv3x3 | nn.Conv2d
    channels, groups = (folded.in_channels, folded.out_channels), folded.groups
    if is_own_geometry(folded):
        conv = RepConv3x3(*channels, stride=folded.stride[0], groups=groups, device="meta")
    else:
        geometry = (folded.kernel_size, folded.stride, folded.padding, folded.dilation)
        conv = nn.Conv2d(*channels, *geometry, groups=groups, device="meta")
    conv.weight, conv.bias = weight, bias
    return conv


def plain_conv(conv: nn.Conv2d, weight: Tensor | None, bias: Tensor | None) -> nn.Conv2d:
    """A convolution of the geometry of ``conv`` with weights of its own."""
    _, _, size, stride, padding, dilation, groups, _ = conv_geometry(conv)
    channels, has_bias = (conv.in_channels, conv.out_channels), bias is not None
    plain = nn.Conv2d(*channels, size, stride, padding, dilation, groups, has_bias, device="meta")
    assert weight is not None
    plain.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
    plain.bias = None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad)
    return plain.train(conv.training)


# --------------------------------------------------------------------------------------------------------------- names

#: The name that a family of blocks gives its deployed convolution, by the names of its branches.
_SLOTS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"rbr_conv", "rbr_scale"}), "reparam_conv"),  # MobileOne
    (frozenset({"conv_kxk"}), "reparam_conv"),  # timm
    (frozenset({"branch_3x3", "branch_norm"}), "branch_reparam"),  # mmpretrain
    (frozenset({"branch_3x3", "branch_1x1"}), "rbr_reparam"),  # super-gradients
    (frozenset({"rbr_dense"}), "rbr_reparam"),  # RepVGG, QARepVGG, YOLO
    (frozenset({"dbb_origin"}), "dbb_reparam"),  # diverse branch blocks
    (frozenset({"large_conv"}), "reparam_conv"),  # FastViT
)


def slot_names(module: nn.Module, count: int) -> list[str]:
    """Attributes for ``count`` deployed convolutions: the first named as in the family of ``module``, if it has one."""
    children = {name for name, child in module.named_children() if child is not None}
    name = next((slot for branches, slot in _SLOTS if branches <= children), "reparam")
    if "reparam_conv" in vars(module):  # timm: None until then
        name = "reparam_conv"
    candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
    return list(itertools.islice((each for each in candidates if getattr(module, each, None) is None), count))


#: Names under which a deployed convolution stands in a block.
DEPLOYED_NAMES = (*dict.fromkeys(slot for _, slot in _SLOTS), "reparam")


# ------------------------------------------------------------------------------------------------------------ the plan


class Rewrite(NamedTuple):
    """A module and its new graph, in which the blocks are single calls. Nothing is changed yet."""

    owner: nn.Module
    given: Arguments | None  # what it is called with
    within: frozenset[int]
    graph: fx.Graph
    convs: dict[str, RepConv3x3 | nn.Conv2d]  # by the name of the child that each becomes
    consumed: frozenset[int]  # ids of modules and tensors that only the blocks use
    literals: Mapping[str, Tensor]


def plan_rewrite(
    owner: nn.Module, within: frozenset[int], blocks: Sequence[tuple[Block, str, RepConv3x3 | nn.Conv2d]]
) -> Rewrite:
    """The graph of ``owner`` (entering the modules ``within``) with the convolutions in the place of the blocks.

    Raises:
        UnfoldableError: the blocks are not in it as they were found.
    """
    given = blocks[0][0].traced.arguments_of(owner)
    within |= blocks[0][0].traced.transparent
    try:
        traced = trace(owner, given, within=within)
    except UntraceableError as error:
        raise UnfoldableError(f"{type(owner).__name__} cannot be traced by itself: {error}") from error
    if traced.stores:
        name = next(iter(traced.stores.values()))
        raise UnfoldableError(f"the forward of {type(owner).__name__} stores {name}, which a generated one would not")
    found = []
    for block, _, _ in blocks:
        place = matching_sum(traced, block)
        if place is None:
            raise UnfoldableError(f"its sum is not found again in the {type(owner).__name__} that holds it")
        found.append(place)
    consumed: set[int] = set()
    replaced: dict[Node, Node] = {}
    for (block, name, _), (root, nodes) in zip(blocks, found, strict=True):
        consumed.update(id(tensor) for tensor in _tensors_of(traced, nodes))
        consumed.update(block.module_ids)
        with traced.graph.inserting_before(nodes[-1]):
            call = traced.graph.call_module(name, (replaced.get(root, root),))
        replaced[nodes[-1]] = call  # it may be the root of the next block
        nodes[-1].replace_all_uses_with(call)
        for node in reversed(nodes):
            traced.graph.erase_node(node)
    _drop_unused_constants(traced.graph)
    try:
        _class_with(owner, traced.graph)  # now: once something is replaced, nothing must fail
    except Exception as error:  # arguments that cannot be written down
        raise UnfoldableError(f"no forward can be generated for {type(owner).__name__}: {error}") from error
    read = {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"}
    literals = {name: tensor for name, tensor in traced.literals.items() if name in read}
    convs = {name: conv for _, name, conv in blocks}
    return Rewrite(owner, given, within, traced.graph, convs, frozenset(consumed), literals)


def _drop_unused_constants(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or _leads_to_constants_only(node)):
            graph.erase_node(node)


# -------------------------------------------------------------------------------------------------------- installation


def install(rewrite: Rewrite) -> None:
    """Carries out the plan."""
    owner, graph = rewrite.owner, rewrite.graph
    for name, conv in rewrite.convs.items():
        vars(owner).pop(name, None)
        setattr(owner, name, conv.train(owner.training))
    _remove_branches(rewrite)
    if isinstance(owner, fx.GraphModule):
        owner.graph = graph
    elif not _computes(rewrite):
        vars(owner).pop("forward", None)
        vars(owner).update(rewrite.literals)
        owner.__class__ = _class_with(owner, graph)


def _remove_branches(rewrite: Rewrite) -> None:
    """Deletes the modules and parameters that only the blocks used, and containers that nothing else is in."""
    owner, graph, consumed = rewrite.owner, rewrite.graph, rewrite.consumed
    called = [owner.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"]
    paths = [str(node.target) for node in graph.nodes if node.op == "get_attr" and node.target not in rewrite.literals]
    read = {id(functools.reduce(getattr, path.split("."), owner)) for path in paths}
    live = {id(inner) for module in called for inner in module.modules()}

    def is_dead(module: nn.Module) -> bool:
        inner = list(module.modules())
        if any(id(each) in live for each in inner):
            return False
        tensors = [*module.parameters(), *module.buffers()]
        if any(id(tensor) in read or id(tensor) not in consumed for tensor in tensors):
            return False
        return bool(tensors) or any(id(each) in consumed for each in inner)

    def visit(module: nn.Module) -> None:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None and id(tensor) in consumed and id(tensor) not in read:
                    del tensors[name]
        for name, child in list(module._modules.items()):
            if child is None:
                continue
            if is_dead(child):
                del module._modules[name]
            elif id(child) not in live:
                visit(child)

    visit(owner)


def _computes(rewrite: Rewrite) -> bool:
    """Whether the forward that the module has is just the new graph."""
    try:
        other = trace(rewrite.owner, rewrite.given, within=rewrite.within).graph
    except UntraceableError:
        return False
    return _listing(rewrite.graph) == _listing(other)


def _listing(graph: fx.Graph) -> list[Any]:
    """The graph in terms of numbered nodes, for comparison."""
    numbers: dict[Node, int] = {}
    lines = []
    for node in graph.nodes:
        arguments = fx.map_arg((node.args, node.kwargs), lambda each: ("node", numbers[each]))
        lines.append((node.op, node.target, repr(arguments)))
        numbers[node] = len(numbers)
    return lines


# ---------------------------------------------------------------------------------------------------- generated forward

Globals = tuple[tuple[str, bool, Any], ...]  # name, whether a module, the object or the module's name


def _class_with(owner: nn.Module, graph: fx.Graph) -> type[nn.Module]:
    base: Any = type(owner)
    return _rewritten_class(base, *_source(graph))


def _source(graph: fx.Graph) -> tuple[str, Globals]:
    code = graph.python_code("self")
    names = [
        (name, isinstance(value, ModuleType), value.__name__ if isinstance(value, ModuleType) else value)
        for name, value in sorted(code.globals.items())
        if re.search(rf"\b{re.escape(name)}\b", code.src)
    ]
    return code.src, tuple(names)


@functools.cache
def _rewritten_class(base: Any, source: str, names: Globals) -> type[nn.Module]:
    """A subclass of ``base`` with another forward; one and the same for blocks that are alike."""
    namespace: dict[str, Any] = {
        name: __import__(value, fromlist=["_"]) if is_module else value for name, is_module, value in names
    }
    exec(compile(source, f"<{base.__name__} converted by repvgg_cuda>", "exec"), namespace)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        function, arguments, *rest = tuple(super(kind, self).__reduce_ex__(protocol))
        if function is not copyreg.__newobj__ or arguments != (kind,):  # type: ignore[attr-defined]
            raise TypeError(
                f"{base.__name__} pickles and copies in its own way, which a converted module cannot follow"
            )
        return (_new, (base, source, names), *rest)

    attributes = {
        "forward": namespace["forward"],
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    kind: type[nn.Module] = type(base.__name__, (base,), attributes)
    kind.__qualname__ = base.__qualname__
    return kind


def _new(base: Any, source: str, names: Globals) -> nn.Module:
    kind = _rewritten_class(base, source, names)
    return kind.__new__(kind)


# ------------------------------------------------------------------------------------------------------------- chains


def rest_of_batchnorm(module: nn.Module) -> nn.Module:
    """What a BatchNorm does besides normalising: nothing, or the layers that its class calls behind it.

    Raises:
        UnfoldableError: it does something else.
    """
    forward = type(module).forward
    if forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward) or type(module).__name__ == "FrozenBatchNorm2d":
        return nn.Identity().train(module.training)
    try:
        graph = trace(module, within=()).graph
    except UntraceableError as error:
        raise UnfoldableError(f"its {type(module).__name__} cannot be traced: {error}") from error
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    output = next(node for node in graph.nodes if node.op == "output")
    in_a_row = [calls[i].args[0] is calls[i - 1] and len(calls[i].args) == 1 for i in range(1, len(calls))]
    layers = {
        str(node.target): module.get_submodule(str(node.target)) for node in calls[1:] if node.op == "call_module"
    }
    if not all(in_a_row) or len(layers) != len(calls) - 1 or output.args != (calls[-1],):
        raise UnfoldableError(f"its {type(module).__name__} does more than normalise and call layers in a row")
    rest = nn.Sequential()
    for name, layer in layers.items():
        rest.add_module(name, layer)
    return rest.train(module.training)


def replace_modules(model: nn.Module, replaced: Mapping[int, nn.Module]) -> None:
    """Puts each replacement in every place of ``model`` where the module with that id stands."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and id(child) in replaced:
                module._modules[name] = replaced[id(child)]
