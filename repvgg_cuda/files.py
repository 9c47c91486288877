# SPDX-License-Identifier: MIT
"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path for a file that takes the place of ``path`` when the block ends well, and is gone when it does not.

    Of the same suffix, in the same folder: os.replace needs the same file system.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(6)}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # the name must not reach the disk before the contents
        os.replace(temporary, path)
    except OSError as error:  # name the file the user asked for, not the temporary one
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # a failing clean-up must not hide the first error
            temporary.unlink()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """:func:`atomic_path`, opened for writing."""
    with atomic_path(path) as temporary, open(temporary, "xb") as file:
        yield file


def write_atomically(path: Path, content: bytes) -> None:
    """``content`` as the file ``path``, through :func:`atomic_file`."""
    with atomic_file(path) as file:
        file.write(content)


def write_text_atomically(path: Path, text: str) -> None:
    """:func:`write_atomically`, of UTF-8."""
    write_atomically(path, text.encode())
