"""Entries' files wherever fsspec reaches: `s3://`, `gs://`, `hf://`, `sftp://`, `memory://` and others.

Where the filesystem renames by itself, a file is written beside its name and moved. Others, object stores above all,
are written to directly: most make a file appear whole, and a torn one fails its checksum, which is a miss.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import fsspec
from fsspec.core import url_to_fs

from ..errors import ConfigError
from .objects import is_name


@contextmanager
def _as_os_error():
    """Filesystems raise what their libraries raise; here every failure is an `OSError`."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class RemoteObjects:
    """As `LocalObjects`, below a URL.

    Raises:
        ConfigError: fsspec does not know the protocol, or its library is not installed.
    """

    def __init__(self, url: str):
        try:
            self._files, root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"store {url!r}: {error}; give a directory or a URL that fsspec can open") from error
        self._root = f"{root.rstrip('/')}/objects"
        self._renames = type(self._files).mv is not fsspec.AbstractFileSystem.mv

    def read(self, name: str, most: int) -> tuple[bytes, int] | None:
        with _as_os_error():
            try:
                data = self._files.cat_file(self._path(name), 0, most)
            except (FileNotFoundError, IsADirectoryError):
                return None
            return data, len(data) if len(data) < most else self._files.size(self._path(name))

    def write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with _as_os_error():
            if not (self._renames and self._moved(path, data)):
                self._pipe(path, data)

    def remove(self, name: str) -> None:
        with _as_os_error(), suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def list(self) -> Iterator[tuple[str, float]]:
        """Names of files; a time of 0, for not every filesystem tells one."""
        with _as_os_error():
            self._files.invalidate_cache()
            paths = self._files.find(self._root)
        yield from ((name, 0.0) for name in (path.rsplit("/", 1)[-1] for path in paths) if is_name(name))

    def sweep(self, age: float) -> int:
        """Nothing: without times, a temporary file that was left behind looks like one being written."""
        return 0

    def _path(self, name: str) -> str:
        return f"{self._root}/{name[:2]}/{name}"

    def _moved(self, path: str, data: bytes) -> bool:
        """Write beside the name and rename; False where the filesystem refuses, say to replace a file."""
        temporary = f"{path.rsplit('/', 1)[0]}/.{secrets.token_hex(8)}.tmp"
        try:
            self._pipe(temporary, data)
            self._files.mv(temporary, path)
            return True
        except Exception:
            with suppress(Exception):
                self._files.rm_file(temporary)
            return False

    def _pipe(self, path: str, data: bytes) -> None:
        try:
            self._files.pipe_file(path, data)
        except FileNotFoundError:
            self._files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            self._files.pipe_file(path, data)
