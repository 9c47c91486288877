# SPDX-License-Identifier: MIT
"""The pictures and the page of a record: what they show, and that a browser shows it, on a phone and in the dark."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import browser
import pytest

from repvgg_cuda import bench, ceilings, charts, page, records
from repvgg_cuda.comparison import AGAIN, Row
from repvgg_cuda.records import Run

pytest.importorskip("matplotlib")

HOSTILE = "</td><script>document.title='taken'</script>&amp;"

#: By candidate: times as fast as the first row, and whether it is ours.
CANDIDATES = {
    "three branches": (1.0, False),
    f"three branches{AGAIN}": (1.01, False),
    "fused F.conv2d + relu": (1.5, False),
    "fused F.conv2d + relu, channels_last": (1.6, False),
    "torch.compile": (1.7, False),
    "ONNX Runtime": (2.0, False),
    "fused conv3x3 prepared": (3.5, True),
    "fused conv3x3 auto": (2.2, True),
    "fused conv3x3 winograd6": (9.0, True),
}


def case_rows(suite: str, name: str, batch: int = 1, scale: float = 1.0) -> list[Row]:
    rows = []
    for candidate, (speedup, own) in CANDIDATES.items():
        median = 1000.0 * scale * batch / speedup
        rows.append(
            Row(
                suite, f"{name}-{batch}", candidate, "ok", median_us=median, p10_us=0.9 * median, p90_us=1.2 * median,
                speedup=speedup, speedup_low=0.95 * speedup, speedup_high=1.06 * speedup,
                within_noise=candidate.endswith(AGAIN), error=1e-6, rounds=9, own=own, batch=batch, group=name,
                threads=1, clock="cpu", flops=6e7 * scale * batch, bytes=2e6 * batch, floor_us=400 * scale * batch,
                share=0.5, samples_ns=(1e6,) * 9,
            )
        )  # fmt: skip
    refused = Row(suite, f"{name}-{batch}", "ncnn", "refused", "not installed", batch=batch, group=name, threads=1)
    wrong = Row(suite, f"{name}-{batch}", HOSTILE, "wrong", HOSTILE, batch=batch, group=name, threads=1)
    return [*rows, refused, wrong]


@pytest.fixture(scope="module")
def run() -> Run:
    environment = {
        "cpu": "A Processor With Rather A Long Name @ 3.00GHz", "threads": 1, "torch": "2.13.0", "git": "0123456789ab",
        "repvgg_cuda": "0.1.0", "time": "2026-11-26T00:00:00+00:00", "build": {"build": "cpu", "flags": ["a" * 200]},
    }  # fmt: skip
    limits = ceilings.Ceilings({"float32": 100.0}, "a guess", ((5e5, 50.0), (8e6, 30.0), (2e8, 10.0)))
    rows = case_rows("notebook", "notebook, (1, 2, 256, 256)")
    for batch in (1, 2):
        for i, name in enumerate(("stem", "A0-stage1")):
            rows += case_rows("layers", name, batch, scale=1.0 + i)
    rows += case_rows("models", "digits", scale=0.1) + case_rows("models", "RepVGG-A0", scale=30.0)
    rows += [dataclasses.replace(row, caches="cold") for row in case_rows("notebook", "notebook, (1, 2, 256, 256)")]
    return Run({"dtype": "float32", "rounds": 9}, environment, limits, [f"a warning {HOSTILE}"], rows)


@pytest.fixture(scope="module")
def folder(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plot") / "out"
    page.write(run, out)
    return out


def test_of_each_kind_the_fastest_and_of_ours_what_a_user_gets() -> None:
    shown = charts.representatives(case_rows("layers", "stem"))
    assert [(kind, row.candidate) for kind, row in shown] == [
        ("unfused", "three branches"), ("PyTorch", "fused F.conv2d + relu, channels_last"),
        ("torch.compile", "torch.compile"), ("ONNX Runtime", "ONNX Runtime"), ("ours", "fused conv3x3 prepared"),
        ("ours, not prepared", "fused conv3x3 auto"),
    ]  # fmt: skip


def test_the_limit_is_drawn_where_the_floor_is() -> None:
    rows = case_rows("layers", "stem")
    assert charts.limit_speedup(rows) == 1000 / 400
    figure = charts.speedups([rows], charts.LIGHT)
    dashed = [line for panel in figure.axes for line in panel.lines if line.get_linestyle() == "--"]
    assert [set(line.get_xdata()) for line in dashed] == [{2.5}]
    texts = [text.get_text() for panel in figure.axes for text in panel.texts]
    assert "limit 2.5x" in texts
    assert "3.50x" in texts


def test_every_file_is_written(folder: Path) -> None:
    names = ["speedup-notebook", "speedup-layers", "speedup-models", "roofline", "batch"]
    expected = sorted([f"{name}.{kind}" for name in names for kind in ("png", "svg")] + ["report.html"])
    assert sorted(path.name for path in folder.iterdir()) == expected
    assert (folder / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "batch.svg").read_text().startswith("<?xml")


def test_the_page_needs_nothing_else(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    assert "<script" not in text
    assert "&lt;/td&gt;&lt;script&gt;" in text
    loads = re.findall(r'(?:src|srcset|href)=["\']?([^"\'> ]+)', text)
    assert loads
    assert all(each.startswith("data:") for each in loads)
    assert "http" not in re.sub(r"data:[^\"]*", "", text)


def test_without_times_there_is_nothing_to_draw(run: Run, tmp_path: Path) -> None:
    empty = dataclasses.replace(run, rows=[row for row in run.rows if row.status != "ok"])
    with pytest.raises(RuntimeError, match="no row with a time"):
        page.write(empty, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_record_without_ceilings_or_with_one_batch_draws_the_rest(run: Run) -> None:
    single = dataclasses.replace(run, ceilings=None, rows=case_rows("layers", "stem"))
    assert [name for name, *_ in page.pictures(single)] == ["speedup-layers"]


def test_the_plot_command(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from repvgg_cuda import cli

    run.write(tmp_path / "whole.jsonl")
    assert records.read(tmp_path / "whole.jsonl") == run
    dataclasses.replace(run, rows=case_rows("layers", "stem"), ceilings=None).write(tmp_path / "record.jsonl")
    assert cli.main(["bench", "plot", str(tmp_path / "record.jsonl")]) == 0
    assert (tmp_path / "record" / "report.html").is_file()
    assert cli.main(["bench", "plot", str(tmp_path / "none.jsonl")]) == 1
    (tmp_path / "file").touch()
    assert cli.main(["bench", "plot", str(tmp_path / "record.jsonl"), "--out", str(tmp_path / "file")]) == 1
    assert "--out must be a directory" in capsys.readouterr().err


def test_the_compare_command(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from repvgg_cuda import cli

    run.write(tmp_path / "a.jsonl")
    slower = [
        dataclasses.replace(row, samples_ns=tuple(1.2 * each for each in row.samples_ns))
        if row.candidate == "fused conv3x3 auto"
        else row
        for row in run.rows
    ]
    dataclasses.replace(run, rows=slower).write(tmp_path / "b.jsonl")
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert cli.main(["bench", "compare", paths[0], paths[0]]) == 0
    assert cli.main(["bench", "compare", *paths]) == 1
    out = capsys.readouterr().out
    assert "1.200" in out
    assert "of this library's rows got slower or wrong" in out
    assert cli.main(["bench", "compare", *reversed(paths)]) == 0


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_it_on_a_phone_and_on_a_desk_in_light_and_dark(folder: Path) -> None:
    seen = {}
    path = browser.find()
    assert path is not None
    with browser.browser(path) as tab:
        for width in (390, 1280):
            for scheme in ("light", "dark"):
                seen[width, scheme] = tab.open(folder / "report.html", width, scheme)
        assert tab.problems == []
    for (width, _), look in seen.items():
        assert look["width"] == width
        assert look["scrollWidth"] <= width
        assert look["outside"] == []
        assert len(look["pictures"]) == 5
        assert all(each["loaded"] and each["width"] > 0.8 * min(width, 1000) for each in look["pictures"])
        assert "a warning </td><script>" in look["text"]  # as text
    sources = {key: tuple(look["sources"]) for key, look in seen.items()}
    assert len(set(sources.values())) == 4  # each has pictures of its own
    backgrounds = {scheme: seen[390, scheme]["background"] for scheme in ("light", "dark")}
    assert backgrounds == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}


def test_a_rehearsal_and_a_second_picture_say_what_they_are(run: Run) -> None:
    assert "rehearsal" not in page.html(run, {})
    assert "times on this page mean nothing" in page.html(
        dataclasses.replace(run, environment={**run.environment, "dry_run": True}), {}
    )
    texts = {name: text for name, text, _ in page.pictures(run)}
    assert "99 % interval" in texts["speedup-notebook"]
    assert texts["speedup-layers"].startswith("As above")


def test_every_suite_has_a_title() -> None:
    assert set(bench.SUITES) <= set(page.SUITE_TITLES)
