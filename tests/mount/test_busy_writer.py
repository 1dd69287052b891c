"""A program that writes to one file all the time must not keep the rest of the mount from coming to an end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.mounts import MountedInstance, wait_until

_WRITER = """
import sys
with open(sys.argv[1], "ab", buffering=0) as out:
    while True:
        out.write(b"line\\n")
        sys.stdin.read(0)
"""


@pytest.mark.timeout(90)
def test_sync_returns_while_a_renamed_file_is_written(local_instance: MountedInstance) -> None:
    mount = local_instance
    mount.mount(["real_keys"])
    target = mount.path / "log.txt"
    target.write_bytes(b"first\n")
    mount.sync()
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(target)], stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: target.stat().st_size > 100, "the writer to write")
        target.rename(mount.path / "renamed.txt")
        mount.sync(timeout=30)
        with mount.registry() as registry:
            artifact = registry.artifacts.by_key("renamed.txt")
            assert artifact is not None
            wait_until(
                lambda: registry.artifacts.by_key("renamed.txt").revision.object_key == "renamed.txt",
                "the object to follow its key",
            )
    finally:
        writer.kill()
        writer.wait(10)
    mount.umount()
