"""A mount's first mover: a fork of the daemon, made before the daemon has threads.

It imports what it needs while the daemon continues its own imports, and checks the storage if that is a bucket. The
connections that it makes for this are ready for the first read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from lamfs import config
from lamfs.daemon.options import MountOptions
from lamfs.errors import LamfsError, StorageForbidden, StorageReadOnly, StorageUnavailable
from lamfs.printable import count_of
from lamfs.storage.root import is_s3

if TYPE_CHECKING:
    from lamfs.ops.instance import Instance
    from lamfs.storage import ObjectStore

log = logging.getLogger("lamfs.daemon")


class FirstMover:
    """Made by ``begin``, before there are threads. When it dies, lamfs.mover.client starts its successors."""

    def __init__(self, options: MountOptions) -> None:
        self._options = options
        self._report: int | None = None
        self.pid = 0
        self.sock: socket.socket
        """Our end of its job socket."""

    def begin(self) -> None:
        """Start it. It ends when our end of its socket is closed. Raises NotSetUp, OSError."""
        looks = is_s3(config.load_instance(self._options.slug).storage.root)
        # Import before the fork: both need these modules.
        import lamfs.mover.jobs
        import lamfs.mover.storing
        import lamfs.ops.instance
        import lamfs.registry  # noqa: F401

        self.sock, theirs = socket.socketpair()
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _become_mover(self._options, theirs, writing if looks else None)
            except BaseException:
                log.exception("the moving process does not get under way")
            finally:
                os._exit(1)
        theirs.close()
        os.close(writing)
        if looks:
            self._report = reading
        else:
            os.close(reading)

    def outcome(self) -> Looked | None:
        """The result of ``look``, once it has ended. None for a local folder, where it is quick and was not started
        here.

        Raises as ``look`` does. Do not call it while this process has the registry open: a newer one may replace it.
        """
        if self._report is None:
            return None
        with open(self._report, "rb") as pipe:
            found = pipe.read()
        report: dict[str, Any] = (
            json.loads(found) if found else {"error": "The look at the storage ended early.", "errno": None}
        )
        if "error" in report:
            raise LamfsError(report["error"], errno=report["errno"])
        return Looked(tuple(report["warnings"]), report["trouble"], report["refused"])


def _become_mover(options: MountOptions, sock: socket.socket, report: int | None) -> NoReturn:
    """The rest of this process's life. ``report``: where it reports on the storage; None: it does not look at it."""
    from lamfs.mover.become import become_mover
    from lamfs.mover.server import serve

    become_mover()
    close_files_but(sock.fileno(), -1 if report is None else report)
    store = None
    if report is not None:
        from lamfs.storage import open_store

        store = open_store(config.load_instance(options.slug).storage)
        with open(report, "wb") as pipe:
            pipe.write(json.dumps(_look_report(options, store)).encode())
    serve(sock, store)


def close_files_but(*kept: int) -> None:
    """Close all descriptors of this process but stdin, stdout, stderr, and these."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _look_report(options: MountOptions, store: ObjectStore) -> dict[str, object]:
    from lamfs.ops.instance import Instance

    try:
        with Instance(config.load_instance(options.slug), store=store) as instance:
            return look(instance, write=not options.read_only)._asdict()
    except LamfsError as error:
        return {"error": str(error), "errno": error.errno}
    except Exception as error:
        log.exception("unexpected error in the look at the storage")
        return {"error": f"The storage could not be looked at ({type(error).__name__}: {error}).", "errno": None}


class Looked(NamedTuple):
    """What `look` found.

    ``warnings``: a sentence for each thing that the storage lacks, or that was wrong in a registry that was fetched
    from it. ``trouble``: why the lease could not be asked for; ``""`` if it was. ``refused``: this machine may not
    write.
    """

    warnings: tuple[str, ...]
    trouble: str = ""
    refused: bool = False


def look(instance: Instance, *, write: bool) -> Looked:
    """What a mount has to know of its storage. With ``write`` this machine holds the lease afterwards, or there is
    trouble.

    A storage that does not answer is no reason to refuse the mount: names, cached bytes and the spool are local, and
    new files wait in the spool as in any outage. A storage that refuses writes is a reason, unless closed files wait in
    the spool: those can be read. Raises LamfsError when the storage is of no use, or another machine works on the
    instance.
    """
    from lamfs.ops import freshness
    from lamfs.ops.probe import check_storage

    instance.refuse_damaged()
    try:
        found = check_storage(instance, write=write).warnings
        if write:
            instance.hold_for_mount()
        else:
            freshness.fetch(instance)
    except StorageUnavailable as error:
        trouble = f"{error} What is cached or waits in the spool can be read; what is written waits in the spool."
        return Looked((trouble, *instance.notices), trouble if write else "")
    except (StorageReadOnly, StorageForbidden) as error:
        waiting = instance.registry.journal.owed().get("put", 0) if write else 0
        if not waiting:
            raise
        trouble = (
            f"{error} So the mount is read-only until storage can be written to: {count_of(waiting, 'file', 'is')} not"
            " stored yet: what is in the spool can be read, and is tried again."
        )
        return Looked((trouble, *instance.notices), trouble, refused=True)
    return Looked((*found, *instance.notices))
