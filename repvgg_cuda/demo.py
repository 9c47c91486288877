# SPDX-License-Identifier: MIT
"""``repvgg-cuda demo``: a trained network is fused, and everything that should stay the same is shown to stay the same.

By default on scikit-learn's digits with the weights shipped in this package; with ``--image`` on a photo, with any
network of the RepVGG family.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from repvgg_cuda import bench, charts, checkpoint, digits, environment, files, networks, picture, suites, tables
from repvgg_cuda.branches import require
from repvgg_cuda.comparison import Row
from repvgg_cuda.convert import reparameterize
from repvgg_cuda.models import create_model
from repvgg_cuda.verification import verify

T = TypeVar("T")

ROUNDS, QUICK_ROUNDS = 30, 3
#: Scans in the batch on which every layer is verified; the predictions are compared on all of them.
VERIFIED_SCANS = 64

BUSY = "other programs were running when the timing began: do not rely on the times and ratios"

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``repvgg-cuda demo``."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="where demo.png of the digits goes (default: out)")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a photo to classify, instead of the digits")
    parser.add_argument("--model", metavar="NAME", help="network for --image (default: RepVGG-A0)")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="its weights, in train or deploy form (default: random ones)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU, else cpu")
    parser.add_argument("--quick", action="store_true", help="time less, and less exactly")


def run(args: argparse.Namespace) -> int:
    """Runs the demo. Returns 1 if accuracy, a prediction or a layer's output is not what it was before fusion."""
    require(
        args.image is not None or (args.model is None and args.checkpoint is None),
        "demo: --model and --checkpoint go with --image FILE; the digits have their own network",
    )
    require(args.image is None or args.out is None, "demo: --out is for the digits' picture; --image draws none")
    require(
        args.device != "cuda" or torch.cuda.is_available(),
        "demo: --device cuda needs a CUDA GPU and a PyTorch built for it, and torch.cuda.is_available() is False; "
        "use --device cpu",
    )
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    demo = Demo(Console(), device, QUICK_ROUNDS if args.quick else ROUNDS)
    if args.image is not None:
        return demo.photo(args.image, args.model or "RepVGG-A0", args.checkpoint)
    return demo.digits(args.out or Path("out"))


class Demo:
    """What the two demos share: where they print and run, how long they time."""

    def __init__(self, console: Console, device: torch.device, rounds: int) -> None:
        self.console, self.device, self.rounds = console, device, rounds
        self.setup = suites.Setup(device, torch.float32)
        self.busy = False

    # ------------------------------------------------------------------------------------------------------- digits

    def digits(self, out: Path) -> int:
        """The whole way on the shipped digits network, with a picture in the directory ``out``."""
        charts.require_matplotlib()
        _, held_out = digits.load_digits()
        out.mkdir(parents=True, exist_ok=True)
        files.require_writable(out / "demo.png")
        record = self.header()

        self.title("1. The trained network")
        trained = digits.load_trained().to(self.device)
        self.say(f"{parameters(trained)} parameters in {len(trained.state_dict())} tensors, from {digits.WEIGHTS.name}")

        self.title("2. Fusion")
        conversion = reparameterize(trained)
        self.say(str(conversion.report))
        deployed = conversion.model
        self.say(f"{parameters(deployed)} parameters in {len(deployed.state_dict())} tensors")

        self.title(f"3. {len(held_out)} held-out digits, before and after")
        before, after = (digits.predict(model, held_out, self.device) for model in (trained, deployed))
        right = [int((logits.argmax(1) == held_out.labels).sum()) for logits in (before, after)]
        agree = int((before.argmax(1) == after.argmax(1)).sum())
        for name, count in zip(("before", "after"), right, strict=True):
            self.say(f"{name:6}  {count} of {len(held_out)} right ({count / len(held_out):.2%})")
        self.say(f"the two agree on {agree} of {len(held_out)}; largest logit difference {largest(before - after):.2e}")

        self.title("4. Every layer against float64")
        sample = digits.preprocess(held_out.scans[:VERIFIED_SCANS]).to(self.device)
        verification = self.wait("verifying", lambda: verify(trained, deployed, sample))
        self.console.print(verification.render())

        self.title("5. Latency, batch 1")
        latencies = [
            ("Digits network, 32 x 32", self.latency("digits", trained, deployed, sample[:1])),
            ("RepVGG-A0, 224 x 224, random weights", self.latency_of("RepVGG-A0")),
        ]
        wrong_rows = any(row.status in ("wrong", "error") for _, rows in latencies for row in rows)

        shown = picture.ROWS * picture.COLUMNS
        picture.draw(
            out / "demo.png",
            title="A trained RepVGG, before and after fusion",
            subtitle=f"{right[0]} of {len(held_out)} held-out digits right before, {right[1]} after; "
            f"{agree} of {len(held_out)} predictions agree",
            scans=held_out.scans,
            labels=held_out.labels,
            predictions=after.argmax(1),
            latencies=[(name, three_forms(rows)) for name, rows in latencies],
            footer=f"{environment.machine(record)}, float32, batch 1, torch {torch.__version__}. Bars: median of "
            f"{self.rounds} samples; lines: 10th to 90th percentile; ratios: over three branches, within rounds. "
            f"Left: {shown} of the {len(held_out)} scans, with every misread one."
            + (f"\nWarning: {BUSY}." if self.busy else ""),
        )

        self.title("Summary")
        self.say(f"accuracy     {right[0]} of {len(held_out)} before, {right[1]} after fusion")
        self.say(f"predictions  {agree} of {len(held_out)} agree")
        self.say(f"layers       {'all within' if verification.ok else 'NOT all within'} their float64 error bounds")
        for name, rows in latencies:
            self.say(f"latency      {name}: {latency_summary(rows)}")
        self.warn_if_busy()
        self.say(f"picture      {out / 'demo.png'}")
        same = right[0] == right[1] and agree == len(held_out) and verification.ok
        return 0 if same and not wrong_rows else 1

    # -------------------------------------------------------------------------------------------------------- photo

    def photo(self, image: Path, name: str, weights: Path | None) -> int:
        """Classifies one photo with the network ``name``, before and after fusion."""
        x = load_image(image, *input_size(name)).to(self.device)
        state = None if weights is None else checkpoint.load_state_dict_file(weights)
        model = self.wait(f"building {name}", lambda: network(name, state)).to(self.device)
        self.header()
        self.title(f"{name} on {image.name}")
        if weights is None:
            self.warn(
                "the weights are random, so the classes below mean nothing; give trained ones with --checkpoint FILE"
            )
        trained = model if state is None or checkpoint.form_of(state) == "train" else None
        if trained is None:
            self.say(f"{weights} is in deploy form: it is fused already, and there is no form before to compare with")
            deployed = model
        else:
            conversion = self.wait("fusing", lambda: reparameterize(model))
            self.say(str(conversion.report))
            deployed = conversion.model

        same = self.print_classes(trained, deployed, x)
        if trained is not None:
            verification = self.wait("verifying", lambda: verify(trained, deployed, x))
            self.console.print(verification.render())
            same = same and verification.ok
        rows = self.latency(name, trained, deployed, x)
        self.title("Summary")
        if trained is not None:
            self.say(
                f"top class and layers: {'the same before and after' if same else 'NOT the same before and after'}"
            )
        self.say(f"latency: {latency_summary(rows)}")
        self.warn_if_busy()
        return 0 if same and not any(row.status in ("wrong", "error") for row in rows) else 1

    @torch.inference_mode()
    def print_classes(self, trained: nn.Module | None, deployed: nn.Module, x: Tensor) -> bool:
        """Prints the five likeliest classes. Returns whether the likeliest is the same before and after."""
        models = {"before": trained, "after": deployed} if trained is not None else {"deployed": deployed}
        probabilities = {form: model(x).double().softmax(1)[0].cpu() for form, model in models.items()}
        forms = list(probabilities.values())
        table = Table(title="likeliest classes (ImageNet's index, counted from 0)", title_justify="left")
        table.add_column("class", justify="right")
        for form in probabilities:
            table.add_column(form, justify="right")
        for index in forms[-1].topk(min(5, len(forms[-1]))).indices.tolist():
            table.add_row(str(index), *(f"{100 * each[index]:.4f} %" for each in forms))
        self.console.print(table)
        if len(forms) == 1:
            return True
        self.say(f"largest difference of any class's probability: {largest(forms[0] - forms[1]):.2e}")
        return bool(forms[0].argmax() == forms[1].argmax())

    # ------------------------------------------------------------------------------------------------------- shared

    def latency_of(self, name: str) -> list[Row]:
        """The latency of a network of the family with random weights."""
        trained, x = self.wait(
            f"building {name}", lambda: networks.build_model(name, self.setup.device, self.setup.dtype)
        )
        return self.latency(name, trained, reparameterize(trained).model, x)

    def latency(self, name: str, trained: nn.Module | None, deployed: nn.Module, x: Tensor) -> list[Row]:
        """Times, and prints a table of, every form of the network on ``x``."""
        candidates = networks.model_candidates(trained, deployed, x, [torch.contiguous_format])
        rows = bench.run_candidates("models", name, candidates, self.setup, self.rounds, self.console)
        self.console.print(tables.table(rows))
        return rows

    def header(self) -> dict[str, object]:
        """Prints what the figures depend on, and returns it."""
        record = self.wait("looking at the machine", self.look_at_machine)
        self.say(
            f"{environment.machine(record)}; torch {record['torch']}; repvgg_cuda {record['build']['build']} build"
        )
        if warning := environment.load_warning(record):
            self.busy = True
            self.warn(warning)
        return record

    def look_at_machine(self) -> dict[str, Any]:
        return environment.collect(self.device) | self.setup.target.facts()

    def warn_if_busy(self) -> None:
        if self.busy:
            self.warn(BUSY)

    def wait(self, what: str, work: Callable[[], T]) -> T:
        """Does ``work`` under a spinner that says ``what``."""
        with self.console.status(escape(what)):
            return work()

    def title(self, text: str) -> None:
        self.console.print(f"\n[bold]{escape(text)}[/bold]", highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------- figures


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def three_forms(rows: list[Row]) -> list[Row]:
    """Of a network's timed rows: three branches, fused in PyTorch, and the fastest of this library's algorithms."""
    timed = [row for row in rows if row.median_us is not None]
    ours = [row for row in timed if row.candidate.startswith(networks.OWN_PREFIX)]
    others = [row for row in timed if row not in ours]
    return [*others[:2], *sorted(ours, key=lambda row: row.median_us or 0.0)[:1]]


def latency_summary(rows: list[Row]) -> str:
    """Each form's median in a line, with how many times faster than the first it is."""
    parts = []
    for i, row in enumerate(three_forms(rows)):
        ratio = f" ({row.speedup:.2f}x)" if i and row.speedup is not None else ""
        parts.append(f"{row.candidate} {tables.duration(row.median_us or 0.0)}{ratio}")
    return ", ".join(parts) or "not timed, no form gave the right result"


# ------------------------------------------------------------------------------------------------------------ photo


def input_size(name: str) -> tuple[int, int]:
    """``(resize, crop)``: the shorter side is scaled to the first, then a square of the second is cut from the centre.

    The SE models were trained and are evaluated on whole 320 px images, the others on the usual 224 of 256.
    """
    return (320, 320) if name.endswith("se") else (256, 224)


def load_image(path: Path, resize: int, crop: int) -> Tensor:
    """A photo as the network's input ``[1, 3, crop, crop]``: upright, RGB, resized, cropped, ImageNet's mean and std.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: it is not an image Pillow can read, or Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise RuntimeError("photos are read with Pillow: install it with `pip install pillow`") from None
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(f"{path}: cannot be read as an image ({reason}); give a JPEG, PNG or WebP file") from None
    scale = resize / min(image.size)
    image = image.resize(
        (max(resize, round(image.width * scale)), max(resize, round(image.height * scale))), Image.Resampling.BILINEAR
    )
    left, top = (image.width - crop) // 2, (image.height - crop) // 2
    image = image.crop((left, top, left + crop, top + crop))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(crop, crop, 3)
    x = pixels.permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((x - mean) / std).unsqueeze(0).contiguous()


def network(name: str, state: dict[str, Tensor] | None) -> nn.Module:
    """The network ``name`` in eval mode, in the form and with the classes of ``state``; with random weights if None."""
    if state is None:
        return networks.randomise_(create_model(name)).eval()
    head = state.get("linear.weight")
    require(head is not None, f"the checkpoint has no linear.weight, which {name} needs; give one of the whole network")
    assert head is not None
    model = create_model(name, num_classes=head.shape[0], deploy=checkpoint.form_of(state) == "deploy")
    checkpoint.load_into(model, state)
    return model.eval()
