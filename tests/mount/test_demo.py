"""scripts/demo as a new user runs it: its tour, a second time, and on an S3 server of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import MountedInstance, is_alive, wait_until

ROOT = Path(__file__).parents[2]
SECONDS = 110.0

pytestmark = pytest.mark.usefixtures("fuse")


@pytest.fixture
def home() -> Iterator[MountedInstance]:
    """Directories of one's own, with a watchdog for the mount at ``path``; the instance in them is not used."""
    if not (ROOT / ".venv" / ".lamfs-stamp").exists():
        # Here it would begin with installing everything: scripts/test has done that.
        assert os.environ.get("CI") != "true", "scripts/setup has not run"
        pytest.skip("scripts/setup has not run in this checkout")
    with MountedInstance(name="unused") as instance:
        instance.env |= {
            "HOME": str(instance.base),
            "LAMFS_CONFIG_DIR": str(instance.base / "fresh"),
            "USER": "visitor",
        }
        instance.env |= {"LOGNAME": "visitor"}
        yield instance


def demo(home: MountedInstance, *words: str) -> str:
    """Run the demo; what it printed."""
    done = subprocess.run(
        [ROOT / "scripts" / "demo", *words, home.path],
        env=home.env,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def uids(text: str) -> list[str]:
    return re.findall(r"^uid +(\w{20})$", text, re.MULTILINE)


def test_the_tour_and_the_tour_again(home: MountedInstance) -> None:
    said = demo(home)
    assert "made visitor/default" in said
    assert len(uids(said)) == 6
    assert len(set(uids(said))) == 1
    hashes = re.findall(r"^hash +(\S+)$", said, re.MULTILINE)
    assert hashes == ["iwc1TmF1TW_l5weDvscSHw", *5 * ["lp2-ycXcKcaliUTnR_TqHA"]]
    assert said.count("in the trash") == 1
    assert (home.path / "tour" / "flowers.csv").read_bytes() == (ROOT / "test-files" / "new_iris.csv").read_bytes()
    assert len([line for line in said.splitlines()[-3:] if line.startswith("demo: ")]) == 3

    again = demo(home)
    assert f"visitor/default is mounted at {home.path} already" in again
    assert len(set(uids(again))) == 1
    home.cli("umount", str(home.path))
    assert len(set(uids(demo(home)))) == 1
    home.cli("umount", str(home.path))
    assert home.cli("ls").stdout == "tour/flowers.csv\n"
    assert home.fsck() == []


def test_the_tour_on_s3(home: MountedInstance) -> None:
    if not (ROOT / ".venv" / "bin" / "weed").exists():
        pytest.skip("the S3 server of the demo is not installed")
    folder = home.data_dir / "lamfs-demo-s3"
    try:
        said = demo(home, "--s3")
        assert len(set(uids(said))) == 1
        assert "s3://lamfs-demo/.lamindb/" in said
        assert (folder / "env").stat().st_mode & 0o077 == 0
        pid = int((folder / "weed.pid").read_text())
        assert f"kill {pid}" in said
        assert "the S3 server is running already" in demo(home, "--s3")
        home.cli("umount", str(home.path))
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not is_alive(pid), "the server has ended", seconds=30)
        assert len(set(uids(demo(home, "--s3")))) == 1
        home.cli("umount", str(home.path))
    finally:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((folder / "weed.pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    ("words", "said"), [(["--nonsense"], "unknown option '--nonsense'"), (["/a", "/b"], "one mount point at most")]
)
def test_what_it_does_not_understand_it_says(words: list[str], said: str) -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "demo", *words], capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 1
    assert said in done.stderr
