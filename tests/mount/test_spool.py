"""Instances whose journal and spool were made by somebody who wants files from outside of it, through real mounts."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamfs.keys import spool_name
from lamfs.ops.instance import Instance
from tests.support.mounts import MountedInstance
from tests.support.timed import timed

SECRET = "the private key of somebody else"
GONE = "00000000-0000-0000-0000-000000000000:4711:1"
"""A process of another machine."""


class Crafted:
    """An instance with journal rows that lead outside of the spool, and one that is sound."""

    def __init__(self, instance: MountedInstance) -> None:
        self.instance = instance
        self.spool = instance.spool
        self.secrets: list[Path] = []
        instance.mount()
        for name in ("absolute", "relative", "newline", "link", "nothing", "sound"):
            (instance.path / name).write_text(f"stored as {name}")
        instance.umount()
        outside = instance.base / "home"
        outside.mkdir()
        self.absolute = self.secret(outside / "id_rsa")
        relative = self.secret(outside / "x")
        self.new = f"{outside}/new"
        self.link = spool_name(1)
        (self.spool / self.link).symlink_to(self.secret(outside / "linked"))
        newline = spool_name(2)
        (self.spool / newline).write_text("nobody owes it")
        self.newline = self.spool / newline
        sound = spool_name(3)
        (self.spool / sound).write_text("written last")
        rows = {
            "absolute": str(self.absolute),
            "relative": os.path.relpath(relative, self.spool),
            "newline": f"{newline}\n",
            "link": self.link,
            "nothing": None,
            "sound": sound,
        }
        for name, src in rows.items():
            self.owe(name, src)
        with instance.registry() as registry:
            made, _ = timed(registry).names.create_file(1, "never stored", 0o100644, 0, 0)
        self.owe("never stored", self.new, ino=made.ino)

    def secret(self, path: Path) -> Path:
        """A file that nobody may see through the instance."""
        path.write_text(SECRET)
        self.secrets.append(path)
        return path

    def owe(self, name: str, src: str | None, *, ino: int | None = None) -> None:
        """Put a row into the journal, as a registry from somewhere may have it."""
        with self.instance.registry() as registry:
            inode = registry.tree.resolve(name)
            assert inode is not None
            journal = timed(registry).journal
            journal.begin_put(inode.ino, "")
            registry.db.execute(
                "UPDATE journal SET state=?, src=?, owner=? WHERE op='put' AND ino=?",
                ("ready" if ino is None else "open", src, GONE, inode.ino),
            )
            size = len("written last" if name == "sound" else SECRET)
            registry.db.execute("UPDATE inode SET size=? WHERE ino=?", (size, inode.ino))

    def check(self) -> None:
        """Nothing outside was touched, or has come into storage."""
        for path in self.secrets:
            assert path.read_text() == SECRET
        assert not os.path.exists(self.new)
        assert os.readlink(self.spool / self.link) == str(self.absolute.with_name("linked"))
        with opened(self.instance) as found:
            contents = [found.store.get(stat.key) for stat in found.store.list() if not stat.key.endswith(".lndb")]
            assert not [data for data in contents if SECRET.encode() in data]
            assert b"written last" in contents
            assert found.registry.journal.entries() == []


@contextlib.contextmanager
def opened(instance: MountedInstance) -> Iterator[Instance]:
    """The instance, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in instance.env.items():
            if name.startswith(("LAMFS_", "AWS_")):
                patch.setenv(name, value)
        with Instance.open(instance.slug) as found:
            yield found


@pytest.fixture
def crafted(instance: MountedInstance) -> Crafted:
    instance.expect_log(r"What the journal owes of '[a-z ]+' is struck off")
    instance.expect_log("was owed to nobody", "that the journal did not know")  # what lies in the spool
    return Crafted(instance)


def test_a_mount_shows_what_was_stored_and_nothing_from_outside(crafted: Crafted) -> None:
    instance = crafted.instance
    instance.mount()
    for name in ("absolute", "relative", "newline", "link", "nothing"):
        assert (instance.path / name).read_text() == f"stored as {name}"
    assert (instance.path / "sound").read_text() == "written last"
    assert not (instance.path / "never stored").exists()
    (instance.path / "absolute").write_text("new")
    (instance.path / "link").unlink()
    instance.umount()
    log = instance.log()
    assert f"'{crafted.absolute}' is not the name of a spool file" in log
    assert f"{crafted.spool / crafted.link} is not a file that lamfs has made" in log
    assert not crafted.newline.exists()  # a spool file that nothing owes
    crafted.check()
    instance.mount()
    assert (instance.path / "absolute").read_text() == "new"
    instance.umount()


def test_a_read_only_mount_does_not_show_it_either(crafted: Crafted) -> None:
    instance = crafted.instance
    instance.expect_log("is not a file that lamfs has made")
    instance.mount(read_only=True)
    for name in ("absolute", "relative", "newline", "link"):
        with pytest.raises(OSError, match=r"Invalid argument|Input/output error"):
            (instance.path / name).read_text()
    assert (instance.path / "sound").read_text() == "written last"
    instance.umount()
    for path in crafted.secrets:
        assert path.read_text() == SECRET
    assert crafted.newline.exists()


def test_cache_gives_what_was_stored(crafted: Crafted) -> None:
    for name in ("absolute", "relative", "newline", "link"):
        said = crafted.instance.cli("cache", name).stdout
        assert Path(said.strip().splitlines()[-1]).read_text() == f"stored as {name}"
    crafted.check()


def test_close_stores_the_rest(crafted: Crafted) -> None:
    crafted.instance.cli("close")
    crafted.check()


def test_fsck_names_each_and_repairs_it(crafted: Crafted) -> None:
    instance = crafted.instance
    problems = instance.fsck()
    for name in ("absolute", "relative", "newline", "nothing"):
        assert any(f"the journal owes '{name}' a file named" in text for text in problems), problems
    assert any("with the last bytes of 'link' is gone" in text for text in problems)
    instance.cli("fsck", "--repair")
    crafted.check()
    assert instance.fsck() == []
    assert f"{crafted.spool / crafted.link} is not a spool file, and is left there" in instance.cli("fsck").stdout


# -- the folder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def documents(instance: MountedInstance) -> Path:
    """A folder with files that have a spool file's names, too; the instance's spool is a link to it."""
    folder = instance.base / "Documents"
    folder.mkdir(mode=0o755)
    for name in ("letter.txt", spool_name(7)):
        (folder / name).write_text(name)
    path = instance.spool
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(folder)
    return folder


def left(folder: Path) -> bool:
    """Whether everything is as it was."""
    names = os.listdir(folder)
    return len(names) == 2 and all((folder / name).read_text() == name for name in names)


def refused(instance: MountedInstance, *words: str) -> str:
    """What a command says that ends with 1."""
    done: subprocess.CompletedProcess[str] = instance.cli(*words, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr + done.stdout


def test_a_spool_that_is_a_link_is_not_used(instance: MountedInstance, documents: Path) -> None:
    path = instance.spool
    instance.expect_log("is not used, because it is a link")
    for words in (("mount", str(instance.path)), ("mount", "--read-only", str(instance.path))):
        said = refused(instance, *words)
        assert f"The spool folder {path} is not used, because it is a link" in said
        assert not instance.mounted
        assert left(documents)
    assert "is a link" in refused(instance, "fsck")
    assert "is a link" in refused(instance, "fsck", "--repair")
    assert left(documents)
    instance.cli("close")  # nothing is owed
    assert left(documents)
    instance.cli("delete-instance", "--force", instance.slug)
    assert left(documents)
    assert documents.stat().st_mode & 0o777 == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_somebody_elses_spool_is_not_used(instance: MountedInstance) -> None:
    path = instance.spool
    path.mkdir(parents=True)
    (path / spool_name(7)).write_text("theirs")
    os.chown(path, 12345, 12345)
    instance.expect_log("belongs to another user")
    said = refused(instance, "mount", str(instance.path))
    assert f"The spool folder {path} belongs to another user (uid 12345)" in said
    assert not instance.mounted
    assert len(os.listdir(path)) == 1


def test_a_spool_that_others_may_enter_is_closed_to_them(instance: MountedInstance) -> None:
    path = instance.spool
    path.mkdir(parents=True)
    path.chmod(0o777)
    (path / "notes.txt").write_text("of nobody")
    instance.mount()
    assert path.stat().st_mode & 0o777 == 0o700
    (instance.path / "a").write_text("a")
    instance.umount()
    assert os.listdir(path) == ["notes.txt"]
