"""What must always be true of a registry's tree, checked with plain SQL, independently of ``lamfs fsck``."""

from __future__ import annotations

import stat

from lamfs.keys import suffix_of
from lamfs.model import AUTO_INO, ROOT_INO, TRASH
from lamfs.registry import Registry


def check_tree(registry: Registry) -> list[str]:
    """Problems of inodes, entries, keys and journal rows; empty if there are none."""
    db, found = registry.db, []
    found += [str(row) for row in db.all("PRAGMA integrity_check") if row[0] != "ok"]
    found += [f"foreign key {row}" for row in db.all("PRAGMA foreign_key_check")]
    inodes = {row[0]: row[1:] for row in db.all("SELECT ino, mode, nlink FROM inode")}
    entries = db.all("SELECT id, parent, name, ino FROM dentry ORDER BY id")
    below: dict[int, list[tuple[str, int]]] = {}
    names: dict[int, list[tuple[int, str]]] = {}
    for _, parent, name, ino in entries:
        below.setdefault(parent, []).append((name, ino))
        names.setdefault(ino, []).append((parent, name))
        if ino not in inodes:
            found.append(f"entry {name} has no inode")
        if parent not in inodes or not stat.S_ISDIR(inodes[parent][0]):
            found.append(f"entry {name} is in no directory")
    reached, pending = {ROOT_INO}, [ROOT_INO]
    while pending:
        for name, ino in below.get(pending.pop(), []):
            if ino in inodes and stat.S_ISDIR(inodes[ino][0]):
                if ino in reached:
                    found.append(f"directory {name} is in two places")
                else:
                    pending.append(ino)
            reached.add(ino)
    rows = db.all(
        "SELECT a.ino, a.uid, a.key, a.visibility, a.suffix, r.size FROM artifact a"
        " JOIN revision r ON r.id=a.revision_id AND r.artifact_id=a.id"
    )
    artifacts = {row[0]: row[1:] for row in rows}
    for (uid,) in db.all(
        "SELECT uid FROM artifact a WHERE NOT EXISTS"
        " (SELECT 1 FROM revision r WHERE r.id=a.revision_id AND r.artifact_id=a.id)"
    ):
        found.append(f"artifact {uid} has no revision")
    for (key,) in db.all("SELECT object_key FROM revision WHERE id NOT IN (SELECT revision_id FROM artifact)"):
        found.append(f"the revision in {key} is no artifact's")
    owed = {row[0] for row in db.all("SELECT ino FROM inode WHERE pending IS NOT NULL")}
    for ino, (mode, nlink) in inodes.items():
        count = len(names.get(ino, []))
        if stat.S_ISDIR(mode):
            folders = sum(stat.S_ISDIR(inodes[child][0]) for _, child in below.get(ino, []) if child in inodes)
            if nlink != 2 + folders:
                found.append(f"directory {ino}: nlink {nlink}, but {folders} directories in it")
        elif nlink != count:
            found.append(f"inode {ino}: nlink {nlink}, but {count} names")
        if ino not in reached and not (ino in artifacts and artifacts[ino][2] == TRASH):
            found.append(f"inode {ino} cannot be reached")
        if stat.S_ISREG(mode) and ino not in artifacts and ino not in owed:
            found.append(f"file {ino} is no artifact and none is owed")
    for ino in owed - inodes.keys():
        found.append(f"a put is owed for inode {ino}, which is gone")
    for ino, (uid, key, visibility, suffix, size) in artifacts.items():
        if ino not in inodes or not stat.S_ISREG(inodes[ino][0]):
            found.append(f"artifact {uid} has no file")
            continue
        if visibility == TRASH:
            if names.get(ino):
                found.append(f"artifact {uid} is in the trash and has names")
            continue
        if not names.get(ino):
            found.append(f"artifact {uid} has no name")
            continue
        parent, name = names[ino][0]
        path = registry.tree.path(ino)
        if parent == AUTO_INO:
            if key is not None or name != uid + suffix:
                found.append(f"auto-managed artifact {uid}: key {key}, name {name}")
        elif key != path or suffix != suffix_of(name):
            found.append(f"artifact {uid}: key {key!r}, suffix {suffix!r}, but its path is {path!r}")
        shown = registry.tree.get(ino)
        assert shown is not None
        if ino not in owed and shown.size != size:
            found.append(f"artifact {uid} has {size} bytes, its inode says {shown.size}")
    for table in ("symlink", "xattr"):
        for row in db.all(f"SELECT DISTINCT ino FROM {table}"):
            if row[0] not in inodes:
                found.append(f"{table} of inode {row[0]}, which is gone")
    for row in db.all("SELECT uid FROM owed WHERE op='move' AND uid NOT IN (SELECT uid FROM artifact)"):
        found.append(f"a move is owed for artifact {row[0]}, which is gone")
    return found
