# SPDX-License-Identifier: MIT
"""What several subcommands share: a spinner, and names for errors."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from repvgg_cuda.branches import require


def positive(text: str) -> int:
    """An argument that must be a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's name before an error about its contents."""
    try:
        yield
    except RuntimeError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise RuntimeError(f"{path}: {error}") from error


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A spinner on stderr with a text that the yielded function changes; nothing where stderr is not a terminal."""
    with Console(stderr=True).status("") as status:
        yield lambda text: status.update(escape(text))


def require_target(source: Path, target: Path, force: bool) -> None:
    """Refuses a target that is the source, exists, or could not be written, before any work is done."""
    same = target.exists() and source.exists() and target.samefile(source)
    require(not same, f"{target}: is IN itself, and a trained checkpoint is never overwritten; give OUT another name")
    require(force or not target.exists(), f"{target}: already exists; give --force to replace it, or another name")
    require(target.parent.is_dir(), f"{target}: cannot be written, {target.parent} is not a directory; create it first")
