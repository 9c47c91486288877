# SPDX-License-Identifier: MIT
"""A benchmark's record as one page, with everything in it: pictures, tables, what was measured and how. No scripts.

Every picture is there four times, for light and dark and for wide and narrow screens; the browser takes one.
"""

from __future__ import annotations

import base64
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, Literal

from repvgg_cuda import charts, environment, tables
from repvgg_cuda.charts import DARK, LIGHT, Theme
from repvgg_cuda.comparison import AGAIN, Row
from repvgg_cuda.files import write_atomically, write_text_atomically
from repvgg_cuda.intervals import LEVEL
from repvgg_cuda.records import Run

#: Screens narrower than this get the narrow pictures.
NARROW_PX = 640

#: What a case's baseline is called where there is one.
SUITE_TITLES = {
    "notebook": "One block: three branches, and fused",
    "layers": "The layers of RepVGG",
    "models": "Whole networks",
    "fusion": "Folding the weights",
    "chains": "Four equal layers in a row",
    "small": "Small images",
}

STYLE = """
:root{color-scheme:light dark;--ink:#111827;--muted:#5b6472;--line:#d5d9e0;--back:#fff;--card:#f5f6f8;--ours:#1d4ed8;
--warn:#8a5a00;--warnback:#fff5dc;--bad:#b91c1c}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--muted:#9aa4b2;--line:#3a4250;--back:#14171c;--card:#1c2027;
--ours:#8fb2ff;--warn:#f0c060;--warnback:#2c2413;--bad:#ff8080}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:1rem;background:var(--back);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2;margin:.6rem 0}h2{font-size:1.2rem;margin:2.2rem 0 .4rem}
p{margin:.5rem 0}.muted{color:var(--muted);font-size:.9rem}
.warn{background:var(--warnback);color:var(--warn);border-radius:.5rem;padding:.6rem .9rem;margin:.8rem 0}
.bad{color:var(--bad);font-weight:600}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(14rem,1fr));gap:.8rem;padding:0;margin:1rem 0}
.facts li{list-style:none;background:var(--card);border-radius:.6rem;padding:.8rem 1rem}
.facts b{display:block;font-size:1.7rem;line-height:1.2}
img{width:100%;height:auto;display:block}
.scroll{overflow-x:auto;margin:.3rem 0 1rem}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;white-space:nowrap;
overflow-wrap:normal}
th,td{text-align:right;padding:.22rem .7rem .22rem 0;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
td.note{white-space:normal;min-width:16rem;text-align:left;color:var(--muted)}
tr.ours td{color:var(--ours)}tr.ours td:first-child{font-weight:600}
summary{cursor:pointer;padding:.25rem 0}
dl{display:grid;grid-template-columns:minmax(7rem,auto) 1fr;gap:.15rem 1rem;font-size:.9rem}
dt{color:var(--muted)}dd{margin:0}
"""


def write(run: Run, out: Path) -> list[Path]:
    """Writes ``report.html`` and each picture as SVG and PNG into the folder ``out``. Returns the paths.

    Raises:
        RuntimeError: no row has a time, or matplotlib is not installed.
    """
    charts.require_matplotlib()
    if not any(row.status == "ok" for row in run.rows):
        raise RuntimeError("the record holds no row with a time; nothing to draw")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    images = {}
    for name, text, draw in pictures(run):
        figures = versions(draw)
        images[name] = (text, image(figures, text))
        for kind in KINDS:
            path = out / f"{name}.{kind}"
            write_atomically(path, charts.render(figures[LIGHT, False], kind, LIGHT))
            written.append(path)
    page = out / "report.html"
    write_text_atomically(page, html(run, images))
    return [*written, page]


Figures = dict[tuple[Theme, bool], Any]


def whole(run: Run) -> str:
    """The page with every picture there is."""
    return html(run, {name: (text, image(versions(draw), text)) for name, text, draw in pictures(run)})


def versions(draw: Callable[[Theme], Any]) -> Figures:
    """A picture for each theme, wide and narrow."""
    return {
        (theme, narrow): draw(dataclasses.replace(theme, narrow=narrow))
        for theme in (DARK, LIGHT)
        for narrow in (True, False)
    }


#: Of the files beside the page.
KINDS: tuple[Literal["svg", "png"], ...] = ("svg", "png")

Picture = tuple[str, str, Callable[[Theme], Any]]


def pictures(run: Run) -> list[Picture]:
    """``(file name, how to read it, draw)`` of every picture that the record has rows for."""
    found: list[Picture] = []
    for suite, cases in by_suite(run).items():
        single = [rows for rows in cases if rows[0].caches == "warm" and rows[0].batch == min_batch(cases)]
        if charts.drawable(single):
            text = speedup_text(single, again=bool(found))
            found.append((f"speedup-{suite}", text, partial(charts.speedups, single)))
    warm = [rows for rows in run.by_case().values() if rows[0].caches == "warm"]
    # The ceilings are those of the first run's threads.
    threads = run.environment.get("threads")
    conv = [rows for rows in warm if rows[0].flops and rows[0].batch == min_batch(warm) and rows[0].threads == threads]
    if run.ceilings is not None and charts.drawable(conv):
        dtype = str(run.options.get("dtype", "float32"))
        found.append(("roofline", ROOFLINE_TEXT, partial(charts.roofline, conv, run.ceilings, dtype)))
    grouped = [rows for rows in warm if charts.drawable([rows])]
    if charts.by_group(grouped):
        found.append(("batch", BATCH_TEXT, partial(charts.batches, grouped)))
    return found


def min_batch(cases: Sequence[Sequence[Row]]) -> int:
    return min(rows[0].batch for rows in cases)


def by_suite(run: Run) -> dict[str, list[list[Row]]]:
    suites: dict[str, list[list[Row]]] = {}
    for (suite, *_), rows in run.by_case().items():
        suites.setdefault(suite, []).append(rows)
    return suites


ROOFLINE_TEXT = (
    "How close each case comes to what this machine can do. A point is one case: to the right, more arithmetic for "
    "each byte; upwards, faster. Nothing can lie above the sloped lines (memory) for data of that size, and no direct "
    "convolution above the solid level line (arithmetic). Winograd algorithms do the same convolution with fewer "
    "multiplications, so they may lie above it, up to the dashed line."
)
BATCH_TEXT = "How the time of one image changes when several are computed together. Lower is better."


def speedup_text(cases: Sequence[Sequence[Row]], *, again: bool = False) -> str:
    """How to read the picture; in short where it stands below another one of its kind."""
    firsts = {rows[0].candidate for rows in cases}
    first = cases[0][0].candidate if len(firsts) == 1 else "the branches before fusion"
    batch = cases[0][0].batch
    if again:
        return f"As above: how many times as fast as {first} each way is, at batch {batch}; longer is better."
    text = (
        f"How many times as fast as {first} each way is, at batch {batch}; longer is better. Of each kind the fastest "
        f"variant is shown. The thin line on a bar is the {100 * LEVEL:.0f} % interval, and a ~ before the number says "
        "that the measurement cannot tell the two apart."
    )
    if any(charts.limit_speedup(rows) for rows in cases):
        text += (
            " The dashed line is where a direct convolution would be that used all of this machine's arithmetic and "
            "memory; Winograd algorithms multiply less and may pass it."
        )
    return text


# --------------------------------------------------------------------------------------------------------------- HTML


def html(run: Run, images: Mapping[str, tuple[str, str]] | None = None) -> str:
    """The page.

    Args:
        images: by name, how to read each picture, and the picture; None: they are drawn here.
    """
    if images is None:
        images = {name: (text, image(versions(draw), text)) for name, text, draw in pictures(run)}
    record = run.environment
    title = f"repvgg_cuda on {environment.machine(record)}"
    parts = [f"<h1>{escape(title)}</h1>", f"<p class=muted>{escape(subtitle(run))}</p>"]
    if record.get("dry_run"):
        parts.append("<p class=warn><b>This is a rehearsal without a GPU: the times on this page mean nothing.</b></p>")
    parts += [f"<p class=warn>{escape(text)}</p>" for text in run.warnings]
    parts.append(facts(run))
    for name, (text, markup) in images.items():
        suite = name.removeprefix("speedup-")
        heading = {"roofline": "Against the machine's limits", "batch": "Several images at a time"}
        parts.append(f"<h2>{escape(heading.get(name) or SUITE_TITLES.get(suite, suite))}</h2>")
        parts += [markup, f"<p class=muted>{escape(text)}</p>"]
    parts.append("<h2>Every row</h2>" + every_row(run))
    parts.append("<h2>How this was measured</h2>" + method(run))
    parts.append("<h2>The machine</h2>" + machine(run))
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        '<link rel=icon href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def subtitle(run: Run) -> str:
    record = run.environment
    parts = [
        str(run.options.get("dtype", "")),
        *([f"TF32 {'allowed' if record.get('tf32') else 'off'}"] if "tf32" in record else []),
        f"PyTorch {record.get('torch')}",
        f"repvgg_cuda {record.get('repvgg_cuda')} ({record.get('git') or 'no checkout'})",
        str(record.get("time", ""))[:10],
    ]  # fmt: skip
    return ", ".join(parts)


def facts(run: Run) -> str:
    """The run in a few large numbers: ours against the first row, for each network, and on average over layers."""
    items = []
    for suite, cases in by_suite(run).items():
        found = [
            (rows, own)
            for rows in cases
            if rows[0].caches == "warm" and rows[0].batch == min_batch(cases) and (own := usual(rows)) is not None
        ]
        if suite in ("models", "small", "benchmark") or len(found) == 1:
            items += [one_fact(rows, own) for rows, own in found]
        elif found:
            speedups = [own.speedup or 0.0 for _, own in found]
            mean = statistics.geometric_mean(speedups)
            title = SUITE_TITLES.get(suite, suite)
            text = f"{title}: geometric mean of {len(found)}, from {min(speedups):.2f}x to {max(speedups):.2f}x"
            items.append(f"<li><b>{mean:.2f}x</b> {escape(text)}</li>")
    return f"<ul class=facts>{''.join(items)}</ul>" if items else ""


def usual(rows: Sequence[Row]) -> Row | None:
    """Ours as a picture shows it: prepared, or else not; None if that has no speed-up."""
    shown = dict(charts.representatives(rows))
    own = shown.get("ours") or shown.get("ours, not prepared")
    return None if own is None or own.speedup is None else own


def one_fact(rows: Sequence[Row], own: Row) -> str:
    interval = own.interval
    sure = "" if interval is None else f" ({100 * LEVEL:.0f} % sure: {interval.low:.2f} to {interval.high:.2f})"
    noise = " The measurement cannot tell them apart." if own.within_noise else ""
    text = (
        f"{charts.case_title(rows)}: {tables.duration(rows[0].median_us or 0.0)} with {rows[0].candidate}, "
        f"{tables.duration(own.median_us or 0.0)} with repvgg_cuda{sure}.{noise}"
    )
    return f"<li><b>{own.speedup or 0.0:.2f}x</b> {escape(text)}</li>"


def image(figures: Figures, text: str) -> str:
    """A picture in four versions; the browser takes one."""
    data = {}
    for (theme, narrow), figure in figures.items():
        svg = charts.render(figure, "svg", dataclasses.replace(theme, background=None))
        data[theme, narrow] = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    sources = "".join(
        f'<source media="(prefers-color-scheme:{scheme}) and {width}" srcset="{data[theme, narrow]}">'
        for scheme, theme in (("dark", DARK), ("light", LIGHT))
        for width, narrow in ((f"(max-width:{NARROW_PX}px)", True), (f"(min-width:{NARROW_PX + 1}px)", False))
    )
    return f'<picture>{sources}<img alt="{escape(text, quote=True)}" src="{data[LIGHT, False]}"></picture>'


def every_row(run: Run) -> str:
    parts = []
    for rows in run.by_case().values():
        first = rows[0]
        cold = ", caches cold" if first.caches == "cold" else ""
        threads = f", {first.threads} threads" if first.threads > 1 else ""
        parts.append(
            f"<details><summary>{escape(f'{first.suite}: {first.case}{cold}{threads}')}</summary>"
            f"<div class=scroll>{rows_table(rows)}</div></details>"
        )
    return "".join(parts)


def rows_table(rows: Sequence[Row]) -> str:
    """The rows of one case as an HTML table."""
    headings = ("", "median", "p10-p90", "speed-up", f"{100 * LEVEL:.0f} % sure", "error", "of the limit", "")
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = []
    for row in rows:
        status = "" if row.status in ("ok", "refused") else " class=bad"
        cells = (
            [
                tables.duration(row.median_us),
                tables.spread_text(row),
                tables.speedup_text(row),
                tables.interval_text(row),
            ]
            if row.median_us is not None
            else [row.status, "", "", ""]
        )
        cells += [tables.error_text(row), tables.share_text(row)]
        noise = "the same again: this is the noise" if row.candidate.endswith(AGAIN) else ""
        note = f"<td class=note>{escape('; '.join(filter(None, (row.note, noise))))}</td>"
        columns = "".join(f"<td{status}>{escape(cell)}</td>" for cell in cells)
        kind = " class=ours" if row.own else ""
        body.append(f"<tr{kind}><td>{escape(row.candidate)}</td>{columns}{note}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def method(run: Run) -> str:
    clocks = sorted({row.clock for row in run.rows if row.clock})
    lines = [
        "Every output was compared with float64 before anything was timed; error is the largest difference, relative "
        "to the largest output. A wrong result would be a row without a time.",
        "All rows of a case ran in one process, once per round in random order, so what disturbs a round disturbs all. "
        "A speed-up is the median over the rounds of the ratio within a round.",
        f"An interval is {100 * LEVEL:.0f} % sure: the wider of a block bootstrap over rounds and of what a sign test "
        "leaves. The row that says (again) times the first one twice: its interval shows the noise.",
        f"{run.options.get('rounds', '?')} rounds; clock: {', '.join(clocks)}. The limit is that of a direct "
        "convolution at the measured peak and bandwidth below.",
    ]
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def machine(run: Run) -> str:
    values: dict[str, object] = {}
    if run.ceilings is not None:
        for name, rate in run.ceilings.gflops.items():
            values[f"peak, {name}"] = f"{rate:.0f} GFLOP/s ({run.ceilings.gflops_source})"
        for size, rate in run.ceilings.bandwidth:
            values[f"memory, {size / (1 << 20):.1f} MB"] = f"{rate:.0f} GB/s"
        for name in ("launch_us", "graph_launch_us"):
            value = getattr(run.ceilings, name)
            if value is not None:
                values[name] = f"{value:.2f}"
    values |= {key: value for key, value in run.environment.items() if value not in (None, {}, [])}
    values |= {f"option {key}": value for key, value in run.options.items()}
    return f"<dl>{''.join(f'<dt>{escape(str(k))}</dt><dd>{escape(flat(v))}</dd>' for k, v in values.items())}</dl>"


def flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {flat(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(flat, value)) or "none"
    return str(value)
