"""Options of a mount: MountOptions, and how ``-o name=value`` words set them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lamfs.errors import InvalidArgument
from lamfs.sizes import parse_size


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
    public_stats: bool = False
    xattr: bool = False
    uid: int | None = None
    gid: int | None = None
    umask: int | None = None
    real_keys: bool = False
    close: Literal["spool", "storage"] = "spool"
    fsync: Literal["spool", "storage"] = "storage"
    cache_limit: int = 20 << 30
    spool_limit: int = 32 << 30
    spool_free: int | None = None
    cache_free: int | None = None
    timeout: float = 60.0
    uploads: int = 8
    foreground: bool = False
    adopt: bool = False
    """The files in the mount point's own folder are moved into the mount later: it need not be empty."""
    debug: bool = False
    fuse: tuple[str, ...] = ()
    """Words for the kernel, passed unchanged (``noatime``, ``nodev``, ``nosuid``, ``noexec`` …)."""


OPPOSITES = {"noatime": "atime", "noexec": "exec", "sync": "async"}
KERNEL_WORDS = frozenset({*OPPOSITES, *OPPOSITES.values(), "dirsync", "nodev", "nosuid"})
"""Words that libfuse 3 and fusermount3 accept and apply. A mount is always nodev and nosuid."""
FLAGS = ("allow_other", "public_stats", "xattr", "real_keys", "debug")
SIZES = ("cache_limit", "cache_free", "spool_limit", "spool_free")
MAX_ID = (1 << 32) - 2
"""The largest uid and gid; 2**32-1 means none."""
NEEDS = {
    "uid": f"a number from 0 to {MAX_ID}",
    "gid": f"a number from 0 to {MAX_ID}",
    "umask": "an octal number such as 022",
    "close": "'spool' or 'storage'",
    "fsync": "'spool' or 'storage'",
    "cache_limit": "a size such as 512M or 20G",
    "spool_limit": "a size such as 512M or 32G",
    "spool_free": "a size such as 512M or 1G",
    "cache_free": "a size such as 512M or 20G",
    "timeout": "a number of seconds above 0",
    "uploads": "a number from 1 to 64",
}


def apply_words(options: MountOptions, words: list[str]) -> None:
    """Apply ``-o`` words (already split at commas) to ``options``. Raises InvalidArgument naming the word."""
    for word in words:
        name, given, value = word.partition("=")
        if name in FLAGS and not given:
            setattr(options, name, True)
        elif name == "ro" and not given:
            options.read_only = True
        elif name == "rw" and not given:
            options.read_only = False
        elif name in ("uid", "gid") and _is_number(value) and int(value) <= MAX_ID:
            setattr(options, name, int(value))
        elif name == "umask" and _is_octal(value):
            options.umask = int(value, 8)
        elif name in ("close", "fsync") and value in ("spool", "storage"):
            setattr(options, name, value)
        elif name in SIZES and value:
            try:
                setattr(options, name, parse_size(value))
            except InvalidArgument:
                raise _needs(name, word) from None
        elif name == "timeout" and _is_number(value.replace(".", "", 1)) and float(value) > 0:
            options.timeout = float(value)
        elif name == "uploads" and _is_number(value) and 1 <= int(value) <= 64:
            options.uploads = int(value)
        elif name in KERNEL_WORDS and not given:
            opposites = {OPPOSITES.get(name), *(word for word, other in OPPOSITES.items() if other == name)}
            options.fuse = (*(word for word in options.fuse if word not in opposites), name)
        elif name in NEEDS:
            raise _needs(name, word)
        elif given and name in {*KERNEL_WORDS, *FLAGS, "ro", "rw"}:
            raise InvalidArgument(f"The mount option '{name}' takes no value, but '{word}' was given.")
        else:
            raise InvalidArgument(f"'{word}' is not a mount option that lamfs knows; 'lamfs mount --help' lists them.")


def _needs(name: str, word: str) -> InvalidArgument:
    return InvalidArgument(f"The mount option '{name}' needs {NEEDS[name]}, but '{word}' was given.")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _is_octal(text: str) -> bool:
    return bool(text) and all(digit in "01234567" for digit in text) and int(text, 8) <= 0o777
