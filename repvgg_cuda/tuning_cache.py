# SPDX-License-Identifier: MIT
"""The file that keeps measured times, so that the next process chooses without measuring.

One JSON file: ``{"format": "repvgg_cuda tuning", "version": 1, "times": {KEY: {ALGORITHM: SECONDS}}}``. A key is text,
written by :mod:`repvgg_cuda.tuning`: all that a time depends on, so that a time of another GPU, driver, build or shape
is simply not found. The file is replaced as a whole, under a lock, after what others have written to it meanwhile has
been read: processes add to it side by side. What is not such a file is left as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from repvgg_cuda.files import write_text_atomically

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Which file to use. Empty: none, every process measures for itself.
VARIABLE = "REPVGG_CUDA_TUNING_CACHE"

#: Whether to choose by measurement; a path says in which file measured times are kept.
Tune = bool | str | os.PathLike[str]

FORMAT, VERSION = "repvgg_cuda tuning", 1

#: No call takes longer: a number above is none of ours.
MOST_SECONDS = 1e6

_warned: set[Path] = set()
_writing = threading.Lock()


class TuningCache:
    """Measured seconds by key and algorithm, in memory, and in a file if ``path`` says one."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._times: dict[str, Any] | None = None  # read when first asked

    def find(self, key: str) -> dict[str, float] | None:
        """The seconds of each algorithm; None where nothing (or nothing that makes sense) is known."""
        if self._times is None:
            self._times = {} if self.path is None else self._read() or {}
        found = self._times.get(key)
        return dict(found) if found is not None and _is_times(found) else None

    def store(self, key: str, seconds: Mapping[str, float]) -> None:
        """Adds to what is known, here and in the file. A file that cannot be written is a warning."""
        self._times = {**(self._times or {}), key: dict(seconds)}
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_name(f"{self.path.name}.lock")):
                times = self._read()
                if times is not None:
                    content = {"format": FORMAT, "version": VERSION, "times": {**times, key: dict(seconds)}}
                    write_text_atomically(self.path, json.dumps(content, indent=1, sort_keys=True) + "\n")
        except OSError as error:
            _warn(self.path, f"cannot write {self.path}: {error.strerror}; measured times are not kept")

    def _read(self) -> dict[str, Any] | None:
        """What the file holds, nothing if there is none; None if it is not ours to write."""
        assert self.path is not None
        try:
            content = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as error:
            _warn(self.path, f"cannot read {self.path}: {error.strerror}; measured times are not kept")
            return None
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            _warn(self.path, f"{self.path} is not a tuning cache and is left as it is; measured times are not kept")
            return None
        if content.get("version") != VERSION or not isinstance(content.get("times"), dict):
            found = content.get("version")
            _warn(
                self.path,
                f"{self.path} is a tuning cache of version {found!r}, this repvgg_cuda knows {VERSION}: it is left as "
                "it is; measured times are not kept",
            )
            return None
        return dict(content["times"])


def cache_for(tune: Tune) -> TuningCache:
    """In the file that ``tune`` names, else in :func:`default_path`."""
    return TuningCache(default_path() if isinstance(tune, bool) else Path(tune))


def default_path() -> Path | None:
    """The file of :data:`VARIABLE`, else ``repvgg_cuda/tuning.json`` where the system keeps a user's caches."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    try:
        return _user_cache() / "repvgg_cuda" / "tuning.json"
    except RuntimeError:  # there is no home
        return None


def _user_cache() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    named = Path(os.environ.get(variable, ""))
    return named if named.is_absolute() else Path.home() / ".cache"  # the XDG specification ignores relative paths


def _is_times(value: object) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(type(each) in (int, float) and 0 < each < MOST_SECONDS for each in value.values())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time: threads everywhere, processes where the system and the file system have locks."""
    with _writing, path.open("a") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        yield


def _warn(path: Path, text: str) -> None:
    """Once for each file."""
    if path not in _warned:
        _warned.add(path)
        remedy = f"delete it, or name another file with tune=PATH or {VARIABLE}"
        warnings.warn(f"prepare: {text}. To keep them, {remedy}", RuntimeWarning, stacklevel=2)
