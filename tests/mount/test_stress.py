"""stress-ng and fio on a mount, for scripts/soak alone: no wrong result, a quiet log, a clean fsck, how much memory.

LAMFS_SOAK: how many times as long as the shortest run, and as many bytes.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounts import MountedInstance, children, s3_instance
from tests.support.servers import Server

SOAK = int(os.environ.get("LAMFS_SOAK", "1"))
SECONDS = 2 * SOAK
TIMEOUT = 60.0 + 10 * SECONDS
"""Some stressors remove in the end what they have made all the time."""

# The class "filesystem" of stress-ng, and others that have to do with files, but for
#   bind-mount, binderfs, eventfd, ioprio, procfs: they use no file in --temp-path
#   fanotify: marks every mount of the machine
#   exec: not as root
#   fiemap, verity: FUSE has neither
#   fsize: wants fallocate, which pyfuse3 does not offer; what stress-ng does instead knows no RLIMIT_FSIZE
#   io-uring: its statx fails on a plain disk too (fio has io_uring below)
#   acl: lamfs has none
STRESSORS = [
    "access", "aio", "aiol", "chattr", "chdir", "chmod", "chown", "copy-file", "dentry", "dir", "dirdeep", "dirmany",
    "dnotify", "dup", "fallocate", "fault", "fcntl", "file-ioctl", "filename", "flock", "fpunch", "fstat", "getdent",
    "handle", "hdd", "inode-flags", "inotify", "io", "iomix", "lease", "link", "locka", "lockf", "lockofd", "mincore",
    "mknod", "mmap", "msync", "open", "readahead", "rename", "seek", "sendfile", "symlink", "sync-file", "touch",
    "utime", "xattr",
]  # fmt: skip
MORE = {
    "fallocate": ["--fallocate-bytes", "32m"],
    "hdd": ["--hdd-bytes", "32m"],
    "iomix": ["--iomix-bytes", "32m"],
    "sync-file": ["--sync-file-bytes", "8m"],  # it writes them first, in place of fallocate
    "mmap": ["--mmap-file", "--mmap-async", "--mmap-bytes", "16m"],
}
# All at once, but for those that do not do file work, and for file-ioctl, which cannot bear to be stopped in fallocate.
MIXED = sorted({*STRESSORS} - {"chattr", "dnotify", "dup", "fault", "file-ioctl", "inode-flags", "inotify", "io"})

# Each writes 64 MiB * LAMFS_SOAK in all, or what it says, and reads and checks it.
JOBS = {
    "seq-psync": "--rw=write --ioengine=psync --bs=128k --numjobs=4 --fsync=64",
    "rand-psync": "--rw=randwrite --ioengine=psync --bs=4k --numjobs=4 --fsync=2000",
    "rand-psync-direct": "--rw=randwrite --ioengine=psync --bs=4k --numjobs=4 --direct=1",
    "mixed-psync": "--rw=randrw --ioengine=psync --bs=4k --numjobs=2 --verify_backlog=256",
    "seq-libaio-direct": "--rw=write --ioengine=libaio --iodepth=8 --bs=1m --numjobs=4 --direct=1",
    "rand-libaio-direct": "--rw=randwrite --ioengine=libaio --iodepth=16 --bsrange=4k-64k --numjobs=4 --direct=1",
    "rand-libaio": "--rw=randwrite --ioengine=libaio --iodepth=16 --bs=8k --numjobs=1 --fsync=1000",
    "rand-uring-direct": "--rw=randwrite --ioengine=io_uring --iodepth=16 --bs=16k --numjobs=4 --direct=1",
    "seq-mmap": "--rw=write --ioengine=mmap --bs=4k --numjobs=4 --fsync=4096",
    "rand-mmap": "--rw=randwrite --ioengine=mmap --bs=4k --numjobs=1",
    "small-osync": "--rw=write --ioengine=sync --bs=4k --numjobs=1 --filesize=32k --nrfiles=64 --sync=1",
}


@pytest.fixture(scope="module", params=["local", "s3"])
def stressed(request: pytest.FixtureRequest, fuse: None) -> Iterator[MountedInstance]:
    """One instance and one daemon for all stressors; in the end everything is stored, and fsck finds it well."""
    with contextlib.ExitStack() as stack:
        if request.param == "local":
            instance = stack.enter_context(MountedInstance())
        else:
            server: Server = request.getfixturevalue("seaweed")
            instance = stack.enter_context(s3_instance(server))
        instance.mount(["xattr"])
        yield instance
        instance.extend(TIMEOUT)
        if instance.mounted:
            instance.umount(timeout=TIMEOUT)
        assert instance.spooled() == []
        assert instance.fsck(timeout=TIMEOUT) == []


def tell(request: pytest.FixtureRequest, text: str) -> None:
    """A line among pytest's own."""
    capture: Any = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{text}", flush=True)


def memory(instance: MountedInstance) -> str:
    """Resident memory of the mount's processes, and the most it has been."""
    found = []
    for pid in (instance.pid, *children(instance.pid)):
        status = Path(f"/proc/{pid}/status").read_text()
        now, most = (int(value) >> 10 for value in re.findall(r"^(?:VmRSS|VmHWM):\s*(\d+)", status, re.MULTILINE)[::-1])
        found.append(f"{now} MiB (at most {most})")
    # The last child is libfuse's helper, which waits for the end.
    return f"daemon {found[0]}, mover {max(found[1:], key=lambda text: int(text.split()[0]))}"


def stress_ng(instance: MountedInstance, folder: Path, name: str, report: Path) -> list[str]:
    """Lines in which stress-ng complains; a stressor that did nothing is one too."""
    names, workers, seconds = (MIXED, 1, 5 * SECONDS) if name == "mixed" else ([name], 2, SECONDS)
    words = ["stress-ng", "--temp-path", str(folder), "--timeout", str(seconds), "--verify", "--metrics-brief"]
    for stressor in names:
        words += [f"--{stressor}", str(workers), *MORE.get(stressor, [])]
    done = instance.run([*words, "--yaml", str(report)], cwd="/", timeout=TIMEOUT, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    bad = [line for line in lines if re.search(r"fail:|error:|skipp", line)]
    if not bad and done.returncode:
        bad = [f"stress-ng ended with {done.returncode}", *lines]
    did = re.findall(r"stressor: (\S+)\s+bogo-ops: [1-9]", report.read_text())
    # One round of xattr sets thousands of attributes of one file, more than there is time for.
    return bad if did or bad or name == "xattr" else [f"{name} did nothing", *lines]


@pytest.mark.parametrize("name", [*STRESSORS, "mixed"])
def test_stress_ng(name: str, stressed: MountedInstance, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """What stress-ng finds wrong with the mount, and not with a plain folder too; then the folder can be removed."""
    stressed.extend(4 * TIMEOUT)
    folder = stressed.path / name
    folder.mkdir()
    bad = stress_ng(stressed, folder, name, tmp_path / "report")
    if bad:
        plain = tmp_path / "plain"
        plain.mkdir()
        assert stress_ng(stressed, plain, name, tmp_path / "plain-report"), "\n".join(bad)
        tell(request, f"{name} fails on a plain folder too: {bad[0]}")
    stressed.run(["rm", "-rf", str(folder)], cwd="/", timeout=TIMEOUT)
    stressed.sync(timeout=TIMEOUT)
    stressed.check_log()
    if name in (STRESSORS[0], "mixed"):  # after the first and after the last
        tell(request, f"stress-ng {name}: {memory(stressed)}")


@pytest.mark.parametrize("name", JOBS)
def test_fio(name: str, stressed: MountedInstance, request: pytest.FixtureRequest) -> None:
    """What fio wrote it reads back: from the mount that took it, from storage, and after it was written over."""
    stressed.extend(6 * TIMEOUT)
    folder = stressed.path / f"fio-{name}"
    folder.mkdir()
    words = JOBS[name].split()
    jobs = next(int(word.partition("=")[2]) for word in words if word.startswith("--numjobs="))
    if "--filesize=32k" not in words:
        words.append(f"--size={64 * SOAK // jobs}m")
    command = ["fio", f"--name={name}", f"--directory={folder}", "--verify=crc32c", "--verify_fatal=1", *words]
    for seed in (1, 2):
        stressed.run([*command, f"--randseed={seed}"], cwd="/", timeout=TIMEOUT)
        stressed.sync(timeout=TIMEOUT)
        stressed.remount(empty_cache=True)
        if "--rw=randrw" not in words:  # which of these blocks were written, fio does not know any more
            stressed.run([*command, f"--randseed={seed}", "--verify_only=1"], cwd="/", timeout=TIMEOUT)
        stressed.check_log()
    tell(request, f"fio {name}: {memory(stressed)}")
    stressed.run(["rm", "-rf", str(folder)], cwd="/", timeout=TIMEOUT)
