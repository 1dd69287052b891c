"""The path of an artifact's object in a bucket: it reads as any cloudpathlib path, and refuses writes.

Written bytes would be lost (the built-in ``open`` writes to cloudpathlib's local copy), or would change the object
without the registry. Any thread.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import IO, Any, NoReturn

from cloudpathlib import S3Path

from lamfs.errors import InvalidArgument

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_handed: dict[str, str] = {}
"""Local copies that were given to programs, and their URLs."""
_guard = threading.Lock()
_watching = False


class ObjectPath(S3Path):
    """A path for reading only. Raises InvalidArgument for every method that writes."""

    def open(self, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:  # type: ignore[override]
        """As open(), for reading."""
        if set(mode) & set("wax+"):
            self._refuse()
        found: IO[Any] = super().open(mode, *args, **kwargs)
        return found

    def write_text(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        self._refuse()

    def write_bytes(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        self._refuse()

    def upload_from(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        self._refuse()

    def touch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        self._refuse()

    def __fspath__(self) -> str:
        local: str = super().__fspath__()
        # For programs that open it by other means than Python's.
        if os.path.isfile(local):
            os.chmod(local, 0o400)
        _watch(local, str(self))
        return local

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Path) and str(self) == str(other)

    def __hash__(self) -> int:
        return super().__hash__()

    def _refuse(self) -> NoReturn:
        raise InvalidArgument(_sentence(str(self)))


def _sentence(url: str) -> str:
    return (
        f"The object {url} is an artifact's and is not written to by its path; use artifact.replace(file).save(), or"
        " write the file in a mount."
    )


def _watch(local: str, url: str) -> None:
    """Refuse to open a local copy for writing from now on: the bytes would stay there (sys.addaudithook)."""
    global _watching
    with _guard:
        _handed[local] = url
        if not _watching:
            sys.addaudithook(_look)
            _watching = True


def _look(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _handed:
        path, _, flags = arguments
        if isinstance(path, str) and path in _handed and isinstance(flags, int) and flags & _WRITES:
            raise InvalidArgument(_sentence(_handed[path]))
