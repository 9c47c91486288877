# SPDX-License-Identifier: MIT
"""What the code of a model meets, in the place of tensors, while it is traced."""

from __future__ import annotations

import dis
import operator
import re
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import fx

Node = fx.Node


class TensorProxy(fx.Proxy):
    """A proxy that tells the code of models that it is a tensor, unless it is a number; torch itself knows better."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asking = sys._getframe(1)
        name = str(asking.f_globals.get("__name__", ""))
        is_model = asking.f_code is torch.is_tensor.__code__ or name.split(".")[0] != "torch"
        return torch.Tensor if is_model and not _is_number(self.node) else fx.Proxy


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[TensorProxy, Any], Any]:
    """``x += y`` and the like, as they change a tensor: torch.fx would take it for ``x = x + y``."""
    plain = getattr(operator, f"__{function.__name__[1:]}__")

    def method(self: TensorProxy, other: Any) -> Any:
        if _is_number(self.node):
            return plain(self, other)
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


#: Operators that change their first operand.
IN_PLACE = frozenset(
    getattr(operator, name)
    for name in "iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor".split()
)
for _function in IN_PLACE:
    setattr(TensorProxy, f"__{_function.__name__}__", _in_place(_function))


def _is_number(node: Node) -> bool:
    """Whether ``node`` is a size, another property of a tensor, or computed from such."""
    if "is_number" not in node.meta:
        owner, name = getattr(node.target, "__module__", ""), getattr(node.target, "__name__", node.target)
        if node.op == "call_method":
            number = name in ("size", "dim", "numel", "ndimension", "stride", "item", "get_device")
        elif node.op == "call_function" and node.target is getattr:
            number = node.args[1] not in ("T", "mT", "H", "mH", "real", "imag", "data", "grad")
        else:
            inputs = node.all_input_nodes if owner in ("_operator", "operator", "builtins", "math") else []
            number = bool(inputs) and all(map(_is_number, inputs))
        node.meta["is_number"] = number
    return bool(node.meta["is_number"])


def way_without_error(code: CodeType, offset: int) -> bool | None:
    """Which truth value at ``offset`` of ``code``, where one is asked for, does not lead straight to a ``raise``.

    None if both or none do, or if somebody might catch the error.
    """
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
    caught = getattr(code, "co_exceptiontable", b"") or any(step.opname.startswith("SETUP_") for step in steps)
    i = next((i for i, step in enumerate(steps) if step.offset >= offset), len(steps))
    negated = False
    while i < len(steps) and steps[i].opname in ("TO_BOOL", "UNARY_NOT"):
        negated ^= steps[i].opname == "UNARY_NOT"
        i += 1
    if caught or i + 1 >= len(steps) or not re.search("JUMP.*IF_(TRUE|FALSE)", steps[i].opname):
        return None
    jumps_if = "IF_TRUE" in steps[i].opname
    target = next((k for k, step in enumerate(steps) if step.offset >= steps[i].argval), len(steps))

    def raises(k: int) -> bool:
        end = next((step.opname for step in steps[k:] if re.search("JUMP|RETURN|RAISE|FOR_ITER", step.opname)), "")
        return end == "RAISE_VARARGS"

    if raises(target) == raises(i + 1):
        return None
    return (raises(i + 1) == jumps_if) != negated
