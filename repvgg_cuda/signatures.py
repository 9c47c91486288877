# SPDX-License-Identifier: MIT
"""What a module is called with: what the graph around it computes, lists and dicts of that, and constants.

A module that is traced by itself gets arguments like those it gets in the model. It may then unpack a size or loop over
feature maps, and options have the values that the model gives them, not their defaults.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from repvgg_cuda.branches import require


@dataclass(frozen=True)
class Computed:
    """A value of the graph: a tensor, or a number such as a size."""

    is_number: bool = False


@dataclass(frozen=True)
class Constant:
    """A value that every call gives, or that stands for what none gives."""

    value: Any


@dataclass(frozen=True)
class Items:
    """A list, tuple or dict (``kind``) with values of the graph in it; ``keys``: indices, or those of the dict."""

    kind: type
    keys: tuple[Any, ...]
    values: tuple[Form, ...]


@dataclass(frozen=True)
class Mixed:
    """A value of another kind in every call: no one forward is right for all."""


Form = Computed | Constant | Items | Mixed
Arguments = Mapping[str, Form]  # by the name of the parameter


_KINDS: Mapping[str, type] = {"list": list, "tuple": tuple, "dict": dict}


def form_of(value: Any) -> Form:
    """The form of an argument in a trace."""
    if isinstance(value, (fx.Proxy, torch.Tensor)):
        return Computed(not isinstance(value, torch.Tensor))
    if type(value) not in _KINDS.values():
        return Constant(value)
    items = value if type(value) is dict else dict(enumerate(value))
    values = tuple(map(form_of, items.values()))
    if all(isinstance(each, Constant) for each in values):
        return Constant(value)
    return Items(type(value), tuple(items), values)


def arguments_of(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """The forms of what ``forward`` is called with, and of the defaults of the rest. TypeError if it takes others."""
    bound = inspect.signature(forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return {name: form_of(value) for name, value in bound.arguments.items()}


def defaults_of(forward: Callable[..., Any]) -> Arguments:
    """Where no call is known: what has a default gets it, so that control flow on options is none on tensors."""
    forms: dict[str, Form] = {}
    for parameter in inspect.signature(forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            forms[parameter.name] = Constant(())
        elif parameter.kind is parameter.VAR_KEYWORD:
            forms[parameter.name] = Constant({})
        else:
            known = parameter.default is not parameter.empty
            forms[parameter.name] = Constant(parameter.default) if known else Computed()
    return forms


def common(a: Arguments | None, b: Arguments) -> Arguments:
    """What two calls of one module have in common."""
    return b if a is None else {name: _common(a[name], b[name]) for name in b}


def _common(a: Form, b: Form) -> Form:
    if isinstance(a, Constant) and isinstance(b, Constant) and _is_same(a.value, b.value):
        return a
    if isinstance(a, Items) and isinstance(b, Items) and (a.kind, a.keys) == (b.kind, b.keys):
        return Items(a.kind, a.keys, tuple(map(_common, a.values, b.values)))
    if _is_number(a) and _is_number(b):
        return Computed(is_number=True)
    return a if a == b == Computed() else Mixed()


def _is_number(form: Form) -> bool:
    if isinstance(form, Constant):
        return type(form.value) in (int, float)
    return isinstance(form, Computed) and form.is_number


_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


def _is_same(value: Any, wanted: Any) -> bool:
    if value is wanted:
        return True
    if isinstance(wanted, dict):
        same_keys = isinstance(value, dict) and value.keys() == wanted.keys()
        return same_keys and all(_is_same(value[key], wanted[key]) for key in wanted)
    if isinstance(wanted, (tuple, list)):
        same_length = type(value) is type(wanted) and len(value) == len(wanted)
        return same_length and all(map(_is_same, value, wanted))
    return isinstance(value, _PLAIN) and isinstance(wanted, _PLAIN) and bool(value == wanted)


# ----------------------------------------------------------------------------------------------- in a generated forward


def require_constant(value: Any, wanted: Any, name: str) -> None:
    """Raises RuntimeError unless an argument of a rewritten forward has the value that it was rewritten for."""
    if not _is_same(value, wanted):
        raise RuntimeError(f"{name} must be {wanted!r}, which the module was converted for, got {_text(value)}")


def require_items(value: Any, kind: str, keys: tuple[Any, ...], name: str) -> None:
    """The same of a list, tuple or dict: it must have the items that the forward was rewritten for."""
    if isinstance(value, (list, tuple, dict)) and isinstance(value, _KINDS[kind]):
        if set(value if isinstance(value, dict) else range(len(value))) == set(keys):
            return
    what = f"the keys {', '.join(map(repr, keys))}" if kind == "dict" else f"{len(keys)} items"
    raise RuntimeError(f"{name} must be a {kind} with {what}, which the module was converted for, got {_text(value)}")


def _text(value: Any) -> str:
    items = value if isinstance(value, (tuple, list)) else (value,)
    return repr(value) if all(isinstance(each, _PLAIN) for each in items) else type(value).__name__


def argument(tracer: fx.Tracer, form: Form, proxy: Any, name: str) -> Any:
    """An argument of that form for a forward that is traced; ``proxy`` is the parameter, or an item of it."""
    if isinstance(form, Constant):
        tracer.create_proxy("call_function", require_constant, (proxy, form.value, name), {})
        return form.value
    if isinstance(form, Items):
        tracer.create_proxy("call_function", require_items, (proxy, form.kind.__name__, form.keys, name), {})
        items = {
            key: argument(tracer, each, proxy[key], f"{name}[{key!r}]")
            for key, each in zip(form.keys, form.values, strict=True)
        }
        return items if form.kind is dict else form.kind(items.values())
    require(not isinstance(form, Mixed), f"{name} differs in kind from call to call")
    assert isinstance(form, Computed)
    proxy.node.meta["is_number"] = form.is_number
    return proxy


def root_arguments(
    tracer: fx.Tracer, forward: Callable[..., Any], forms: Arguments
) -> tuple[list[Any], dict[str, Any]]:
    """Parameters of those forms for a forward that is traced, as its positional and its named arguments."""
    args: list[Any] = []
    named: dict[str, Any] = {}
    for parameter in inspect.signature(forward).parameters.values():
        name, form = parameter.name, forms[parameter.name]
        stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
        if stars and isinstance(form, Constant) and not form.value:
            continue
        default = () if parameter.default is parameter.empty else (parameter.default,)
        value = argument(tracer, form, tracer.create_proxy("placeholder", stars + name, default, {}), name)
        if stars == "*":
            args += value
        elif stars == "**":
            named.update(value)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            named[name] = value
        else:
            args.append(value)
    return args, named
