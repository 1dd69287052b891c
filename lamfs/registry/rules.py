"""What each column of a registry may contain, as SQL: for registries that come from storage. Pure.

SQLite keeps any type in any column, and text that is not UTF-8. A rule is an expression over one column that is 1 or 0,
never NULL, for any value of any type. Most rules run inside SQLite. The connection has to provide one function,
``lamfs_utf8`` (see ``is_utf8``); it is called only for text that is not plain ASCII.
"""

from __future__ import annotations

import stat
from typing import NamedTuple

from lamfs.keys import NAME_MAX, REAL_KEY_MAX, SUFFIX_MAX
from lamfs.model import (
    ARTIFACT_UID_LEN,
    BLOCK_SIZE,
    DESCRIPTION_XATTR,
    LEAF_HASH,
    LEAF_SIZE,
    RUN_UID_LEN,
    STORAGE_UID_LEN,
    TRANSFORM_UID_LEN,
    USER_UID_LEN,
)
from lamfs.registry.db import WORK_SPLIT
from lamfs.registry.workdb import FIRST_OWED

INO_MAX = (1 << 47) - 1
"""Highest inode number. Mounts give the numbers above it to later revisions (fs/nodes.py)."""
INO_GIVEN = INO_MAX // 2
"""lamfs itself never gets near this number. A registry with higher ones tries to use up all inode numbers."""
ROW_MAX = 1 << 53
"""Highest id of any row: leaves AUTOINCREMENT enough numbers forever."""
TEXT_MAX = 1 << 20
"""Most bytes of a description, of a key (a tree may be deeper than PATH_MAX), and of text without its own rule."""
REVISIONS = 13
"""First version of the schema in which a revision has its own row."""
RETAINED = "retained:"
"""Prefix of keys of the meta table, before an object key: somebody wanted the object to stay without an artifact."""
_INT_MAX = (1 << 63) - 1
_OWNER_MAX = (1 << 32) - 1


class Column(NamedTuple):
    """``rule``: true for a valid value. ``instead``: SQL that replaces an invalid one; None: the row is left out."""

    rule: str
    instead: str | None = None


def is_utf8(value: object) -> bool:
    """Whether bytes are UTF-8 text without NUL. This is ``lamfs_utf8``."""
    if not isinstance(value, bytes) or b"\0" in value:
        return False
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


# -- kinds of values; {0} is the column -------------------------------------------------------------------------------


def _text(least: int, most: int) -> str:
    return (
        f"(typeof({{0}})='text' AND length(CAST({{0}} AS BLOB)) BETWEEN {least} AND {most}"
        " AND CASE WHEN {0} NOT GLOB '*[^ -~]*' AND instr(CAST({0} AS BLOB), x'00')=0 THEN 1"
        " ELSE lamfs_utf8(CAST({0} AS BLOB)) END)"
    )


def _ascii(characters: str, least: int, most: int) -> str:
    """Text of these characters, written as inside GLOB's brackets."""
    return (
        f"(typeof({{0}})='text' AND length(CAST({{0}} AS BLOB)) BETWEEN {least} AND {most}"
        f" AND instr(CAST({{0}} AS BLOB), x'00')=0 AND {{0}} NOT GLOB '*[^{characters}]*')"
    )


def _integer(least: int, most: int) -> str:
    return f"(typeof({{0}})='integer' AND {{0}} BETWEEN {least} AND {most})"


def _blob(least: int, most: int) -> str:
    return f"(typeof({{0}})='blob' AND length({{0}}) BETWEEN {least} AND {most})"


def _or_null(rule: str) -> str:
    return f"({{0}} IS NULL OR {rule})"


def _uid(length: int) -> str:
    return _ascii("0-9A-Za-z", length, length)


def _path(rule: str, *forbidden: str) -> str:
    parts = " AND ".join(f"instr('/'||{{0}}||'/', '{part}')=0" for part in forbidden)
    return f"({rule} AND {parts})"


_ID = _integer(1, ROW_MAX)
_OWED_ID = _integer(FIRST_OWED + 1, ROW_MAX)
_INO = _integer(1, INO_MAX)
_TIME = _integer(-_INT_MAX, _INT_MAX)
_HANDLE = f"({_ascii('0-9A-Za-z._-', 1, 64)} AND {{0}} GLOB '[0-9A-Za-z]*')"
_NAME = f"({_path(_text(1, NAME_MAX), '/./', '/../')} AND instr({{0}}, '/')=0)"
_KEY = (
    f"({_path(_text(1, TEXT_MAX), '//', '/./', '/../')} AND {{0}} NOT IN ('.lamindb', '.lamfs')"
    " AND {0} NOT GLOB '.lamindb/*' AND {0} NOT GLOB '.lamfs/*')"
)
_OBJECT_KEY = (
    f"({_path(_text(1, REAL_KEY_MAX), '/../')} AND {{0}} NOT GLOB '/*' AND {{0}} NOT GLOB '.lamindb/_*'"
    f" AND {{0}} NOT GLOB '{'[0-9a-f]' * 32}.lndb')"
)
"""An object of an artifact: below the root, but not the registry, the lock, a spool file or a temporary file."""
_SUFFIX = f"({_text(0, SUFFIX_MAX)} AND instr({{0}}, '/')=0)"
_ETAG = _ascii("!#-~", 0, 1024)
_HASH = _ascii("0-9A-Za-z_-", 1, 64)
_KINDS = ", ".join(
    str(kind)
    for kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)
)
_MODE = f"({_integer(0, 0o177777)} AND {{0}} & {0o170000} IN ({_KINDS}))"
_BLOCKS = f"(typeof(blocks)='blob' AND length(blocks)=32*((size+{BLOCK_SIZE - 1})/{BLOCK_SIZE}))"
_XATTR = f"({_blob(0, 1 << 16)} AND CASE name WHEN '{DESCRIPTION_XATTR}' THEN lamfs_utf8({{0}}) ELSE 1 END)"
_USED = (
    f"CASE WHEN {_text(2, TEXT_MAX)} THEN CASE WHEN json_valid({{0}}) THEN CASE WHEN json_type({{0}})='array'"
    " THEN NOT EXISTS (SELECT 1 FROM json_each({0}) WHERE type<>'text') END END END"
)
_LEAVES = 8 + BLOCK_SIZE // LEAF_SIZE * LEAF_HASH
_PAYLOAD = (
    f"CASE WHEN {_ascii(' -~', 2, 4096)} AND {{0}} GLOB '{{{{*' AND instr(substr({{0}}, 2), '{{{{')=0"
    " AND instr({0}, '[')=0 AND instr({0}, '\\')=0 THEN CASE WHEN json_valid({0})"
    " THEN op<>'abort' OR coalesce(json_type({0}, '$.upload_id'), 'null') IN ('text', 'null') END END"
)
"""A flat JSON object without escapes. A ``held`` delete keeps the payload of its former put, which nobody reads."""

RETAINED_KEY = (
    f"({_text(1, len(RETAINED) + REAL_KEY_MAX)} AND substr({{0}}, 1, {len(RETAINED)})='{RETAINED}'"
    f" AND {_OBJECT_KEY.format(f'substr({{0}}, {len(RETAINED) + 1})')})"
)
"""For a key of the meta table that begins with RETAINED."""


# -- tables -----------------------------------------------------------------------------------------------------------

_REFERENCE = Column(_or_null(_ID), "NULL")
_CONTENT = {
    "size": Column(_integer(0, _INT_MAX - BLOCK_SIZE)), "hash": Column(_HASH),
    "hash_type": Column("({0} IN ('md5', 'sha1-fl', 'md5-d'))"), "blocks": Column(_BLOCKS),
    "object_key": Column(_OBJECT_KEY), "etag": Column(_ETAG), "head": Column(_or_null(_blob(20, 20)), "NULL"),
    "number": Column(_integer(1, ROW_MAX), "1"),
}  # fmt: skip

_OWED = {
    "uid": Column(f"CASE op WHEN 'move' THEN {_uid(ARTIFACT_UID_LEN)} ELSE {_or_null(_uid(ARTIFACT_UID_LEN))} END"),
    "object_key": Column(f"CASE op WHEN 'move' THEN {{0}} IS NULL ELSE {_OBJECT_KEY} END"),
    "attempts": Column(_integer(0, ROW_MAX), "0"), "error": Column(_or_null(_text(0, TEXT_MAX)), "NULL"),
    "next_at": Column(_TIME, "0"), "created_at": Column(_TIME, "0"),
    "owner": Column(_or_null(_ascii("!-~", 0, 256)), "NULL"),
    "payload": Column(_PAYLOAD, "'{}'"),
}  # fmt: skip

TABLES: dict[str, dict[str, Column]] = {
    "user": {
        "id": Column(_ID), "uid": Column(_uid(USER_UID_LEN)), "handle": Column(_HANDLE),
        "email": Column(_or_null(_text(0, 1024)), "NULL"), "name": Column(_or_null(_text(0, 1024)), "NULL"),
        "created_at": Column(_TIME, "0"),
    },
    "storage": {
        "id": Column(_ID), "uid": Column(_uid(STORAGE_UID_LEN)), "uuid": Column(_ascii("0-9a-f", 32, 32)),
        "root": Column(_text(1, 4096)), "type": Column("({0} IN ('local', 's3'))"),
        "region": Column(_or_null(_ascii("0-9A-Za-z-", 0, 64)), "NULL"), "created_at": Column(_TIME, "0"),
    },
    "transform": {
        "id": Column(_ID), "uid": Column(_uid(TRANSFORM_UID_LEN)), "name": Column(_text(0, TEXT_MAX), "''"),
        "key": Column(_or_null(_text(0, TEXT_MAX)), "NULL"), "type": Column(_text(0, 256), "'script'"),
        "created_by_id": _REFERENCE, "created_at": Column(_TIME, "0"), "updated_at": Column(_TIME, "0"),
    },
    "run": {
        "id": Column(_ID), "uid": Column(_uid(RUN_UID_LEN)), "transform_id": Column(_ID),
        "created_by_id": _REFERENCE, "started_at": Column(_TIME, "0"),
        "finished_at": Column(_or_null(_TIME), "NULL"),
    },
    "inode": {
        "ino": Column(_INO), "mode": Column(_MODE),
        "uid": Column(_integer(0, _OWNER_MAX), "(SELECT uid FROM temp.me)"),
        "gid": Column(_integer(0, _OWNER_MAX), "(SELECT gid FROM temp.me)"),
        "nlink": Column(_integer(0, ROW_MAX), "0"), "size": Column(_integer(0, _INT_MAX), "0"),
        "atime_ns": Column(_TIME, "0"), "mtime_ns": Column(_TIME, "0"), "ctime_ns": Column(_TIME, "0"),
        "rdev": Column(_integer(0, _OWNER_MAX), "0"), "revision": Column(_integer(0, ROW_MAX), "0"),
        "blocks": Column(_or_null(_integer(0, _INT_MAX)), "NULL"),
        "pending": Column(_or_null(_ascii("0-9A-Za-z:-", 1, 64)), "NULL"),
    },
    "dentry": {"id": Column(_ID), "parent": Column(_INO), "name": Column(_NAME), "ino": Column(_INO)},
    "symlink": {"ino": Column(_INO), "target": Column(f"({_blob(1, 4095)} AND instr({{0}}, x'00')=0)")},
    "xattr": {"ino": Column(_INO), "name": Column(_text(1, 255)), "value": Column(_XATTR)},
    "revision": {
        "id": Column(_ID), "artifact_id": Column(_ID), **_CONTENT,
        "created_at": Column(_TIME, "0"), "created_by_id": _REFERENCE, "run_id": _REFERENCE,
    },
    "artifact": {
        "id": Column(_ID), "uid": Column(_uid(ARTIFACT_UID_LEN)), "storage_id": Column(_ID),
        "key": Column(_or_null(_KEY), "NULL"), "suffix": Column(_SUFFIX, "''"),
        "description": Column(_or_null(_text(0, TEXT_MAX)), "NULL"),
        "accessor": Column(_or_null(_text(0, 256)), "NULL"),
        "visibility": Column(_integer(-1, 1), "1"), "key_is_virtual": Column(_integer(0, 1), "1"),
        "created_by_id": _REFERENCE, "run_id": _REFERENCE, "transform_id": _REFERENCE,
        "created_at": Column(_TIME, "0"), "updated_at": Column(_TIME, "0"), "ino": Column(_INO, "-id"),
        "revision_id": Column(_ID), "used": Column(_or_null(_USED), "NULL"),
    },
    "leaf": {"artifact_id": Column(_ID), "block": Column(_integer(0, ROW_MAX)), "hashes": Column(_blob(8, _LEAVES))},
    "journal": {
        "id": Column(_ID), "op": Column("({0} IN ('move', 'delete'))"),
        "state": Column("({0} IN ('ready', 'held'))", "'ready'"), "ino": Column("({0} IS NULL)", "NULL"),
        "src": Column("({0} IS NULL)", "NULL"), "gen": Column(_integer(0, ROW_MAX), "0"),
    } | _OWED,
    "owed": {"id": Column(_OWED_ID), "op": Column("({0} IN ('move', 'delete'))")} | _OWED,
    "rekey": {"id": Column(_ID), "old": Column(_KEY), "new": Column(_KEY)},
}  # fmt: skip
"""The tables whose rows are taken over, in an order in which referenced rows come first.

Not taken over: ``meta`` (read separately) and ``change`` (nobody on this machine follows that log). Up to version 13
the work of a machine was in its registry: of that only the deletes and moves in ``journal`` are taken.
"""


def tables(kind: str, version: int) -> dict[str, dict[str, Column]]:
    """TABLES of a schema's version, for one kind of storage. Before REVISIONS, artifacts have the columns of revisions.

    In a folder (``local``) an object key is a path, so it has no empty part and no ``.``. An object with another key
    cannot exist there, and cannot even be deleted.
    """
    found = {name: columns for name, columns in TABLES.items() if version >= REVISIONS or name != "revision"}
    if version < WORK_SPLIT:
        found["inode"] = {name: column for name, column in found["inode"].items() if name != "pending"}
    del found["owed" if version < WORK_SPLIT else "journal"]
    if version < REVISIONS:
        found["artifact"] = {**found["artifact"], **_CONTENT}
    if kind != "local":
        return found
    path = "({0} IS NULL OR (instr('/'||{0}||'/', '//')=0 AND instr('/'||{0}||'/', '/./')=0))"
    for table in {"revision" if version >= REVISIONS else "artifact", "journal", "owed"} & found.keys():
        key = found[table]["object_key"]
        found[table] = {**found[table], "object_key": key._replace(rule=f"({key.rule} AND {path})")}
    return found


def rule(column: str, of: Column) -> str:
    """The rule of a column, as an expression that is 1 or 0."""
    return f"coalesce({of.rule.format(column)}, 0)"
