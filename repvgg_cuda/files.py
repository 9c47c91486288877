# SPDX-License-Identifier: MIT
"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def require_writable(path: Path) -> None:
    """Raises OSError now if :func:`write_atomically` could not write ``path`` later, after minutes of timing."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; name a file in it")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no directory {path.absolute().parent}; create it first")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; choose another directory") from None


def write_text_atomically(path: Path, text: str) -> None:
    """As UTF-8, under a temporary name, then renames: ``path`` is never half a file."""
    write_atomically(path, text.encode())


def write_atomically(path: Path, content: bytes) -> None:
    """:func:`write_text_atomically`, of bytes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
