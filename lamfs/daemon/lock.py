"""The instance's lock as a mount uses it: through the mover, which has imported what talks to storage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from lamfs.mover.client import Mover
from lamfs.storage.base import ObjectStat


class LockByMover:
    """A LockStore. For a thread of ``trio.to_thread``, while the mover runs. Also raises TransferDied."""

    def __init__(self, mover: Mover, url: Callable[[str], str]) -> None:
        self._mover = mover
        self.url = url

    def open_local(self, key: str) -> int | None:
        """None: a running mount does not take over a lock from another machine, so it needs no times."""

    def head(self, key: str) -> ObjectStat:
        """As Mover.head."""
        return trio.from_thread.run(self._mover.head, key)

    def get(self, key: str, *, length: int, etag: str | None = None) -> bytes:
        """As Mover.get."""
        return trio.from_thread.run(partial(self._mover.get, key, length=length, etag=etag))

    def put_bytes(
        self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None
    ) -> ObjectStat:
        """As Mover.put_bytes."""
        return trio.from_thread.run(
            partial(self._mover.put_bytes, key, data, if_none_match=if_none_match, if_match=if_match)
        )

    def delete(self, keys: list[str]) -> None:
        """As Mover.delete."""
        trio.from_thread.run(self._mover.delete, dict.fromkeys(keys))
