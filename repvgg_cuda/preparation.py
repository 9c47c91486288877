# SPDX-License-Identifier: MIT
"""Prepares a whole model: finds its deployed convolutions, sees what each of them reads, packs their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from repvgg_cuda import ops
from repvgg_cuda.branches import require
from repvgg_cuda.modules import RepConv3x3
from repvgg_cuda.prepared import Entry, PreparedWeights, Report, prepare_layer, report
from repvgg_cuda.tuning_cache import Tune, cache_for


def prepare(
    model: nn.Module,
    example: Tensor | Sequence[Any] | None = None,
    *,
    memory: ops.Memory = "fast",
    tune: Tune = False,
) -> Report:
    """Packs the weights of every :class:`RepConv3x3` in ``model``, for the forwards in eval mode to come.

    The networks of this package then run their blocks in whole runs, :func:`repvgg_cuda.conv3x3_chain`. Packed weights
    are never saved, copied or pickled; :meth:`RepConv3x3.prepare` says when they are made again. Results change by
    what the chosen algorithms round differently, within ``testing.error_bound``.

    Args:
        model: deployed, in eval mode; it may itself be such a layer.
        example: what ``model`` takes: a tensor, a tuple of arguments, or the size of one tensor, ``[N, C_in, H, W]``.
            It runs once, to see the size of every layer's input, for which the algorithms are chosen. Other sizes run
            on them too. None: the first forward decides.
        memory: ``"low"`` chooses among the algorithms whose packed weights are no larger than the weight.
        tune: choose by measuring, which takes up to seconds for each kind of layer, instead of by prediction. Times are
            kept in a file, so that another process does not measure again: a path says in which, True: in that of the
            environment variable ``REPVGG_CUDA_TUNING_CACHE`` (empty: none), else in the user's cache directory.
    Returns:
        One entry per layer, with the time of each candidate and the memory. Print it.
    Raises:
        RuntimeError: there is no such layer, or one is in training mode; the message names it.
    """
    layers = dict(_layers(model))
    require(
        len(layers) > 0,
        "prepare: the model has no RepConv3x3 to prepare; fold its blocks first, with repvgg_cuda.reparameterize",
    )
    training = next((path for path, layer in layers.items() if layer.training), None)
    require(
        training is None,
        f"prepare: {training or 'the layer'} is in training mode, where packed weights are not used; "
        "call .eval() first",
    )
    sizes = {} if example is None else _input_sizes(model, layers, example)
    cache = cache_for(tune)
    entries = []
    for path, layer in layers.items():
        if example is not None and path not in sizes:
            layer.prepared = None
            weight_bytes = layer.weight.numel() * layer.weight.element_size()
            entries.append(Entry(path, "", None, (), weight_bytes, 0, "the example does not reach it"))
            continue
        layer.prepared = PreparedWeights(sizes.get(path), memory, tune)
        entries.append(prepare_layer(path, layer, layer.prepared, cache))
    return report(entries, list(layers.values()), tune)


def _layers(model: nn.Module) -> Iterator[tuple[str, RepConv3x3]]:
    """Every layer with its first path."""
    for path, module in model.named_modules():
        if isinstance(module, RepConv3x3):
            yield path, module


@torch.no_grad()
def _input_sizes(
    model: nn.Module, layers: Mapping[str, RepConv3x3], example: Tensor | Sequence[Any]
) -> dict[str, tuple[int, ...]]:
    """The size of what each layer reads when ``model`` runs ``example``; the largest, if it runs several times."""
    sizes: dict[str, tuple[int, ...]] = {}

    def record(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            size = tuple((args[0] if args else kwargs["x"]).shape)
            if path not in sizes or _elements(size) > _elements(sizes[path]):
                sizes[path] = size

        return hook

    arguments = _arguments(model, example)
    handles = [layer.register_forward_pre_hook(record(path), with_kwargs=True) for path, layer in layers.items()]
    try:
        model(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def _elements(size: tuple[int, ...]) -> int:
    return torch.Size(size).numel()


def _arguments(model: nn.Module, example: Tensor | Sequence[Any]) -> tuple[Any, ...]:
    if isinstance(example, Tensor):
        return (example,)
    require(
        isinstance(example, Sequence) and not isinstance(example, str) and len(example) > 0,
        f"prepare: example must be a tensor, a tuple of arguments or a size [N, C_in, H, W], got {example!r}",
    )
    if not all(isinstance(each, int) for each in example):
        return tuple(example)
    like = next(model.parameters())
    return (torch.zeros(tuple(example), dtype=like.dtype, device=like.device),)
