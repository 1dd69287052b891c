"""What the kernel is told to forget."""

from __future__ import annotations

import errno
from collections import Counter

import pyfuse3
import pytest
import trio
import trio.testing

from lamfs.fuse.operations import Kernel


@pytest.mark.usefixtures("jumping_clock")
async def test_many_notices_of_a_few_inodes_become_few(monkeypatch: pytest.MonkeyPatch) -> None:
    told: Counter[int] = Counter()

    def invalidate(fino: int, attr_only: bool) -> None:
        assert attr_only
        told[fino] += 1
        if fino == 2:
            raise OSError(errno.ENOENT, "the kernel does not know it")

    monkeypatch.setattr(pyfuse3, "invalidate_inode", invalidate)
    kernel = Kernel()
    async with trio.open_nursery() as nursery:
        for number in range(300):
            kernel.attributes(1 + number % 3)
        nursery.start_soon(kernel.run)
        await trio.testing.wait_all_tasks_blocked()
        assert told == {1: 1, 2: 1, 3: 1}
        kernel.attributes(3)
        await trio.testing.wait_all_tasks_blocked()
        assert told == {1: 1, 2: 1, 3: 2}
        nursery.cancel_scope.cancel()
