"""The row of the Python API: lamfs beside LaminDB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench import api
from tests.bench.bench import Bench, Numbers, row
from tests.bench.systems import LaminDB, System


@row("API", "Python API: save, replace, cache, rename and delete 4 KiB", only=("lamfs", "lamindb"), mounted=False)
def python_api(bench: Bench, system: System) -> Numbers:
    """One artifact by itself, then many one after the other, in a new instance; a process of its own."""
    python = LaminDB.found() if isinstance(system, LaminDB) else sys.executable
    assert python is not None
    with tempfile.TemporaryDirectory(dir=bench.base) as folder:
        done = subprocess.run(
            [python, api.__file__, system.name, folder, str(bench.scale.saves)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{system.name}: {done.stderr[-800:]}")
    found: dict[str, Numbers] = json.loads(done.stdout.splitlines()[-1])
    return {
        f"{name}, {'one' if count == '1' else f'each of {int(count):,}'} [ms]": value
        for count, numbers in found.items()
        for name, value in numbers.items()
    }
