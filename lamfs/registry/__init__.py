"""The registry: the only truth about names and metadata, and the journal of storage work. One object per thread."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from lamfs.errors import LamfsError
from lamfs.model import ArtifactRecord, iso, new_uid
from lamfs.processes import is_alive, of_another_boot, process_id
from lamfs.registry.artifacts import Artifacts, Provenance
from lamfs.registry.attributes import Attributes
from lamfs.registry.changes import Change, ChangeLog
from lamfs.registry.commits import Commits, Committed, Conflict, NewObject, Stored
from lamfs.registry.consistency import Consistency, Flaw
from lamfs.registry.db import LOG_PAGES, Database, begin_log, fold_log, sync_log
from lamfs.registry.file import RegistryFile
from lamfs.registry.identity import Removed
from lamfs.registry.journal import Journal
from lamfs.registry.namespace import Backup, Namespace, Renamed
from lamfs.registry.partial_spools import (
    PartialSpools,
    Ranges,
    add_range,
    base_id,
    is_based_on,
    lacks_some,
    missing_blocks,
    unwritten,
    without,
)
from lamfs.registry.people import People, Run, Storage, Transform, User
from lamfs.registry.replay import Pending, Replay
from lamfs.registry.rescue import Lost, Rescue
from lamfs.registry.seals import Seal, Seals
from lamfs.registry.tree import Tree
from lamfs.registry.upkeep import Displaced, Upkeep
from lamfs.registry.uploads import PartRecord, UploadRecord, Uploads
from lamfs.registry.writes import Writes
from lamfs.scratch import Matcher, nothing


class Registry:
    """One registry file, through one connection. Belongs to the thread that made it. It satisfies verbs.Verbs.

    ``origin`` marks this object's rows in the change log. ``scratch`` tells which keys are not artifacts. ``name``: how
    messages call the instance. ``work``: whether this machine's work on it is attached (workdb.py).
    """

    def __init__(
        self,
        path: Path,
        *,
        create: bool = False,
        scratch: Matcher = nothing,
        name: str | None = None,
        work: bool = True,
    ) -> None:
        self.path = path
        self.origin = new_uid(12)
        self.db = Database(path, create=create, name=name, work=work)
        self.tree = Tree(self.db)
        self.artifacts = Artifacts(self.db, time.sleep)
        self.journal = Journal(self.db, process_id() or new_uid())
        self.partial_spools = PartialSpools(self.db)
        self.uploads = Uploads(self.db)
        self.seals = Seals(self.db)
        self.changes = ChangeLog(self.db, self.origin)
        self.replay = Replay(self.db, self.changes)
        if work:
            with contextlib.suppress(LamfsError, TypeError):  # whoever reads a damaged one is told more
                self.replay.watch()
            self.db.mend = self.replay.undo
        self.people = People(self.db)
        self.names = Namespace(self.db, self.tree, self.artifacts, self.journal, self.changes, scratch)
        self.rescue = Rescue(self.db, self.tree, self.artifacts, self.journal, self.changes, self.names)
        self.commits = Commits(self.db, self.tree, self.artifacts, self.journal, self.changes, self.names)
        self.attributes = Attributes(self.db, self.tree, self.artifacts, self.changes)
        self.writes = Writes(self.db, self.tree, self.journal, self.changes, self.names, self.partial_spools)
        self.file = RegistryFile(self.db, self.people, self.journal, self.changes)
        self.consistency = Consistency(self.db, self.tree, self.journal, self.changes)
        self.upkeep = Upkeep(self.db, self.tree, self.artifacts, self.journal, self.changes, self.commits, self.rescue)

    def describe(self, record: ArtifactRecord) -> dict[str, Any]:
        """An artifact's record with its references resolved, ready for JSON: what ``lamfs info`` prints."""
        storage = self.people.storage(record.storage_id)
        user = self.people.user(record.created_by_id)
        run = self.people.run(record.run_id)
        transform = self.people.transform(record.transform_id)
        root = storage.root if storage else ""
        pending = None if record.ino is None else self.replay.of(record.ino)
        return {
            "uid": record.uid,
            "key": record.key,
            "description": record.description,
            "suffix": record.suffix,
            "size": record.size,
            "hash": record.hash,
            "hash_type": record.revision.content.hash_type,
            "visibility": record.visibility,
            "key_is_virtual": record.key_is_virtual,
            "accessor": record.accessor,
            "storage": root,
            "storage_path": f"{root}/{record.revision.object_key}",
            "created_by": user.handle if user else None,
            "run": run.uid if run else None,
            "transform": transform.name if transform else None,
            "created_at": iso(record.created_at),
            "updated_at": iso(record.updated_at),
            "pending": pending is not None,
        }

    def close(self) -> None:
        """Close the connection."""
        self.db.close()


__all__ = [
    "LOG_PAGES", "Backup", "Change", "Commits", "Committed", "Conflict", "Displaced", "Flaw", "Lost", "NewObject",
    "PartRecord", "Pending", "Provenance", "Ranges", "Registry", "Removed", "Renamed", "Run", "Seal", "Storage",
    "Stored", "Transform", "UploadRecord", "Uploads", "User", "add_range", "base_id", "begin_log", "fold_log",
    "is_alive", "is_based_on", "lacks_some", "missing_blocks",
    "of_another_boot", "process_id", "sync_log", "unwritten", "without",
]  # fmt: skip
