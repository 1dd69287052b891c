"""Words after -o: those that are refused say what is wrong with them, before anything is mounted."""

from __future__ import annotations

import pytest

from lamfs.daemon.options import MountOptions, apply_words
from lamfs.errors import InvalidArgument


@pytest.mark.parametrize(
    ("word", "need"),
    [
        ("uid=abc", "a number from 0"),
        ("uid=-1", "a number from 0"),
        ("gid=4294967295", "a number from 0"),
        ("gid", "a number from 0"),
        ("uid=²", "a number from 0"),
        ("umask=999", "an octal number"),
        ("close=never", "'spool' or 'storage'"),
        ("fsync", "'spool' or 'storage'"),
        ("cache_limit", "a size"),
        ("spool_limit", "a size"),
        ("spool_free", "a size"),
        ("cache_free", "a size"),
        ("timeout=0", "above 0"),
        ("timeout=-1", "above 0"),
        ("timeout=nan", "above 0"),
        ("uploads=65", "from 1 to 64"),
        ("ro=1", "takes no value"),
        ("noatime=yes", "takes no value"),
        ("bogus", "lamfs knows"),
        ("suid", "lamfs knows"),
    ],
)
def test_a_wrong_word_is_named_with_what_it_needs(word: str, need: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        apply_words(MountOptions("a/b", "/m"), [word])
    assert word in str(caught.value)
    assert need in str(caught.value)


def test_of_two_opposite_words_the_last_counts() -> None:
    options = MountOptions("a/b", "/m")
    apply_words(options, ["noatime", "noexec", "atime", "sync", "async", "exec", "noexec", "ro", "rw"])
    assert options.fuse == ("atime", "async", "noexec")
    assert not options.read_only
