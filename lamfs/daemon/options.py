"""What a mount is asked for: MountOptions, and how ``-o name=value`` words become one. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from lamfs.errors import InvalidArgument


@dataclass(slots=True)
class MountOptions:
    """Everything a mount needs to know. Sizes in bytes, times in seconds.

    ``close``: what ``close()`` = 0 means: ``spool`` (bytes and intent are on the local disk) or ``storage`` (they are
    in storage and in the registry). ``fsync``: likewise. ``umask``, ``uid`` and ``gid`` override what is shown.
    """

    slug: str
    mountpoint: str
    read_only: bool = False
    allow_other: bool = False
    xattr: bool = False
    uid: int | None = None
    gid: int | None = None
    umask: int | None = None
    real_keys: bool = False
    close: Literal["spool", "storage"] = "spool"
    fsync: Literal["spool", "storage"] = "storage"
    cache_limit: int = 20 << 30
    timeout: float = 300.0
    uploads: int = 8
    foreground: bool = False
    debug: bool = False
    fuse: tuple[str, ...] = ()
    """Words handed to the kernel as they are (``noatime``, ``nodev``, ``nosuid``, ``noexec`` …)."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MountOptions:
        """Back from ``to_json``."""
        return cls(**{**data, "fuse": tuple(data.get("fuse", ()))})


KERNEL_WORDS = frozenset(
    {"noatime", "atime", "nodev", "dev", "nosuid", "suid", "noexec", "exec", "sync", "dirsync", "async", "nodiratime"}
)
SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """``4096``, ``512M``, ``20G`` as bytes. Raises InvalidArgument."""
    digits = text.lower().removesuffix("ib").removesuffix("b").rstrip("kmgt")
    unit = text.lower().removesuffix("ib").removesuffix("b")[len(digits) :]
    if not digits.isdigit() or unit not in SIZE_UNITS:
        raise InvalidArgument(f"'{text}' is not a size; write bytes, or a number with K, M, G or T such as '20G'.")
    return int(digits) * SIZE_UNITS[unit]


def apply_words(options: MountOptions, words: list[str]) -> None:
    """Apply ``-o`` words (already split at commas) to ``options``. Raises InvalidArgument naming the word."""
    for word in words:
        name, given, value = word.partition("=")
        if name in ("allow_other", "xattr", "real_keys", "debug") and not given:
            setattr(options, name, True)
        elif name == "ro" and not given:
            options.read_only = True
        elif name == "rw" and not given:
            options.read_only = False
        elif name in ("uid", "gid") and value.isdigit():
            setattr(options, name, int(value))
        elif name == "umask" and _is_octal(value):
            options.umask = int(value, 8)
        elif name in ("close", "fsync") and value in ("spool", "storage"):
            setattr(options, name, value)
        elif name == "cache_limit":
            options.cache_limit = parse_size(value)
        elif name == "timeout" and value.replace(".", "", 1).isdigit():
            options.timeout = float(value)
        elif name == "uploads" and value.isdigit() and 1 <= int(value) <= 64:
            options.uploads = int(value)
        elif name in KERNEL_WORDS and not given:
            options.fuse = (*options.fuse, name)
        else:
            raise InvalidArgument(f"'{word}' is not a mount option that lamfs knows; 'lamfs mount --help' lists them.")


def _is_octal(text: str) -> bool:
    return bool(text) and all(digit in "01234567" for digit in text) and int(text, 8) <= 0o777
