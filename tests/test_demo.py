# SPDX-License-Identifier: MIT
"""The demo: its data, its shipped network, both of its ways, what makes it fail, and its errors. No times."""

from __future__ import annotations

import argparse
import builtins
import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from repvgg_cuda import baselines, charts, checkpoint, comparison, demo, digits, networks, picture, timing
from repvgg_cuda.convert import reparameterize
from repvgg_cuda.models import create_model

sklearn = pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(argv)


def load_script(path: str) -> ModuleType:
    """A script that is not part of the package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(__file__).resolve().parent.parent / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hide_import(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Makes ``import name`` fail, as where the package is not installed."""
    original = builtins.__import__

    def refuse(module: str, *args: Any, **kwargs: Any) -> Any:
        if module == name or module.startswith(f"{name}."):
            raise ImportError(f"No module named {name!r}")
        return original(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Nothing here depends on a stable time."""
    monkeypatch.setattr(timing, "WARM_UP_NS", 1e6)


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands a small network in for RepVGG-A0, which takes seconds to verify."""

    def small(name: str, **options: Any) -> nn.Module:
        if name != "RepVGG-A0":
            return create_model(name, **options)
        options = {"num_classes": 1000, **options}
        return digits.RepVGG(num_blocks=[1, 1, 1, 1], width_multiplier=[0.25, 0.25, 0.25, 0.125], **options)

    monkeypatch.setattr(demo, "create_model", small)
    monkeypatch.setattr(networks, "create_model", small)


# ------------------------------------------------------------------------------------------------- data and weights


def test_the_split_is_stratified_and_has_every_scan_once() -> None:
    train, held_out = digits.load_digits()
    assert (len(train), len(held_out)) == (1352, 445)
    assert held_out.scans.shape == (445, 1, 8, 8)
    assert held_out.scans.min() == 0
    assert held_out.scans.max() == 1
    for digit in range(10):
        counts = [int((part.labels == digit).sum()) for part in (train, held_out)]
        assert counts[1] == sum(counts) // digits.HELD_OUT_EVERY
    bunch = sklearn.datasets.load_digits()
    both = torch.cat([train.scans, held_out.scans]).flatten(1) * 16
    rows = sorted(tuple(row) for row in both.int().tolist())
    assert rows == sorted(tuple(row) for row in torch.from_numpy(bunch.data).int().tolist())


def test_the_shipped_weights_do_what_their_metadata_say() -> None:
    metadata = digits.weights_metadata()
    _, held_out = digits.load_digits()
    right = int((digits.predict(digits.load_trained(), held_out).argmax(1) == held_out.labels).sum())
    assert right == int(metadata["held_out_correct"])
    assert len(held_out) == int(metadata["held_out_total"])
    assert right / len(held_out) >= 0.985
    assert {"seed", "split", "torch", "epochs"} <= set(metadata)


def test_the_shipped_weights_are_a_trained_multi_branch_network() -> None:
    state = checkpoint.load_state_dict_file(digits.WEIGHTS)
    assert checkpoint.form_of(state) == "train"
    assert set(state) == set(digits.build_model().state_dict())
    assert all(value.dtype == torch.float32 for value in state.values() if value.is_floating_point())
    assert digits.WEIGHTS.stat().st_size < 500_000
    assert int(state["stage0.rbr_dense.bn.num_batches_tracked"]) > 0


@pytest.fixture
def train_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Runs examples/train_digits.py with the given options."""
    script = load_script("examples/train_digits.py")

    def run(*options: str) -> int:
        monkeypatch.setattr("sys.argv", ["train_digits.py", *options])
        return int(script.main())

    deterministic = torch.are_deterministic_algorithms_enabled()
    yield run
    torch.use_deterministic_algorithms(deterministic)


def test_the_training_script_learns_and_writes(train_script: Callable[..., int], tmp_path: Path) -> None:
    path = tmp_path / "digits.safetensors"
    assert train_script("--epochs", "2", "--out", str(path)) == 0
    assert list(tmp_path.iterdir()) == [path]
    metadata = digits.weights_metadata(path)
    _, held_out = digits.load_digits()
    right = int((digits.predict(digits.load_trained(path), held_out).argmax(1) == held_out.labels).sum())
    assert (metadata["held_out_correct"], metadata["epochs"]) == (str(right), "2")
    assert right > len(held_out) / 2  # chance is a tenth
    again = tmp_path / "again.safetensors"
    assert train_script("--epochs", "2", "--out", str(again)) == 0
    states = [checkpoint.load_state_dict_file(file) for file in (path, again)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_training_script_says_what_is_wrong(
    train_script: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_script("--out", str(tmp_path / "missing" / "x.safetensors")) == 1
    assert capsys.readouterr().err.startswith("error: cannot write ")


# ------------------------------------------------------------------------------------------------- the digits demo


def test_the_demo_runs_and_draws(small_network: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(parse("--quick", "--out", str(tmp_path / "new"), "--device", "cpu")) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["demo.png"]
    with Image.open(tmp_path / "new" / "demo.png") as image:
        assert image.size[0] > 1000
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    out = capsys.readouterr().out
    metadata = digits.weights_metadata()
    right, total = metadata["held_out_correct"], metadata["held_out_total"]
    summary = out[out.index("Summary") :]
    assert f"{right} of {total} before, {right} after fusion" in summary
    assert f"{total} of {total} agree" in summary
    assert "all within their float64 error bounds" in summary
    assert "NOT" not in summary
    for form in (baselines.THREE_BRANCHES, "fused F.conv2d", networks.OWN_PREFIX):
        assert summary.count(form) == 2, form


def break_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the demo's fusion get the sign of one layer wrong."""

    def broken(model: nn.Module) -> Any:
        conversion = reparameterize(model)
        with torch.no_grad():
            conversion.model.get_parameter("stage1.0.rbr_reparam.weight").mul_(-1)
        return conversion

    monkeypatch.setattr(demo, "reparameterize", broken)


def stub_latency(monkeypatch: pytest.MonkeyPatch, rows: list[comparison.Row]) -> None:
    monkeypatch.setattr(demo.Demo, "latency", lambda *args: rows)
    monkeypatch.setattr(demo.Demo, "latency_of", lambda *args: rows)


def test_a_wrong_fusion_gets_no_times(
    small_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_fusion(monkeypatch)
    assert demo.run(parse("--quick", "--out", str(tmp_path), "--device", "cpu")) == 1
    out = capsys.readouterr().out
    assert "NOT all within their float64 error bounds" in out
    rows = [line for line in out.splitlines() if "wrong" in line]
    assert [row for row in rows if baselines.THREE_BRANCHES in row] == []
    assert [row for row in rows if "fused F.conv2d" in row]
    assert [row for row in rows if networks.OWN_PREFIX in row]


def test_changed_predictions_alone_fail_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_latency(monkeypatch, [])
    break_fusion(monkeypatch)
    assert demo.run(parse("--out", str(tmp_path), "--device", "cpu")) == 1
    assert (tmp_path / "demo.png").is_file()


@pytest.mark.parametrize(("status", "exit_code"), [("ok", 0), ("refused", 0), ("wrong", 1), ("error", 1)])
def test_a_wrong_row_alone_fails_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: Any, exit_code: int
) -> None:
    stub_latency(monkeypatch, [comparison.Row("models", "m", "fused F.conv2d", status)])
    monkeypatch.setattr(picture, "draw", lambda path, **parts: None)
    assert demo.run(parse("--out", str(tmp_path), "--device", "cpu")) == exit_code


@pytest.mark.parametrize("busy", [True, False])
def test_times_of_a_busy_machine_carry_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], busy: bool
) -> None:
    stub_latency(monkeypatch, [])
    footers: list[str] = []
    monkeypatch.setattr(picture, "draw", lambda path, *, footer, **parts: footers.append(footer))
    monkeypatch.setattr("repvgg_cuda.environment.load_warning", lambda record: "busy" if busy else None)
    assert demo.run(parse("--out", str(tmp_path), "--device", "cpu")) == 0
    out = capsys.readouterr().out
    assert (demo.BUSY in footers[0]) == (demo.BUSY in out[out.index("Summary") :]) == busy


def test_misread_digits_are_shown_first() -> None:
    wrong = torch.zeros(100, dtype=torch.bool)
    wrong[[3, 50, 99]] = True
    chosen = picture.choose(wrong, 10)
    assert len(set(chosen)) == 10
    assert {3, 50, 99} <= set(chosen)
    assert chosen == sorted(chosen)
    assert picture.choose(torch.ones(4, dtype=torch.bool), 3) == [0, 1, 2]
    assert picture.choose(torch.zeros(2, dtype=torch.bool), 3) == [0, 1]


def test_the_three_forms_are_the_baseline_pytorch_and_our_fastest() -> None:
    def row(name: str, median: float | None) -> comparison.Row:
        return comparison.Row("models", "m", name, "ok" if median else "refused", median_us=median, speedup=2.0)

    rows = [
        row("three branches", 9.0),
        row("fused F.conv2d", 4.0),
        row("fused conv3x3 slow", 5.0),
        row("fused conv3x3 fast", 3.0),
    ]
    assert [each.candidate for each in demo.three_forms(rows)] == [
        "three branches",
        "fused F.conv2d",
        "fused conv3x3 fast",
    ]
    assert [each.candidate for each in demo.three_forms([*rows[:3], row("fused conv3x3 fast", None)])][
        -1
    ] == "fused conv3x3 slow"
    assert demo.latency_summary(rows) == (
        "three branches 9.00 us, fused F.conv2d 4.00 us (2.00x), fused conv3x3 fast 3.00 us (2.00x)"
    )


# ------------------------------------------------------------------------------------------------------- the photo


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = (torch.rand(60, 90, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).resize((360, 240)).save(path)
    return path


def test_a_photo_is_classified_before_and_after(
    small_network: None, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.run(parse("--image", str(photo), "--quick", "--device", "cpu")) == 0
    out = capsys.readouterr().out
    assert "the weights are random, so the classes below mean nothing" in out
    assert "the same before and after" in out
    assert "before" in out
    assert out.count(" %") == 10


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_a_photo_with_a_checkpoint_of_either_form(
    small_network: None, photo: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = networks.randomise_(networks.create_model("RepVGG-A0", num_classes=7)).eval()
    if form == "deploy":
        model = reparameterize(model).model
    path = tmp_path / "weights.safetensors"
    checkpoint.save_state_dict_file(model.state_dict(), path)
    assert demo.run(parse("--image", str(photo), "--checkpoint", str(path), "--quick", "--device", "cpu")) == 0
    out = capsys.readouterr().out
    assert "weights are random" not in out
    assert ("is in deploy form: it is fused already" in out) == (form == "deploy")
    assert out.count(" %") == (5 if form == "deploy" else 10)


def preprocess_by_hand(image: Any, resize: int, crop: int) -> Tensor:
    """ImageNet's preprocessing once more, by torch's own antialiased resize."""
    x = torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None].float()
    scale = resize / min(image.size)
    size = (round(image.height * scale), round(image.width * scale))
    x = nn.functional.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - crop) // 2, (size[1] - crop) // 2
    x = x[:, :, top : top + crop, left : left + crop] / 255
    return (x - torch.tensor(demo.IMAGENET_MEAN).reshape(3, 1, 1)) / torch.tensor(demo.IMAGENET_STD).reshape(3, 1, 1)


def test_preprocessing_is_imagenets(photo: Path) -> None:
    x = demo.load_image(photo, 256, 224)
    assert x.shape == (1, 3, 224, 224)
    assert x.dtype == torch.float32
    with Image.open(photo) as image:
        want = preprocess_by_hand(image, 256, 224)
    # Pillow rounds to whole greys after each of its two passes: one step together, divided by the smallest std.
    assert (x - want).abs().max() <= (1 + 1e-3) / 255 / min(demo.IMAGENET_STD)


def test_photos_are_turned_upright_and_made_rgb(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 300), (200, 30, 30))
    image.paste((30, 30, 200), (0, 0, 300, 150))  # blue above red
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the right edge of the stored picture is its top: turn by 270 degrees
    image.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = demo.load_image(tmp_path / "turned.jpg", 256, 224)
    assert (upright[0, 2, :100] > upright[0, 0, :100]).all()
    assert (upright[0, 0, -100:] > upright[0, 2, -100:]).all()
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        image.convert(mode).save(tmp_path / "other.tif")
        assert demo.load_image(tmp_path / "other.tif", 256, 224).shape == (1, 3, 224, 224), mode


@pytest.mark.parametrize("size", [(1, 1), (5, 900), (900, 5), (224, 225)])
def test_any_size_of_photo_fits(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (9, 99, 199)).save(tmp_path / "any.png")
    x = demo.load_image(tmp_path / "any.png", 256, 224)
    assert x.shape == (1, 3, 224, 224)
    assert (x == x[:, :, :1, :1]).all()


def test_se_models_see_whole_320_px_images() -> None:
    assert demo.input_size("RepVGG-A0") == (256, 224)
    assert demo.input_size("RepVGG-D2se") == demo.input_size("RepVGGplus-L2pse") == (320, 320)


# ----------------------------------------------------------------------------------------------------------- errors


def truncated_png() -> bytes:
    data = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(data, "PNG")
    return data.getvalue()[:1000]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not an image at all", r"photo.png: cannot be read as an image \(cannot identify image file"),
        (b"", r"photo.png: cannot be read as an image"),
        (truncated_png, r"photo.png: cannot be read as an image \(.*truncated"),
    ],
)
def test_an_unreadable_image_is_one_line(tmp_path: Path, content: bytes | Callable[[], bytes], message: str) -> None:
    (tmp_path / "photo.png").write_bytes(content() if callable(content) else content)
    with pytest.raises(RuntimeError, match=message) as error:
        demo.run(parse("--image", str(tmp_path / "photo.png")))
    assert "give a JPEG, PNG or WebP file" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_image_or_checkpoint(photo: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.jpg: there is no such file"):
        demo.run(parse("--image", str(tmp_path / "none.jpg")))
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        demo.run(parse("--image", str(photo), "--checkpoint", str(tmp_path / "none.safetensors")))


def test_an_unknown_model(photo: Path) -> None:
    with pytest.raises(RuntimeError, match="RepVGG-Z9"):
        demo.run(parse("--image", str(photo), "--model", "RepVGG-Z9"))


def test_a_checkpoint_of_another_network(small_network: None, photo: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stage0.rbr_dense.conv.weight must be|the checkpoint is of another model"):
        demo.run(parse("--image", str(photo), "--checkpoint", str(digits.WEIGHTS)))
    headless = {name: value for name, value in digits.load_trained().state_dict().items() if "linear" not in name}
    checkpoint.save_state_dict_file(headless, tmp_path / "headless.safetensors")
    with pytest.raises(RuntimeError, match=r"no linear\.weight.*give one of the whole network"):
        demo.run(parse("--image", str(photo), "--checkpoint", str(tmp_path / "headless.safetensors")))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "RepVGG-A0"], "--model and --checkpoint go with --image FILE"),
        (["--checkpoint", "x.pth"], "--model and --checkpoint go with --image FILE"),
        (["--image", "x.png", "--out", "there"], "--out is for the digits' picture"),
    ],
)
def test_options_that_would_be_ignored_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        demo.run(parse(*argv))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_cuda_without_a_gpu_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="--device cuda needs a CUDA GPU .*; use --device cpu"):
        demo.run(parse("--device", "cuda", "--out", str(tmp_path)))


def test_an_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        demo.run(parse("--out", str(tmp_path / "file")))


@pytest.mark.parametrize(
    ("package", "remedy", "call"),
    [
        ("sklearn", "pip install scikit-learn", digits.load_digits),
        ("PIL", "pip install pillow", lambda: demo.load_image(Path("x.png"), 256, 224)),
        ("matplotlib", "pip install matplotlib", charts.require_matplotlib),
    ],
)
def test_a_missing_extra_names_its_remedy(
    monkeypatch: pytest.MonkeyPatch, package: str, remedy: str, call: Callable[[], object]
) -> None:
    hide_import(monkeypatch, package)
    with pytest.raises(RuntimeError, match=remedy):
        call()
