"""A machine took the lock over from one that died: what that has stored without a name is said, until it is found."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from lamfs import config
from lamfs.daemon.first import look
from lamfs.ops import artifacts, diverged, fsck, setup, snapshot, unreturned
from lamfs.ops.instance import Instance
from tests.support.commands import quick, quick_json
from tests.support.ops import machine
from tests.unit.ops.test_diverged import SLUG, run_out, save

SAID = (
    "had the lock of 'ada/shared' since ",
    " and did not give it back: ",
    "'lamfs fsck' names such objects, and 'lamfs fsck --repair' makes them readable, in lost+found",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The storage of a machine that died after it had stored something and before it had stored its registry."""
    root = tmp_path / "store"
    with machine(tmp_path / "one"):
        setup.login("ada")
        setup.init(str(root), "shared")
        with Instance.open(SLUG) as opened:
            snapshot.push(opened)
        save(tmp_path, "plates/a.txt", "stored")
    run_out_of(tmp_path / "one", root)
    setup.login("bob")
    return root


def run_out_of(folder: Path, root: Path) -> None:
    with machine(folder):
        run_out(root)


def said(text: str) -> bool:
    return all(part in text for part in SAID) and "ada on " in text


def test_connect_and_status_say_who_did_not_give_the_lock_back(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lamfs"):
        quick("connect", str(root))
    assert [record.getMessage() for record in caplog.records if said(record.getMessage())]
    (instance,) = quick_json("status")["instances"]
    assert said(instance["unreturned"])
    assert any(said(line) for line in quick("status").splitlines())
    assert quick("ls") == ""
    # Found, and not yet named: it is said as long as somebody has to do something.
    quick("fsck", code=1)
    assert unreturned.known(config.load_instance(SLUG)) is not None
    quick("fsck", "--repair")
    assert unreturned.known(config.load_instance(SLUG)) is None
    assert "lost+found" in quick("ls")
    assert not any(said(line) for line in quick("status").splitlines())


def test_a_mount_says_it_too(root: Path) -> None:
    settings = setup.connect(str(root))
    setup.close(SLUG)
    unreturned.forget(settings)
    with Instance.open(SLUG) as opened:
        opened.hold_for_mount()  # a machine that dies now
    run_out(root)
    with machine(config.data_dir().parent / "three"):
        setup.login("eve")
        setup.connect(str(root))
        setup.close(SLUG)
    with Instance.open(SLUG) as opened:
        opened.hold_for_mount()
    run_out(root)
    with machine(config.data_dir().parent / "three"), Instance.open(SLUG) as opened:
        assert any("bob on " in notice and "did not give it back" in notice for notice in look(opened, write=True)[0])


def test_the_machine_that_died_is_told_where_its_files_are_now(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    setup.connect(str(root))
    quick("fsck", "--repair")
    (found,) = quick("ls").split("\n")[:-1]
    setup.close(SLUG)
    with machine(tmp_path / "one"):
        with caplog.at_level(logging.WARNING, "lamfs"):
            setup.connect(SLUG)
        (kept,) = diverged.known(config.load_instance(SLUG))
        assert (kept["brought_back"], kept["left"]) == ([], [])
        (renamed,) = kept["renamed"]
        assert renamed.startswith("'plates/a.txt' (uid ")
        assert renamed.endswith(f") is '{found}' now")
        assert f"  renamed: {renamed}" in [record.getMessage() for record in caplog.records]
        assert "1 have another name now, which " in quick("status")
        assert "diverged." in quick("status")
        with Instance.open(SLUG) as opened:
            assert artifacts.find(opened, found).size == 6


def test_nothing_is_said_of_a_lock_that_was_given_back(root: Path, tmp_path: Path) -> None:
    with machine(tmp_path / "one"):
        setup.close(SLUG)
    settings = setup.connect(str(root))
    assert unreturned.known(settings) is None
    with Instance.open(SLUG) as opened:
        assert opened.notices == []
        assert fsck.check(opened).problems == []
        assert artifacts.find(opened, "plates/a.txt").size == 6


def test_a_note_that_is_none_says_nothing(root: Path) -> None:
    settings = setup.connect(str(root))
    for body in ("", "[]", '{"handle": 5, "since": "x"}', '{"handle": "a", "host": "b", "since": 1e300, "pushed": 0}'):
        (settings.directory / unreturned.NAME).write_text(body)
        assert unreturned.known(settings) is None
        quick("status")
    shutil.rmtree(settings.directory)
    assert unreturned.known(settings) is None
