"""The numbers of a mount: ``lamfs status``, ``--watch``, ``.lamfs/stats`` and ``.lamfs/metrics``; damage in storage."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.support.mounts import BUCKET, MountedInstance, wait_until
from tests.support.proxy import FaultProxy
from tests.support.servers import Server

SAMPLE = re.compile(r'^(lamfs_[a-z_]+)\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)+)\} (-?[0-9.e+]+)$')


def stats(mount: MountedInstance) -> dict[str, str]:
    """``.lamfs/stats`` as name and value; of lines with the same name the last."""
    lines = (mount.path / ".lamfs" / "stats").read_text().splitlines()
    return {name: value for name, _, value in (line.partition(": ") for line in lines)}


def metrics(text: str) -> dict[str, float]:
    """The samples of an exposition, by name; each has its HELP and TYPE first."""
    found: dict[str, float] = {}
    kinds: dict[str, str] = {}
    helped = ""
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# HELP "):
            helped = line.split(" ")[2]
            assert helped not in kinds
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == helped
            assert (kind == "counter") == name.endswith("_total")
            kinds[name] = kind
        else:
            sample = SAMPLE.match(line)
            assert sample, line
            assert sample[1] == helped
            found[sample[1]] = found.get(sample[1], 0) + float(sample[3])
    assert set(found) == set(kinds)
    return found


def test_the_files_are_read_by_any_program(shared_mount: MountedInstance) -> None:
    mount = shared_mount
    before = mount.status()
    (mount.path / "n").write_bytes(b"x" * 5000)
    mount.sync()
    fd = os.open(mount.path / "n", os.O_RDONLY | os.O_DIRECT)
    try:
        assert os.read(fd, 8192) == b"x" * 5000
    finally:
        os.close(fd)
    path = mount.path / ".lamfs" / "stats"
    now = stats(mount)
    assert int(now["writes"]) == before["writes"] + 1
    assert int(now["write_bytes"]) == before["write_bytes"] + 5000
    assert int(now["read_bytes"]) == before["read_bytes"] + 5000
    assert int(now["stored_files"]) == before["stored_files"] + 1
    assert int(now["owed_bytes"]) == 0
    assert now["mountpoint"] == str(mount.path)
    rate = wait_until(lambda: float(stats(mount)["write_bytes_per_second"]), "a sample with the write in it", seconds=5)
    assert rate <= 5000
    text = path.read_text()
    assert mount.run(["cat", path]).stdout.splitlines()[:6] == text.splitlines()[:6]
    assert mount.run(["head", "-c", "11", path]).stdout == text[:11]
    assert mount.run(["grep", "^pid:", path]).stdout == f"pid: {mount.pid}\n"
    assert abs(int(mount.run(["wc", "-c", path]).stdout.split()[0]) - len(text)) < 50
    assert mount.run(["tail", "-n", "1", path]).stdout == text[text[:-1].rindex("\n") + 1 :]
    assert mount.run(["sh", "-c", "while read -r line; do echo $line; done < .lamfs/stats"]).stdout.count(": ") > 30
    with open(path, "rb", buffering=0) as file:
        begin, whole = file.read(10), os.pread(file.fileno(), 1 << 20, 0)
        assert begin + file.read() == whole
    assert path.stat().st_size == 0
    assert sorted(os.listdir(mount.path / ".lamfs")) == ["info", "metrics", "stats"]
    with pytest.raises(PermissionError):
        path.open("a")
    found = metrics((mount.path / ".lamfs" / "metrics").read_text())
    assert found["lamfs_writes_total"] == before["writes"] + 1
    assert found["lamfs_start_time_seconds"] < time.time()


def test_watch_ends_with_ctrl_c(shared_mount: MountedInstance) -> None:
    mount = shared_mount
    command = [sys.executable, "-m", "lamfs", "status", "--watch"]
    process = subprocess.Popen([*command, "--json"], env=mount.env, stdout=subprocess.PIPE, text=True, cwd="/")
    assert process.stdout is not None
    seen = [json.loads(process.stdout.readline()) for _ in range(2)]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 0
    assert [one["mounts"][0]["mountpoint"] for one in seen] == [str(mount.path)] * 2
    assert {"owed_bytes", "rates", "retries", "storage_damage", "cache"} <= set(seen[0]["mounts"][0])

    ours, theirs = pty.openpty()
    terminal = subprocess.Popen(command, env=mount.env, stdout=theirs, stderr=theirs, cwd="/", start_new_session=True)
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + 20
    while shown.count(b"\x1b[H") < 2 and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.5)[0]:
            shown += os.read(ours, 65536)
    terminal.send_signal(signal.SIGINT)
    assert terminal.wait(10) == 0
    os.close(ours)
    assert shown.count(b"\x1b[2J") == 1
    assert b"writes   " in shown
    assert b"Traceback" not in shown


def test_damage_in_storage_is_told_everywhere(seaweed: Server, seaweed_proxy: FaultProxy, fuse: None) -> None:
    """Which artifact, which object, which block; and what is tried again, how often."""
    config = dataclasses.replace(seaweed.config(BUCKET, f"d{os.urandom(4).hex()}/root"), endpoint_url=seaweed_proxy.url)
    with MountedInstance(config, env=seaweed.env) as instance:
        instance.mount()
        (instance.path / "good").write_bytes(b"g" * 70_000)
        (instance.path / "bad one").write_bytes(b"b" * 70_000)
        info = instance.stored_info("bad one")
        instance.fusermount()
        shutil.rmtree(instance.cache_dir)
        instance.mount()
        seaweed_proxy.add("corrupt", method="GET", path=info["uid"], at=70, count=None)
        with pytest.raises(OSError) as refused:
            (instance.path / "bad one").read_bytes()
        assert refused.value.errno == errno.EIO
        assert len((instance.path / "good").read_bytes()) == 70_000
        status = instance.status()
        (damage,) = status["storage_damage"]
        assert (damage["key"], damage["uid"], damage["block"]) == ("bad one", info["uid"], 0)
        assert damage["object"].endswith(info["uid"])
        assert status["io_errors"] >= 1
        assert status["cache"]["read_misses"] == 1
        line = next(line for line in instance.log().splitlines() if "STORAGE DAMAGE" in line)
        assert "block 0 of artifact 'bad one'" in line
        assert damage["object"] in line
        assert info["uid"] in stats(instance)["storage_damage"]
        found = metrics((instance.path / ".lamfs" / "metrics").read_text())
        assert found["lamfs_storage_damage_total"] >= 1
        assert found["lamfs_cache_damage_total"] == 0
        assert found["lamfs_cache_misses_total"] == 1
        assert "STORAGE DAMAGE" in instance.cli("status").stdout

        seaweed_proxy.clear()
        seaweed_proxy.add("status", code=403, error="AccessDenied", method="PUT", count=None)
        (instance.path / "late").write_bytes(b"1")
        retry = wait_until(lambda: instance.status()["retries"], "a try has failed", seconds=30)[0]
        assert retry["what"] == "put late"
        assert retry["attempts"] >= 1
        assert "retry" in stats(instance)
        seaweed_proxy.clear()
        instance.sync()
        assert instance.status()["retrying"] == 0
        assert instance.status()["failed_tries"] >= 1
