"""What is particular to a lamfs mount: ``.lamfs``, ``.lamindb``, mount options, extended attributes, other users."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import MountedInstance, outcome, wait_until

NOBODY = 65534


def everything(root: Path) -> Iterator[Path]:
    """A folder and all below it, also while files come and go there."""
    yield root
    for folder, folders, files in os.walk(root):
        yield from (Path(folder, name) for name in (*folders, *files))


def put(path: Path, data: bytes = b"x") -> Path:
    path.write_bytes(data)
    return path


# -- .lamfs -----------------------------------------------------------------------------------------------------------


def test_the_control_directory_is_reachable_and_never_listed(local_mount: MountedInstance, tmp_path: Path) -> None:
    top = local_mount.path
    (top / "dir").mkdir()
    put(top / "dir/data.csv", b"a,b\n1,2\n")
    put(top / "plain", b"hello")
    local_mount.sync()
    assert stat.S_ISDIR((top / ".lamfs").stat().st_mode)
    assert sorted(os.listdir(top / ".lamfs")) == ["info", "metrics", "stats"]
    assert sorted(os.listdir(top / ".lamfs/info")) == ["dir", "plain"]
    assert os.listdir(top / ".lamfs/info/dir") == ["data.csv"]
    assert ".lamfs" not in os.listdir(top)
    found = local_mount.run(["find", ".", "-name", ".lamfs*"]).stdout
    assert found == ""
    local_mount.run(["cp", "-a", ".", tmp_path / "copy"])
    assert sorted(path.name for path in (tmp_path / "copy").rglob("*")) == ["data.csv", "dir", "plain"]
    assert local_mount.run(["du", "-a", "."]).stdout.count("\n") == 4
    record = local_mount.info("dir/data.csv")
    assert (record["key"], record["size"], record["suffix"]) == ("dir/data.csv", 8, ".csv")
    assert record["hash"]
    # Its size is what reading gives, so that cp and tar take all of it.
    path = top / ".lamfs/info/dir/data.csv"
    assert path.stat().st_size == len(path.read_bytes())


def test_the_control_directory_cannot_be_changed(local_mount: MountedInstance) -> None:
    top = local_mount.path
    put(top / "f")
    local_mount.sync()
    info = top / ".lamfs/info/f"
    before = info.read_bytes()
    attempts = {
        "write": lambda: info.write_bytes(b"x"),
        "append": lambda: os.close(os.open(info, os.O_WRONLY | os.O_APPEND)),
        "truncate": lambda: os.truncate(info, 0),
        "unlink": lambda: os.unlink(info),
        "rename within": lambda: os.rename(info, top / ".lamfs/info/g"),
        "rename out": lambda: os.rename(info, top / "g"),
        "rename in": lambda: os.rename(top / "f", top / ".lamfs/info/g"),
        "create": lambda: put(top / ".lamfs/info/new"),
        "create at the top": lambda: put(top / ".lamfs/new"),
        "mkdir": lambda: os.mkdir(top / ".lamfs/new"),
        "symlink": lambda: os.symlink("x", top / ".lamfs/new"),
        "link": lambda: os.link(info, top / "hard"),
        "link in": lambda: os.link(top / "f", top / ".lamfs/hard"),
        "chmod": lambda: os.chmod(info, 0o777),
        "utime": lambda: os.utime(info),
        "chown": lambda: os.chown(info, 1, 1),
        "rmdir": lambda: os.rmdir(top / ".lamfs/info"),
        "rmdir of the top": lambda: os.rmdir(top / ".lamfs"),
        "rename of the top": lambda: os.rename(top / ".lamfs", top / "x"),
        "over the top": lambda: os.rename(top / "f", top / ".lamfs"),
        "mkdir over the top": lambda: os.mkdir(top / ".lamfs"),
    }
    for name, attempt in attempts.items():
        assert outcome(attempt) in ("EPERM", "EACCES", "EEXIST", "EISDIR", "EBUSY", "ENOTEMPTY"), name
    assert info.read_bytes() == before
    assert outcome(lambda: (top / ".lamfs/nothing").stat()) == "ENOENT"
    assert outcome(lambda: (top / ".lamfs/info/nothing").stat()) == "ENOENT"
    assert os.listdir(top) == ["f"]
    local_mount.run(["rm", "-rf", *os.listdir(top)])
    assert os.listdir(top) == []


def test_the_record_follows_the_file(local_mount: MountedInstance) -> None:
    top = local_mount.path
    put(top / "f.txt", b"one")
    first = local_mount.stored_info("f.txt")
    put(top / "f.txt", b"second")
    second = local_mount.stored_info("f.txt")
    assert (second["uid"], second["size"]) == (first["uid"], 6)
    assert second["hash"] != first["hash"]
    os.rename(top / "f.txt", top / "g.csv")
    assert outcome(lambda: local_mount.info("f.txt")) == "ENOENT"
    third = local_mount.stored_info("g.csv")
    assert (third["uid"], third["key"], third["suffix"]) == (first["uid"], "g.csv", ".csv")
    os.unlink(top / "g.csv")
    assert outcome(lambda: local_mount.info("g.csv")) == "ENOENT"
    with open(top / "slow", "wb", buffering=0) as file:
        file.write(b"123")
        assert local_mount.info("slow")["size"] == 3


# -- .lamindb ---------------------------------------------------------------------------------------------------------

SAVE_WITHOUT_KEY = """
import sys
from lamfs.ops import artifacts
from lamfs.ops.instance import Instance
with Instance.open() as instance:
    print(artifacts.save(instance, sys.argv[1], key=None, description="no key").uid)
"""


def save_without_key(mount: MountedInstance, path: Path) -> str:
    return mount.python(SAVE_WITHOUT_KEY, str(path)).strip().splitlines()[-1]


def test_artifacts_without_a_key_get_one_by_mv(mount: MountedInstance, tmp_path: Path) -> None:
    top = mount.path
    assert ".lamindb" not in os.listdir(top)
    uid = save_without_key(mount, put(tmp_path / "iris.csv", b"1,2\n"))
    shown = top / ".lamindb" / f"{uid}.csv"
    wait_until(shown.exists, "the artifact shows")
    assert os.listdir(top / ".lamindb") == [f"{uid}.csv"]
    assert ".lamindb" in os.listdir(top)
    assert shown.read_bytes() == b"1,2\n"
    assert mount.info(f".lamindb/{uid}.csv")["key"] is None
    # Nothing can be put in there, and it stays where it is.
    put(top / "other", b"x")
    for attempt in (
        lambda: put(top / ".lamindb/new"),
        lambda: os.mkdir(top / ".lamindb/new"),
        lambda: os.symlink("x", top / ".lamindb/new"),
        lambda: os.link(top / "other", top / ".lamindb/new"),
        lambda: os.rename(top / "other", top / ".lamindb/new"),
        lambda: os.rename(top / "other", shown),
        lambda: os.rename(shown, top / ".lamindb/renamed.csv"),
    ):
        assert outcome(attempt) == "EPERM"
    assert outcome(lambda: os.rename(top / ".lamindb", top / "x")) in ("EBUSY", "EPERM")
    assert outcome(lambda: os.rmdir(top / ".lamindb")) in ("EBUSY", "EPERM", "ENOTEMPTY")
    # Its content can be replaced where it is, and mv gives it a key.
    put(shown, b"3,4\n")
    record = mount.stored_info(f".lamindb/{uid}.csv")
    assert (record["uid"], record["size"], record["key"], record["description"]) == (uid, 4, None, "no key")
    (top / "results").mkdir()
    mount.run(["mv", shown, top / "results/final.csv"])
    record = mount.stored_info("results/final.csv")
    assert (record["uid"], record["key"], record["description"]) == (uid, "results/final.csv", "no key")
    assert (top / "results/final.csv").read_bytes() == b"3,4\n"
    assert ".lamindb" not in os.listdir(top)
    mount.umount()
    assert mount.fsck() == []


def test_rm_of_an_artifact_without_a_key(local_mount: MountedInstance, tmp_path: Path) -> None:
    uid = save_without_key(local_mount, put(tmp_path / "a.tar.gz", b"not really"))
    shown = local_mount.path / ".lamindb" / f"{uid}.tar.gz"
    wait_until(shown.exists, "the artifact shows")
    shown.unlink()
    assert not shown.exists()
    local_mount.sync()
    with local_mount.registry() as registry:
        record = registry.artifacts.by_uid(uid)
        assert record is not None
        assert record.visibility == -1


# -- options ----------------------------------------------------------------------------------------------------------


def test_a_read_only_mount_refuses_every_change(local_instance: MountedInstance) -> None:
    local_instance.mount()
    top = local_instance.path
    put(top / "f", b"content")
    (top / "d").mkdir()
    (top / "s").symlink_to("f")
    local_instance.umount()
    local_instance.mount(read_only=True)
    attempts = {
        "write": lambda: os.open(top / "f", os.O_WRONLY),
        "both": lambda: os.open(top / "f", os.O_RDWR),
        "truncate on open": lambda: os.open(top / "f", os.O_RDONLY | os.O_TRUNC),
        "create": lambda: os.open(top / "new", os.O_CREAT | os.O_WRONLY),
        "truncate": lambda: os.truncate(top / "f", 0),
        "unlink": lambda: os.unlink(top / "f"),
        "rename": lambda: os.rename(top / "f", top / "g"),
        "mkdir": lambda: os.mkdir(top / "new"),
        "rmdir": lambda: os.rmdir(top / "d"),
        "symlink": lambda: os.symlink("x", top / "new"),
        "link": lambda: os.link(top / "f", top / "new"),
        "mkfifo": lambda: os.mkfifo(top / "new"),
        "chmod": lambda: os.chmod(top / "f", 0o600),
        "chown": lambda: os.chown(top / "f", 1, 1),
        "utime": lambda: os.utime(top / "f"),
    }
    for name, attempt in attempts.items():
        assert outcome(attempt) == "EROFS", name
    assert (top / "f").read_bytes() == b"content"
    assert os.readlink(top / "s") == "f"
    assert local_instance.info("f")["size"] == 7
    assert "ro," in local_instance.run(["cat", "/proc/self/mounts"]).stdout.partition(str(top))[2].split("\n")[0]
    assert local_instance.status()["read_only"]


def test_a_read_only_mount_sees_what_another_mount_does(local_instance: MountedInstance) -> None:
    """Two mounts of one instance: what one does shows in the other."""
    local_instance.mount()
    put(local_instance.path / "f", b"one")
    local_instance.sync()
    second = local_instance.base / "second"
    second.mkdir()
    local_instance.cli("mount", str(second), "--read-only")
    try:
        assert (second / "f").read_bytes() == b"one"
        put(local_instance.path / "f", b"two, longer")
        put(local_instance.path / "g", b"new")
        local_instance.sync()
        wait_until(lambda: (second / "f").read_bytes() == b"two, longer", "the new content shows", seconds=1)
        wait_until(lambda: outcome((second / "g").read_bytes) == b"new", "the new file shows", seconds=1)
        os.unlink(local_instance.path / "g")
        wait_until(lambda: not (second / "g").exists(), "the removal shows", seconds=1)
    finally:
        local_instance.cli("umount", str(second))


def test_owner_and_mask_options(local_instance: MountedInstance) -> None:
    local_instance.mount(["uid=1234", "gid=4321", "umask=027"])
    top = local_instance.path
    put(top / "f").chmod(0o666)
    (top / "d").mkdir(0o777)
    for path, mode in ((top / "f", 0o640), (top / "d", 0o750)):
        info = path.stat()
        assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (1234, 4321, mode)
    assert top.stat().st_uid == 1234
    assert outcome(lambda: os.chown(top / "f", 7, 7)) == "EPERM"
    # What is asked for is what is shown already: no error, so that cp -a and tar as the owner work.
    assert outcome(lambda: os.chown(top / "f", 1234, 4321)) is None
    local_instance.umount()
    local_instance.mount()
    assert stat.S_IMODE((top / "f").stat().st_mode) == 0o666
    assert (top / "f").stat().st_uid == os.getuid()


def test_options_that_are_not_known_are_refused(local_instance: MountedInstance) -> None:
    done = local_instance.cli("mount", str(local_instance.path), "-o", "frobnicate", check=False)
    assert done.returncode != 0
    assert "frobnicate" in done.stderr
    assert not local_instance.mounted


def test_kernel_options_reach_the_kernel(local_instance: MountedInstance) -> None:
    local_instance.mount(["noexec", "nosuid", "nodev", "noatime"])
    line = next(line for line in Path("/proc/self/mounts").read_text().split("\n") if str(local_instance.path) in line)
    assert {"noexec", "nosuid", "nodev", "noatime"} <= set(line.split()[3].split(","))
    assert line.split()[2] == "fuse.lamfs"
    script = put(local_instance.path / "script", b"#!/bin/sh\necho no\n")
    script.chmod(0o755)
    assert outcome(lambda: subprocess.run([script], check=True)) == "EACCES"


def test_the_kernel_reads_ahead_further_where_root_mounts(local_mount: MountedInstance) -> None:
    device = next(
        fields[2]
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if (fields := line.split())[4] == str(local_mount.path)
    )
    setting = Path(f"/sys/class/bdi/{device}/read_ahead_kb")
    if not os.access(setting, os.W_OK):
        pytest.skip("only who may write to /sys can raise it")
    assert setting.read_text() == "512\n"


def test_a_program_in_the_mount_can_be_executed(local_mount: MountedInstance) -> None:
    shutil.copy("/bin/true", local_mount.path / "true")
    put(local_mount.path / "script", b"#!/bin/sh\necho yes\n").chmod(0o755)
    assert local_mount.run(["./true"]).returncode == 0
    assert local_mount.run(["./script"]).stdout == "yes\n"


def test_close_stores_when_it_is_asked_to(local_instance: MountedInstance) -> None:
    local_instance.mount(["close=storage"])
    put(local_instance.path / "f", b"durable")
    with local_instance.registry() as registry:
        record = registry.artifacts.by_key("f")
        assert record is not None
        assert (Path(local_instance.storage.root) / record.revision.object_key).read_bytes() == b"durable"


def test_real_keys_make_objects_with_readable_names(instance: MountedInstance) -> None:
    instance.mount(["real_keys"])
    top = instance.path
    (top / "a").mkdir()
    put(top / "a/b.csv", b"1\n")
    record = instance.stored_info("a/b.csv")
    assert record["key_is_virtual"] is False
    assert record["storage_path"] == f"{instance.storage.root}/a/b.csv"
    os.rename(top / "a", top / "c")
    record = instance.stored_info("c/b.csv")
    assert record["storage_path"] == f"{instance.storage.root}/c/b.csv"
    assert (top / "c/b.csv").read_bytes() == b"1\n"
    instance.umount()
    assert instance.fsck() == []


# -- extended attributes ----------------------------------------------------------------------------------------------


as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")


def test_without_the_option_there_are_no_extended_attributes(local_mount: MountedInstance) -> None:
    path = put(local_mount.path / "f")
    for attempt in (
        lambda: os.getxattr(path, "user.lamfs.uid"),
        lambda: os.setxattr(path, "user.x", b"1"),
        lambda: os.listxattr(path),
        lambda: os.removexattr(path, "user.x"),
    ):
        assert outcome(attempt) in ("ENOTSUP", "EOPNOTSUPP", "ENOSYS", [])
    # Tools that copy them are content.
    local_mount.run(["cp", "-a", "f", "g"])
    assert (local_mount.path / "g").read_bytes() == b"x"


def test_extended_attributes(local_instance: MountedInstance, tmp_path: Path) -> None:
    local_instance.mount(["xattr"])
    path = put(local_instance.path / "data.csv", b"1,2\n")
    record = local_instance.stored_info("data.csv")
    names = ("uid", "hash", "hash_type", "created_by", "key_is_virtual", "storage_path")
    own = {f"user.lamfs.{name}": os.getxattr(path, f"user.lamfs.{name}").decode() for name in names}
    assert own["user.lamfs.uid"] == record["uid"]
    assert own["user.lamfs.hash"] == record["hash"]
    assert own["user.lamfs.hash_type"] == "md5"
    assert own["user.lamfs.created_by"] == "testuser1"
    assert own["user.lamfs.key_is_virtual"] == "1"
    assert own["user.lamfs.storage_path"] == record["storage_path"]
    # Copies are artifacts of their own, so tools must not find these. A description may be copied.
    assert os.listxattr(path) == []
    assert outcome(lambda: os.getxattr(path, "user.lamfs.description")) == "ENODATA"
    os.setxattr(path, "user.lamfs.description", "größer".encode())
    assert os.getxattr(path, "user.lamfs.description") == "größer".encode()
    assert local_instance.info("data.csv")["description"] == "größer"
    assert os.listxattr(path) == ["user.lamfs.description"]
    assert outcome(lambda: os.setxattr(path, "user.lamfs.uid", b"x")) == "EPERM"
    assert outcome(lambda: os.removexattr(path, "user.lamfs.hash")) == "EPERM"
    assert outcome(lambda: os.getxattr(path, "user.nothing")) == "ENODATA"
    assert outcome(lambda: os.removexattr(path, "user.nothing")) == "ENODATA"
    assert outcome(lambda: os.setxattr(path, "user.big", bytes(65537))) == "E2BIG"
    os.setxattr(path, "user.mine", b"\x00binary\xff")
    os.setxattr(path, "user.mine", b"changed", os.XATTR_REPLACE)
    assert outcome(lambda: os.setxattr(path, "user.mine", b"", os.XATTR_CREATE)) == "EEXIST"
    assert outcome(lambda: os.setxattr(path, "user.other", b"", os.XATTR_REPLACE)) == "ENODATA"
    # Directories have them too; they go with a rename over the file, and survive a remount.
    os.setxattr(local_instance.path, "user.top", b"1")
    path.rename(path.with_name("moved.csv"))
    local_instance.remount()
    path = path.with_name("moved.csv")
    assert os.getxattr(path, "user.mine") == b"changed"
    assert os.getxattr(path, "user.lamfs.description") == "größer".encode()
    assert os.listxattr(local_instance.path) == ["user.top"]
    local_instance.run(["cp", "-a", "moved.csv", "copy.csv"])
    assert os.getxattr(path.with_name("copy.csv"), "user.mine") == b"changed"
    local_instance.run(["cp", "--preserve=xattr", "moved.csv", "again.csv"])
    local_instance.run(["rsync", "-X", "moved.csv", "third.csv"])
    for name in ("copy.csv", "again.csv", "third.csv"):
        copied = local_instance.stored_info(name)
        assert copied["description"] == "größer"
        assert copied["uid"] != record["uid"]
        assert os.listxattr(path.with_name(name)) == ["user.lamfs.description", "user.mine"]
    os.removexattr(path, "user.mine")
    assert "user.mine" not in os.listxattr(path)


def test_the_description_of_a_file_that_is_replaced_stays(local_instance: MountedInstance) -> None:
    local_instance.mount(["xattr"])
    for target, wanted in (("described", "mine"), ("plain", "theirs")):
        path = put(local_instance.path / target)
        if target == "described":
            os.setxattr(path, "user.lamfs.description", b"mine")
        uid = local_instance.stored_info(target)["uid"]
        temporary = put(local_instance.path / "tmp", b"new")
        os.setxattr(temporary, "user.lamfs.description", b"theirs")
        os.rename(temporary, path)
        record = local_instance.stored_info(target)
        assert (record["uid"], record["description"], record["size"]) == (uid, wanted, 3)


@as_root
def test_trusted_attributes_show_to_root_alone(local_instance: MountedInstance) -> None:
    local_instance.mount(["xattr", "allow_other"])
    path = put(local_instance.path / "f")
    local_instance.base.chmod(0o755)
    local_instance.path.chmod(0o755)
    path.chmod(0o644)
    for name in ("user.a", "trusted.b", "security.c"):
        os.setxattr(path, name, b"1")
    assert sorted(os.listxattr(path)) == ["security.c", "trusted.b", "user.a"]
    assert try_as_nobody(local_instance, ["sorted(os.listxattr(top + '/f'))"]) == ["['security.c', 'user.a']"]


@pytest.mark.parametrize("words", [[], ["xattr"]])
def test_access_control_lists_are_refused_cleanly(local_instance: MountedInstance, words: list[str]) -> None:
    """The FUSE library does not pass on the mode without the umask, which default lists need."""
    local_instance.mount(words)
    (local_instance.path / "d").mkdir()
    put(local_instance.path / "d" / "f")
    for options in (["-m", "u:1:r", "d/f"], ["-d", "-m", "u:1:r", "d"]):
        done = local_instance.run(["setfacl", *options], check=False)
        assert (done.returncode, done.stderr.split(": ")[-1].strip()) == (1, "Operation not supported")
    assert local_instance.run(["getfacl", "-c", "d/f"]).stdout.split() == ["user::rw-", "group::r--", "other::r--"]
    local_instance.run(["cp", "-a", "d", "e"])
    local_instance.run(["rsync", "-aHAX", "d/", "g"])
    assert (local_instance.path / "g" / "f").read_bytes() == (local_instance.path / "e" / "f").read_bytes() == b"x"


# -- other users ------------------------------------------------------------------------------------------------------


def try_as_nobody(mount: MountedInstance, calls: list[str]) -> list[str]:
    """What Python expressions give, or their errno, when another user evaluates them; ``top`` is the mountpoint."""
    # The interpreter may lie where other users cannot look: it becomes another user when it runs already.
    program = (
        "import os, sys\n"
        f"os.setgroups([]); os.setresgid({NOBODY}, {NOBODY}, {NOBODY}); os.setresuid({NOBODY}, {NOBODY}, {NOBODY})\n"
        f"top = {str(mount.path)!r}\n"
        "for call in sys.argv[1:]:\n"
        "    try: print(eval(call))\n"
        "    except OSError as error: print(error.errno)\n"
    )
    return mount.run([sys.executable, "-I", "-S", "-c", program, *calls], cwd="/").stdout.split("\n")[:-1]


@as_root
def test_other_users_cannot_look_in(local_mount: MountedInstance) -> None:
    put(local_mount.path / "f").chmod(0o777)
    local_mount.path.chmod(0o777)
    calls = ["os.listdir(top)", "os.stat(top + '/f')", "open(top + '/f').read()", "open(top + '/new', 'w')"]
    assert try_as_nobody(local_mount, calls) == [str(errno.EACCES)] * 4


@as_root
def test_other_users_may_look_in_when_they_are_allowed_to(local_instance: MountedInstance) -> None:
    local_instance.mount(["allow_other"])
    top = local_instance.path
    top.chmod(0o755)
    put(top / "f", b"open").chmod(0o644)
    put(top / "secret").chmod(0o600)
    (top / "drop").mkdir()
    (top / "drop").chmod(0o1777)
    put(top / "drop/theirs")
    cases = {
        "open(top + '/f').read()": "open",
        "open(top + '/secret')": str(errno.EACCES),
        "open(top + '/f', 'a')": str(errno.EACCES),
        "open(top + '/new', 'w')": str(errno.EACCES),
        "os.chmod(top + '/f', 0o777)": str(errno.EPERM),
        "os.unlink(top + '/drop/theirs')": str(errno.EPERM),
        "os.utime(top + '/f')": str(errno.EACCES),
        "os.close(os.open(top + '/drop/mine', os.O_CREAT | os.O_WRONLY))": "None",
        "os.stat(top + '/drop/mine').st_uid": str(NOBODY),
    }
    assert dict(zip(cases, try_as_nobody(local_instance, list(cases)), strict=True)) == cases


def test_what_belongs_to_the_user_is_closed_to_others(mount: MountedInstance) -> None:
    """Spool, cache, registry, socket and log are 0700/0600."""
    put(mount.path / "f", b"x" * 100)
    mount.sync()
    mount.remount()
    assert (mount.path / "f").read_bytes() == b"x" * 100
    with open(mount.path / "g", "wb", buffering=0) as file:
        file.write(b"being written")
        seen = 0
        roots = [mount.base / "config", mount.data_dir, mount.cache_dir]
        if mount.storage.root.startswith("/"):
            roots.append(Path(mount.storage.root))
        for root in roots:
            for path in everything(root):
                with contextlib.suppress(FileNotFoundError):  # the daemon goes on: a temporary file gets its name
                    assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0, path
                    seen += 1
        assert seen > 10
    secrets = [value for name, value in mount.env.items() if "SECRET" in name]
    for path in (mount.base / "config", mount.data_dir):
        for file in everything(path):
            with contextlib.suppress(FileNotFoundError):
                content = file.read_bytes() if file.is_file() else b""
                assert not any(secret.encode() in content for secret in secrets), file
    command_line = Path(f"/proc/{mount.pid}/cmdline").read_bytes()
    assert not any(secret.encode() in command_line for secret in secrets)


# -- mounting and unmounting ------------------------------------------------------------------------------------------


def test_mounting_where_it_cannot_be(local_instance: MountedInstance) -> None:
    base = local_instance.base
    (base / "full").mkdir()
    put(base / "full/f")
    put(base / "file")
    for path, word in (("full", "empty"), ("file", "directory")):
        done = local_instance.cli("mount", str(base / path), check=False)
        assert done.returncode != 0
        assert word in done.stderr
    local_instance.mount()
    done = local_instance.cli("mount", str(local_instance.path), check=False)
    assert done.returncode != 0
    assert "mounted" in done.stderr
    assert local_instance.status()["mountpoint"] == str(local_instance.path)


def test_unmounting_a_busy_mount_says_who_is_busy(local_mount: MountedInstance) -> None:
    put(local_mount.path / "f", b"kept")
    with open(local_mount.path / "f", "rb") as file:
        done = local_mount.cli("umount", str(local_mount.path), check=False)
        assert done.returncode != 0
        assert str(os.getpid()) in done.stderr
        assert local_mount.mounted
        assert file.read() == b"kept"
    local_mount.umount()


def test_a_mount_without_its_daemon_is_cleaned_away_by_the_next(local_mount: MountedInstance) -> None:
    put(local_mount.path / "f", b"kept")
    local_mount.sync()
    pid = local_mount.pid
    os.kill(pid, 9)
    wait_until(lambda: outcome(lambda: os.stat(local_mount.path / "f")) in ("ENOTCONN", "ENOENT"), "the daemon is gone")
    done = local_mount.cli("mount", str(local_mount.path))
    local_mount.pid = local_mount.record().pid
    assert local_mount.pid != pid
    assert done.returncode == 0
    assert (local_mount.path / "f").read_bytes() == b"kept"


def test_sigterm_drains_and_unmounts(mount: MountedInstance) -> None:
    for number in range(20):
        put(mount.path / f"f{number}", b"%d" % number * 1000)
    mount.term()
    with mount.registry() as registry:
        assert not any(registry.journal.owed().values())
        assert registry.artifacts.by_key("f19") is not None
    assert mount.spooled() == []
    assert mount.fsck() == []


def test_status_tells_what_is_owed(local_mount: MountedInstance) -> None:
    with open(local_mount.path / "f", "wb", buffering=0) as file:
        file.write(b"x")
        status = local_mount.status()
        assert status["open_files"] == 1
        assert status["slug"] == local_mount.slug
        assert status["pid"] == local_mount.pid
    local_mount.sync()
    status = local_mount.status()
    assert (status["open_files"], status["owed_rows"], status["errors"]) == (0, 0, [])
    assert json.loads(local_mount.cli("status", "--json").stdout)
