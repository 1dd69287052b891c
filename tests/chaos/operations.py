"""What users do: plans of what to do and what it promises, and carrying them out, also while something is killed.

Each function that makes a plan returns None when there is nothing to do it with.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import oracle
from tests.chaos.content import Piece, Version
from tests.chaos.model import LARGE, Doubt, File, Model, Plan, Stage
from tests.chaos.world import SLUG, Mount, S3Storage, Violation, World, pick, wait_until

SUFFIXES = (".bin", ".csv", ".fastq.gz", "", ".h5ad")
SMALL = (0, 1, 100, 4096, 5000, 70_000, 300_000, 300_000, 1 << 20, 5 << 20)
FOLDERS = ("", "", "runs", "runs/day 1", "data", "é")
HURRY = 0.3
"""How often somebody goes on in one mount before it shows what was done in the other."""
ALLOWED_IN_A_HURRY = frozenset({"ESTALE", "ENOENT", "EEXIST"})


@dataclass
class Sizes:
    """How large files are, and how many large ones there may be at a time."""

    large_share: float
    large_mib: int
    most_large: int


class Round:
    """One world, its model, and the dice. ``holder`` is the machine that works with the instance now."""

    def __init__(self, world: World, model: Model, sizes: Sizes, rng: random.Random) -> None:
        self.world = world
        self.model = model
        self.sizes = sizes
        self.rng = rng
        self.holder = world.machine("A")
        self.fsyncs = True
        """Whether somebody waits for storage now and then."""
        self._names = 0

    # -- dice ---------------------------------------------------------------------------------------------------

    def stream(self) -> int:
        """The number of a stream that nobody has used."""
        return self.rng.getrandbits(62) + 1

    def size(self) -> int:
        """How large a new file is to be: half of them are large."""
        if self.model.large() < self.sizes.most_large and self.rng.random() < self.sizes.large_share:
            return LARGE + self.rng.randrange(0, max(self.sizes.large_mib, 1) << 20)
        return self.rng.choice(SMALL) + self.rng.randrange(2)

    def wants_fsync(self) -> bool:
        """Whether the next writer calls fsync."""
        return self.rng.random() < 0.3 and self.fsyncs

    def version(self) -> Version:
        """A new content."""
        return self.model.know(Version.whole(self.size(), self.stream()))

    def new_path(self, suffix: str | None = None) -> str:
        """A path that was never used, in one of a few folders."""
        self._names += 1
        end = self.rng.choice(SUFFIXES) if suffix is None else suffix
        folder = self.rng.choice([*FOLDERS, *self.model.folders])
        name = f"n{self._names}-{self.rng.getrandbits(24):06x}{end}"
        return f"{folder}/{name}" if folder else name

    def some_path(self, condition: Callable[[File], bool] = lambda file: True) -> str | None:
        """A file that is there; large ones as often as others."""
        paths = [path for path, file in sorted(self.model.tree.items()) if not file.version.opaque and condition(file)]
        large = [path for path in paths if self.model.tree[path].version.size >= LARGE]
        if large and self.rng.random() < self.sizes.large_share:
            return self.rng.choice(large)
        return self.rng.choice(paths) if paths else None

    def mount(self) -> Mount:
        """One of the mounts of the machine that works."""
        return self.rng.choice(self.holder.active)

    def file(self, version: Version, path: str, *, stored: bool = False) -> File:
        """A content that is acknowledged here."""
        return File(version, frozenset({path.rpartition("/")[2]}), self.holder.name, stored)

    # -- plans for the mount ------------------------------------------------------------------------------------

    def plan_create(self) -> Plan:
        """A new file."""
        path, version, fsync = self.new_path(), self.version(), self.wants_fsync()
        step = {"do": "write", "path": path, "pieces": version.listed(), "how": "create", "fsync": fsync}
        stages = [Stage({path: None})]
        if fsync:
            stages.append(Stage({path: self.file(version, path, stored=True)}))
        stages.append(Stage({path: self.file(version, path, stored=fsync)}))
        return Plan(f"create {path}", stages, step, torn={path: [version]})

    def plan_replace(self) -> Plan | None:
        """Another content for a file, in place or by a temporary file that is renamed over it."""
        path = self.some_path()
        if path is None:
            return None
        old, fsync = self.model.tree[path], self.wants_fsync()
        version = (
            self.version()
            if old.version.size < LARGE
            else self.model.know(Version.whole(old.version.size, self.stream()))
        )
        new = old.with_version(version, self.holder.name, stored=fsync)
        step: dict[str, object] = {"do": "write", "path": path, "pieces": version.listed(), "fsync": fsync}
        if self.rng.random() < 0.5:
            step["how"] = "truncate"
            promises = [Stage({path: new})] * (2 if fsync else 1)
            torn = {path: [old.version, version]}
            return Plan(f"overwrite {path}", [Stage({path: old}), *promises], step, torn=torn)
        temporary = f"{path}.part{self.rng.getrandbits(16):04x}"
        step |= {"how": "atomic", "temporary": temporary}
        whole = Stage({temporary: new.called(temporary), path: old})
        stages = [Stage({temporary: None, path: old}), *([whole] * (2 if fsync else 1))]
        stages.append(Stage({temporary: None, path: new}))
        return Plan(f"replace {path}", stages, step, torn={temporary: [version]})

    def plan_patch(self) -> Plan | None:
        """A few writes in the middle of a file, at its end, or a truncate."""
        path = self.some_path()
        if path is None:
            return None
        old, version = self.model.tree[path], self.model.tree[path].version
        versions, writes = [version], []
        for _ in range(self.rng.randrange(3)):
            start = version.size if self.rng.random() < 0.3 else self.rng.randrange(version.size + 1)
            end = start + self.rng.choice((1, 100, 4096, 70_000, 1 << 20, 5 << 20))
            piece = Piece(start, min(end, start + max(version.size, 8192)), self.stream())
            version = version.written(*piece)
            versions.append(version)
            writes.append(list(piece))
        size = None
        if not writes or self.rng.random() < 0.2:
            size = self.rng.choice((version.size // 2, version.size + 10_000, version.size))
            version = version.cut(size)
            versions.append(version)
        fsync = self.wants_fsync()
        step: dict[str, object] = {"do": "patch", "path": path, "writes": writes, "size": size, "fsync": fsync}
        self.model.know(version)
        new = old.with_version(version, self.holder.name, stored=fsync)
        stages = [Stage({path: old}), *([Stage({path: new})] * (2 if fsync else 1))]
        return Plan(f"patch {path}", stages, step, torn={path: versions})

    def plan_fsync(self) -> Plan | None:
        """An fsync of a file that is there."""
        path = self.some_path()
        if path is None:
            return None
        old = self.model.tree[path]
        if not self.fsyncs:
            return None
        new = File(old.version, old.names, old.machine, stored=True)
        step: dict[str, object] = {"do": "patch", "path": path, "writes": [], "fsync": True}
        return Plan(f"fsync {path}", [Stage({path: old}), Stage({path: new}), Stage({path: new})], step)

    def plan_rename(self) -> Plan | None:
        """A file gets another name, sometimes that of another file."""
        path = self.some_path()
        if path is None:
            return None
        file, to = self.model.tree[path], self.new_path()
        if self.rng.random() < 0.2:
            to = self.some_path(lambda other: other is not file) or to
        before: dict[str, File | None] = {path: file, to: self.model.tree.get(to)}
        after = {path: None, to: file.called(to)}
        return Plan(f"rename {path} to {to}", [Stage(before), Stage(after)], {"do": "rename", "path": path, "to": to})

    def plan_rename_folder(self) -> Plan | None:
        """A folder gets another name."""
        broken = {path.partition("/")[0] for path in self.model.broken}
        folders = sorted({path.partition("/")[0] for path in self.model.tree if "/" in path} - {oracle.LOST} - broken)
        if not folders:
            return None
        folder = self.rng.choice(folders)
        self._names += 1
        to = f"folder {self._names}"
        below = {path: file for path, file in self.model.tree.items() if path.startswith(f"{folder}/")}
        before: dict[str, File | None] = dict(below)
        after: dict[str, File | None] = dict.fromkeys(below)
        for path, file in below.items():
            moved = to + path[len(folder) :]
            before[moved], after[moved] = None, file
        self.model.folders.append(to)
        return Plan(
            f"rename folder {folder} to {to}", [Stage(before), Stage(after)], {"do": "rename", "path": folder, "to": to}
        )

    def plan_unlink(self) -> Plan | None:
        """A file goes to the trash."""
        path = self.some_path()
        if path is None:
            return None
        file = self.model.tree[path]
        stages = [Stage({path: file}), Stage({path: None}, trashed=(file,))]
        return Plan(f"unlink {path}", stages, {"do": "unlink", "path": path})

    # -- plans for commands -------------------------------------------------------------------------------------

    def source(self, version: Version, suffix: str) -> Path:
        """A file of this content, outside of the mount."""
        path = self.world.base / f"source{suffix}"
        with path.open("wb") as file:
            for chunk in version.chunks():
                file.write(chunk)
        return path

    def plan_save(self) -> Plan:
        """``lamfs save``."""
        path, version = self.new_path(), self.version()
        source = self.source(version, "".join(Path(path).suffixes))
        words = ("save", str(source), "--key", path, "--instance", SLUG)
        stages = [Stage({path: None}), Stage({path: self.file(version, path, stored=True)})]
        return Plan(f"save {path}", stages, words=words)

    def plan_replace_command(self) -> Plan | None:
        """``lamfs replace``."""
        path = self.some_path(lambda file: file.stored)
        if path is None:
            return None
        old, version = self.model.tree[path], self.version()
        source = self.source(version, "".join(Path(path).suffixes))
        words = ("replace", path, str(source), "--instance", SLUG)
        new = old.with_version(version, self.holder.name, stored=True)
        return Plan(f"replace {path} by a command", [Stage({path: old}), Stage({path: new})], words=words)

    def plan_delete(self) -> Plan | None:
        """``lamfs delete``, for good or not."""
        path = self.some_path(lambda file: file.stored)
        if path is None:
            return None
        file, for_good = self.model.tree[path], self.rng.random() < 0.5
        words = ("delete", *(("--permanent", "--yes") if for_good else ()), path, "--instance", SLUG)
        after = Stage({path: None}, trashed=() if for_good else (file,))
        return Plan(f"delete {path}", [Stage({path: file}), after], words=words)

    def plan_restore(self) -> Plan | None:
        """``lamfs restore``."""
        if not self.model.trash:
            return None
        file, path = self.rng.choice(self.model.trash), self.new_path()
        uid = next(
            (
                record["uid"]
                for record in self.holder.json("ls", "--trash", "--instance", SLUG) or ()
                if (record["key"] or "").rpartition("/")[2] in file.names and record["size"] == file.version.size
            ),
            None,
        )
        if uid is None:
            return None
        words = ("restore", uid, "--key", path, "--instance", SLUG)
        after = Stage({path: file.called(path)}, restored=(file,))
        return Plan(f"restore {path}", [Stage({path: None}), after], words=words)

    PLANS = {  # noqa: RUF012
        "create": 6.0, "replace": 3.0, "patch": 4.0, "fsync": 1.0, "rename": 2.0, "rename_folder": 0.5, "unlink": 1.5,
        "save": 1.5, "replace_command": 1.0, "delete": 1.0, "restore": 0.7,
    }  # fmt: skip
    IN_MOUNT = ("create", "replace", "patch", "fsync", "rename", "unlink")

    def plan(self, *, in_mount: bool = False) -> Plan:
        """Something to do."""
        weights = {name: self.PLANS[name] for name in self.IN_MOUNT} if in_mount else dict(self.PLANS)
        if self.model.large() >= self.sizes.most_large:
            weights["unlink"] = weights["delete"] = 4.0
            if in_mount:
                del weights["delete"]
        while True:
            plan: Plan | None = getattr(self, f"plan_{pick(self.rng, weights)}")()
            if plan is not None:
                return plan

    # -- doing --------------------------------------------------------------------------------------------------

    def view(self, mount: Mount, plan: Plan) -> bool:
        """Wait until a mount shows what others did to the paths of a plan. False: somebody did not want to wait."""
        others = {self.model.changed_by.get(path, str(mount)) for path in plan.stages[0].paths} - {str(mount)}
        if not others:
            return True
        if len(self.holder.active) > 1 and self.rng.random() < HURRY:
            return False
        oracle.resolve(self.model, mount, [Doubt(f"before '{plan.what}': what {others} did", plan.stages[:1])])
        return True

    def run(self, plan: Plan) -> None:
        """Do it, undisturbed: it has to succeed. Raises Violation."""
        mount = self.mount()
        calm = plan.words is not None or self.view(mount, plan)
        self.make_folders(mount, plan)
        promises, error = self.perform(mount, plan)
        by = str(mount) if plan.words is None else f"{self.holder.name}'s command"
        if error is None:
            self.model.apply(plan.stages[-1], by)
        elif (calm or error not in ALLOWED_IN_A_HURRY) and not self.world.storage.stalled():
            raise Violation("refused", f"{plan.what} in {by}: {error}")
        else:
            oracle.resolve(self.model, mount, [plan.doubt(promises)])
        self.count(plan, disturbed=False)

    def count(self, plan: Plan, *, disturbed: bool) -> None:
        """For the report."""
        self.model.count("operations")
        if disturbed:
            self.model.count("killed in the middle")
        sizes = [file.version.size for stage in plan.stages for file in stage.paths.values() if file is not None]
        if max(sizes, default=0) >= LARGE:
            self.model.count("of large files")

    def make_folders(self, mount: Mount, plan: Plan) -> None:
        """The folders above what a plan makes."""
        if plan.step is None:
            return
        paths = [str(plan.step["to"])] if plan.step["do"] == "rename" else list(plan.stages[-1].paths)
        for path in paths:
            parts = path.split("/")[:-1]
            for depth in range(len(parts)):
                mount.do({"do": "mkdir", "path": "/".join(parts[: depth + 1])})

    def perform(self, mount: Mount, plan: Plan) -> tuple[int, str | None]:
        """Carry a plan out: how many promises were given, and what went wrong."""
        if plan.step is not None:
            mount.begin(plan.step)
            acks, reply = mount.end()
            return len(acks), reply["error"]
        assert plan.words is not None
        result = self.holder.cli(*plan.words)
        if result.hung:
            raise Violation("hang", str(result))
        return int(result.good), None if result.good else str(result)

    def run_and_kill(self, plan: Plan, what: str, delay: float) -> Doubt | None:
        """Do it, and ``delay`` seconds after its beginning kill ``what``: daemon, mover, both, worker, command (by
        SIGKILL, SIGTERM or SIGINT), server. A promise that was given counts. What is left open is returned."""
        mount = self.mount()
        if plan.words is None:
            self.view(mount, plan)
            self.make_folders(mount, plan)
            assert plan.step is not None
            mount.begin(plan.step)
            deadline = time.monotonic() + delay
            wait_until(lambda: time.monotonic() > deadline, delay, every=0.001)
            self.kill(mount, what)
            acks, reply = mount.end()
            promises, error = len(acks), reply["error"]
            if what == "worker":
                mount.stop_worker()  # it may have answered in its last moment
        else:
            process = self.holder.start(*plan.words)
            wait_until(lambda: process.poll() is not None, delay, every=0.005)
            if what == "command":
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(
                        self.rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
                    )
            else:
                self.kill(mount, what)
            result = self.holder.finish(process, plan.words)
            if result.hung:
                raise Violation("hang", str(result))
            promises, error = int(result.good), None if result.good else "failed"
        self.count(plan, disturbed=True)
        by = str(mount) if plan.words is None else f"{self.holder.name}'s command"
        if error is None:
            self.model.apply(plan.stages[-1], by)
            return None
        return plan.doubt(promises)

    def kill(self, mount: Mount, what: str) -> None:
        """SIGKILL."""
        storage = self.world.storage
        if what == "worker":
            pid = mount.worker_pid
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
        elif what == "server" and isinstance(storage, S3Storage):
            storage.server.kill()
        else:
            self.holder.kill_daemons([mount], what=what)
        self.model.count(f"kills of {what}")
        self.world.log.write("killed", what=what)

    def remount_dead(self) -> None:
        """Mount again what has lost its daemon; that has to succeed. Raises Violation."""
        self.world.storage.running()
        for mount in self.holder.active:
            if mount.daemon is None:
                mount.stop_worker()
                self.must_mount(mount, "after a kill, ")

    def must_mount(self, mount: Mount, when: str = "") -> None:
        """``lamfs mount``, which has to succeed. Raises Violation, which says ``when``."""
        result = self.holder.mount(mount)
        if not result.good:
            raise Violation("refused", f"{when}{result}")

    def sync(self, mount: Mount) -> None:
        """``lamfs sync``."""
        self.holder.must("sync", str(mount.path))
        if len(self.holder.active) == 1:
            self.model.stored(self.holder.name)
