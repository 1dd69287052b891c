"""The moving process that a mount begins with: a fork that has looked at the storage. What dies when, what lives on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import watchdog
from tests.support.mounts import BUCKET, MountedInstance, children, is_alive, wait_until
from tests.support.proxy import FaultProxy
from tests.support.servers import Server


@pytest.fixture
def behind(seaweed: Server, fuse: None) -> Iterator[tuple[MountedInstance, FaultProxy]]:
    """An instance on S3, not mounted, and the proxy between."""
    config = seaweed.config(BUCKET, f"f{os.urandom(4).hex()}/root")
    with FaultProxy(seaweed.port) as proxy:
        with MountedInstance(dataclasses.replace(config, endpoint_url=proxy.url), env=seaweed.env) as instance:
            yield instance, proxy
            proxy.clear()


def movers(pids: list[int]) -> list[int]:
    """Those that move bytes, of some processes."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text() == "lamfs-mover\n" and is_alive(pid):
                found.append(pid)
    return found


def command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def sockets(pid: int) -> int:
    return sum(os.readlink(fd).startswith("socket:") for fd in Path(f"/proc/{pid}/fd").iterdir())


def test_it_is_a_fork_and_has_its_connection_when_the_mount_is_there(
    behind: tuple[MountedInstance, FaultProxy],
) -> None:
    instance, proxy = behind
    instance.mount()
    for name in ("one", "two"):
        (instance.path / name).write_bytes(name.encode())
    instance.remount(empty_cache=True)
    [first] = movers(children(instance.pid))
    assert command(first) == command(instance.pid)
    assert sockets(first) >= 2  # the daemon's, and at least one to the bucket
    seen = len(proxy.requests)
    assert (instance.path / "one").read_bytes() == b"one"
    # (The mount looks after its lock all the time.)
    read = [head.method for head in proxy.requests[seen:] if "/_exclusion/" not in head.path]
    assert read == ["GET"]
    os.kill(first, signal.SIGKILL)
    [second] = wait_until(lambda: set(movers(children(instance.pid))) - {first}, "there is another")
    assert b"lamfs.mover.server" in command(second)
    assert (instance.path / "two").read_bytes() == b"two"
    instance.remount()
    [third] = movers(children(instance.pid))
    os.kill(instance.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(third), "it ends when the daemon is killed")
    instance.kill9()


def test_killed_while_it_looks_at_the_storage(behind: tuple[MountedInstance, FaultProxy]) -> None:
    instance, proxy = behind
    rule = proxy.add("hang", count=None)
    with subprocess.Popen(
        [sys.executable, "-m", "lamfs", "mount", str(instance.path)],
        env=instance.env,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    ) as mounting:
        wait_until(lambda: rule.hits, "it looks")
        [mover] = movers(watchdog.processes_of(str(instance.data_dir)))
        os.kill(mover, signal.SIGKILL)
        assert mounting.wait(20) == 1
        assert mounting.stderr is not None
        assert "The look at the storage ended early." in mounting.stderr.read()
    assert not instance.mounted
    proxy.clear()
    instance.mount()
    instance.fusermount()


def test_with_the_end_of_children_ignored(local_instance: MountedInstance) -> None:
    """As some programs start others: the kernel does not say then how a child ended."""
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    subprocess.run(
        [sys.executable, "-c", ignoring, sys.executable, "-m", "lamfs", "mount", str(local_instance.path)],
        env=local_instance.env,
        check=True,
        capture_output=True,
        timeout=60,
    )
    local_instance.pid = local_instance.record().pid
    (local_instance.path / "one").write_bytes(b"1")
    [mover] = movers(children(local_instance.pid))
    local_instance.expect_log(f"The moving process {mover} ended with status 0")
    os.kill(mover, signal.SIGKILL)
    wait_until(lambda: set(movers(children(local_instance.pid))) - {mover}, "there is another")
    local_instance.sync()
    local_instance.fusermount()
