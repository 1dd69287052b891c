"""The five minutes of README.md, run as they stand there: the shell on a real mount, then Python."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.support.mounts import MountedInstance

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("fuse")


def test_the_five_minutes_of_the_readme() -> None:
    pytest.importorskip("pandas")
    text = (ROOT / "README.md").read_text()
    shell = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)[0]
    python = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    with MountedInstance(name="unused") as instance:
        programs = instance.base / "bin"
        programs.mkdir()
        (programs / "lamfs").write_text(f'#!/bin/sh\nexec {sys.executable} -m lamfs "$@"\n')
        (programs / "lamfs").chmod(0o755)
        env = {
            "PATH": f"{programs}:{instance.env['PATH']}",
            "USER": "reader",
            "LOGNAME": "reader",
            "LAMFS_CONFIG_DIR": str(instance.base / "fresh"),
        }
        # At the mountpoint that this instance's watchdog looks after.
        shell = shell.replace("~/data", str(instance.path))
        done = instance.run(["bash", "-eu", "-o", "pipefail", "-c", shell], cwd=ROOT, env=env)
        assert "made reader/default" in done.stdout
        uids = re.findall(r"^uid +(\w+)$", done.stdout, re.MULTILINE)
        assert f"restored: {uids[0]}  flowers/iris.csv" in done.stdout
        assert f"{instance.path} is unmounted." in done.stdout
        program = instance.base / "tour.py"
        program.write_text(python + "print(ln.Artifact.get(key='flowers/six.csv').hash)\n")
        done = instance.run([sys.executable, str(program)], cwd=ROOT, env=env)
        assert done.stdout.splitlines() == ["lp2-ycXcKcaliUTnR_TqHA"]
        done = instance.run([sys.executable, "-m", "lamfs", "fsck", "--data"], cwd=ROOT, env=env)
        assert done.stdout == "reader/default: clean (3 artifacts, 3 objects, 640 B read)\n"
