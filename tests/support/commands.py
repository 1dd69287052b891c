"""The command ``lamfs``: as a user runs it (``lamfs``, in its own process), and faster (``quick``, in this process)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
SECONDS = 60.0

Word = str | os.PathLike[str]


def lamfs(*words: Word, code: int = 0) -> str:
    """Run ``lamfs``, which must end with ``code``. Returns what it printed on stdout (stderr, if ``code`` is not 0)."""
    done = subprocess.run(
        [sys.executable, "-m", "lamfs", *map(os.fspath, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=SECONDS,
        env={
            **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
            "PYTHONPATH": str(ROOT),
        },
    )
    return _checked(words, code, done.returncode, done.stdout, done.stderr)


def quick(*words: Word, code: int = 0) -> str:
    """As ``lamfs``, but in this process, without starting another."""
    from lamfs.cli import main

    done = CliRunner().invoke(main, [os.fspath(word) for word in words])
    return _checked(words, code, done.exit_code, done.stdout_bytes, done.stderr_bytes)


def _checked(words: tuple[Word, ...], code: int, ended: int, stdout: bytes, stderr: bytes) -> str:
    output, problems = os.fsdecode(stdout), os.fsdecode(stderr)
    assert ended == code, f"{words} ended with {ended}\n{output}{problems}"
    assert "Traceback" not in output + problems
    assert "should not have happened" not in problems
    return problems if code else output


def quick_json(*words: Word) -> Any:
    """The result of ``lamfs … --json``."""
    return json.loads(quick(*words, "--json"))
