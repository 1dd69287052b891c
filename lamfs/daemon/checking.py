"""Looking at the storage in a process of its own, while this one still loads what a mount needs. Before any thread.

What talks to S3 takes as long to load as all the rest, and the daemon does not need it afterwards: the mover has it.
"""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING, Any

from lamfs import config
from lamfs.daemon.options import MountOptions
from lamfs.errors import LamfsError
from lamfs.storage.root import is_s3

if TYPE_CHECKING:
    from lamfs.ops.instance import Instance

log = logging.getLogger("lamfs.daemon")


class StorageCheck:
    """The look at one mount's storage: begun by ``begin``, before there are threads; waited for by ``outcome``."""

    def __init__(self, options: MountOptions) -> None:
        self._options = options
        self._child: tuple[int, int] | None = None

    def begin(self) -> None:
        """Start to look, if that takes long: not at a local folder. Raises NotSetUp."""
        if not is_s3(config.load_instance(self._options.slug).storage.root):
            return
        reading, writing = os.pipe()
        pid = os.fork()
        if pid:
            os.close(writing)
            self._child = (pid, reading)
            return
        try:
            os.close(reading)
            os.write(writing, json.dumps(self._report()).encode())
        finally:
            os._exit(0)

    def outcome(self) -> tuple[str, ...] | None:
        """What ``look`` gives, once that has ended; None where it was not begun, and is quick.

        Raises as that does. Not while this process has the registry open: it may be replaced by a newer one.
        """
        if self._child is None:
            return None
        pid, reading = self._child
        with open(reading, "rb") as pipe:
            found = pipe.read()
        os.waitpid(pid, 0)
        report: dict[str, Any] = (
            json.loads(found) if found else {"error": "The look at the storage ended early.", "errno": None}
        )
        if "error" in report:
            raise LamfsError(report["error"], errno=report["errno"])
        return tuple(report["warnings"])

    def _report(self) -> dict[str, object]:
        from lamfs.ops.instance import Instance

        try:
            with Instance(config.load_instance(self._options.slug)) as instance:
                return {"warnings": look(instance, write=not self._options.read_only)}
        except LamfsError as error:
            return {"error": str(error), "errno": error.errno}
        except Exception as error:
            log.exception("unexpected error in the look at the storage")
            return {"error": f"The storage could not be looked at ({type(error).__name__}: {error}).", "errno": None}


def look(instance: Instance, *, write: bool) -> tuple[str, ...]:
    """A sentence for each thing that the storage lacks. With ``write`` this machine holds the lease then.

    Raises LamfsError when the storage is of no use, or another machine works on the instance.
    """
    from lamfs.ops.probe import check_storage

    found = check_storage(instance, write=write).warnings
    if write:
        instance.hold()
    return found
