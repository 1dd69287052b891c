"""The spool folder: only its own regular files, by the names that lamfs makes, whatever lies there instead."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lamfs import spool
from lamfs.errors import InvalidName, StorageError
from lamfs.spool import SpoolFolder
from tests.support.transfer import open_fds

NAME = "5-0123456789ab"
OTHER = "6-0123456789ab"
PARTS = (".lamindb", "_spool", "x")
NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL

BAD_NAMES = ["", ".", "..", "../5-0123456789ab", "/etc/passwd", f"{NAME}\n", f"\n{NAME}", f"{NAME}/", f"./{NAME}",
             "5-0123456789AB", "5-0123456789abc", "5-0123456789a", "-0123456789ab", "12345678901234567-0123456789ab",
             f"{NAME}\0", "٥-0123456789ab", None, b"5-0123456789ab", 5]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path.joinpath("root", *PARTS)


@pytest.fixture
def opened(folder: Path, tmp_path: Path) -> Iterator[SpoolFolder]:
    with SpoolFolder.make(tmp_path / "root", PARTS) as found:
        yield found


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A private file outside of the spool."""
    path = tmp_path / "id_rsa"
    path.write_text("secret")
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_made_read_moved_and_removed(opened: SpoolFolder, folder: Path) -> None:
    with opened.opened(NAME, NEW) as fd:
        os.write(fd, b"bytes")
    assert mode(folder / NAME) == 0o600
    assert opened.names() == [NAME]
    assert opened.stat(NAME).st_size == 5
    assert opened.shown(NAME) == str(folder / NAME)
    with pytest.raises(FileExistsError):
        opened.open(NAME, NEW)
    with opened.opened(NAME, os.O_RDONLY) as fd:
        assert os.read(fd, 9) == b"bytes"
    assert opened.exists(NAME)
    assert opened.allocated() >= 5
    opened.unlink(NAME)
    assert not opened.exists(NAME)
    assert opened.names() == []
    opened.unlink(NAME)
    with pytest.raises(FileNotFoundError):
        opened.unlink(NAME, missing_ok=False)
    for call in (opened.stat, lambda name: opened.open(name, os.O_RDONLY)):
        with pytest.raises(FileNotFoundError):
            call(NAME)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_refused_by_every_method(opened: SpoolFolder, name: Any) -> None:
    calls: list[Callable[[], object]] = [
        lambda: opened.open(name, NEW),
        lambda: opened.open(name, os.O_RDONLY),
        lambda: opened.stat(name),
        lambda: opened.exists(name),
        lambda: opened.unlink(name),
        lambda: opened.path(name),
    ]
    for call in calls:
        with pytest.raises(InvalidName, match="is not the name of a spool file") as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    assert os.listdir(opened.folder) == []


def make_link(path: Path, secret: Path) -> None:
    path.symlink_to(secret)


def make_dangling_link(path: Path, secret: Path) -> None:
    path.symlink_to(secret.with_name("not there"))


def make_fifo(path: Path, secret: Path) -> None:
    os.mkfifo(path)


def make_folder(path: Path, secret: Path) -> None:
    path.mkdir()


def make_socket(path: Path, secret: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)  # the path of a socket is short
        server.bind(path.name)


STRANGERS = [make_link, make_dangling_link, make_fifo, make_folder, make_socket]


@pytest.mark.parametrize("make", STRANGERS)
def test_what_is_no_file_is_neither_followed_nor_waited_for(
    opened: SpoolFolder, folder: Path, secret: Path, make: Callable[[Path, Path], None]
) -> None:
    make(folder / NAME, secret)
    before = open_fds()
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_CREAT):
        with pytest.raises(StorageError, match=f"{NAME} is not a file that lamfs has made"):
            opened.open(NAME, flags)
    for call in (opened.stat, opened.exists):
        with pytest.raises(StorageError, match="is not a file that lamfs has made"):
            call(NAME)
    with pytest.raises(FileExistsError):
        opened.open(NAME, NEW)
    assert open_fds() == before
    assert (opened.names(), opened.strangers()) == ([], [NAME])
    assert secret.read_text() == "secret"
    assert not secret.with_name("not there").exists()


def test_removing_a_link_leaves_what_it_leads_to(opened: SpoolFolder, folder: Path, secret: Path) -> None:
    (folder / NAME).symlink_to(secret)
    opened.unlink(NAME)
    assert os.listdir(folder) == []
    assert secret.read_text() == "secret"


def test_names_are_those_that_lamfs_makes(opened: SpoolFolder, folder: Path) -> None:
    for name in (OTHER, NAME, "notes.txt", "conflict-5", "5-0123456789abc"):
        (folder / name).write_text("x")
    assert opened.names() == [NAME, OTHER]
    assert opened.strangers() == ["5-0123456789abc", "conflict-5", "notes.txt"]


# -- the path for other processes -------------------------------------------------------------------------------------


def test_a_path_leads_to_the_held_folder_from_another_process(
    opened: SpoolFolder, folder: Path, tmp_path: Path, secret: Path
) -> None:
    """Also when the folder has another name by now, and a link to somewhere else has its own."""
    with opened.opened(NAME, NEW) as fd:
        os.write(fd, b"bytes")
    aside = folder.with_name("aside")
    folder.rename(aside)
    folder.symlink_to(tmp_path)
    code = (
        "import os, sys\n"
        "first, made, taken, linked = sys.argv[1:]\n"
        "assert open(first).read() == 'bytes'\n"
        "os.close(os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))\n"
        "os.link(first, linked)\n"
        "os.rename(first, taken)\n"
    )
    taken, linked = tmp_path / "root" / "taken", tmp_path / "root" / "linked"
    words = [opened.path(NAME), opened.path(OTHER), str(taken), str(linked)]
    subprocess.run([sys.executable, "-c", code, *words], check=True, timeout=30)
    assert taken.read_text() == linked.read_text() == "bytes"
    assert os.listdir(aside) == opened.names() == [OTHER]


# -- the folder -------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_made_is_private(opened: SpoolFolder, folder: Path) -> None:
    assert [mode(path) for path in (folder, *folder.parents[:2])] == [0o700] * 3
    assert opened.folder == str(folder)
    assert opened.device() == folder.stat().st_dev
    assert opened.disk().f_bsize == os.statvfs(folder).f_bsize
    opened.sync()


def test_what_is_not_there_is_not_found_and_not_made(tmp_path: Path) -> None:
    assert SpoolFolder.find(tmp_path, PARTS) is None
    assert SpoolFolder.find(tmp_path / "not mounted", PARTS) is None
    assert os.listdir(tmp_path) == []
    with pytest.raises(StorageError, match=r"cannot be used \(No such file or directory, at .*not mounted"):
        SpoolFolder.make(tmp_path / "not mounted", PARTS)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_open_to_others_is_closed_to_them(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with SpoolFolder.make(tmp_path / "root", PARTS):
        assert mode(folder) == 0o700
    folder.chmod(0o755)
    found = SpoolFolder.find(tmp_path / "root", PARTS)
    assert found is not None
    with found:
        assert mode(folder) == 0o700


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("open_folder", [SpoolFolder.find, SpoolFolder.make, spool.remove])
def test_a_link_on_the_way_is_not_followed(tmp_path: Path, depth: int, open_folder: Callable[..., object]) -> None:
    root, documents = tmp_path / "root", tmp_path / "Documents"
    documents.joinpath(*PARTS[depth:]).mkdir(parents=True)
    kept = documents.joinpath(*PARTS[depth:], NAME)
    kept.write_text("kept")
    link = root.joinpath(*PARTS[:depth])
    link.parent.mkdir(parents=True)
    link.symlink_to(documents)
    before = open_fds()
    with pytest.raises(StorageError, match=f"because (it|.*/{PARTS[depth - 1]}) is a link") as caught:
        open_folder(root, PARTS)
    assert caught.value.errno == errno.ELOOP
    assert open_fds() == before
    assert kept.read_text() == "kept"
    assert mode(documents) != 0o700


def test_a_root_that_is_a_link_is_the_users_choice(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    with SpoolFolder.make(tmp_path / "root", PARTS):
        assert tmp_path.joinpath("disk", *PARTS).is_dir()


def test_a_file_instead_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / ".lamindb").write_text("")
    with pytest.raises(StorageError, match=r"because .*/\.lamindb is not a directory"):
        SpoolFolder.find(tmp_path, PARTS)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_somebody_elses_folder_is_left_alone(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    os.chown(folder, 12345, 12345)
    before = open_fds()
    for call in (SpoolFolder.find, SpoolFolder.make):
        with pytest.raises(StorageError, match=f"{folder} belongs to another user .uid 12345.") as caught:
            call(tmp_path / "root", PARTS)
        assert caught.value.errno == errno.EPERM
    assert open_fds() == before
    assert mode(folder) == 0o777


# -- the end ----------------------------------------------------------------------------------------------------------


def test_removing_a_spool_takes_its_files_and_folders(opened: SpoolFolder, folder: Path, tmp_path: Path) -> None:
    os.close(opened.open(NAME, NEW))
    assert spool.remove(tmp_path / "root", PARTS) == []
    assert os.listdir(tmp_path / "root" / ".lamindb") == []
    assert spool.remove(tmp_path / "root", PARTS) == []


def test_removing_a_spool_leaves_what_lamfs_has_not_made(
    opened: SpoolFolder, folder: Path, tmp_path: Path, secret: Path
) -> None:
    os.close(opened.open(NAME, NEW))
    (folder / "notes.txt").write_text("x")
    (folder / OTHER).symlink_to(secret)
    assert spool.remove(tmp_path / "root", PARTS) == [str(folder / OTHER), str(folder / "notes.txt")]
    assert sorted(os.listdir(folder)) == [OTHER, "notes.txt"]
    assert secret.read_text() == "secret"
