"""Memory for blocks: used again, given back."""

from __future__ import annotations

import mmap
import threading
import weakref

import pytest

from lamfs.model import BLOCK_SIZE
from lamfs.mover import buffers as module
from lamfs.mover.buffers import Buffers


def test_memory_is_used_again_and_given_back() -> None:
    buffers = Buffers()
    with buffers.view(10) as one, buffers.view(BLOCK_SIZE) as two:
        assert (len(one), len(two)) == (10, BLOCK_SIZE)
        one[:] = b"0123456789"
        assert two[:10] == bytes(10)
        assert not buffers._free
    with buffers.view(10) as again:
        assert bytes(again) in (b"0123456789", bytes(10))
        assert buffers._free
    buffers.drop()
    assert not buffers._free
    with buffers.view(10) as fresh:
        assert bytes(fresh) == bytes(10)


def test_memory_comes_back_after_a_failure_too() -> None:
    buffers = Buffers()
    with pytest.raises(OSError), buffers.view(10):
        raise OSError
    assert buffers._free


def test_more_than_a_block_is_not_kept() -> None:
    buffers = Buffers()
    with buffers.view(BLOCK_SIZE + 1) as view:
        assert len(view) == BLOCK_SIZE + 1
    assert not buffers._free


def test_a_threads_own_memory_goes_with_it() -> None:
    seen: list[weakref.ref[mmap.mmap]] = []

    def work() -> None:
        own = module.own()
        assert module.own() is own is not mine
        with own.view(10):
            pass
        seen.append(weakref.ref(own._free[0]))

    mine = module.own()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen[0]() is None
