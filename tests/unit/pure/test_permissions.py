"""Who else can write to a folder, and what is said of it."""

from __future__ import annotations

import grp
import os
import pwd
import stat

import pytest

from lamfs.errors import NotSetUp, StorageForbidden
from lamfs.permissions import Others, check_private, check_storage_folder, others

ANN, BOB, GONE = 1000, 1001, 4242
"""Users. Ann's primary group is her own, Bob's is users; nobody knows the third."""
OF_ANN, LAB, USERS = 1000, 2000, 100
MEMBERS = {OF_ANN: ("ann", []), LAB: ("lab", ["ann", "bob"]), USERS: ("users", []), 0: ("root", [])}
NAMES = {0: ("root", 0), ANN: ("ann", OF_ANN), BOB: ("bob", USERS)}


@pytest.fixture(autouse=True)
def people(monkeypatch: pytest.MonkeyPatch) -> None:
    """The users and groups above, on every machine."""

    def user(uid: int) -> pwd.struct_passwd:
        name, gid = NAMES[uid]
        return pwd.struct_passwd((name, "x", uid, gid, "", "/", "/bin/sh"))

    def group(gid: int) -> grp.struct_group:
        name, members = MEMBERS[gid]
        return grp.struct_group((name, "x", gid, members))

    monkeypatch.setattr(pwd, "getpwuid", user)
    monkeypatch.setattr(grp, "getgrgid", group)


def folder(mode: int, uid: int = ANN, gid: int = OF_ANN) -> os.stat_result:
    """The stat of a folder."""
    return os.stat_result((stat.S_IFDIR | mode, 1, 1, 2, uid, gid, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("status", "uid", "found"),
    [
        (folder(0o700), ANN, Others.NOBODY),
        (folder(0o755), ANN, Others.NOBODY),
        (folder(0o755, 0, 0), ANN, Others.NOBODY),
        (folder(0o775, 0, 0), ANN, Others.NOBODY),  # root's own group
        (folder(0o700, 0, 0), 0, Others.NOBODY),
        (folder(0o775), ANN, Others.NOBODY),  # Debian, Fedora: umask 002
        (folder(0o2775, ANN, LAB), ANN, Others.GROUP),
        (folder(0o770, BOB, USERS), BOB, Others.GROUP),  # the primary group of many
        (folder(0o775, 0, LAB), ANN, Others.GROUP),
        (folder(0o775, ANN, GONE), ANN, Others.GROUP),
        (folder(0o777), ANN, Others.EVERYBODY),
        (folder(0o1777, 0, 0), ANN, Others.EVERYBODY),
        (folder(0o702), ANN, Others.EVERYBODY),
        (folder(0o777, BOB), ANN, Others.EVERYBODY),
        (folder(0o700, BOB), ANN, Others.OWNER),
        (folder(0o775, BOB, LAB), ANN, Others.OWNER),
        (folder(0o700, GONE), ANN, Others.OWNER),
        (folder(0o700), 0, Others.OWNER),  # root works in a folder of Ann's
    ],
)
def test_who_else_can_write(status: os.stat_result, uid: int, found: Others) -> None:
    assert others(status, uid=uid) is found


def test_a_group_with_another_member_is_not_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MEMBERS, OF_ANN, ("ann", ["ann"]))
    assert others(folder(0o775), uid=ANN) is Others.NOBODY
    monkeypatch.setitem(MEMBERS, OF_ANN, ("ann", ["bob"]))
    assert others(folder(0o775), uid=ANN) is Others.GROUP


def test_the_user_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: BOB)
    assert others(folder(0o700)) is Others.OWNER
    assert others(folder(0o700, BOB)) is Others.NOBODY


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (folder(0o777), r"can be written by everybody \(mode 0777\).*run 'chmod go-w '/x y'', or name.*LAMFS_DATA_DIR"),
        (folder(0o1777), r"everybody \(mode 1777\).*make a folder of your own below it"),
        (folder(0o770, ANN, LAB), r"by the group lab \(mode 0770\).*chmod go-w"),
        (folder(0o770, ANN, GONE), r"by the group 4242 \(mode 0770\)"),
        (folder(0o700, BOB), r"belongs to bob,.*run 'sudo chown ann '/x y''"),
        (folder(0o700, GONE), r"belongs to 4242,"),
    ],
)
def test_a_folder_of_lamfs_is_refused(status: os.stat_result, says: str) -> None:
    with pytest.raises(NotSetUp, match=rf"The folder /x y \(LAMFS_DATA_DIR\) .*{says}"):
        check_private("/x y", status, "LAMFS_DATA_DIR", uid=ANN)


def test_a_folder_of_ones_own_is_taken() -> None:
    check_private("/x", folder(0o700), "LAMFS_DATA_DIR", uid=ANN)
    assert check_storage_folder("/x", folder(0o755), uid=ANN) is None


def test_a_storage_that_everybody_can_write_is_refused() -> None:
    with pytest.raises(StorageForbidden, match=r"The storage folder /x .*everybody \(mode 0777\).*'chmod o-w /x'"):
        check_storage_folder("/x", folder(0o777), uid=ANN)
    with pytest.raises(StorageForbidden, match=r"everybody \(mode 1777\).*make a folder of your own below it"):
        check_storage_folder("/tmp", folder(0o1777, 0, 0), uid=ANN)


def test_a_storage_that_some_can_write_is_warned_of() -> None:
    for status, fault in ((folder(0o770, ANN, LAB), "the group lab"), (folder(0o755, BOB), "belongs to bob")):
        said = check_storage_folder("/x", status, uid=ANN)
        assert said is not None
        assert fault in said
        assert "cannot be shared between users" in said
