"""The daemon's control socket: ``lamfs status``, ``sync`` and ``umount`` use it. In the daemon's trio loop.

JSON lines on a unix socket (0600, in a 0700 directory) of the user's data directory. A reply ends with ``ok`` or
``error``; ``progress`` lines may come before it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from lamfs import jsonlines
from lamfs.errors import LamfsError, LeaseLost, TooLarge
from lamfs.fs import numbers
from lamfs.fs.filesystem import FileSystem
from lamfs.fs.follow import Follower
from lamfs.jsonlines import Lines
from lamfs.ops.mounts import socket_address

log = logging.getLogger("lamfs.control")

MAX_LINE = 65_536
LOOK_SECONDS = 1.0
"""Seconds that a status may ask storage whether an earlier problem still exists."""
MAX_REFUSED = 5
"""Refused deletions and moves that are named besides files that are too large."""


class ControlServer:
    """Answers commands about one mount."""

    def __init__(self, path: Path, fs: FileSystem, follower: Follower, end_now: Callable[[], Awaitable[None]]) -> None:
        """``end_now`` ends the mount at once, whatever is pending."""
        self.path = path
        self._fs = fs
        self._follower = follower
        self._end_now = end_now

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. The socket exists once this has started, and is removed afterwards."""
        self.path.unlink(missing_ok=True)
        listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            with socket_address(self.path) as address:
                await listener.bind(address)
        finally:
            os.umask(mask)
        listener.listen(16)
        task_status.started()
        try:
            await trio.serve_listeners(self._serve, [trio.SocketListener(listener)])
        finally:
            self.path.unlink(missing_ok=True)

    async def _serve(self, stream: trio.SocketStream) -> None:
        """One client. Whatever it does wrong ends only its own connection."""
        try:
            async with stream:
                lines = Lines(MAX_LINE)
                while data := await stream.receive_some(MAX_LINE):
                    try:
                        complete = lines.feed(data)
                    except ValueError:
                        return
                    for line in complete:
                        await self._answer(stream, line)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        except Exception:
            log.exception("unexpected error on the control socket")

    async def _answer(self, stream: trio.SocketStream, line: bytes) -> None:
        command: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            command = jsonlines.decode(line)
        name = command.get("cmd")
        try:
            if name == "status":
                context = self._fs.context
                with trio.move_on_after(LOOK_SECONDS):
                    await context.stats.look_again(context.registry, context.store, context.mover)
                reply: dict[str, Any] = {"ok": True, "status": self.status()}
            elif name == "poke":
                self._follower.poke()
                self._fs.context.cache.look()
                reply = {"ok": True}
            elif name == "sync" and isinstance(command.get("ino"), int):
                self._fs.files.acknowledge_all()
                await self._fs.files.store(command["ino"])
                reply = {"ok": True}
            elif name == "sync":
                reply = {"ok": True, "refused": await self._sync(stream, command.get("below"))}
            elif name == "end":
                await stream.send_all(jsonlines.encode({"ok": True}))
                log.warning("told to end now; what is owed is stored by the next mount")
                await self._end_now()
                return
            else:
                reply = {"error": f"This mount knows no command '{name}'; is it of another version of lamfs?"}
        except LamfsError as error:
            reply = {"error": str(error), "lost": isinstance(error, LeaseLost)}
        await stream.send_all(jsonlines.encode(reply))

    async def _sync(self, stream: trio.SocketStream, below: object) -> list[str]:
        """Drain, or store what is ``below`` a key, and report progress. Ends early when the client goes.

        Returns what storage refuses for good.
        """
        refused: list[str] = []
        last: tuple[int, int] | None = None
        gone = False
        send, receive = trio.open_memory_channel[tuple[int, int]](1)

        def progress(rows: int, size: int) -> None:
            nonlocal last
            if (rows, size) != last:
                last = (rows, size)
                with contextlib.suppress(trio.WouldBlock):
                    send.send_nowait((rows, size))

        async def tell() -> None:
            nonlocal gone
            try:
                async for rows, size in receive:
                    await stream.send_all(jsonlines.encode({"progress": {"owed": rows, "bytes": size}}))
            except trio.BrokenResourceError:
                gone = True
                nursery.cancel_scope.cancel()

        problem: LamfsError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell)
            try:
                if isinstance(below, str) and below:
                    await self._fs.sync_below(below, progress)
                else:
                    refused = await self._fs.sync_all(progress)
                    if too_large := self._fs.refused():
                        raise TooLarge(" ".join([too_large, *_also(refused)]))
            except LamfsError as error:
                problem = error
            await send.aclose()
        if gone:
            raise trio.BrokenResourceError
        if problem is not None:
            raise problem
        return refused

    def status(self) -> dict[str, Any]:
        """What ``lamfs status`` shows of this mount. Sizes in bytes, times ISO 8601."""
        return numbers.collect(self._fs.context)


def _also(refused: list[str]) -> list[str]:
    """A sentence for each thing that storage refuses, except for files that are too large."""
    if not refused:
        return []
    more = f"; and {len(refused) - MAX_REFUSED} more" if len(refused) > MAX_REFUSED else ""
    said = "; ".join(refused[:MAX_REFUSED])
    return [f"Storage also refuses for good, and no bytes are lost with it: {said}{more}"]
