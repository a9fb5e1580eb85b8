"""Entries' files in a local directory: `objects/ab/abcd...`, named by key.

A file appears under its name whole or not at all: it is written beside it, synchronised and renamed, and its directory
is synchronised too. What a kill leaves behind is a temporary file, which `sweep` removes.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_NAME, _FOLDER = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{2}")
_TEMPORARY = ".tmp"
# Without O_NONBLOCK opening a pipe that someone put in a file's place would wait for its other end.
_READ = getattr(os, "O_NONBLOCK", 0)
_CREATE = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)


def is_name(name: str) -> bool:
    """Whether a file of this name may be an entry's: a key in hexadecimal."""
    return _NAME.fullmatch(name) is not None


class LocalObjects:
    """Files below `root / "objects"`, by name (a key in hexadecimal); every method may raise `OSError`."""

    def __init__(self, root: Path):
        self.folder = root / "objects"

    def read(self, name: str, most: int) -> tuple[bytes, int] | None:
        """The first `most` bytes of a file, and the size of the whole; None where no such file is."""
        try:
            with open(self._path(name), "rb", opener=lambda path, flags: os.open(path, flags | _READ)) as file:
                found = os.fstat(file.fileno())
                return (file.read(min(most, found.st_size)), found.st_size) if stat.S_ISREG(found.st_mode) else None
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def write(self, name: str, data: bytes) -> None:
        """Store a file, in the place of one of this name."""
        target = self._path(name)
        try:
            write_file(target, data)
        except FileNotFoundError:
            self._make(target.parent)
            write_file(target, data)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._path(name))

    def list(self) -> Iterator[tuple[str, float]]:
        """Names of files, and when they were written (seconds since 1970)."""
        yield from ((path.name, written) for path, written in self._files() if is_name(path.name))

    def sweep(self, age: float) -> int:
        """Remove temporary files older than `age` seconds; returns how many."""
        old = [path for path, at in self._files() if path.suffix == _TEMPORARY and at < time.time() - age]
        for path in old:
            path.unlink(missing_ok=True)
        return len(old)

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _files(self) -> Iterator[tuple[Path, float]]:
        """Regular files of all folders and their times; what vanishes meanwhile or may not be read is passed over."""
        folders = []
        with suppress(OSError):
            folders = sorted(name for name in os.listdir(self.folder) if _FOLDER.fullmatch(name))
        for name in folders:
            found = []
            with suppress(OSError), os.scandir(self.folder / name) as entries:
                for entry in entries:
                    with suppress(OSError):
                        if entry.is_file(follow_symlinks=False):
                            found.append((Path(entry.path), entry.stat().st_mtime))
            yield from found

    def _make(self, folder: Path) -> None:
        os.makedirs(self.folder.parent, exist_ok=True)
        for made in (self.folder, folder):
            with suppress(FileExistsError):
                os.mkdir(made, 0o700)
                _synchronise(made.parent)


def write_file(target: Path, data: bytes) -> None:
    """Write a file, or replace one, at once and for good: whatever happens, there is the old one or the new one."""
    temporary = target.with_name(f".{secrets.token_hex(8)}{_TEMPORARY}")
    file = os.open(temporary, _CREATE, 0o600)
    try:
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _synchronise(target.parent)


def _synchronise(folder: Path) -> None:
    """Make names in a directory survive a loss of power, where directories can be opened (not on Windows)."""
    if os.name == "posix":
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
