"""Rules for keys, names, suffixes and object keys. Pure functions.

Sources: LaminDB 0.72 (``extract_suffix_from_path``, ``auto_storage_key_from_artifact``) for suffixes and object
keys; POSIX.1-2024 ``limits.h`` for NAME_MAX and PATH_MAX; S3 documentation ("Creating object key names") for 1024.
"""

from __future__ import annotations

import errno
import functools
import re
import secrets
from pathlib import PurePosixPath

from lamfs.errors import FsError, InvalidName
from lamfs.model import AUTO_KEY_PREFIX

NAME_MAX = 255
PATH_MAX = 4096
REAL_KEY_MAX = 1024
SUFFIX_MAX = 64
_SPOOL_NAME = re.compile("[0-9a-f]{1,16}-[0-9a-f]{12}")
LOCK_FOLDER = f"{AUTO_KEY_PREFIX}_exclusion/"
"""Prefix of the keys of locks, and of the keys for which ``is_probe`` is true."""
PROBE_PREFIX = f"{LOCK_FOLDER}probe-"
"""Prefix of the keys of objects that test what the storage can do."""
_PROBE = re.compile(rf"{re.escape(LOCK_FOLDER)}(probe-[^/]+|[0-9a-f]{{32}}\.([0-9a-f]{{8}}|[0-9a-z-]+))")
"""Older versions use 8 digits."""
_REGISTRY_KEY = re.compile(r"[0-9a-f]{32}\.lndb")
OWN_OBJECT = re.compile(r"\.lamindb/[0-9A-Za-z]{20}(\..*)?", re.DOTALL)
"""Object keys that lamfs gives artifacts without a real key."""

FORMAT_SUFFIXES = frozenset(
    {
        ".fasta",
        ".fastq",
        ".jpg",
        ".mtx",
        ".obo",
        ".pdf",
        ".png",
        ".tar",
        ".tiff",
        ".txt",
        ".tsv",
        ".zip",
        ".xml",
        ".qs",
        ".rds",
        ".h5ad",
        ".parquet",
        ".csv",
        ".fcs",
        ".xslx",
        ".xlsx",
        ".zarr",
        ".json",
        ".bam",
        ".sam",
        ".cram",
        ".vcf",
        ".bcf",
        ".bed",
        ".gff",
        ".gtf",
        ".fa",
        ".fq",
        ".mzml",
        ".h5",
        ".loom",
        ".h5mu",
        ".nii",
        ".yaml",
        ".html",
        ".md",
    }
)
"""If one of these is followed by another suffix, both count as one (``.csv.gz``): LaminDB's list, and the usual formats
of the field."""

COMPOSITE_SUFFIXES = (".anndata.zarr", ".spatialdata.zarr", ".vitessce.json")


@functools.lru_cache(maxsize=1024)
def suffix_of(name: str) -> str:
    """The artifact suffix of a path or key, with its dot, or ``""``.

    One suffix: as it is, unless it is all digits (``v1.2`` has none). Several: a composite suffix; else the last two,
    if the second-last is a known format; else the last. As in LaminDB 0.72. Anything longer than 64 bytes is not a
    suffix, because every storage must be able to keep the name ``{uid}{suffix}``.
    """
    suffix = _suffix(name)
    return suffix if len(suffix.encode("utf-8", "surrogateescape")) <= SUFFIX_MAX else ""


def _suffix(name: str) -> str:
    suffixes = PurePosixPath(name).suffixes
    if not suffixes:
        return ""
    if len(suffixes) > 1:
        total = "".join(suffixes)
        for composite in COMPOSITE_SUFFIXES:
            if total.endswith(composite):
                return composite
        if suffixes[-2] in FORMAT_SUFFIXES:
            return suffixes[-2] + suffixes[-1]
    last = suffixes[-1]
    return "" if last[1:].isdigit() else last


def key_with_suffix(key: str, old_suffix: str, new_suffix: str) -> str:
    """The key after a replace by a file with another suffix: ``a.tar.gz`` replaced by a csv file is ``a.csv``."""
    stem = key[: -len(old_suffix)] if old_suffix and key.endswith(old_suffix) else key
    return stem + new_suffix


def object_key_for(uid: str, suffix: str, key: str | None, key_is_virtual: bool) -> str:
    """Where the object of an artifact belongs: ``.lamindb/{uid}{suffix}``, or the key itself if it is real.

    A real key of more than 1024 bytes (which renaming a directory can make) cannot name an S3 object. A real key that
    is the object key of a registry would overwrite that registry.
    """
    if key is None or key_is_virtual or len(key.encode()) > REAL_KEY_MAX or is_registry_key(key):
        return f"{AUTO_KEY_PREFIX}{uid}{suffix}"
    return key


def revision_key(uid: str, suffix: str, number: int) -> str:
    """Object key of revision ``number`` of an artifact, if ``.lamindb/{uid}{suffix}`` was used before. See
    docs/decisions/one-object-per-revision.md."""
    return f"{AUTO_KEY_PREFIX}{uid}.{number}{suffix}"


def is_private(object_key: str) -> bool:
    """Whether only lamfs stores objects with such keys."""
    return object_key.startswith(AUTO_KEY_PREFIX)


def is_in_place(object_key: str, uid: str, suffix: str, key: str | None, key_is_virtual: bool) -> bool:
    """Whether the object of an artifact is where its key and suffix require: at its real key, else below ``.lamindb/``
    under the name of any of its revisions."""
    place = object_key_for(uid, suffix, key, key_is_virtual)
    if object_key == place or not is_private(place):
        return object_key == place
    name = object_key.removeprefix(f"{AUTO_KEY_PREFIX}{uid}.")
    return name != object_key and name.endswith(suffix) and name[: len(name) - len(suffix)].isdecimal()


def is_registry_key(object_key: str) -> bool:
    """Whether an object key is that of a registry: ``{instance id hex}.lndb``."""
    return _REGISTRY_KEY.fullmatch(object_key) is not None


def is_internal(object_key: str) -> bool:
    """Whether an object is not an artifact's but lamfs's own: a lock, a kept registry, a spool file or temporary
    file."""
    return object_key.startswith(f"{AUTO_KEY_PREFIX}_")


def is_probe(object_key: str) -> bool:
    """Whether an object exists only for a moment, to ask the storage what time it is or what it can do."""
    return _PROBE.fullmatch(object_key) is not None


def check_name(name: bytes) -> str:
    """Decode and check one path component from the kernel.

    Raises FsError with EILSEQ (not UTF-8), ENAMETOOLONG (over 255 bytes) or EINVAL (empty, ``.``, ``..``, ``/``, NUL).
    """
    if len(name) > NAME_MAX:
        raise FsError(errno.ENAMETOOLONG)
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        raise FsError(errno.EILSEQ) from None
    if text in ("", ".", "..") or "/" in text or "\0" in text:
        raise FsError(errno.EINVAL)
    return text


def check_key(key: str, *, real: bool = False) -> str:
    """Check a key that a user gave (API or CLI), and return it without duplicate slashes.

    Raises InvalidName, a ValueError that names the broken rule.
    """
    try:
        raw = key.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidName(f"The key {key!r} is not valid UTF-8; rename it first.", errno=errno.EILSEQ) from None
    if "\0" in key:
        raise InvalidName(f"The key {key!r} contains a NUL byte; leave it out.")
    parts = [part for part in key.split("/") if part != ""]
    if not parts:
        raise InvalidName("The key is empty; give it a name such as 'folder/file.csv'.")
    if any(part in (".", "..") for part in parts):
        raise InvalidName(f"The key '{key}' contains '.' or '..'; give the full key from the root.")
    if parts[0] in (AUTO_KEY_PREFIX.rstrip("/"), ".lamfs"):
        raise InvalidName(f"The key '{key}' starts with '{parts[0]}/', which is reserved; choose another key.")
    if key.startswith("/"):
        raise InvalidName(
            f"The key '{key}' begins with '/', but a key is a path in the registry; give '{'/'.join(parts)}' if that is"
            " meant."
        )
    if key.endswith("/"):
        raise InvalidName(f"The key '{key}' ends with '/', so it names no file; give the key of a file.")
    if any(len(part.encode()) > NAME_MAX for part in parts):
        raise InvalidName(
            f"A part of the key '{key[:80]}…' is longer than {NAME_MAX} bytes; shorten it.",
            errno=errno.ENAMETOOLONG,
        )
    if len(raw) > PATH_MAX:
        raise InvalidName(
            f"The key '{key[:80]}…' is longer than {PATH_MAX} bytes; shorten it.", errno=errno.ENAMETOOLONG
        )
    if real and len(raw) > REAL_KEY_MAX:
        raise InvalidName(
            f"The key '{key[:80]}…' is longer than {REAL_KEY_MAX} bytes, the limit of an S3 object key; shorten it,"
            " or use a virtual key.",
            errno=errno.ENAMETOOLONG,
        )
    return "/".join(parts)


def into(key: str, name: str) -> str:
    """The key of a file that is to be stored at ``key``. As with cp(1), ``folder/`` means ``name`` in that folder."""
    return f"{key}{name}" if key.endswith("/") and key.strip("/") else key


def root_path(key: str) -> tuple[str, str]:
    """Split a key into parent key (``""`` for the root) and name."""
    parent, _, name = key.rpartition("/")
    return parent, name


def is_glob(text: str) -> bool:
    """Whether a text has characters with a meaning in patterns."""
    return any(char in text for char in "*?[")


def glob_pattern(glob: str) -> re.Pattern[str]:
    """A pattern over keys, as in the shell (glob(7), bash's globstar), for ``fullmatch``.

    ``*`` is any text without ``/``, ``?`` is one character, ``[ab]``, ``[a-z]``, ``[!a]`` is one of (or not of) these.
    ``**`` as a whole part is any number of parts; as the last part it is everything below.
    """
    parts = [part for part in glob.split("/") if part]
    text = ""
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part == "**":
            text += ".+" if last else "(?:[^/]+/)*"
        else:
            text += _part_pattern(part) + ("" if last else "/")
    try:
        return re.compile(text, re.DOTALL)
    except re.error as error:
        raise InvalidName(f"'{glob}' is no pattern: {error}.") from None


def _part_pattern(part: str) -> str:
    found, at = "", 0
    while at < len(part):
        char = part[at]
        end = part.find("]", at + 3 if part[at + 1 : at + 2] in ("!", "^") else at + 2) if char == "[" else -1
        if char == "*":
            found += "[^/]*" if not found.endswith("[^/]*") else ""
        elif char == "?":
            found += "[^/]"
        elif end > 0:
            negated = part[at + 1] in "!^"
            inside = part[at + 1 + negated : end].replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
            found += f"(?!/)[{'^' if negated else ''}{inside}]"
            at = end
        else:
            found += re.escape(char)
        at += 1
    return found


def conflict_name(name: str, what: str) -> str:
    """``a (conflict <what>).csv`` for ``a.csv``. See name_with."""
    return name_with(name, f"conflict {what}")


def name_with(name: str, note: str) -> str:
    """``a (<note>).csv`` for ``a.csv``. The suffix stays, and the name has at most 255 bytes (NAME_MAX)."""
    suffix = suffix_of(name)
    mark = f" ({note}){suffix}"
    stem = name.removesuffix(suffix).encode()[: 255 - len(mark.encode())]
    return stem.decode(errors="ignore") + mark


def spool_token() -> str:
    """The random part of a spool file's name."""
    return secrets.token_hex(6)


def spool_name(ino: int, token: str | None = None) -> str:
    """A new name for a spool file of an inode. ``token``: of spool_token; None: a new one."""
    return f"{ino:x}-{token or spool_token()}"


def is_spool_name(text: object) -> bool:
    """Whether ``spool_name`` can make this name."""
    return isinstance(text, str) and _SPOOL_NAME.fullmatch(text) is not None


DRAFT = ".new"
"""Ends the name of a spool file while it is being made."""


def is_draft_name(text: str) -> bool:
    """Whether it is the name of a spool file that is still being made."""
    return text.endswith(DRAFT) and is_spool_name(text.removesuffix(DRAFT))


def spool_inode(name: str) -> int:
    """The inode number in the name of a spool file: the inode that it was made for."""
    return int(check_spool_name(name).partition("-")[0], 16)


def check_spool_name(text: object) -> str:
    """Returns a name that ``spool_name`` can make. Raises InvalidName for anything else that a registry may contain."""
    if isinstance(text, str) and _SPOOL_NAME.fullmatch(text) is not None:
        return text
    raise InvalidName(
        f"{str(text)[:80]!r} is not the name of a spool file, so no file of that name is touched; the journal of this"
        " registry is damaged, or was not written by lamfs: see 'lamfs fsck'."
    )
