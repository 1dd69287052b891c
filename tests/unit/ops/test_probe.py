"""What a storage has proven is not asked again for a day, nor of another storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamfs import config
from lamfs.model import StorageConfig
from lamfs.ops import probe
from lamfs.ops.instance import Instance
from lamfs.storage.base import Capabilities


class Fake:
    kind = "s3"
    on_disk = False
    exclusive = True

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def check(self, *, write: bool = True, exclusive: bool = False) -> Capabilities:
        self.asked.append(exclusive)
        return Capabilities(exclusive or self.exclusive, replace_guarded=True, read_guarded=True)

    def close(self) -> None:
        pass


def test_a_proof_lasts_a_day(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAMFS_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("LAMFS_DATA_DIR", str(tmp_path / "data"))
    store = Fake()

    def ask(root: str = "s3://bucket/x") -> None:
        settings = config.InstanceSettings("a/b", StorageConfig(root))
        with Instance(settings, store=store) as instance:  # type: ignore[arg-type]
            assert probe.check_storage(instance, write=True).create_exclusive == store.exclusive

    store.exclusive = False
    ask()
    ask()
    store.exclusive = True
    ask()
    ask()
    ask("s3://bucket/other")
    ask("s3://bucket/other")
    now = probe.now_ns()
    monkeypatch.setattr(probe, "now_ns", lambda: now + probe.BELIEVED_NS)
    ask("s3://bucket/other")
    monkeypatch.setattr(probe, "now_ns", lambda: now - probe.BELIEVED_NS)
    ask("s3://bucket/other")
    assert store.asked == [False, False, False, True, False, True, False, False]
