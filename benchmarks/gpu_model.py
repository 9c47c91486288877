# SPDX-License-Identifier: MIT
"""How long every RepVGG layer should take on GPUs that need not be at hand: predicted, not measured.

    python benchmarks/gpu_model.py                                    # RepVGG-A0 and B1, float16, every GPU: networks
    python benchmarks/gpu_model.py --layers --gpu A100 --batch 1 32   # layer by layer: tile, blocks, waves, times
    python benchmarks/gpu_model.py --model all --dtype fp16 fp32 --csv model.csv
    python benchmarks/gpu_model.py --markdown                         # renews docs/gpu-model.md

Tile, blocks, threads and shared memory are those of the compiled table. The model is repvgg_cuda/gpu_model.py.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from repvgg_cuda import _ext, gpu_model
from repvgg_cuda.explanation import aligned
from repvgg_cuda.files import write_text_atomically
from repvgg_cuda.gpu_model import MODES, Mode, Prediction
from repvgg_cuda.gpus import GPUS, Gpu
from repvgg_cuda.models import model_names
from repvgg_cuda.testing import Case

PREDICTED = "predicted, not measured"
BATCHES = (1, 8, 32, 128)
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "gpu-model.md"

#: What the document shows; the whole family is a command away.
SUMMARY_MODELS = ("RepVGG-A0", "RepVGG-A2", "RepVGG-B1", "RepVGG-B1g4", "RepVGG-B3g4")
DOCUMENT_MODES = ("fp16", "tf32", "fp32")
#: Of these every layer of the family.
LAYER_TABLES = (("A100", "fp16"), ("A100", "tf32"), ("A100", "fp32"), ("H100", "fp16"))


@dataclass(frozen=True)
class Network:
    """The sums over a network's layers, in microseconds. ``aten``: how many layers every row of ours refuses.

    ``ours`` runs our fastest row wherever there is one, ``auto`` what "auto" takes; F.conv2d and a ReLU elsewhere.
    """

    model: str
    gpu: Gpu
    mode: Mode
    batch: int
    layers: int
    aten: int
    floor: float
    ours: float
    auto: float
    fused: float
    compiled: float
    eager: float

    @property
    def ratios(self) -> tuple[float, float, float]:
        """How many times as long as ours the rivals take."""
        return self.fused / self.ours, self.compiled / self.ours, self.eager / self.ours


Layers = list[tuple[Prediction, int]]  # with how often it is in the network


def layers_of(model: str, gpu: Gpu, mode: Mode, batch: int) -> Layers:
    """Empty where the GPU cannot compute in this mode."""
    found = [
        (gpu_model.predict(gpu, case, mode), count)
        for case, count in gpu_model.distinct(gpu_model.network(model), batch)
    ]
    return [(prediction, count) for prediction, count in found if prediction is not None]


def network_of(model: str, layers: Layers) -> Network:
    def total(us: Any) -> float:
        return float(sum(count * us(layer) for layer, count in layers))

    first = layers[0][0]
    return Network(
        model,
        first.gpu,
        first.mode,
        first.case.N,
        sum(count for _, count in layers),
        sum(count for layer, count in layers if layer.own is None),
        total(lambda layer: layer.floor_us),
        total(lambda layer: layer.ours_us),
        total(lambda layer: layer.auto_us),
        total(lambda layer: layer.fused.us),
        total(lambda layer: layer.compiled_us),
        total(lambda layer: layer.eager_us),
    )


def networks(models: Sequence[str], gpus: Sequence[str], modes: Sequence[str], batches: Sequence[int]) -> list[Network]:
    found = [
        (model, layers_of(model, GPUS[gpu], MODES[mode], batch))
        for model in models
        for mode in modes
        for gpu in gpus
        for batch in batches
    ]
    return [network_of(model, layers) for model, layers in found if layers]


# -------------------------------------------------------------------------------------------------------------- tables


LAYER_COLUMNS = (
    "layer", "in", "batch", "row", "tile", "blocks", "per SM", "waves", "floor", "ours", "bound by", "cuDNN fused",
    "compiled", "eager", "its kernel",
)  # fmt: skip


def layer_cells(layer: Prediction, where: str) -> tuple[str, ...]:
    """``where``: in which networks it is, or how often in one."""
    case, own = layer.case, layer.own
    size = f"{case.C}->{case.K}, {case.H}x{case.W}"
    size += (", s2" if case.stride == 2 else "") + (f", g{case.groups}" if case.groups > 1 else "")
    plan: tuple[str, ...] = ("aten", "", "", "", "", f"{layer.floor_us:.1f}", "", "")
    if own is not None:
        tile = f"{own.plan.tile_k}x{own.plan.tile_p}x{own.plan.tile_q}"
        tile += f", {own.plan.images} images" if own.plan.images > 1 else ""
        tile += f", split {own.plan.split}" if own.plan.split > 1 else ""
        row = own.algorithm + ("" if own.chosen else ", if named")
        plan = (row, tile, str(own.plan.blocks), str(own.resident), str(own.waves))
        plan += (f"{layer.floor_us:.1f}", f"{own.us:.1f}", own.bound)
    rivals = (f"{us:.1f}" for us in (layer.fused.us, layer.compiled_us, layer.eager_us))
    return (size, where, str(case.N), *plan, *rivals, layer.fused.kernel)


NETWORK_COLUMNS = (
    "network", "GPU", "dtype", "batch", "floor", "ours", "auto", "cuDNN fused", "compiled", "eager", "ratios",
)  # fmt: skip


def network_cells(network: Network) -> tuple[str, ...]:
    name = network.model + (f" ({network.aten} of {network.layers} by aten)" if network.aten else "")
    times = (network.floor, network.ours, network.auto, network.fused, network.compiled, network.eager)
    ratios = " ".join(f"{ratio:.2f}x" for ratio in network.ratios)
    return (name, network.gpu.name, network.mode.name, str(network.batch), *(f"{us:.0f}" for us in times), ratios)


def show(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; lines of equal columns in a pipe, where nothing must be cut off."""
    if not console.is_terminal:
        print("\n".join([f"{title} ({PREDICTED}; us)", *aligned([columns, *rows], left=(0,))]))
        return
    table = Table(title=f"{title} ({PREDICTED}; us)", title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def as_csv(layers: Sequence[tuple[str, Prediction, int]]) -> str:
    """One line per layer of a network, batch, dtype and GPU."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        "note model gpu dtype N C H W K stride groups count flop_us byte_us algorithm auto_takes_it blocks threads "
        "shared_bytes tile_k tile_p tile_q images split blocks_per_multiprocessor waves ours_us bound estimate_us "
        "rival fused_us compiled_us eager_us".split()
    )
    for model, layer, count in layers:
        case, own = layer.case, layer.own
        ours: tuple[object, ...] = ("aten", *[""] * 14)
        if own is not None:
            plan = own.plan
            ours = (
                own.algorithm, own.chosen, plan.blocks, plan.threads, plan.shared_bytes, plan.tile_k, plan.tile_p,
                plan.tile_q, plan.images, plan.split, own.resident, own.waves, round(own.us, 3), own.bound,
                "" if own.estimate_us is None else round(own.estimate_us, 3),
            )  # fmt: skip
        times = (round(us, 3) for us in (layer.fused.us, layer.compiled_us, layer.eager_us))
        shape = (*case.x_size, case.K, case.stride, case.groups)
        floors = (round(layer.flop_us, 3), round(layer.byte_us, 3))
        writer.writerow(
            [
                PREDICTED,
                model,
                layer.gpu.name,
                layer.mode.name,
                *shape,
                count,
                *floors,
                *ours,
                layer.fused.kernel,
                *times,
            ]
        )
    return text.getvalue()


# ------------------------------------------------------------------------------------------------------------ document


INTRODUCTION = """# What a GPU should make of it: predicted, not measured

Written by `python benchmarks/gpu_model.py --markdown`; do not edit. **Nothing on this page has been measured.** It is
what a closed-form model, `repvgg_cuda/gpu_model.py`, says about the kernels as they are compiled now. `make gpu-check`
([gpu-check.md](gpu-check.md)) puts measurements beside these numbers, on a machine with a GPU.

The model gives every kernel, ours and cuDNN's, a main loop without a gap, boost clocks, and a launch from a CUDA graph
at 2.2 us; cuDNN has its best tile too. Believe ratios more than times. Row, tile, blocks and shared memory are those of
the compiled table (`repvgg-cuda explain --layer 32,192,14,14,192 --gpu A100` shows them for one layer); every constant
has its source in the file.

- **floor**: the products of a direct convolution at the GPU's peak, or input, weights and output moved once, whichever
  is longer, summed over the layers.
- **cuDNN fused**: convolution, bias and ReLU in one kernel (`torch.cudnn_convolution_relu` at its best), an implicit
  GEMM with the best of 8 tiles and 4 splits; in exact float32 the better of that and Winograd. **compiled**: one more
  kernel, as `torch.compile` launches. **eager**: two more.
- bfloat16 is as float16 here, from compute capability 8.0 on. The T4 has neither bfloat16 nor TF32.
"""


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def summary(mode: str, found: Sequence[Network]) -> Iterator[str]:
    yield f"## Networks, {mode}"
    yield ""
    if all(network.aten == network.layers for network in found):
        yield "There is no row of ours for it yet: F.conv2d runs."
        yield ""
        return
    yield (
        "Our time in microseconds and, in brackets, how many times as long the fused cuDNN kernel, the compiled and "
        "the eager form take; bold where we lose to the fused one."
    )
    yield ""
    gpus = list(dict.fromkeys(network.gpu.name for network in found))
    rows = []
    for model in SUMMARY_MODELS:
        for batch in BATCHES:
            cells = {network.gpu.name: network for network in found if (network.model, network.batch) == (model, batch)}
            rows.append([model, str(batch), *(summary_cell(cells[gpu]) for gpu in gpus)])
    yield from markdown_table(["network", "batch", *gpus], rows)
    some = next((network for network in found if network.aten), None)
    if some is not None:
        yield ""
        yield f"\\* with F.conv2d and a ReLU in layers that every row of ours refuses ({some.model}: {some.aten})."
    yield ""


def summary_cell(network: Network) -> str:
    if network.aten == network.layers:
        return "no row of ours"
    fused, *others = (f"{ratio:.2f}x" for ratio in network.ratios)
    return f"{network.ours:.0f}{'*' * (network.aten > 0)} ({lost(fused, network)}, {', '.join(others)})"


def lost(text: str, network: Network) -> str:
    return f"**{text}**" if network.ratios[0] < 0.995 else text


def behind(found: Sequence[Network]) -> Iterator[str]:
    """Where the model says that cuDNN stays ahead."""
    yield "## Where the model says that cuDNN stays ahead"
    yield ""
    yield "Against its fused kernel, at the batches in brackets:"
    yield ""
    for mode in DOCUMENT_MODES:
        for gpu in dict.fromkeys(network.gpu.name for network in found):
            losing = [n for n in found if (n.mode.name, n.gpu.name) == (mode, gpu) and n.ratios[0] < 0.995]
            losing = [network for network in losing if network.aten < network.layers]
            if not losing:
                continue
            names = []
            for model in dict.fromkeys(network.model for network in losing):
                batches = ", ".join(str(network.batch) for network in losing if network.model == model)
                names.append(f"{model.removeprefix('RepVGG-')} ({batches})")
            worst = min(losing, key=lambda network: network.ratios[0])
            yield (
                f"- {mode} on {gpu}: {', '.join(names)}; at worst {worst.ratios[0]:.2f}x "
                f"({worst.model.removeprefix('RepVGG-')}, batch {worst.batch})"
            )
    yield ""
    yield (
        "Two of the reasons lie in the hardware and the mathematics. On Hopper cuDNN has `wgmma`, of whose peak "
        "`mma.sync` reaches 63 %: at large batch it stays ahead. And exact float32 has Winograd, with 2.25 to 4 times "
        "fewer products, which a direct kernel cannot make up on wide layers with stride 1."
    )
    yield ""


def family() -> dict[Case, list[str]]:
    """Every 3x3 layer of the family at batch 1, once, and the networks that have it."""
    found: dict[Case, list[str]] = {}
    for model in model_names():
        for case, _ in gpu_model.distinct(gpu_model.network(model), 1):
            found.setdefault(case, []).append(model.removeprefix("RepVGG-"))
    return found


def layer_table(gpu: str, mode: str) -> Iterator[str]:
    """Every layer of the family at every batch, in the order of the networks' first layers to their last."""
    rows = []
    for case, models in sorted(family().items(), key=lambda each: (-each[0].H, each[0].C, each[0].K, each[0].groups)):
        for batch in BATCHES:
            prediction = gpu_model.predict(GPUS[gpu], replace(case, N=batch), MODES[mode])
            assert prediction is not None
            rows.append(layer_cells(prediction, ", ".join(models)))
    yield f"<details><summary>Every layer, {mode}, {gpu}: predicted, not measured</summary>"
    yield ""
    yield from markdown_table(LAYER_COLUMNS, rows)
    yield ""
    yield "</details>"
    yield ""


def document() -> str:
    gpus = [name for name in GPUS if name != "H200"]
    found = networks(SUMMARY_MODELS, gpus, DOCUMENT_MODES, BATCHES)
    lines = [INTRODUCTION]
    lines += behind(found)
    for mode in DOCUMENT_MODES:
        lines += summary(mode, [network for network in found if network.mode.name == mode])
    lines += ["## Layer by layer", ""]
    lines.append(
        "Each 3x3 layer of the family once, at batch 1, 8, 32 and 128. Times in microseconds. in: which networks have "
        "it; row: ours, or aten where each of ours refuses, 'if named' where `auto` takes another; tile: output "
        "channels x rows x columns of a block (CTA); per SM: how many blocks a multiprocessor holds; waves: how many "
        "times that fills the GPU; floor: the least time, ours: the predicted one. `--csv` writes every network, GPU "
        "and dtype."
    )
    lines.append("")
    for gpu, mode in LAYER_TABLES:
        lines += layer_table(gpu, mode)
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model", nargs="+", default=["RepVGG-A0", "RepVGG-B1"], metavar="NAME", help="all: the family"
    )
    parser.add_argument("--gpu", nargs="+", choices=list(GPUS), default=list(GPUS))
    parser.add_argument("--dtype", nargs="+", choices=list(MODES), default=["fp16"])
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES), metavar="N")
    parser.add_argument("--layers", action="store_true", help="layer by layer, not the sums over each network")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every layer here too")
    parser.add_argument(
        "--markdown", action="store_true", help=f"write {DOCUMENT.name} of docs/, whatever else is asked"
    )
    args = parser.parse_args(argv)
    models = model_names() if "all" in args.model else args.model
    unknown = [name for name in models if name not in model_names()]
    if unknown or min(args.batch) < 1:
        parser.error(f"--model must be all or of {', '.join(model_names())}; --batch at least 1")
    if _ext.module is None or not _ext.has_cuda_kernels():
        print("error: the compiled module has no CUDA rows to ask: build it with nvcc", file=sys.stderr)
        return 1
    if args.markdown:
        write_text_atomically(DOCUMENT, document())
        print(f"wrote {DOCUMENT}")
        return 0
    console, every = Console(), []
    for mode in args.dtype:
        for gpu in args.gpu:
            for model in models:
                for batch in args.batch:
                    every += [(model, *each) for each in layers_of(model, GPUS[gpu], MODES[mode], batch)]
    if args.layers:
        for model, gpu, mode in dict.fromkeys((model, p.gpu.name, p.mode.name) for model, p, _ in every):
            rows = [
                layer_cells(p, f"{n}x") for name, p, n in every if (name, p.gpu.name, p.mode.name) == (model, gpu, mode)
            ]
            show(console, f"{model} on {gpu}, {mode}", LAYER_COLUMNS, rows)
    else:
        found = networks(models, args.gpu, args.dtype, args.batch)
        show(console, "networks", NETWORK_COLUMNS, [network_cells(network) for network in found])
    if args.csv is not None:
        write_text_atomically(args.csv, as_csv(every))
        print(f"wrote {args.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
