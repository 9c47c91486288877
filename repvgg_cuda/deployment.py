# SPDX-License-Identifier: MIT
"""One call from a trained model to one that is ready to run: fold, swap in our convolutions, prepare, verify."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils import parametrize

from repvgg_cuda import ops
from repvgg_cuda.branches import FLOAT_DTYPES, dtype_name, require
from repvgg_cuda.convert import Conv, Conversion, absorb_relus, copied, reparameterize, require_convertible
from repvgg_cuda.modules import RepConv3x3
from repvgg_cuda.preparation import prepare
from repvgg_cuda.report import Entry, Report
from repvgg_cuda.rewriting import replace_modules
from repvgg_cuda.structure import conv_geometry, has_hooks, is_plain_conv
from repvgg_cuda.tuning_cache import Tune
from repvgg_cuda.verification import Verification, arguments, compare

Example = Tensor | Sequence[Any]


def deploy(
    model: nn.Module,
    example_input: Example,
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    strict: bool = False,
    verify: bool = True,
    flush_denormals: bool = False,
    memory: ops.Memory = "fast",
    tune: Tune = False,
) -> Conversion:
    """A copy of ``model`` ready for inference: :func:`repvgg_cuda.reparameterize`, then every 3x3 convolution with zero
    padding 1 and stride 1 or 2 becomes a :class:`RepConv3x3` (taking over a ReLU behind it), ``prepare`` and
    ``verify``.

    The result is a module like any other: ``state_dict``, ``copy.deepcopy``, pickle, ``.to()``, DataParallel and
    DistributedDataParallel, ``torch.compile``, ``torch.export`` and CUDA graphs work on it.

    Args:
        model: any model in eval mode; it is not modified.
        example_input: what ``model`` takes, a tensor or a tuple of arguments, on its device: a batch of real inputs, if
            there is one. Sizes for which algorithms are chosen, FLOPs and errors in the report come from it; the
            deployed model takes other sizes, too.
        dtype: of the deployed model. None: as ``model``.
        memory_format: of the deployed model's weights, such as ``torch.channels_last``. None: as ``model``.
        strict: raise if something that looks like a block was left.
        verify: compare every folded layer and the whole with ``model`` in float64; raise if one is out of its bound.
        flush_denormals: set folded weights that are denormal numbers to zero.
        memory, tune: as for :func:`repvgg_cuda.prepare`.
    Returns:
        ``(model, report)``. Print the report.
    Raises:
        RuntimeError: ``model`` is in training mode, TorchScript, or cannot be copied; or, with ``strict``, a block was
            left; or, with ``verify``, a layer or the whole is out of its bound: the message names the first.
    """
    require_convertible(model, "deploy")
    training = next((path for path, module in model.named_modules() if module.training), None)
    require(
        training is None,
        f"deploy: {training or 'the model'} is in training mode, where BatchNorms and dropout compute something else; "
        "call model.eval() first",
    )
    require(
        dtype is None or dtype in FLOAT_DTYPES,
        "deploy: dtype must be float64, float32, float16 or bfloat16, "
        f"got {dtype_name(dtype) if isinstance(dtype, torch.dtype) else dtype}",
    )
    deployed = copied(model, "deploy")
    if dtype is not None:  # wider first, narrower last: folded weights are rounded as little as can be
        deployed = _widened(deployed, dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "reparameterize: found nothing", UserWarning)
        deployed, report = reparameterize(deployed, inplace=True, strict=strict, flush_denormals=flush_denormals)
    deployed = use_own_convolutions(deployed)
    if dtype is not None:
        deployed = deployed.to(dtype)
    if memory_format is not None:
        deployed = deployed.to(memory_format=memory_format)  # type: ignore[call-overload]
    inputs = arguments(example_input, deployed, "deploy: example_input")
    if memory_format is not None:
        inputs = tuple(x.to(memory_format=memory_format) if _is_image(x) else x for x in inputs)
    if any(isinstance(module, RepConv3x3) for module in deployed.modules()):
        preparation = prepare(deployed, inputs, memory=memory, tune=tune)
        report = dataclasses.replace(report, preparation=preparation.summary())
    report = _with_flops(report, deployed, inputs)
    if verify:
        verification = compare(model, deployed, inputs, needs_layers=False)
        report = _with_errors(report, verification)
        failure = verification.first_failure
        left = f"; not folded: {report.problems()}" if report.left else ""
        require(
            failure is None,
            f"deploy: {failure and failure.name} is out of its bound: {verification.summary()}{left}\n{verification}",
        )
    return Conversion(deployed, report)


def _widened(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` in ``dtype``, if that holds all values that its own dtypes can."""
    own = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    return model.to(dtype) if all(torch.promote_types(each, dtype) == dtype for each in own) else model


def _is_image(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


# ------------------------------------------------------------------------------------------------------- convolutions


def use_own_convolutions(model: nn.Module) -> nn.Module:
    """Swaps every plain 3x3 convolution that :class:`RepConv3x3` can stand for, in place; keys and weights stay.

    Those with hooks or computed weights are left. Returns the model, which may be such a convolution itself.
    """
    replaced: dict[int, nn.Module] = {}
    for module in model.modules():
        if is_plain_conv(module) and not has_hooks(module) and not parametrize.is_parametrized(module):
            assert isinstance(module, nn.Conv2d)
            if _is_own_geometry(module):
                replaced[id(module)] = _own(module)
    replace_modules(model, replaced)
    model = replaced.get(id(model), model)
    absorb_relus(model)
    return model


def _is_own_geometry(conv: nn.Conv2d) -> bool:
    if conv.kernel_size != (3, 3) or conv.padding_mode != "zeros" or "weight" not in conv._parameters:
        return False
    geometry = conv_geometry(conv)
    same = (geometry.padding, geometry.dilation) == ((1, 1), (1, 1)) and geometry.stride in ((1, 1), (2, 2))
    return same and conv.weight.dtype in FLOAT_DTYPES


def _own(conv: nn.Conv2d) -> RepConv3x3:
    channels, stride = (conv.in_channels, conv.out_channels), int(conv.stride[0])
    own = RepConv3x3(*channels, stride=stride, groups=conv.groups, bias=conv.bias is not None, device="meta")
    own._parameters.update(weight=conv._parameters["weight"], bias=conv._parameters["bias"])
    return own.train(conv.training)


# -------------------------------------------------------------------------------------------------------------- report


@torch.no_grad()
def _with_flops(report: Report, deployed: nn.Module, inputs: Sequence[Any]) -> Report:
    """The report with the multiplications and additions of each block's convolutions, for all calls of one forward."""
    pixels: dict[str, int] = {}  # output pixels of each convolution, over the batch

    def hook_for(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, y: Tensor) -> None:
            pixels[path] = pixels.get(path, 0) + y.numel() // y.shape[1]

        return hook

    handles = []
    modules = dict(deployed.named_modules(remove_duplicate=False))
    for entry in report.fused:
        handles.append(modules[entry.conv].register_forward_hook(hook_for(entry.conv)))
    try:
        deployed(*inputs)
    finally:
        for handle in handles:
            handle.remove()

    def counted(entry: Entry) -> Entry:
        if entry.conv not in pixels:
            return entry
        conv = modules[entry.conv]
        assert isinstance(conv, Conv)
        before, after = (2 * pixels[entry.conv] * n for n in (entry.weights_before, conv.weight.numel()))
        return dataclasses.replace(entry, flops_before=before, flops_after=after)

    return dataclasses.replace(report, entries=tuple(map(counted, report.entries)))


def _with_errors(report: Report, verification: Verification) -> Report:
    rows = {row.conv: row for row in verification.rows if row.conv is not None}
    entries = tuple(
        dataclasses.replace(entry, error=rows[entry.conv].error, bound=rows[entry.conv].bound)
        if entry.status == "fused" and entry.conv in rows
        else entry
        for entry in report.entries
    )
    return dataclasses.replace(report, entries=entries, verification=verification.summary())
