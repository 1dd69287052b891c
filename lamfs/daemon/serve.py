"""One mount, from first check to last byte stored: wiring, signals, the end. The daemon's main thread and trio loop.

This is the one place where concrete storage, cache, mover, registry, file system and FUSE come together.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

from lamfs import config, mountinfo
from lamfs.cache.blocks import BlockCache
from lamfs.daemon.control import ControlServer
from lamfs.daemon.first import FirstMover, Looked, look
from lamfs.daemon.lease import Keeper, hand_back, renewed
from lamfs.daemon.options import MountOptions
from lamfs.daemon.recovery import clear_temporaries, take_over
from lamfs.errors import FsError, LamfsError, LeaseLost
from lamfs.fs.atimes import Atimes
from lamfs.fs.context import Context, Policy
from lamfs.fs.filesystem import FileSystem
from lamfs.fs.follow import Follower
from lamfs.fs.stats import About, Stats
from lamfs.fuse import session
from lamfs.fuse.operations import Kernel, Operations, Shown
from lamfs.model import now_ns
from lamfs.mover.client import Mover
from lamfs.mover.process import Forked
from lamfs.ops import mounts, recover, snapshot, spools, written
from lamfs.ops.instance import Instance
from lamfs.prefetch.scheduler import Prefetcher
from lamfs.registry import Provenance, process_id
from lamfs.spool import SpoolFolder
from lamfs.work.uploader import Uploader

log = logging.getLogger("lamfs.daemon")

NOTE_SECONDS = 60.0
"""Seconds between two notes of the registry's state."""
READAHEAD_KIB = 512
LIFE_SECONDS = 10.0
"""Seconds between two signs of life."""
HURRIED_SECONDS = 1.0
"""Seconds that the mover may take to end when the mount must end now."""
BACKGROUND = 128
"""Readahead requests of the kernel in flight."""


Ready = Callable[[tuple[str, ...]], None]
"""Called when the mount is ready, with a sentence for each thing that its storage lacks."""


def serve(options: MountOptions, ready: Ready, progress: Callable[[int, int], None], first: FirstMover) -> None:
    """Mount and serve until unmounted or told to end. Returns when nothing is pending and the registry is pushed.

    Raises LamfsError when it cannot mount.
    """
    _clear_stale(options.mountpoint, empty=not options.adopt)
    _raise_limits()
    found = first.outcome()
    with Instance.open(options.slug) as instance:
        _refuse_own_files(options.mountpoint, instance)
        looked = look(instance, write=not options.read_only) if found is None else found
        warnings = looked.warnings
        for warning in warnings:
            log.warning("%s", warning)
        config.make_directory(instance.settings.mounts_dir)
        with spools.make(instance.settings, instance.registry, read_only=options.read_only) as spool:
            if not options.read_only:
                if not looked.trouble:
                    recover.finish_saves(instance)
                take_over(instance, spool)
                clear_temporaries(instance)
            user = instance.user()
            origin = Provenance(user_id=user.id if user else None)
            mount = _Mount(options, instance, spool, origin, lambda: ready(warnings), progress, first, looked)
            try:
                _live(mount)
                if mount.lost is not None:
                    raise mount.lost
                if not options.read_only and not mount.hurried:
                    with renewed(instance):
                        snapshot.push(instance)
                    hand_back(instance)
            except LamfsError as error:
                if not mount.died:
                    mounts.leave_word(instance.settings.mounts_dir, error)
                raise
            finally:
                # Until here 'lamfs umount' finds the process that it waits for.
                if not mount.died:
                    mounts.remove(instance.settings.mounts_dir, os.getpid())


def _live(mount: _Mount) -> None:
    try:
        trio.run(mount.run)
    except BaseExceptionGroup as group:
        raise _first(group) from group


class _Mount:
    """The parts of one running mount. Made and used in the main thread."""

    def __init__(
        self,
        options: MountOptions,
        instance: Instance,
        spool: SpoolFolder,
        origin: Provenance,
        ready: Callable[[], None],
        progress: Callable[[int, int], None],
        first: FirstMover,
        looked: Looked,
    ) -> None:
        self._options = options
        self._instance = instance
        self._ready = ready
        self._progress = progress
        self.hurried = False
        """Told to end at once: pending work is left to the next mount."""
        self.died = False
        """An error has ended it: the mount stays in the tree without a daemon, and its record says whose it was."""
        self._announced = False
        self._served = False
        self._place: mountinfo.Mounted | None = None
        self._storing = trio.CancelScope()
        self._serving = trio.CancelScope()
        self._draining = trio.CancelScope()
        store, registry = instance.store, instance.registry
        self._mover = Mover(store.config, (Forked(first.pid), first.sock))
        self._keeper = Keeper(instance, self._mover, self._lost, self._kept)
        self._uploader = Uploader(
            registry, store, self._mover, spool, origin, workers=options.uploads, permit=self._keeper.permit
        )
        self._cache = BlockCache(
            store,
            self._mover,
            instance.cache_index,
            instance.cache_dir,
            limit_bytes=options.cache_limit,
            leaves=registry.artifacts.leaves,
            free_bytes=options.cache_free,
        )
        policy = Policy(
            real_keys=options.real_keys,
            close_stores=options.close == "storage",
            fsync_stores=options.fsync == "storage",
            timeout=options.timeout,
            read_only=options.read_only or looked.refused,
            spool_limit=options.spool_limit,
            spool_free=options.spool_free,
            public_stats=options.public_stats,
        )
        self._context = Context(
            registry,
            store,
            self._cache,
            Prefetcher(self._cache),
            self._mover,
            self._uploader,
            spool,
            policy,
            atimes=Atimes(keep=not options.read_only and "noatime" not in options.fuse),
            stats=Stats(About(instance.settings.slug, options.mountpoint, now_ns())),
        )
        self._context.stats.notice = looked.trouble
        self._fs = FileSystem(self._context)
        self._follower = Follower(self._context)

    @property
    def lost(self) -> LeaseLost | None:
        """Why this mount may not change storage any more."""
        return self._keeper.lost

    async def run(self) -> None:
        """The whole life of the mount."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._mover.run)
            await nursery.start(self._cache.run)
            if not self._options.read_only:
                nursery.start_soon(self._store)
            await self._mounted(nursery)
            self._context.atimes.flush(self._instance.registry)
            with self._draining:
                if await self._may_store():
                    self._fs.files.acknowledge_all()
                    for refused in await self._drain():
                        log.warning(
                            "storage refuses this for good, so it is left in the journal, for the next mount: %s",
                            refused,
                        )
                await self._uploader.range_sync.finish()
            nursery.cancel_scope.cancel()

    async def _drain(self) -> list[str]:
        """Return when all that can be is stored. Returns a sentence for each thing that storage refuses for good."""
        # Without the lease nothing more is stored, which is reported at the end (``lost``). The mount leaves the tree.
        with contextlib.suppress(LeaseLost):
            return await self._uploader.drain(self._progress)
        return []

    async def _store(self) -> None:
        with self._storing:
            await self._uploader.run()

    async def _mounted(self, nursery: trio.Nursery) -> None:
        """Mount, serve, unmount. Tasks that outlive the mount, while the last bytes are stored, run in ``nursery``."""
        options, settings = self._options, self._instance.settings
        shown = Shown(options.uid, options.gid, options.umask)
        operations = Operations(self._fs, shown, xattr=options.xattr)
        session.mount(operations, options.mountpoint, f"lamfs:{options.slug}", _mount_words(options))
        self._place = _mounted_at(options.mountpoint)
        mount_id, device = (self._place.id, self._place.device) if self._place is not None else (0, "")
        record = mounts.MountRecord(
            pid=os.getpid(),
            owner=process_id() or "",
            mountpoint=options.mountpoint,
            slug=settings.slug,
            socket=str(settings.mounts_dir / f"{os.getpid()}.sock"),
            started_at=self._context.stats.about.started_at,
            read_only=options.read_only,
            device=device,
            mount_id=mount_id,
        )
        control = ControlServer(Path(record.socket), self._fs, self._follower, self._end_now)
        self.died = True
        try:
            self._served = True
            async with trio.open_nursery() as inner:
                kernel = Kernel()
                self._context.kernel = kernel
                inner.start_soon(kernel.run)
                inner.start_soon(self._follower.run)
                inner.start_soon(partial(self._context.waits.run, options.mountpoint, shared=options.allow_other))
                await nursery.start(control.run)
                nursery.start_soon(self._signals)
                if not options.read_only:
                    nursery.start_soon(self._keeper.run)
                    inner.start_soon(self._keep_note)
                mounts.write(settings.mounts_dir, record)
                nursery.start_soon(self._show_life)
                gc.freeze()
                gc.enable()
                inner.start_soon(self._announce)
                with self._serving:
                    await session.serve()
                log.info("unmounted from %s", options.mountpoint)
                inner.cancel_scope.cancel()
            self.died = False
        except KeyboardInterrupt:
            self.died = False
            raise
        finally:
            self._served = False
            self.died = self.died and self._announced
            session.close(unmount=not self.died and self._is_in_tree())

    async def _show_life(self) -> None:
        """Keep the time of the last sign of life in the record, in case the daemon dies."""
        while True:
            await trio.sleep(LIFE_SECONDS)
            mounts.touch(self._instance.settings.mounts_dir, os.getpid())

    async def _announce(self) -> None:
        """Report that the mount is ready once its requests are answered."""
        # Until somebody has asked, the kernel assumes that root owns the top directory, and refuses its owner's chmod.
        # And what it was told before the protocol was negotiated, it forgets.
        with trio.move_on_after(5), contextlib.suppress(LamfsError):
            await self._mover.visit(self._options.mountpoint)
        _raise_readahead(self._options.mountpoint)
        _raise_background(self._options.mountpoint)
        log.info("mounted %s at %s", self._instance.settings.slug, self._options.mountpoint)
        self._announced = True
        self._ready()

    async def _signals(self) -> None:
        """SIGTERM, SIGINT, SIGHUP: store everything, unmount, end. A second one: end now, the next mount goes on."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async with trio.open_nursery() as nursery:
                told = False
                async for number in signals:
                    name = signal.Signals(number).name
                    if not told:
                        told = True
                        log.info("%s: storing what is owed, then unmounting", name)
                        nursery.start_soon(self._leave)
                    else:
                        log.warning("%s again: ending now; what is owed is stored by the next mount", name)
                        await self._end_now()
                        nursery.cancel_scope.cancel()

    async def _leave(self) -> None:
        if not self._served:
            return  # it is unmounted, and pending work is being stored already
        if await self._may_store():
            self._fs.files.acknowledge_all()
            await self._drain()
        await self._unmount()
        # A lazy unmount leaves the session alive while files are open. Everything in them is stored.
        await trio.sleep(1.0)
        self._fs.files.acknowledge_all()
        if self._served:
            session.end()

    async def _end_now(self) -> None:
        """Unmount and end, whatever is pending, open or in flight."""
        self.hurried = True
        self._mover.patience = HURRIED_SECONDS
        if self._served:
            await self._unmount()
            session.end()
        self._serving.cancel()
        self._draining.cancel()

    def _is_in_tree(self) -> bool:
        """Whether our mount is still in its place, and not another one, made after ours left the tree."""
        return _mounted_at(self._options.mountpoint) == self._place

    async def _unmount(self) -> None:
        if not self._is_in_tree():
            return
        with trio.move_on_after(10):
            await trio.run_process(
                ["fusermount3", "-u", "-z", self._options.mountpoint],
                check=False,
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def _lost(self, error: LeaseLost) -> None:
        """Another machine has the instance now: pending work stays in the journal, and storage is not touched."""
        self._context.policy.read_only = True
        self._context.stats.notice = str(error)
        self._storing.cancel()
        self._uploader.stop(error)

    def _kept(self) -> None:
        """Storage has accepted a renewal: it may accept now what it refused when this mount began."""
        if self._context.stats.notice:
            log.info("storage can be written to: what is owed is stored, and changes are taken")
            self._context.stats.notice = ""
            self._context.policy.read_only = self._options.read_only
            self._uploader.notify()

    async def _keep_note(self) -> None:
        """Record the registry's state, so that an older one can be recognized."""
        while True:
            await trio.sleep(NOTE_SECONDS)
            with contextlib.suppress(LamfsError):  # others report a full disk
                written.note(self._instance.settings, self._instance.registry)

    async def _may_store(self) -> bool:
        """Whether this mount may still change storage, as far as storage can be asked."""
        if self._options.read_only:
            return False
        try:
            await self._keeper.look()
        except LeaseLost:
            return False
        except LamfsError as error:
            log.info("could not look at the lock in storage: %s", error)
        return True


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of the mount's tasks: a domain error with its sentence, if there is one."""
    known = group.subgroup(LamfsError)
    error: BaseException = known or group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _mount_words(options: MountOptions) -> tuple[str, ...]:
    words = list(options.fuse)
    if options.allow_other:
        words.append("allow_other")
    if options.read_only:
        words.append("ro")
    return tuple(words)


def _clear_stale(mountpoint: str, *, empty: bool) -> None:
    """Unmount what a dead daemon left here. Refuses what is not a directory or not ``empty``."""
    try:
        entries = os.listdir(mountpoint)
    except NotADirectoryError:
        raise LamfsError(f"{mountpoint} is not a directory; choose an empty one.") from None
    except FileNotFoundError:
        raise LamfsError(f"There is no directory {mountpoint}; make it first.") from None
    except PermissionError:
        raise LamfsError(f"You may not look into {mountpoint}; choose a directory of your own.") from None
    except OSError as error:
        log.info("%s: %s; cleaning up after a mount that ended early", mountpoint, error.strerror)
        subprocess.run(["fusermount3", "-u", "-z", mountpoint], check=False, capture_output=True, timeout=10)
        deadline = time.monotonic() + 5
        while True:
            try:
                entries = os.listdir(mountpoint)
                break
            except OSError as again:
                if time.monotonic() > deadline:
                    raise FsError(
                        error.errno or 5,
                        f"A dead mount is left at {mountpoint} and does not go ({again.strerror});"
                        f" try 'fusermount3 -uz {mountpoint}'.",
                    ) from None
                time.sleep(0.05)
    if entries and empty:
        raise LamfsError(f"The directory {mountpoint} is not empty; what is in it would be hidden. Choose another.")


def _refuse_own_files(mountpoint: str, instance: Instance) -> None:
    """A daemon whose own files were below its mount would wait for itself."""
    inner = os.path.realpath(mountpoint)
    for path in (instance.settings.storage.root, str(instance.settings.directory), str(instance.cache_dir)):
        if path.startswith("/") and os.path.commonpath([inner, os.path.realpath(path)]) == inner:
            raise LamfsError(f"The instance keeps its own files in {path}, below {mountpoint}; mount it elsewhere.")
    root = instance.settings.storage.root
    if root.startswith("/") and os.path.commonpath([inner, os.path.realpath(root)]) == os.path.realpath(root):
        raise LamfsError(f"{mountpoint} is inside of the storage folder {root}; mount it elsewhere.")


def _raise_limits() -> None:
    """Allow as many open files as possible, and shorten the switch interval: the loop's thread must not wait."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sys.setswitchinterval(0.0005)


def _raise_readahead(mountpoint: str) -> None:
    """Let the kernel read ahead further, if we may (root): larger requests, faster sequential reads.

    It also reads as much around each page fault of a mapping. More would make random access to a mapping expensive, and
    look like the start of a sequence (lamfs.prefetch.settings, RUN_SURE).
    """
    mounted = _mounted_at(mountpoint)
    if mounted is not None:
        _tell_kernel(f"/sys/class/bdi/{mounted.device}/read_ahead_kb", READAHEAD_KIB)


def _raise_background(mountpoint: str) -> None:
    """Allow more readahead requests. The kernel's default is 12: a few files that stall would block all others."""
    mounted = _mounted_at(mountpoint)
    if mounted is not None:
        folder = f"/sys/fs/fuse/connections/{mounted.device.partition(':')[2]}"
        _tell_kernel(f"{folder}/max_background", BACKGROUND)
        _tell_kernel(f"{folder}/congestion_threshold", BACKGROUND * 3 // 4)


def _mounted_at(mountpoint: str) -> mountinfo.Mounted | None:
    """The topmost mount there."""
    try:
        return mountinfo.at(mountpoint)
    except (OSError, ValueError) as error:
        log.debug("the mount is not found in the kernel's table: %s", error)
        return None


def _tell_kernel(path: str, value: int) -> None:
    try:
        with open(path, "w") as setting:
            setting.write(str(value))
    except OSError as error:
        log.debug("the kernel's setting stays as it is: %s", error)
