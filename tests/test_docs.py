# SPDX-License-Identifier: MIT
"""The users' pages: every snippet runs, section by section, with files such as its text speaks of."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm_models
import torch
import zoo_networks
from torch import Tensor

from repvgg_cuda import cli
from repvgg_cuda.models import create_model
from repvgg_cuda.zoo import ZOOS

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = ("zoo.md", "migration.md", "converted-model.md", "conversion.md")


class Snippet(NamedTuple):
    language: str
    code: str

    def missing(self) -> str | None:
        """A package that the snippet imports and that is not installed."""
        if self.language != "python":
            return None
        names = []
        for node in ast.walk(ast.parse(self.code)):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.append(node.module)
        roots = (name.partition(".")[0] for name in names)
        return next((root for root in roots if importlib.util.find_spec(root) is None), None)


def sections(page: str) -> dict[str, list[Snippet]]:
    """The snippets below each heading that has some."""
    found: dict[str, list[Snippet]] = {}
    for part in re.split(r"^## ", (DOCS / page).read_text(), flags=re.M):
        title, _, body = part.partition("\n")
        snippets = [Snippet(*match) for match in re.findall(r"```(\w+)\n(.*?)```", body, flags=re.S)]
        if snippets:
            found[title.lstrip("# ")] = snippets
    return found


SECTIONS = [(page, title) for page in PAGES for title in sections(page)]
#: Which snippets need what cannot be installed: code bases that are no packages.
NEEDS = {"YOLOv6": "yolov6", "YOLOv7": "models"}


def state_of(name: str) -> Callable[[], Any]:
    def make() -> dict[str, Tensor]:
        torch.manual_seed(0)
        return timm_models.randomised(zoo_networks.CASES[name].make()).state_dict()

    return make


#: The files that the pages speak of.
FILES: dict[str, Callable[[], Any]] = {
    "RepVGG-A0-train.pth": lambda: timm_models.randomised(create_model("RepVGG-A0")).state_dict(),
    "mmpretrain.pth": lambda: {"meta": {}, "state_dict": state_of("mmpretrain RepVGG")()},
    "mobileone.pth": state_of("Apple MobileOne"),
    "yolov6s.pth": state_of("YOLOv6"),
    "yolov7.pth": state_of("YOLOv7"),
    "yolov9.pth": state_of("Ultralytics"),
    "qarepvgg.pth": state_of("QARepVGG V2"),
    "repvit.pth": state_of("RepViT"),
}


def run_console(code: str) -> None:
    for line in code.splitlines():
        prompt, program, *arguments = shlex.split(line)
        assert (prompt, program) == ("$", "repvgg-cuda")
        assert cli.main(arguments) == 0, line


@pytest.mark.parametrize(("page", "title"), SECTIONS)
def test_snippets_run(page: str, title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippets = sections(page)[title]
    text = "".join(snippet.code for snippet in snippets)
    if "timm" in text:
        timm_models.import_timm()
    monkeypatch.chdir(tmp_path)
    for name, make in FILES.items():
        if name in text:
            torch.save(make(), name)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "snippet"}
    skipped = []
    for snippet in snippets:
        if (package := snippet.missing()) is not None:
            skipped.append(package)
        elif snippet.language == "console":
            run_console(snippet.code)
        else:
            exec(compile(snippet.code, f"{page}: {title}", "exec"), namespace)
    assert skipped == ([NEEDS[title]] if title in NEEDS else [])


@pytest.mark.parametrize("title", NEEDS)
def test_snippets_in_a_checkout(title: str) -> None:
    (snippet,) = (each for each in sections("zoo.md")[title] if each.missing() is not None)
    compile(snippet.code, title, "exec")
    pytest.skip(f"runs in a checkout of {title} alone: {NEEDS[title]} is no package that could be installed")


def test_every_zoo_is_on_the_page() -> None:
    """With its eps as the code has it."""
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| (1e-\d) \|", (DOCS / "zoo.md").read_text(), flags=re.M))
    assert {name: float(eps) for name, eps in rows.items()} == {zoo.name: zoo.eps for zoo in ZOOS.values()}
