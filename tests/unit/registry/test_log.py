"""The write-ahead logs of a registry are begun before the first program writes."""

from __future__ import annotations

from pathlib import Path

from lamfs.registry import Registry, begin_log
from lamfs.registry.workdb import work_path


def test_both_logs_are_begun(tmp_path: Path) -> None:
    path = tmp_path / "registry.lndb"
    Registry(path, create=True).close()
    registry = Registry(path)
    logs = [Path(f"{each}-wal") for each in (path, work_path(path))]
    assert not any(log.stat().st_size for log in logs)
    before = registry.db.conn.execute("SELECT * FROM meta ORDER BY key").fetchall()
    begin_log(path)
    assert all(log.stat().st_size for log in logs)
    assert registry.db.conn.execute("SELECT * FROM meta ORDER BY key").fetchall() == before
    registry.close()
