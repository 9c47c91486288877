# SPDX-License-Identifier: MIT
"""The operations of any model as a graph, with the module that each of them runs in.

``torch.fx`` rather than ``torch.export``: it needs no example input, does not fix sizes, and its calls are those of the
modules, which is where a conversion has to put its convolutions. What it cannot follow (control flow that depends on
data or sizes) stays one opaque call; the modules within such a call are then traced one by one.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import fx

from repvgg_cuda.proxies import IN_PLACE, TensorProxy, way_without_error
from repvgg_cuda.signatures import Arguments, arguments_of, common, defaults_of, root_arguments
from repvgg_cuda.structure import has_hooks, is_batchnorm, is_plain_conv

Node = fx.Node


def hooked(value: Any, path: str) -> Any:
    """Stands behind a call of the module at ``path``, which has hooks; they do not run while tracing."""
    return value


@dataclass(frozen=True)
class Traced:
    """``graph`` is what ``module`` computes, in terms of paths within it.

    ``scopes``: for each node the paths of the module calls it lies in, outermost first. ``opaque``: paths of modules
    whose forward cannot be traced, with the reason; each is one call in the graph. ``calls``: of each module, by id.
    ``given``: what ``module`` was traced with; ``arguments``: what its modules are called with, by id. ``transparent``:
    ids of modules that only hand their input on. ``literals``: tensors that a forward makes, under names that no module
    has. ``stores``: attributes that a forward sets, by the id of their module.
    """

    module: nn.Module
    graph: fx.Graph
    scopes: dict[Node, tuple[str, ...]]
    opaque: dict[str, str]
    calls: Counter[int]
    given: Arguments | None
    arguments: Mapping[int, Arguments]
    transparent: frozenset[int]
    literals: Mapping[str, torch.Tensor]
    stores: Mapping[int, str]

    def attribute(self, path: str) -> Any:
        """The parameter, buffer or literal that a ``get_attr`` node reads."""
        return self.literals[path] if path in self.literals else functools.reduce(getattr, path.split("."), self.module)

    def arguments_of(self, module: nn.Module) -> Arguments | None:
        """What ``module``, which may be the whole, is called with; None if that is not known."""
        return self.given if module is self.module else self.arguments.get(id(module))


class UntraceableError(Exception):
    """The forward of the module itself cannot be traced. The message says why."""


def is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is an operation of its own: a layer of torch.nn, one that is read as such, or ours."""
    in_torch = type(module).__module__.startswith(("torch.nn.", "torch.ao.")) and not isinstance(module, nn.Sequential)
    return in_torch or is_plain_conv(module) or is_batchnorm(module) or type(module).__name__ == "RepConv3x3"


def trace(
    module: nn.Module,
    given: Arguments | None = None,
    *,
    closed: Collection[int] = (),
    within: Collection[int] | None = None,
) -> Traced:
    """Traces ``module``, which is left as it was.

    Args:
        given: what it is called with; None: not known, then with its defaults.
        closed: ids of modules whose calls stay calls.
        within: if given, the ids of the only modules whose calls are entered.
    Raises:
        UntraceableError: the forward of ``module`` itself cannot be traced.
    """
    tracer = _Tracer(given, closed, within)
    stores: dict[int, str] = {}
    with _attributes_kept(module, stores):
        try:
            graph = tracer.trace(module)
        except Exception as error:  # a foreign forward may raise anything
            raise UntraceableError(_one_line(error)) from error
    _drop_asserts(graph)
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    literals = {
        name: tensor
        for tensor, name in tracer.tensor_attrs.items()
        if name in read and isinstance(tensor, torch.Tensor) and not hasattr(module, name)
    }
    return Traced(
        module,
        graph,
        tracer.scopes,
        tracer.opaque,
        tracer.call_counts,
        given,
        tracer.arguments,
        frozenset(tracer.transparent),
        literals,
        stores,
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' if len(text) > 160 else ''}"


class _Tracer(fx.Tracer):
    def __init__(self, given: Arguments | None, closed: Collection[int], within: Collection[int] | None) -> None:
        super().__init__()
        self.given, self.closed, self.within = given, closed, within
        self.scopes: dict[Node, tuple[str, ...]] = {}
        self.opaque: dict[str, str] = {}
        self.call_counts: Counter[int] = Counter()
        self.arguments: dict[int, Arguments] = {}
        self.transparent: set[int] = set()
        self._stack: tuple[str, ...] = ()
        self._names: dict[int, str] = {}  # of parameters and buffers, by id

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers become nodes. (The inherited search for their names takes quadratic time.)"""
        if not isinstance(attr_val, torch.Tensor):
            return attr_val
        if not self._names:
            tensors = (*self.root.named_parameters(), *self.root.named_buffers())
            self._names = {id(tensor): name for name, tensor in reversed(tensors)}
        name = self._names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def proxy(self, node: Node) -> fx.Proxy:
        return TensorProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self.within is not None and id(m) not in self.within:
            return True
        return id(m) in self.closed or is_layer(m)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Arguments like those of its calls in the model."""
        forward = vars(self.root).get("forward") or functools.partial(root_fn, self.root)  # set on the instance
        given = self.given or defaults_of(forward)
        args, named = root_arguments(self, forward, given)
        return lambda: forward(*args, **named), []

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        self.scopes[node] = self._stack
        return node

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        self.call_counts[id(m)] += 1
        if self.is_leaf_module(m, path) or path in self.opaque:
            return self._bounded(m, path, self.create_proxy("call_module", path, args, kwargs))
        last = next(iter(reversed(self.graph.nodes)))
        before = (self._stack, Counter(self.call_counts), dict(self.arguments), dict(self.opaque))
        self._stack = (*self._stack, path)
        try:
            self.arguments[id(m)] = common(self.arguments.get(id(m)), arguments_of(m.forward, args, kwargs))
            result = m.forward(*args, **kwargs)  # not m(...): hooks are no part of the graph
        except Exception as error:
            self._stack, self.call_counts, self.arguments, self.opaque = before
            self._erase_after(last)
            self.opaque[path] = _one_line(error)
            result = self.create_proxy("call_module", path, args, kwargs)
        self._stack = before[0]
        if last is next(iter(reversed(self.graph.nodes))) and not has_hooks(m):
            self.transparent.add(id(m))
        return self._bounded(m, path, result)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Checks of the input are taken to hold: where one way ends in an error, the other is gone."""
        frame = sys._getframe(2)  # behind Proxy.__bool__
        wanted = way_without_error(frame.f_code, frame.f_lasti)
        return super().to_bool(obj) if wanted is None else wanted

    def _erase_after(self, last: Node) -> None:
        for node in reversed(self.graph.nodes):
            if node is last:
                return
            node.users.clear()  # its users were made after it, and are gone
            self.scopes.pop(node, None)
            self.graph.erase_node(node)

    def _bounded(self, m: nn.Module, path: str, result: Any) -> Any:
        """``result`` behind a mark, if ``m`` has hooks."""
        if not has_hooks(m):
            return result

        def mark(value: Any) -> Any:
            return (
                self.create_proxy("call_function", hooked, (value, path), {}) if isinstance(value, fx.Proxy) else value
            )

        return torch.utils._pytree.tree_map(mark, result)


@contextlib.contextmanager
def _attributes_kept(module: nn.Module, stores: dict[int, str]) -> Iterator[None]:
    """Undoes what a forward stores in its modules while it is traced, and notes it in ``stores``, by id."""
    tables: list[tuple[int, str, Any]] = []
    for each in module.modules():
        tables.append((id(each), "", vars(each)))
        tables += [(id(each), name, value) for name, value in vars(each).items() if isinstance(value, (dict, list))]
    before = [(*entry, entry[2].copy()) for entry in tables]
    try:
        yield
    finally:
        for i, name, table, content in before:
            items = table.items() if isinstance(table, dict) else enumerate(table)
            stored = [key for key, value in items if _holds_proxy(value)]
            if stored:
                stores[i] = str(stored[0]) if name in ("", "_buffers") else name
            table.clear()
            if isinstance(table, dict):
                table.update(content)
            else:
                table.extend(content)


def _holds_proxy(value: Any) -> bool:
    items = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(each, fx.Proxy) for each in items)


def _drop_asserts(graph: fx.Graph) -> None:
    """Removes assertions, and what only they need: they look at a tensor, and would count as its users."""
    for node in reversed(graph.nodes):
        is_assert = node.op == "call_function" and node.target is torch._assert
        if is_assert or (not node.users and _is_look(node)):
            graph.erase_node(node)


def _is_look(node: Node) -> bool:
    """Whether ``node`` only reads properties of tensors, or compares numbers."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    from_operator = getattr(node.target, "__module__", "") in ("_operator", "builtins", "operator")
    return node.op == "call_function" and from_operator and node.target not in IN_PLACE


# -------------------------------------------------------------------------------------------------------------- regions


@dataclass(frozen=True)
class Region:
    """A part of a model that is traced by itself: ``traced`` of the module at ``prefix``.

    ``elsewhere``: ids of modules in it that are also called from outside.
    """

    prefix: str
    traced: Traced
    elsewhere: frozenset[int]

    def absolute(self, path: str) -> str:
        return ".".join(filter(None, (self.prefix, path)))


#: Modules that only hold or call others: those are looked at.
_HOLDERS = (nn.ModuleList, nn.ModuleDict, nn.DataParallel, nn.parallel.DistributedDataParallel)


def find_regions(model: nn.Module) -> tuple[list[Region], list[str]]:
    """The model as graphs, and notes on what stays unseen.

    One graph, where the whole can be traced; besides one for each module that is called several times, and for those
    within a module that cannot be traced.
    """
    regions: list[Region] = []
    notes: list[str] = []
    seen: set[int] = set()

    def visit_children(prefix: str, module: nn.Module, calls: Counter[int], elsewhere: frozenset[int]) -> None:
        for name, child in module.named_children():
            called = {id(each) for each in child.modules() if calls[id(each)]}
            visit(".".join(filter(None, (prefix, name))), child, elsewhere | called)

    def visit(prefix: str, module: nn.Module, elsewhere: frozenset[int], given: Arguments | None = None) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, _HOLDERS) or "_orig_mod" in module._modules:
            return visit_children(prefix, module, Counter(), elsewhere)
        if is_layer(module):
            return
        try:
            whole = traced = trace(module, given)
            by_id = {id(each): (path, each) for path, each in module.named_modules()}
            shared = [i for i, n in whole.calls.items() if n > 1 and not is_layer(by_id[i][1])]
            if shared:
                traced = trace(module, given, closed=shared)
        except UntraceableError as error:
            _note(notes, prefix, module, str(error))
            return visit_children(prefix, module, Counter(), elsewhere)
        regions.append(Region(prefix, traced, elsewhere))
        region = regions[-1]
        for path, reason in traced.opaque.items():
            opaque = module.get_submodule(path)
            _note(notes, region.absolute(path), opaque, reason)
            visit_children(region.absolute(path), opaque, whole.calls, elsewhere)
        for i in shared:
            if not traced.calls[i]:
                continue  # within another one
            path, each = by_id[i]
            arguments = whole.arguments.get(i)
            inner = _calls_within(each, arguments)
            times = whole.calls[i]
            outside = {id(m) for m in each.modules() if m is not each and whole.calls[id(m)] != times * inner[id(m)]}
            visit(region.absolute(path), each, elsewhere | outside, arguments)
        visit_unreached(prefix, module, whole.calls, elsewhere)

    def visit_unreached(prefix: str, module: nn.Module, calls: Counter[int], elsewhere: frozenset[int]) -> None:
        """What another method than forward may call."""
        for name, child in module.named_children():
            path = ".".join(filter(None, (prefix, name)))
            if not any(calls[id(each)] for each in child.modules()):
                visit(path, child, elsewhere)
            elif not is_layer(child):
                visit_unreached(path, child, calls, elsewhere)

    visit("", model, frozenset())
    return regions, notes


def _calls_within(module: nn.Module, given: Arguments | None) -> Counter[int]:
    try:
        return trace(module, given).calls
    except UntraceableError:
        return Counter()


def _note(notes: list[str], path: str, module: nn.Module, reason: str) -> None:
    if any(isinstance(each, nn.Conv2d) for each in module.modules()):
        where = path or "the model itself"
        notes.append(
            f"{where} ({type(module).__name__}) cannot be traced, its modules were looked at one by one: {reason}"
        )
