"""Programs that build, pack and copy, in a real mount on a local folder and on S3: git, unzip, make, tar, rsync."""

from __future__ import annotations

import os
import random
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.mount.test_programs_tools import need, plant, portrait
from tests.support.mounts import MountedInstance

FILES = 1000


def test_git_of_a_thousand_files(each_mount: MountedInstance, each_dir: Path, tmp_path: Path) -> None:
    """Clone in and out, commit, repack, check; what git replaces by a rename stays its artifact."""
    git = [need("git"), "-c", "user.name=Test", "-c", "user.email=test@localhost", "-c", "gc.auto=0"]
    rng = random.Random(6)
    source, repository = tmp_path / "source", each_dir / "repository"

    def run(*words: str | Path, where: Path = repository) -> str:
        return each_mount.run([*git, *words], cwd=where, timeout=100).stdout

    source.mkdir()
    run("init", "-q", "-b", "main", where=source)
    for number in range(FILES):
        path = source / f"d{number % 20}" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"line {rng.random()}\n" for _ in range(rng.randrange(1, 30))))
    (source / "d1/1.txt").chmod(0o755)
    (source / "link").symlink_to("d2/2.txt")
    run("add", ".", where=source)
    run("commit", "-qm", "first", where=source)
    # Over git's protocol: --no-local makes it read and write packs as from a server.
    run("clone", "-q", "--no-local", source, repository, where=each_dir)
    assert run("status", "--porcelain") == ""
    assert run("ls-files").count("\n") == FILES + 1
    kept = {name: f"{each_dir.name}/repository/.git/{name}" for name in ("index", "config", "refs/heads/main")}
    each_mount.sync()
    uids = {name: each_mount.info(key)["uid"] for name, key in kept.items()}
    for number in range(0, FILES, 4):
        with open(repository / f"d{number % 20}" / f"{number}.txt", "a") as file:
            file.write("changed\n")
    os.rename(repository / "d3", repository / "moved")
    (repository / "link").unlink()
    run("add", "-A")
    run("commit", "-qm", "second")
    run("config", "core.abbrev", "12")
    assert run("show", "--stat=200", "-M", "--summary", "HEAD").count("rename {d3 => moved}/") == FILES // 20
    each_mount.sync()
    assert {name: each_mount.info(key)["uid"] for name, key in kept.items()} == uids
    run("gc", "-q", "--prune=now")
    assert run("count-objects", "-v").startswith("count: 0\n")
    run("fsck", "--full", "--strict")
    run("checkout", "-q", "-b", "other", "HEAD~1")
    assert os.readlink(repository / "link") == "d2/2.txt"
    run("checkout", "-q", "main")
    assert run("status", "--porcelain") == ""
    run("push", "-q", "origin", "main:pushed")
    run("clone", "-q", "--no-local", repository, tmp_path / "out")
    run("fsck", "--full", where=tmp_path / "out")
    assert run("rev-parse", "HEAD", "HEAD^{tree}", where=tmp_path / "out") == run("rev-parse", "HEAD", "HEAD^{tree}")
    assert run("status", "--porcelain", where=tmp_path / "out") == ""
    assert run("rev-parse", "pushed", where=source) == run("rev-parse", "main")
    each_mount.sync()
    assert each_mount.fsck() == []
    each_mount.remount(empty_cache=True)
    assert run("status", "--porcelain") == ""
    run("fsck", "--full", "--strict")


def unzipped(folder: Path) -> dict[str, Any]:
    """What unzip restores: not the times of links."""
    return {
        name: facts if facts[0].startswith("0o10") else (facts[0], facts[-1])
        for name, facts in portrait(folder).items()
    }


def test_unzip(each_mount: MountedInstance, each_dir: Path, tmp_path: Path) -> None:
    """Content, modes, links and times, out of an archive on a disk and out of one in the mount."""
    unzip = need("unzip")
    original = plant(tmp_path / "in", files=40)
    (original / "hard").unlink()
    (original / "sparse").unlink()
    archive = each_dir / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for number, path in enumerate(sorted(original.rglob("*"))):
            # Zip knows every other second, in local time.
            if not path.is_symlink():
                os.utime(path, (10**9 + 2 * number, 10**9 + 2 * number))
            if path.is_symlink():
                entry = zipfile.ZipInfo(str(path.relative_to(original)), (2001, 9, 9, 1, 46, 40))
                entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
                file.writestr(entry, os.readlink(path))
            else:
                file.write(path, path.relative_to(original))
    each_mount.run(["cp", archive, tmp_path / "a.zip"])
    for folder, source in (
        (each_dir / "one", tmp_path / "a.zip"),
        (each_dir / "two", archive),
        (tmp_path / "x", archive),
    ):
        each_mount.run([unzip, "-q", source, "-d", folder], env={"TZ": "UTC"})
    wanted = unzipped(tmp_path / "x")
    assert unzipped(each_dir / "one") == unzipped(each_dir / "two") == wanted == unzipped(original)
    path = each_dir / "one/dir 1/é1/file 1.dat"
    path.chmod(0o644)
    path.write_bytes(b"changed")
    each_mount.run([unzip, "-tq", archive])
    each_mount.run([unzip, "-qo", archive, "-d", each_dir / "one"], env={"TZ": "UTC"})
    assert unzipped(each_dir / "one") == wanted


MAKEFILE = """\
CC = gcc
CFLAGS = -O1 -g -MMD -I.
objects = $(patsubst %.c,%.o,$(wildcard part*.c))

all: program shared.so
program: main.o libparts.a
\t$(CC) -o $@ main.o -L. -lparts
libparts.a: $(objects)
\tar rcs $@ $(objects)
shared.so: $(objects)
\t$(CC) -shared -o $@ $(objects)
%.o: CFLAGS += -fPIC
clean:
\trm -f *.o *.d *.a *.so program
-include *.d
"""
PARTS = 20


def test_make_of_a_small_c_project(each_mount: MountedInstance, each_dir: Path) -> None:
    """Compilers, archives and linker; times order what is rebuilt, also after a remount; what was built runs there."""
    make = [need("make"), "-j4", "-s"]
    need("gcc")
    for number in range(PARTS):
        code = f'#include "common.h"\nint part{number}(void) {{ return {number} * SCALE; }}\n'
        (each_dir / f"part{number}.c").write_text(code)
    (each_dir / "common.h").write_text("#define SCALE 2\n")
    declared = "".join(f"int part{number}(void);\n" for number in range(PARTS))
    total = " + ".join(f"part{number}()" for number in range(PARTS))
    (each_dir / "main.c").write_text(
        f'#include <stdio.h>\n{declared}int main(void) {{ printf("%d\\n", {total}); return 0; }}\n'
    )
    (each_dir / "Makefile").write_text(MAKEFILE)

    def answer() -> int:
        assert each_mount.run([*make, "-q"], cwd=each_dir, check=False).returncode == 0
        return int(each_mount.run(["./program"], cwd=each_dir).stdout)

    each_mount.run(make, cwd=each_dir)
    assert answer() == 2 * 190
    library = f"{each_dir.name}/libparts.a"
    uid = each_mount.stored_info(library)["uid"]
    # One part changes: one object is made anew. ar changes the library; the linker removes its output first.
    (each_dir / "part3.c").write_text("int part3(void) { return 1000; }\n")
    said = each_mount.run([need("make")], cwd=each_dir).stdout
    assert said.count(" -c ") == 1
    assert answer() == 2 * 187 + 1000
    assert each_mount.stored_info(library)["uid"] == uid
    before = {path.name: path.stat().st_mtime_ns for path in each_dir.iterdir()}
    each_mount.remount(empty_cache=True)
    assert {path.name: path.stat().st_mtime_ns for path in each_dir.iterdir()} == before
    assert answer() == 2 * 187 + 1000
    (each_dir / "common.h").write_text("#define SCALE 3\n")
    each_mount.run(make, cwd=each_dir)
    assert answer() == 3 * 187 + 1000
    each_mount.run([*make, "clean"], cwd=each_dir)
    assert len(os.listdir(each_dir)) == PARTS + 3
    each_mount.sync()
    assert each_mount.fsck() == []


def attributes(folder: Path) -> dict[str, dict[str, bytes]]:
    """Extended attributes of everything in a tree."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        names = sorted(os.listxattr(path, follow_symlinks=False))
        found[str(path.relative_to(folder))] = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
    return found


def whole(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, bytes]]]:
    """All that a copy with attributes has to keep."""
    return portrait(folder), attributes(folder)


def test_tar_and_rsync_round_trips_with_attributes(instance: MountedInstance, tmp_path: Path) -> None:
    """Content, modes, times, attributes and links; there, in another order, back, and read from storage."""
    rsync, setfattr = need("rsync"), need("setfattr")
    instance.mount(["xattr"])
    # Made on the disk if that keeps attributes, which a tmpfs of older kernels does not.
    source = tmp_path / "in"
    try:
        os.setxattr(tmp_path, "user.x", b"")
    except OSError:
        source = instance.path / "in"
    plant(source)
    for number, path in enumerate(sorted(path for path in source.rglob("*") if not path.is_symlink())):
        times = path.stat()
        if number % 3 == 0:
            os.setxattr(path, "user.number", b"%d\0binary\xff" % number)
            instance.run([setfattr, "-n", "user.größe", "-v", "x" * (number * 7), path])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    original = whole(source)
    assert sum(map(bool, original[1].values())) > 20

    # Without ACLs in the source, -A must not fail although the mount has none.
    copy = [rsync, "-aHAXS", "--modify-window=-1"]
    instance.run([*copy, f"{source}/", "one/"])
    assert whole(instance.path / "one") == original
    assert instance.run([*copy, "--itemize-changes", f"{source}/", "one/"]).stdout == ""

    tar = ["tar", "--xattrs", "--acls", "--sparse", "--format=posix"]
    instance.run([*tar, "-cf", "a.tar", "-C", "one", "."])
    (instance.path / "two").mkdir()
    instance.run([*tar, "-xpf", "a.tar", "-C", "two"])
    assert whole(instance.path / "two") == original

    instance.sync()
    assert instance.fsck() == []
    instance.remount(empty_cache=True)
    assert whole(instance.path / "two") == original
    instance.run([*copy, "two/", f"{tmp_path}/three/"])
    assert portrait(tmp_path / "three") == original[0]
    if source.is_relative_to(tmp_path):
        assert attributes(tmp_path / "three") == original[1]
    instance.umount()
    assert instance.fsck() == []


@pytest.mark.parametrize("words", [[], ["xattr"]])
def test_flags_for_access_control_lists_do_no_harm(local_instance: MountedInstance, words: list[str]) -> None:
    """rsync, cp, tar, mv and getfacl on a mount that has none, with the flags that people always give."""
    local_instance.mount(words)
    (local_instance.base / "d").mkdir()
    (local_instance.base / "d/file").write_bytes(b"x")
    (local_instance.base / "d/file").chmod(0o640)
    local_instance.run([need("rsync"), "-aHAX", local_instance.base / "d", "."])
    local_instance.run([need("rsync"), "-aHAX", "d", "e"])
    local_instance.run(["cp", "--preserve=all", "-r", "d", "f"])
    local_instance.run(["tar", "--acls", "--xattrs", "-cf", local_instance.base / "d.tar", "d"])
    local_instance.run(["tar", "--acls", "--xattrs", "-xpf", local_instance.base / "d.tar", "--one-top-level=g"])
    local_instance.run([need("rsync"), "-aHAX", "d", local_instance.base / "back"])
    for path in ("d/file", "e/d/file", "f/file", "g/d/file"):
        assert (local_instance.path / path).read_bytes() == b"x"
        assert stat.S_IMODE((local_instance.path / path).stat().st_mode) == 0o640
    said = local_instance.run([need("getfacl"), "--omit-header", "d/file"]).stdout
    assert said.split() == ["user::rw-", "group::r--", "other::---"]
    refused = local_instance.run([need("setfacl"), "-m", "u:1:r", "d/file"], check=False)
    assert "not supported" in refused.stderr
