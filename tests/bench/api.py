"""The rows of the Python API: the same script with lamfs and, in its own environment, with lamindb.

    python api.py lamfs|lamindb FOLDER COUNT

Prints JSON: milliseconds an artifact, by name. Storage is a local folder for both: lamindb asks its hub about any
other. There its cache() is the path of the object itself; lamfs's is a verified copy below the cache directory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lamfs(folder: Path) -> Any:
    """lamfs with a new instance."""
    for name in ("CONFIG", "DATA", "CACHE"):
        os.environ[f"LAMFS_{name}_DIR"] = str(folder / name.lower())
    import lamfs as ln

    ln.setup.login("bench")
    ln.setup.init(storage=str(folder / "store"))
    return ln


def lamindb(folder: Path) -> Any:
    """lamindb with a new instance."""
    os.environ["LAMIN_SETTINGS_DIR"] = str(folder / "settings")
    lamindb_setup = import_module("lamindb_setup")

    lamindb_setup.init(storage=str(folder / "store"), name="bench")
    lamindb_setup.settings.instance._is_on_hub = False  # nothing leaves this machine
    ln = import_module("lamindb")

    return ln


def measure(ln: Any, folder: Path, count: int) -> dict[str, float]:
    """Save, replace, cache, rename and delete ``count`` artifacts, one after the other."""
    numbers = {}
    files = folder / "files"
    files.mkdir(exist_ok=True)
    paths = [files / f"{count}-{number}.csv" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_text(f"{count},{number}," + "x" * 4000)

    def timed(name: str, work: Callable[[int], object]) -> None:
        begin = time.perf_counter()
        for number in range(count):
            work(number)
        numbers[name] = (time.perf_counter() - begin) * 1000 / count

    artifacts: dict[int, Any] = {}

    def save(number: int) -> None:
        artifacts[number] = ln.Artifact(paths[number], key=f"{count}/{number}.csv").save()

    def replace(number: int) -> None:
        artifacts[number].replace(paths[number])
        artifacts[number].save()

    def rename(number: int) -> None:
        artifacts[number].key = f"{count}/renamed-{number}.csv"
        artifacts[number].save()

    timed("save", save)
    for number, path in enumerate(paths):
        path.write_text(f"{count},{number}," + "y" * 4000)
    timed("replace", replace)
    timed("cache", lambda number: artifacts[number].cache().read_bytes())
    timed("cache again", lambda number: artifacts[number].cache().read_bytes())
    timed("rename", rename)
    timed("delete", lambda number: artifacts[number].delete(permanent=True))
    return numbers


def main() -> None:
    """One artifact, then ``COUNT``."""
    which, place, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    ln = {"lamfs": lamfs, "lamindb": lamindb}[which](place)
    measure(ln, place, 2)  # what is imported at first use
    print(json.dumps({str(number): measure(ln, place, number) for number in (1, count)}))


if __name__ == "__main__":
    main()
