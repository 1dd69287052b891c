"""What goes wrong, by kind. Each function does one thing that goes wrong, what a careful user does then, and the check.

Damage is done while no daemon of the machine runs, but for the cache. A fault that does not apply now (there is no
spool file, no cache) does nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import string
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from blake3 import blake3

from lamfs.cache.index import NAME as CACHE_INDEX
from tests.chaos import oracle
from tests.chaos.content import CHUNK, PAGE, Piece, Version, explain
from tests.chaos.model import Doubt, Excuse, File, Model, Stage
from tests.chaos.operations import Round
from tests.chaos.recovery import recover, try_repairs, unmount
from tests.chaos.world import SLUG, Machine, Mount, S3Storage, Violation, wait_until

BLOCK = 4 << 20
SEAL_SECONDS = 6.0
"""How long a file waits in the spool until it is sure to be hashed."""
Fault = Callable[[Round], None]
FAULTS: dict[str, list[Fault]] = {}
"""By kind, as --only names them."""


def kind(name: str) -> Callable[[Fault], Fault]:
    """A function is a fault of this kind."""

    def add(fault: Fault) -> Fault:
        FAULTS.setdefault(name, []).append(fault)
        return fault

    return add


# -- getting there ----------------------------------------------------------------------------------------------------


def exact(round: Round) -> None:
    """Every mount shows just what is predicted."""
    for mount in round.holder.active:
        oracle.check_exact(round.holder, mount, round.model)
    round.world.check()


def after_damage(round: Round, excuses: Iterable[Excuse] = (), *, restore: bool = True, stuck: bool = False) -> None:
    """Recover, and look whether everything is somewhere."""
    claims = round.model.claims()
    come_back(round, restore=restore, stuck=stuck)
    oracle.check_somewhere(round.holder, round.holder.mounts[0], round.model, claims, excuses)
    round.world.check()


def come_back(round: Round, *, restore: bool = True, stuck: bool = False) -> None:
    """Recover. A registry that was taken from storage is older than what was deleted and moved since: files that it
    names so may have no object any more, and fsck goes on saying so, though the cache may have their bytes."""
    if recover(round.holder, round.rng, restore=restore, stuck=stuck):
        round.model.blemished = True


def one_mount(round: Round) -> Mount:
    """See to it that the machine that works has just its first mount."""
    for mount in round.holder.mounts[1:]:
        if mount.mounted:
            unmount(round.holder, mount)
    return round.holder.mounts[0]


def burst(round: Round, count: int, *, hold: bool, seconds: float = 0.0) -> list[Doubt]:
    """Several operations at once, so that much is owed. ``hold``: storage takes nothing meanwhile, nor for so many
    ``seconds`` after."""
    storage, mount = round.world.storage, round.holder.mounts[0]
    held = hold and isinstance(storage, S3Storage)
    doubts: list[Doubt] = []
    if held:
        storage.server.pause()  # type: ignore[attr-defined]
    round.fsyncs = False
    try:
        for _ in range(count):
            busy = {path for doubt in doubts for path in doubt.paths}
            plan = round.plan_create() if held else round.plan(in_mount=True)
            if busy & {path for stage in plan.stages for path in stage.paths}:
                continue
            if not held:
                round.view(mount, plan)
            round.make_folders(mount, plan)
            promises, error = round.perform(mount, plan)
            round.count(plan, disturbed=False)
            if error is None:
                round.model.apply(plan.stages[-1], str(mount))
            elif held or storage.stalled():
                doubts.append(plan.doubt(promises))
            else:
                raise Violation("refused", f"{plan.what} in {mount}: {error}")
        pause(seconds)
    finally:
        round.fsyncs = True
    return doubts


def pause(seconds: float) -> None:
    """Let the daemons do what they do."""
    deadline = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > deadline, seconds + 1, every=0.005)


def go_down(round: Round, *, owing: bool, hold: bool | None = None, seconds: float = 0.0) -> list[Doubt]:
    """Leave the machine without a daemon: killed with much to do (``owing``), or unmounted in peace.

    ``hold``: whether storage takes nothing meanwhile (None: perhaps); ``seconds``: for how long after the last close.
    """
    mount = one_mount(round)
    if owing:
        hold = round.rng.random() < 0.7 if hold is None else hold
        doubts = burst(round, round.rng.randint(1, 4), hold=hold, seconds=seconds)
        round.holder.no_daemon()
        round.world.storage.running()
        return doubts
    unmount(round.holder, mount)
    round.model.stored(round.holder.name)
    return []


def excuse_doubts(round: Round, doubts: Iterable[Doubt]) -> list[Excuse]:
    """What was in flight may be as it was or as it was to be: then neither has to be there for sure."""
    excuses = []
    for doubt in doubts:
        for stage in doubt.stages[:1]:
            for file in stage.paths.values():
                if file is not None:
                    excuses.append(Excuse(file, doubt.what, file.version.pieces, silent=True))
    return excuses


# -- kills ------------------------------------------------------------------------------------------------------------


@kind("kills")
def kill_in_the_middle(round: Round) -> None:
    """SIGKILL while a call or command is under way, then mount again: old or new, and all else as it was."""
    plan = round.plan()
    large = any(file and file.version.size > 50 << 20 for stage in plan.stages for file in stage.paths.values())
    delay = round.rng.random() * (0.8 if large else 0.03)
    targets = ["daemon", "mover", "both", "both", "worker"]
    if plan.words is not None:
        targets, delay = ["command", "command", "both"], round.rng.random() * (1.5 if large else 0.6)
    if isinstance(round.world.storage, S3Storage):
        targets.append("server")
    what = round.rng.choice(targets)
    doubt = round.run_and_kill(plan, what, delay)
    round.remount_dead()
    if plan.words is not None:
        # What a dead command has left is finished by whoever comes next.
        round.holder.must("fsck", "--repair", "--instance", SLUG)
    if doubt is not None:
        oracle.resolve(round.model, round.mount(), [doubt])
    exact(round)


@kind("kills")
def kill_while_storing(round: Round) -> None:
    """SIGKILL of what stores, right after much was closed."""
    one_mount(round)
    doubts = burst(round, round.rng.randint(2, 5), hold=round.rng.random() < 0.3)
    if isinstance(round.world.storage, S3Storage) and round.rng.random() < 0.3:
        round.kill(round.holder.mounts[0], "server")
    for _ in range(round.rng.randint(1, 2)):
        pause(round.rng.random() * 0.5)
        round.kill(round.holder.mounts[0], round.rng.choice(("daemon", "mover", "both", "both")))
        round.remount_dead()
    oracle.resolve(round.model, round.holder.mounts[0], doubts)
    exact(round)


@kind("kills")
def outage(round: Round) -> None:
    """The S3 server is away, or silent, for some operations: what close promises holds."""
    storage = round.world.storage
    if not isinstance(storage, S3Storage):
        return kill_while_storing(round)
    one_mount(round)
    mount = round.holder.mounts[0]
    silent = round.rng.random() < 0.5
    storage.server.pause() if silent else storage.server.kill()
    round.model.count("outages")
    doubts = []
    round.fsyncs = False
    try:
        for _ in range(round.rng.randint(1, 3)):
            plan = round.plan_create()
            round.make_folders(mount, plan)
            promises, error = round.perform(mount, plan)
            if error is None:
                round.model.apply(plan.stages[-1], str(mount))
            else:
                doubts.append(plan.doubt(promises))
    finally:
        round.fsyncs = True
    if round.rng.random() < 0.5:
        round.kill(mount, "both")
    storage.running()
    round.remount_dead()
    oracle.resolve(round.model, mount, doubts)
    exact(round)


# -- repair commands --------------------------------------------------------------------------------------------------


@kind("repair")
def repairs(round: Round) -> None:
    """Repair commands in any order, after a kill, an unmount, or nothing at all. Names stay, unless the registry in
    storage was taken."""
    restore = round.rng.random() < 0.4
    doubts = []
    if round.rng.random() < 0.7:
        doubts = go_down(round, owing=round.rng.random() < 0.7)
    try_repairs(round.holder, round.rng, round.rng.randint(2, 5), restore=restore)
    if restore:
        after_damage(round, excuse_doubts(round, doubts))
        return
    recover(round.holder, round.rng, restore=False)
    oracle.resolve(round.model, round.holder.mounts[0], doubts)
    round.model.stored(round.holder.name)
    exact(round)


# -- the registry on this machine -------------------------------------------------------------------------------------


@kind("registry")
def damaged_registry(round: Round) -> None:
    """The working copy is emptied, cut, has a bad page, is an older one, another instance's, or gone."""
    path = round.holder.registry_path
    older = round.world.base / "older.lndb"
    if not older.exists() or round.rng.random() < 0.5:
        with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(older)) as target:
            source.backup(target)
        for _ in range(round.rng.randint(1, 3)):
            round.run(round.plan(in_mount=True))
    doubts = go_down(round, owing=round.rng.random() < 0.7)
    how = round.rng.choice(("empty", "cut", "page", "older", "foreign", "gone"))
    if how != "page" and round.rng.random() < 0.7:
        for suffix in ("-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
    if not ruin(round, path, how):
        for suffix in ("-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        shutil.copyfile(older, path)
        if how == "foreign":
            with contextlib.closing(sqlite3.connect(path)) as db, db:
                db.execute("UPDATE meta SET value='somebody/else' WHERE key='slug'")
                db.execute("UPDATE meta SET value='XXXXXXXXXXXX' WHERE key='uid'")
    damage(round, f"registry {how}")
    after_damage(round, excuse_doubts(round, doubts))


@kind("work")
def damaged_work(round: Round) -> None:
    """The work database is emptied, cut, has a bad page, is an older one, or gone."""
    path = round.holder.work_path
    older = round.world.base / "older.work.db"
    with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(older)) as target:
        source.backup(target)
    for _ in range(round.rng.randint(1, 3)):
        round.run(round.plan(in_mount=True))
    doubts = go_down(round, owing=round.rng.random() < 0.7)
    how = round.rng.choice(("empty", "cut", "page", "older", "gone"))
    if how == "older" or round.rng.random() < 0.7:
        for suffix in ("-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
    if not ruin(round, path, how):
        shutil.copyfile(older, path)
    damage(round, f"work database {how}")
    after_damage(round, excuse_doubts(round, doubts))


@kind("wal")
def damaged_log(round: Round) -> None:
    """The write-ahead log of the registry, or of the work database, has a flipped byte, is cut, or gone."""
    doubts = go_down(round, owing=True)
    path = Path(f"{round.rng.choice((round.holder.registry_path, round.holder.work_path))}-wal")
    size = path.stat().st_size if path.exists() else 0
    if size:
        how = round.rng.choice(("flip", "cut", "gone"))
        if how == "flip":
            flip(path, round.rng.randrange(size))
        elif how == "cut":
            os.truncate(path, round.rng.randrange(size))
        else:
            path.unlink()
        damage(round, f"log {how}")
    after_damage(round, excuse_doubts(round, doubts))


def ruin(round: Round, path: Path, how: str) -> bool:
    """Empty a file, cut it, overwrite a page of it, or remove it. False: ``how`` is none of these."""
    size = path.stat().st_size
    if how == "empty":
        os.truncate(path, 0)
    elif how == "cut":
        os.truncate(path, round.rng.randrange(1, size))
    elif how == "page":
        overwrite(path, round.rng.randrange(0, max(size // PAGE, 1)) * PAGE, round.rng.randbytes(PAGE))
    elif how == "gone":
        path.unlink()
    else:
        return False
    return True


def damage(round: Round, what: str) -> None:
    """Something was damaged just now: only what is said from here on names what is lost by it."""
    round.model.count(what)
    round.world.log.write("damage", what=what)
    for machine in round.world.machines.values():
        machine.hear_logs()
    round.world.log.forget()


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Other bytes in the middle of a file, on the disk: whoever reads them next reads them from there."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, data, offset)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def flip(path: Path, offset: int) -> None:
    """A byte of a file becomes another one."""
    fd = os.open(path, os.O_RDONLY)
    try:
        byte = os.pread(fd, 1, offset)
    finally:
        os.close(fd)
    overwrite(path, offset, bytes([byte[0] ^ 0x5A]))


# -- the spool --------------------------------------------------------------------------------------------------------


@kind("spool")
def damaged_spool(round: Round) -> None:
    """A spool file is removed, has a flipped byte, or there is one too many.

    A byte is flipped only in a file that had to wait: the hash of what is stored at once is that of its sending.
    """
    how = round.rng.choice(("removed", "flipped", "stray"))
    if how == "flipped" and not isinstance(round.world.storage, S3Storage):
        how = "removed"
    doubts = go_down(round, owing=True, hold=how == "flipped" or None, seconds=SEAL_SECONDS if how == "flipped" else 0)
    spool = round.holder.spool
    files = sorted(path for path in spool.iterdir() if path.is_file()) if spool.exists() else []
    files = [path for path in files if path.stat().st_size]
    excuses = excuse_doubts(round, doubts)
    if how == "stray":
        version = round.model.know(Version.whole(round.rng.choice((5000, 3 << 20)), round.stream()))
        name = f"{round.rng.randrange(1, 400):x}-{round.rng.getrandbits(48):012x}"
        spool.mkdir(parents=True, exist_ok=True, mode=0o700)
        (spool / name).write_bytes(b"".join(version.chunks()))
        (spool / name).chmod(0o600)
        damage(round, "spool stray")
        come_back(round)
        stray = File(version, frozenset({name}), round.holder.name)
        mount = round.holder.mounts[0]
        oracle.check_somewhere(round.holder, mount, round.model, [*round.model.claims(), stray], excuses)
        round.world.check()
        return
    if files:
        victim = round.rng.choice(files)
        pieces = pieces_of(round.model, victim)
        words = frozenset({victim.name})
        if how == "flipped":
            offset = round.rng.randrange(victim.stat().st_size)
            low = offset // BLOCK * BLOCK
            pieces = [
                Piece(max(start, low), min(end, low + BLOCK), stream)
                for start, end, stream in pieces
                if start < low + BLOCK and end > low
            ]
            flip(victim, offset)
        else:
            victim.unlink()
        damage(round, f"spool {how}")
        excuses += [
            Excuse(file, f"the spool file {victim.name} was {how}", tuple(pieces), words)
            for file in round.model.touching(pieces)
        ]
    after_damage(round, excuses, stuck=how == "flipped")


def pieces_of(model: Model, path: Path) -> list[Piece]:
    """What the bytes of a file outside of the mounts are."""
    data = path.read_bytes()
    version = model.versions.get(blake3(data).hexdigest())
    if version is not None:
        return list(version.pieces)
    chunks = (data[at : at + CHUNK] for at in range(0, len(data), CHUNK))
    return explain(chunks, list(model.versions.values())).pieces


# -- the cache --------------------------------------------------------------------------------------------------------


@kind("cache")
def damaged_cache(round: Round) -> None:
    """A cache file has a flipped byte, or is gone, also while the mount lives: nobody notices."""
    path = round.some_path()
    if path is not None and round.model.tree[path].stored:
        round.holder.cli("cache", path, "--instance", SLUG)
    if round.rng.random() < 0.4:
        one_mount(round)
        unmount(round.holder, round.holder.mounts[0])
        round.model.stored(round.holder.name)
    folder = round.holder.cache_dir
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(CACHE_INDEX)]
    files = sorted(file for file in files if file.stat().st_size)
    for victim in round.rng.sample(files, min(len(files), 3)):
        if round.rng.random() < 0.6:
            flip(victim, round.rng.randrange(victim.stat().st_size))
        else:
            victim.unlink()
        damage(round, "cache")
    for mount in round.holder.mounts[:1]:
        if not mount.mounted:
            round.must_mount(mount)
    exact(round)


# -- storage ----------------------------------------------------------------------------------------------------------


@kind("storage")
def damaged_object(round: Round) -> None:
    """An object is gone, or has a flipped byte: that file is lost, and it is said which."""
    one_mount(round)
    unmount(round.holder, round.holder.mounts[0])
    round.model.stored(round.holder.name)
    storage = round.world.storage
    digests = {key: storage.digest(key) for key in storage.objects()}
    known = {key: round.model.versions[digest] for key, digest in digests.items() if digest in round.model.versions}
    keys = sorted(key for key, version in known.items() if version.size)
    if keys:
        key = round.rng.choice(keys)
        version = known[key]
        how = round.rng.choice(("removed", "flipped"))
        round.model.blemished = True
        if how == "removed":
            storage.delete(key)
        else:
            data = bytearray(storage.get(key))
            data[round.rng.randrange(len(data))] ^= 0x5A
            storage.put(key, bytes(data))
        shutil.rmtree(round.holder.cache_dir, ignore_errors=True)
        damage(round, f"object {how}")
        words = frozenset({key.rpartition("/")[2].partition(".")[0]})
        excuses = [
            Excuse(file, f"the object {key} was {how}", version.pieces, words)
            for file in round.model.touching(version.pieces)
        ]
        round.holder.cli("fsck", "--data", "--instance", SLUG)
        after_damage(round, excuses)
    else:
        after_damage(round)


@kind("storage")
def unknown_object(round: Round) -> None:
    """An object that no registry knows: it is somebody's."""
    version = round.model.know(Version.whole(round.rng.choice((5000, 3 << 20)), round.stream()))
    letters = string.ascii_letters + string.digits
    key = f".lamindb/{''.join(round.rng.choice(letters) for _ in range(20))}.bin"
    round.world.storage.put(key, b"".join(version.chunks()))
    damage(round, "object unknown")
    claims = round.model.claims()
    come_back(round)
    if round.world.storage.digest(key) != version.digest:
        claims.append(File(version, frozenset({key}), "storage"))
    oracle.check_somewhere(round.holder, round.holder.mounts[0], round.model, claims)
    round.world.check()


@kind("copy")
def damaged_copy(round: Round) -> None:
    """The registry's copy in storage is emptied, cut, or gone; the working copy is whole."""
    storage = round.world.storage
    doubts = [] if round.rng.random() < 0.4 else go_down(round, owing=round.rng.random() < 0.5)
    how = round.rng.choice(("emptied", "cut", "removed"))
    if storage.registry_key in set(storage.keys()):
        if how == "removed":
            storage.delete(storage.registry_key)
        else:
            data = storage.get(storage.registry_key)
            storage.put(storage.registry_key, data[: round.rng.randrange(1, len(data))] if how == "cut" else b"")
    damage(round, f"copy {how}")
    after_damage(round, excuse_doubts(round, doubts))


# -- machines ---------------------------------------------------------------------------------------------------------


PATIENCE = 150.0
"""Seconds that somebody waits for a lease to run out by itself."""


def break_lock(round: Round) -> None:
    """The lock has run out (by itself, if that does not take long), or a person who knows that the other machine is
    gone removes it."""
    storage = round.world.storage
    with contextlib.suppress(FileNotFoundError):
        lock = json.loads(storage.get(storage.lock_key))
        how = round.rng.choice(("wait", "expire", "expire", "remove", "remove"))
        round.world.log.write("lock", how=how, until=lock["until"], now=time.time())
        if how == "wait" and lock["until"] < time.time() + PATIENCE:
            wait_until(lambda: time.time() > lock["until"] + 5, PATIENCE + 5, every=0.2)
        elif how != "remove":
            # A lock that says nothing of how long it holds after it was written is over at its time.
            lock.pop("seconds", None)
            storage.put(storage.lock_key, json.dumps(lock | {"until": time.time() - 1}).encode())
        else:
            storage.delete(storage.lock_key)


def other(round: Round) -> Machine:
    """The machine that does not work now."""
    return round.world.machine("B" if round.holder.name == "A" else "A")


@kind("takeover")
def hand_over(round: Round) -> None:
    """One machine closes the instance, the other goes on: every name is there."""
    one_mount(round)
    unmount(round.holder, round.holder.mounts[0])
    round.holder.must("close", SLUG)
    round.model.stored(round.holder.name)
    round.world.check()
    round.holder = other(round)
    result = round.holder.connect()
    if not result.good:
        raise Violation("refused", f"on {round.holder.name} after 'lamfs close' on the other machine: {result}")
    round.must_mount(round.holder.mounts[0], f"on {round.holder.name}: ")
    round.model.changed_by = {}
    exact(round)


@kind("takeover")
def take_over(round: Round) -> None:
    """Another machine takes the instance by force, while this one is dead, or sleeps and comes back. Both work on; then
    this one returns. Everything that either has acknowledged is there."""
    first = round.holder
    second = other(round)
    mount = one_mount(round)
    sleeps = round.rng.random() < 0.6
    doubts = burst(round, round.rng.randint(1, 3), hold=round.rng.random() < 0.3)
    if sleeps:
        first.signal_daemons(signal.SIGSTOP)
    else:
        first.no_daemon()
    round.world.storage.running()
    break_lock(round)
    damage(round, "take-over of a sleeping machine" if sleeps else "take-over of a dead machine")
    theirs = Round(round.world, Model(), round.sizes, round.rng)
    theirs.holder, theirs.model.versions, theirs.model.counts = second, round.model.versions, round.model.counts
    theirs.model.paths = round.model.paths
    excuses = excuse_doubts(round, doubts)
    mine = round.model.claims()
    in_storage = [file for file in mine if file.stored]
    recover(second, round.rng, restore=False)
    theirs.model.tree = {f"?{number}": file for number, file in enumerate(in_storage)}  # for their names
    oracle.check_somewhere(second, second.mounts[0], theirs.model, in_storage, excuses)
    seen = {file.version.digest for file in theirs.model.claims()}
    # The registry that was taken is older than what the first machine did last: some of what it shows was replaced or
    # deleted there by then, and promised to nobody any more.
    over = seen - {file.version.digest for file in mine}
    replaced: set[str] = set()
    for _ in range(round.rng.randint(1, 4)):
        theirs.run(theirs.plan(in_mount=round.rng.random() < 0.7))
    if sleeps:
        first.signal_daemons(signal.SIGCONT)
        before = {file.version.digest for file in mine}
        mine = rogue(round, mount, excuses)
        replaced = before - {file.version.digest for file in mine}
        # What a machine without the lease stores over an object is a conflict with what is stored there next: both are
        # kept, and which of them has the name nobody can say before.
        owed = [file for file in theirs.model.claims() if file.version.digest not in over]
        oracle.check_somewhere(second, second.mounts[0], theirs.model, owed, excuses)
    else:
        exact(theirs)
    unmount(second, second.mounts[0])
    second.must("close", SLUG)
    # What the first machine has replaced when it came back, and the second has not touched, may be replaced.
    kept = [file for file in theirs.model.claims() if file.version.digest not in over | replaced]
    ended = seen - replaced - {file.version.digest for file in kept}
    claims = [*(file for file in mine if file.version.digest not in ended), *kept]
    # What this machine has only closed may be a few bytes that belong into one of these.
    below = tuple(
        piece for digest in ended if digest in round.model.versions for piece in round.model.versions[digest].pieces
    )
    why = "what it was written into was replaced by the other machine"
    excuses += [Excuse(file, why, below, silent=True) for file in claims if not file.stored]
    first.no_daemon()
    recover(first, round.rng)
    oracle.check_somewhere(first, mount, round.model, claims, excuses)
    round.world.check()


def rogue(round: Round, mount: Mount, excuses: list[Excuse]) -> list[File]:
    """A machine that has lost the lease without knowing works on. Returns what it has promised by then. Some of that
    it may refuse; nothing hangs."""
    for _ in range(round.rng.randint(1, 3)):
        plan = round.plan_create() if round.rng.random() < 0.7 else (round.plan_replace() or round.plan_create())
        with contextlib.suppress(Violation):
            round.make_folders(mount, plan)
        promises, error = round.perform(mount, plan)
        if error is None:
            round.model.apply(plan.stages[-1], str(mount))
        else:
            excuses += excuse_doubts(round, [plan.doubt(promises)])
            sure = plan.stages[promises]
            round.model.apply(sure, str(mount))
    mine = round.model.claims()
    for _ in range(round.rng.randint(0, 3)):
        word = round.rng.choice(("delete", "sync", "umount", "close", "mount", "fsck --repair", "save"))
        if word == "delete":
            path = round.some_path(lambda file: file.stored)
            if path is not None:
                file = round.model.tree[path]
                if round.holder.cli("delete", "--permanent", "--yes", path, "--instance", SLUG).good:
                    mine = [one for one in mine if one is not file]
                else:
                    excuses.append(Excuse(file, "its deletion was broken off", file.version.pieces, silent=True))
        elif word == "save":
            plan = round.plan_save()
            if round.perform(mount, plan)[1] is None:
                mine += [file for file in plan.stages[-1].paths.values() if file is not None]
        elif word == "mount":
            if not mount.mounted:
                round.holder.mount(mount)
        elif word == "umount":
            round.holder.umount(mount, "--timeout", "20")
        else:
            words = {"sync": ("sync", "--timeout", "20"), "close": ("close", SLUG)}
            round.holder.cli(*words.get(word, ("fsck", "--repair", "--instance", SLUG)))
    return mine


@kind("vanish")
def vanish(round: Round) -> None:
    """A machine is gone for good. What it had told to be in storage is there. Where that is a folder, what it had only
    closed waits in its spool there, which is named and stays as it is: only that machine knows what it is of."""
    one_mount(round)
    doubts = burst(round, round.rng.randint(1, 4), hold=round.rng.random() < 0.3)
    if round.rng.random() < 0.5 and not doubts:
        path = round.some_path()
        plan = round.plan_fsync() if path is not None else None
        if plan is not None:
            round.run(plan)
    gone = round.holder
    gone.no_daemon()
    round.world.storage.running()
    spool = gone.spool
    gone.vanish()
    break_lock(round)
    damage(round, "machine gone")
    excuses = excuse_doubts(round, doubts)
    waiting = spool_files(round.model, spool)
    if isinstance(round.world.storage, S3Storage):
        excuses += [
            Excuse(file, "it was on the other machine alone", file.version.pieces, silent=True)
            for file in round.model.claims()
            if not file.stored
        ]
    for pieces in waiting.values():
        excuses += [
            Excuse(file, f"it waits in {spool}", tuple(pieces), frozenset({spool.name}))
            for file in round.model.touching(pieces)
            if not file.stored
        ]
    round.holder = other(round)
    after_damage(round, excuses)
    if spool_files(round.model, spool) != waiting:
        raise Violation("lost", f"in {spool}, the spool of a machine that is gone, is not what was there: {waiting}")


def spool_files(model: Model, spool: Path) -> dict[str, list[Piece]]:
    """What the files in a spool are, by name; nothing when there is none."""
    files = sorted(path for path in spool.iterdir() if path.is_file()) if spool.exists() else []
    return {path.name: pieces_of(model, path) for path in files}


# -- two mounts -------------------------------------------------------------------------------------------------------


@kind("twomounts")
def second_mount(round: Round) -> None:
    """The same instance at a second place, or no longer there."""
    two = round.holder.mounts[1]
    if two.mounted:
        unmount(round.holder, two)
    else:
        round.must_mount(two)
    exact(round)


@kind("twomounts")
def relay(round: Round) -> None:
    """Two programs, one in each mount, open a file in turn, write a part of their own, and close it. Each close that is
    0 has kept its part."""
    if not round.holder.mounts[1].mounted:
        second_mount(round)
    path = round.some_path(lambda file: file.version.size > 0)
    if path is None:
        return
    old = round.model.tree[path]
    for mount in round.holder.mounts:
        oracle.resolve(round.model, mount, [Doubt(f"before a relay over {path}", [Stage({path: old})])])
    length = PAGE * round.rng.choice((1, 1, 20, 300))
    turns = round.rng.randint(3, 8)
    round.model.know(old.version.cut(max(old.version.size, turns * length)))
    now, order, parts = old.version, [], []
    for turn in range(turns):
        mount = round.rng.choice(round.holder.mounts)
        piece = Piece(turn * length, (turn + 1) * length, round.stream())
        part = round.model.know(Version([piece]))
        mount.begin({"do": "patch", "path": path, "writes": [list(piece)]})
        reply = mount.end()[1]
        order.append(f"{mount} {piece.start}: {reply['error'] or 0}")
        if reply["error"] is None:
            now = round.model.know(now.written(*piece))
            parts.append(File(part, old.names, round.holder.name))
        elif reply["error"] != "ESTALE":
            raise Violation("refused", f"a relay over {path}: {'; '.join(order)}")
    round.model.count("relays")
    rest = [Piece(max(a, turns * length), b, s) for a, b, s in old.version.pieces if b > turns * length]
    claims = [*parts, File(Version(rest), old.names, old.machine)]
    after_two(round, f"a relay over {path}: {'; '.join(order)}", path, old, claims)


def after_two(round: Round, what: str, path: str, old: File, claims: list[File]) -> None:
    """After two mounts have written to a file: everything is stored, all claims are somewhere, both mounts show it."""
    for mount in round.holder.mounts:
        result = round.holder.cli("sync", str(mount.path), "--timeout", "60")
        if not result.good:
            raise Violation("hang", f"after {what}: {result}")
    others = [file for file in round.model.claims() if file is not old]
    mount, mixed = round.holder.mounts[0], frozenset({path})
    try:
        oracle.check_somewhere(round.holder, mount, round.model, [*others, *claims], mixed=mixed)
    except Violation as error:
        raise Violation(error.kind, f"{what}: {error}") from None
    exact(round)


@kind("twomounts")
def duel(round: Round) -> None:
    """Two programs, one in each mount, have one file open and write to it. Each close that is 0 has kept its bytes: in
    the file, or in a conflict."""
    if not round.holder.mounts[1].mounted:
        second_mount(round)
    path = round.some_path(lambda file: file.version.size > 0)
    if path is None:
        return
    old = round.model.tree[path]
    for mount in round.holder.mounts:
        doubt = Doubt(f"before a duel over {path}", [Stage({path: old})])
        oracle.resolve(round.model, mount, [doubt])
    length = round.rng.choice((4096, 70_000, 300_000))
    parties = [(mount, round.stream(), iter(("hold", "put", "let"))) for mount in round.holder.mounts]
    order: list[str] = []
    failed: dict[str, str] = {}
    times: dict[tuple[str, str], int] = {}
    turns = [0, 0, 0, 1, 1, 1]
    round.rng.shuffle(turns)
    for turn in turns:
        mount, stream, steps = parties[turn]
        do = next(steps)
        if str(mount) in failed and do == "put":
            continue
        step: dict[str, object] = {"do": do, "handle": "duel", "path": path, "piece": [0, length, stream]}
        if do == "let" and (str(mount), "hold") not in times:
            continue
        mount.begin(step)
        reply = mount.end()[1]
        times[str(mount), do] = len(order)
        order.append(f"{mount} {do}: {reply['error'] or 0}")
        if reply["error"] is not None:
            failed[str(mount)] = reply["error"]
            if do == "hold":
                del times[str(mount), "hold"]
    round.world.log.write("duel", path=path, order=order)
    round.model.count("duels")
    claims = []
    for number, (mount, stream, _) in enumerate(parties):
        version = round.model.know(Version([Piece(0, length, stream)]))
        if str(mount) in failed:
            continue
        rival = parties[1 - number][0]
        # Whoever opens the file after the other has closed it has seen what he overwrites.
        after = str(rival) not in failed and times[str(mount), "let"] < times.get((str(rival), "hold"), -1)
        if not after:
            claims.append(File(version, old.names, round.holder.name))
    for one, (_, stream, _) in enumerate(parties):
        round.model.know(old.version.written(0, length, stream))
        both = old.version.written(0, length, parties[1 - one][1]).written(0, length, stream)
        round.model.know(both)
    rest = [piece for piece in old.version.pieces if piece.end > length]
    if rest or not claims:
        keep = rest if claims else old.version.pieces
        claims.append(File(Version(Piece(max(a, length if claims else 0), b, s) for a, b, s in keep), old.names, "A"))
    after_two(round, f"a duel over {path}: {'; '.join(order)}", path, old, claims)
