# SPDX-License-Identifier: MIT
"""Finds in a traced graph what can be one convolution: sums of affine branches of one tensor, and plain conv-BN chains.

Nothing is known of block classes or attribute names. A block is a sum whose terms are affine in the nearest tensor they
all come from, with at least one convolution among them, and the BatchNorm, scales and further sums that follow it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor, fx

from repvgg_cuda import affine
from repvgg_cuda.affine import Affine
from repvgg_cuda.layers import Layer, read_layers
from repvgg_cuda.proxies import IN_PLACE
from repvgg_cuda.structure import NO_STATISTICS, UnfoldableError
from repvgg_cuda.tracing import Node, Traced

#: A fold may have up to twice the weights of its branches. Beyond that one convolution costs more than several do: a
#: depthwise 3x3 beside a dense 1x1, say, would become a dense 3x3.
MAX_GROWTH = 2


@dataclass(frozen=True)
class Block:
    """``nodes`` compute ``out``, the last of them, from ``root`` alone. ``folded`` is that map, unless ``reason`` is
    given.

    ``scope``: the path of the innermost module whose call holds all of them. ``branches``: as "3x3+1x1+id".
    ``is_chain``: no sum, a convolution with the BatchNorms around it.
    """

    traced: Traced
    root: Node
    nodes: tuple[Node, ...]
    layers: tuple[Layer, ...]
    scope: str
    branches: str
    is_chain: bool
    folded: Affine | None
    reason: str = ""

    @property
    def out(self) -> Node:
        return self.nodes[-1]

    @property
    def convolutions(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.kind == "conv")

    @property
    def module_ids(self) -> list[int]:
        paths = [str(node.target) for node in self.nodes if node.op == "call_module"]
        return [id(self.traced.module.get_submodule(path)) for path in paths]

    @property
    def path(self) -> str:
        """The name of the block: its module, or its convolution where it is a chain."""
        return next(iter(self.convolutions)).path if self.is_chain else self.scope

    def constants(self) -> dict[str, Tensor]:
        """The parameters and buffers that its layers take as arguments, by path."""
        todo = [constant for layer in self.layers for constant in layer.constants]
        found: dict[str, Tensor] = {}
        while todo:
            node = todo.pop()
            if node.op == "get_attr":
                found[str(node.target)] = self.traced.attribute(str(node.target))
            todo += node.all_input_nodes
        return found

    @torch.no_grad()
    def run(self, x: Tensor, model: nn.Module | None = None) -> Tensor:
        """What its layers make of ``x``, in the modules of ``model`` (default: those it was found in)."""
        graph, values = fx.Graph(), {}
        values[self.root] = graph.placeholder("x")

        def constant(node: Node) -> Node:
            if node not in values:
                values[node] = graph.node_copy(node, constant)
            return values[node]

        for node in self.nodes:
            values[node] = graph.node_copy(node, constant)
        graph.output(values[self.out])
        literals = {node: self.traced.literals.get(str(node.target)) for node in graph.nodes if node.op == "get_attr"}
        env = {node: literal.to(x.dtype) for node, literal in literals.items() if literal is not None}
        y = fx.Interpreter(model or self.traced.module, graph=graph).run(x, initial_env=env)
        assert isinstance(y, Tensor)
        return y


@torch.no_grad()
def find_blocks(traced: Traced, elsewhere: Collection[int] = (), *, chains: bool = True) -> list[Block]:
    """The blocks of a graph in the order of execution, foldable or with the reason why not.

    Args:
        elsewhere: ids of modules that are also called from outside of the graph.
        chains: find convolutions with BatchNorms around them, too.
    Raises:
        RuntimeError: a BatchNorm in one of them is in training mode or has no running statistics.
    """
    return _Finder(traced, elsewhere).find(chains)


def matching_sum(traced: Traced, block: Block) -> tuple[Node, list[Node]] | None:
    """``block``, found in the graph of a larger module, in the graph of one that holds it: its root, and its nodes."""
    finder = _Finder(traced, ())
    wanted = _signature(block.traced, block.layers)
    for node in finder.layers:
        for root, nodes in finder.sums_at(node):
            if _signature(traced, [finder.layers[each] for each in nodes]) == wanted:
                return root, nodes
    return None


def _signature(traced: Traced, layers: Sequence[Layer]) -> list[tuple[object, ...]]:
    """What tells blocks of one model apart: their operations, by id the modules and tensors they use, literals."""

    def used(node: Node) -> list[object]:
        if node.op in ("call_function", "call_method"):
            return []
        path = str(node.target)
        return [traced.literals[path].tolist() if path in traced.literals else id(traced.attribute(path))]

    def constants(node: Node) -> list[object]:
        return used(node) + [i for each in node.all_input_nodes for i in constants(each)]

    return [
        (layer.kind, layer.node.op, *used(layer.node), *(i for each in layer.constants for i in constants(each)))
        for layer in layers
    ]


class _Finder:
    def __init__(self, traced: Traced, elsewhere: Collection[int]) -> None:
        self.traced, self.elsewhere = traced, elsewhere
        self.layers = read_layers(traced)
        self.order = {node: i for i, node in enumerate(traced.graph.nodes)}
        self.roots = self._roots()
        self.mutations = self._mutations()
        self.parameter_readers = Counter(
            str(node.target).rpartition(".")[0] for node in traced.graph.nodes if node.op == "get_attr"
        )
        self.taken: set[Node] = set()

    def find(self, chains: bool) -> list[Block]:
        blocks: list[Block] = []
        for node in reversed(self.traced.graph.nodes):
            found = [] if node in self.taken else self.sums_at(node)
            for root, nodes in found:
                block = self._block(root, nodes, is_chain=False)
                if not block.reason or not any(block.out in outer.nodes for outer in blocks):
                    blocks.append(block)  # but a part of one that was refused: that is said once
                if not block.reason:
                    self.taken.update(nodes)
                    break
        if chains:
            blocks += [chain for node in self.traced.graph.nodes for chain in self._chains(node)]
        return sorted(blocks, key=lambda block: self.order[block.out])

    # -------------------------------------------------------------------------------------------------------- analysis

    def _roots(self) -> dict[Node, frozenset[Node]]:
        """For each node the nodes, itself included, of which alone it is an affine map."""
        roots: dict[Node, frozenset[Node]] = {}
        for node in self.traced.graph.nodes:
            layer = self.layers.get(node)
            common = frozenset.intersection(*(roots[each] for each in layer.inputs)) if layer else frozenset()
            roots[node] = common | {node}
        return roots

    def _mutations(self) -> dict[Node, list[Node]]:
        """For each tensor the nodes that change it in place; views and pass-through layers stand for their tensor."""
        base: dict[Node, Node] = {}
        mutations: dict[Node, list[Node]] = {}
        for node in self.traced.graph.nodes:
            layer = self.layers.get(node)
            first = node.args[0] if node.args and isinstance(node.args[0], Node) else None
            in_place = first is not None and self._changes_input(node)
            aliases = in_place or _is_view(node) or (layer is not None and layer.kind in ("pass", "hooks"))
            base[node] = base[first] if aliases and first is not None else node
            if in_place and first is not None:
                mutations.setdefault(base[first], []).append(node)
        self.base = base
        return mutations

    def _changes_input(self, node: Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.traced.module.get_submodule(str(node.target)), "inplace", False))
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op == "call_method":
            return name.endswith("_") and not name.startswith("_")
        flagged = node.kwargs.get("inplace") is True or any(each is True for each in node.args[1:])  # relu(x, True)
        return node.target in IN_PLACE or name.endswith("_") or flagged

    def _interior(self, root: Node, out: Node) -> list[Node]:
        """The nodes between ``root`` and ``out``, in order, ``out`` included."""
        seen, todo = {root}, [out]
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += self.layers[node].inputs
        return sorted(seen - {root}, key=self.order.__getitem__)

    # ----------------------------------------------------------------------------------------------------------- sums

    def sums_at(self, node: Node) -> list[tuple[Node, list[Node]]]:
        """If ``node`` adds branches of one tensor: that tensor, and the nodes of the block.

        First the largest block, then those with less of what follows.
        """
        layer = self.layers.get(node)
        if layer is None or layer.kind != "sum":
            return []
        common = frozenset.intersection(*(self.roots[each] for each in layer.inputs))
        if not common:
            return []
        root = max(common, key=self.order.__getitem__)
        interiors = (self._interior(root, out) for out in reversed(self._extensions(node, root)))
        return [(root, nodes) for nodes in interiors if any(self.layers[each].kind == "conv" for each in nodes)]

    def _extensions(self, out: Node, root: Node) -> list[Node]:
        """``out``, and the BatchNorms, scales and sums that follow it and still depend on ``root`` alone."""
        outs = [out]
        while len(out.users) == 1:
            user = next(iter(out.users))
            layer = self.layers.get(user)
            if layer is None or layer.kind not in ("bn", "scale", "sum", "pass") or root not in self.roots[user]:
                break
            out = user
            if layer.kind != "pass":
                outs.append(out)
        return outs

    def _block(self, root: Node, nodes: Sequence[Node], *, is_chain: bool) -> Block:
        layers = tuple(self.layers[node] for node in nodes)
        scopes = [self.traced.scopes.get(node, ()) for node in nodes]
        common = _common_prefix(scopes)
        folded, reason = None, ""
        try:
            self._check_isolated(root, nodes)
            self._check_modules(nodes)
            folded = self._fold(root, layers)
        except UnfoldableError as error:
            reason = str(error)
        except RuntimeError as error:
            if not (is_chain and NO_STATISTICS in str(error)):  # batch statistics are what some layers are meant to use
                raise
            reason = str(error)
        branches = _label(self.layers, root, nodes[-1])
        scope = common[-1] if common else ""
        return Block(self.traced, root, tuple(nodes), layers, scope, branches, is_chain, folded, reason)

    def _check_isolated(self, root: Node, nodes: Sequence[Node]) -> None:
        """Raises UnfoldableError if what happens between root and result is seen from outside, or disturbed."""
        inside = set(nodes)
        for node in nodes[:-1]:
            if any(user not in inside for user in node.users):
                where = self.layers[node].path or str(node.target)
                raise UnfoldableError(f"the output of {where} is also used outside of the sum")
        first, last = self.order[nodes[0]], self.order[nodes[-1]]
        for change in self.mutations.get(self.base[root], ()):
            if first <= self.order[change] <= last:
                raise UnfoldableError("its input is changed in place before all branches have read it")

    def _check_modules(self, nodes: Sequence[Node]) -> None:
        constants = Counter(constant for node in nodes for constant in self.layers[node].constants)
        for constant in constants:
            if any(user not in nodes and not _is_constant_of(user, nodes) for user in constant.users):
                raise UnfoldableError(f"{constant.target} is also used outside of the sum")
        for node in nodes:
            if node.op != "call_module":
                continue
            path = str(node.target)
            module = self.traced.module.get_submodule(path)
            if any(True for _ in module.parameters()) and self.traced.calls[id(module)] != 1:
                raise UnfoldableError(f"{path} is used {self.traced.calls[id(module)]} times")
            if id(module) in self.elsewhere:
                raise UnfoldableError(f"{path} is also used outside of {self.traced.module.__class__.__name__}")
            if self.parameter_readers[path]:
                raise UnfoldableError(f"the parameters of {path} are also read outside of it")

    @staticmethod
    def _fold(root: Node, layers: Sequence[Layer]) -> Affine:
        channels = next(layer.channels for layer in layers if layer.channels is not None)
        device = next(layer.kernel.device for layer in layers if layer.kernel is not None)
        values = {root: affine.identity(channels, device)}
        for layer in layers:
            values[layer.node] = layer.fold([values[each] for each in layer.inputs])
        folded = values[layers[-1].node]
        before, after = sum(layer.weights for layer in layers), folded.weight.numel()
        if after > MAX_GROWTH * before:
            raise UnfoldableError(
                f"one convolution would need {after / before:.1f} times the weights of its branches, {after:,} instead "
                f"of {before:,}: it would be slower"
            )
        return folded

    # --------------------------------------------------------------------------------------------------------- chains

    def _chains(self, node: Node) -> list[Block]:
        """A convolution module with the BatchNorms directly behind and before it; without those where inexact."""
        layer = self.layers.get(node)
        if node in self.taken or layer is None or layer.kind != "conv" or node.op != "call_module":
            return []
        behind = self._batchnorms_behind(node)
        before = self._batchnorms_before(node)
        chains = [[*before, node, *behind], [node, *behind]] if before and behind else [[*before, node, *behind]]
        blocks: list[Block] = []
        for chain in chains:
            if len(chain) > 1 and (not blocks or blocks[-1].reason):
                blocks.append(self._block(self.layers[chain[0]].inputs[0], chain, is_chain=True))
        if len(blocks) == 2 and blocks[1].reason:
            return blocks[:1]  # it is not for what stands before
        return blocks

    def _batchnorms_behind(self, node: Node) -> list[Node]:
        chain: list[Node] = []
        last = 0
        while len(node.users) == 1:
            node = next(iter(node.users))
            layer = self.layers.get(node)
            if layer is None or layer.kind not in ("bn", "pass", "hooks") or node in self.taken:
                break
            chain.append(node)
            last = len(chain) if layer.kind == "bn" else last
        return chain[:last]

    def _batchnorms_before(self, node: Node) -> list[Node]:
        chain: list[Node] = []
        last = 0
        while True:
            node = self.layers[node].inputs[0]
            layer = self.layers.get(node)
            free = layer is not None and layer.kind in ("bn", "pass", "hooks") and node not in self.taken
            # A BatchNorm behind another convolution belongs to that one.
            if not free or layer is None or len(node.users) != 1:
                break
            chain.append(node)
            last = len(chain) if layer.kind == "bn" else last
        follows_conv = layer is not None and layer.kind == "conv" and len(node.users) == 1
        return [] if follows_conv else chain[:last][::-1]


def _is_view(node: Node) -> bool:
    """Whether ``node`` may share the memory of its first argument."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in _VIEWS


_VIEWS = frozenset(
    "chunk contiguous detach diagonal expand flatten getitem movedim narrow permute reshape select split squeeze t "
    "transpose unbind unflatten unsqueeze view view_as".split()
)


def _is_constant_of(node: Node, nodes: Sequence[Node]) -> bool:
    """Whether all that becomes of ``node`` is read by ``nodes``."""
    return bool(node.users) and all(user in nodes or _is_constant_of(user, nodes) for user in node.users)


def _common_prefix(scopes: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    shortest = min(scopes, key=len)
    for i, name in enumerate(shortest):
        if any(scope[i] != name for scope in scopes):
            return shortest[:i]
    return shortest


def _label(layers: Mapping[Node, Layer], root: Node, out: Node) -> str:
    """The branches in words: "3x3+1x1+id", equal ones counted, layers in a row joined by "-"."""

    def terms(node: Node) -> list[str]:
        if node is root:
            return [""]
        layer = layers[node]
        if layer.kind == "sum":
            return [term for each in layer.inputs for term in terms(each)]
        inner = terms(layer.inputs[0])
        if not layer.label:
            return inner
        before = f"({'+'.join(term or 'id' for term in inner)})" if len(inner) > 1 else inner[0]
        return [f"{before}-{layer.label}" if before else layer.label]

    counts = Counter(term or "id" for term in terms(out))
    return "+".join(term if n == 1 else f"{n}*{term}" for term, n in counts.items())
