"""What of pyfuse3's log is of interest."""

from __future__ import annotations

import errno
import logging
import os

import pytest

from lamfs.daemon.launch import is_of_interest


@pytest.mark.parametrize(
    ("text", "cause", "wanted"),
    [
        ("fuse_release(): fuse_reply_* failed with %s", errno.ENOENT, False),
        ("fuse_release(): fuse_reply_* failed with %s", errno.EIO, True),
        ("lookup of something failed with %s", errno.ENOENT, True),
    ],
)
def test_replies_that_nobody_waited_for_are_no_errors(text: str, cause: int, wanted: bool) -> None:
    record = logging.LogRecord("pyfuse3", logging.ERROR, "", 0, text, (os.strerror(cause),), None)
    assert is_of_interest(record) is wanted
