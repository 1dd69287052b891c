"""Whether storage has a newer registry: said when it is so, and not about what this machine has stored itself."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lamfs.ops import artifacts, freshness, setup
from lamfs.ops.instance import Instance
from tests.support.ops import machine


def save(tmp_path: Path, key: str) -> None:
    (tmp_path / "file").write_text(key)
    with Instance.open("ada/default") as opened:
        artifacts.save(opened, tmp_path / "file", key=key)
    setup.close("ada/default")


def said(caplog: pytest.LogCaptureFixture) -> bool:
    """Whether this machine says that storage has a newer registry."""
    caplog.clear()
    with Instance.open("ada/default") as opened:
        freshness.warn(opened)
    return "another machine has stored a newer one" in caplog.text


def test_an_answer_from_before_this_machine_stored_its_registry_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lamfs")
    setup.login("ada")
    setup.init(str(tmp_path / "store"), "default")
    setup.close("ada/default")
    assert not said(caplog)  # the answer is remembered
    save(tmp_path, "a.txt")
    assert not said(caplog)
    with machine(tmp_path / "elsewhere"):
        setup.login("ada")
        setup.connect("ada/default", storage=str(tmp_path / "store"))
        save(tmp_path, "b.txt")
    with Instance.open("ada/default") as opened:
        (opened.settings.directory / freshness.NAME).unlink(missing_ok=True)
    assert said(caplog)
    setup.connect("ada/default")
    setup.close("ada/default")
    assert not said(caplog)
