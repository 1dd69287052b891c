"""Control files without a kernel: whom they belong to, and how their contents are made, shared and let go."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable

import pytest

from lamfs.errors import FsError
from lamfs.fs import contents, numbers
from lamfs.fs.contents import LIMIT, OVERHEAD, SHARED_SECONDS, Contents
from lamfs.fs.filesystem import Changes, FileSystem
from lamfs.fs.nodes import CONTROL_BASE
from lamfs.model import ROOT_INO, TRASH
from tests.support.fsbox import User
from tests.unit.fs.conftest import MakeBox

HANDLES = 20_000


class Maker:
    """Contents of a size that say how often one was made; a clock and a stamp to set."""

    def __init__(self, size: int = 20) -> None:
        self.size = size
        self.made = 0
        self.now = 0.0
        self.stamp: object | None = "same"
        self.contents = Contents(self.make, lambda number: self.stamp, CONTROL_BASE, clock=lambda: self.now)

    def make(self, number: int) -> bytes:
        self.made += 1
        return f"{number} {self.made} ".encode().ljust(self.size, b".")

    def read_whole(self, handle: int) -> bytes:
        """As ``cat`` reads: until it is told of the end."""
        data = b""
        while piece := self.contents.read(handle, len(data), 7):
            data += piece
        return data


def test_opening_makes_nothing() -> None:
    maker = Maker()
    handles = [maker.contents.open(1) for _ in range(HANDLES)]
    assert len(set(handles)) == HANDLES
    assert min(handles) > CONTROL_BASE
    assert (maker.made, maker.contents.kept_bytes) == (0, 0)
    for handle in handles:
        maker.contents.release(handle)
    assert maker.contents.open(1) > max(handles), "a number is never used again"


def test_handles_that_read_within_a_short_time_share_a_content() -> None:
    maker = Maker()
    contents = maker.contents
    first, second, third, other = (contents.open(number) for number in (1, 1, 1, 2))
    begun = contents.read(first, 0, 5)
    maker.now += SHARED_SECONDS
    assert maker.read_whole(second) == b"1 1 ".ljust(20, b".")
    assert maker.read_whole(other) == b"2 2 ".ljust(20, b".")
    maker.now += 0.01
    assert maker.read_whole(third) == b"1 3 ".ljust(20, b".")
    assert begun + contents.read(first, 5, 100) == b"1 1 ".ljust(20, b"."), "one handle goes on with what it began"


def test_nothing_is_shared_across_a_change() -> None:
    """A program that reads after it has done something finds that."""
    maker = Maker()
    first, second = maker.contents.open(1), maker.contents.open(1)
    assert maker.read_whole(first).startswith(b"1 1 ")
    maker.stamp = "changed"
    assert maker.read_whole(second).startswith(b"1 2 ")
    maker.stamp = None
    handles = [maker.contents.open(1) for _ in range(2)]
    assert [maker.contents.read(handle, 2, 1) for handle in handles] == [b"3", b"4"]


def test_equal_contents_are_kept_once() -> None:
    made: list[int] = []

    def make(number: int) -> bytes:
        made.append(number)
        return b"x" * 1000

    contents = Contents(make, lambda number: None, CONTROL_BASE)
    handles = [contents.open(7) for _ in range(100)]
    assert {contents.read(handle, 0, 10) for handle in handles} == {b"x" * 10}
    assert (len(made), contents.kept_bytes) == (100, 1000 + OVERHEAD)
    for handle in handles:
        contents.release(handle)
    assert contents.kept_bytes == 0


def test_the_end_stays_where_a_handle_was_told_of_it() -> None:
    maker = Maker()
    handle = maker.contents.open(1)
    assert len(maker.read_whole(handle)) == 20
    maker.now += 1
    maker.size = 50
    assert maker.contents.read(handle, 20, 100) == b"", "no piece of a longer content is added"
    assert maker.read_whole(handle) == b"1 2 ".ljust(50, b"."), "rewound, it reads what is there now"
    assert maker.contents.read(maker.contents.open(1), 1000, 5) == b""


@pytest.mark.parametrize("leave", ["end", "release"])
def test_a_content_is_let_go(leave: str) -> None:
    """When its last reader has read to the end or is closed; the next one looks after what may still be shared."""
    maker = Maker()
    contents = maker.contents
    for held in (1, 3):
        handles = [contents.open(1) for _ in range(held)]
        for handle in handles:
            contents.read(handle, 0, 5)
        assert contents.kept_bytes == 20 + OVERHEAD
        maker.now += 1
        for handle in handles:
            assert contents.kept_bytes == 20 + OVERHEAD
            if leave == "end":
                maker.read_whole(handle)
            else:
                contents.release(handle)
        assert contents.kept_bytes == 0
    for number in (1, 2, 3):
        assert maker.read_whole(contents.open(number))
        assert contents.kept_bytes == 20 + OVERHEAD
        maker.now += 1


def test_what_is_kept_is_bounded() -> None:
    """Each of very many handles holds a content of its own; the oldest go, and are made anew."""
    maker = Maker(1000)
    maker.stamp = None
    contents = maker.contents
    handles = [contents.open(number) for number in range(HANDLES)]
    most = 0
    for handle in handles:
        assert len(contents.read(handle, 0, 10)) == 10
        most = max(most, contents.kept_bytes)
    assert most <= LIMIT
    assert maker.made == HANDLES
    last = contents.read(handles[-1], 0, 1000)
    assert (last[:12], maker.made) == (b"19999 20000 ", HANDLES), "the newest are kept"
    assert contents.read(handles[0], 0, 10) == b"0 20001 ..", "the oldest is made anew"
    for handle in handles:
        contents.release(handle)
    assert contents.kept_bytes == 0


def test_a_content_above_the_bound_can_be_read() -> None:
    maker = Maker(LIMIT + 100)
    first, second = maker.contents.open(1), maker.contents.open(2)
    assert len(maker.contents.read(first, 0, LIMIT)) == LIMIT
    assert len(maker.contents.read(first, LIMIT, LIMIT)) == 100
    assert maker.made == 1
    assert len(maker.contents.read(second, 0, 10)) == 10
    assert maker.contents.kept_bytes == LIMIT + 100 + OVERHEAD


def test_a_content_that_cannot_be_made_leaves_nothing() -> None:
    def make(number: int) -> bytes:
        raise FsError(errno.ESTALE)

    contents = Contents(make, lambda number: None, CONTROL_BASE)
    handle = contents.open(1)
    with pytest.raises(FsError):
        contents.read(handle, 0, 10)
    contents.release(handle)
    assert contents.kept_bytes == 0


# -- on a file system -------------------------------------------------------------------------------------------------


def control(fs: FileSystem, path: str) -> int:
    """FUSE inode number of a path below ``.lamfs``."""
    number = fs.control.top()[0]
    for name in path.split("/") if path else ():
        found = fs.lookup(number, name.encode())
        assert found is not None, path
        number = found[0]
    return number


def refused(call: Callable[[], object]) -> int:
    """The errno with which a call fails."""
    with pytest.raises(FsError) as caught:
        call()
    return caught.value.errno


async def chmod(user: User, path: str, mode: int, uid: int, gid: int) -> None:
    await user.fs.setattr(user.find(path), Changes(mode=mode, uid=uid, gid=gid))


def test_mode_and_owner_are_those_of_what_is_described(make_box: MakeBox) -> None:
    def shown(fs: FileSystem, path: str) -> tuple[int, int, int]:
        inode = fs.getattr(control(fs, path))
        folder, _, name = path.rpartition("/")
        entry = {key: found for _, key, _, found in fs.entries(control(fs, folder), 0)}[name.encode()]
        assert (entry.mode, entry.uid, entry.gid) == (inode.mode, inode.uid, inode.gid)
        return inode.mode, inode.uid, inode.gid

    async def scenario(user: User) -> None:
        fs = user.fs
        mine = os.getuid(), os.getgid()
        for path, given, wanted in (
            ("d", 0o2770, stat.S_IFDIR | 0o550),
            ("f", 0o4764, stat.S_IFREG | 0o444),
            ("d/closed", 0o600, stat.S_IFREG | 0o400),
            ("d/none", 0o333, stat.S_IFREG),
        ):
            if path == "d":
                await user.mkdir(path)
            else:
                await user.write_file(path, b"x")
            await chmod(user, path, given, 7, 8)
            assert shown(fs, f"info/{path}") == (wanted, 7, 8)
        await fs.setattr(ROOT_INO, Changes(mode=0o711, uid=9))
        assert shown(fs, "info")[:2] == (stat.S_IFDIR | 0o511, 9)
        assert fs.control.top()[1].mode == stat.S_IFDIR | 0o555
        for name in ("stats", "metrics"):
            assert shown(fs, name) == (stat.S_IFREG | 0o400, *mine)
        fs.context.policy.public_stats = True
        for name in ("stats", "metrics"):
            assert shown(fs, name) == (stat.S_IFREG | 0o444, *mine)
        # While it is being written, the registry does not have its mode yet.
        opened = await user.create("open")
        await user.pwrite(opened, b"secret", 0)
        await chmod(user, "open", 0o600, 5, 6)
        assert shown(fs, "info/open") == (stat.S_IFREG | 0o400, 5, 6)
        await user.close(opened)
        assert shown(fs, "info/open") == (stat.S_IFREG | 0o400, 5, 6)

    box = make_box("s3")
    box.run(scenario, User())


def test_numbers_that_no_name_leads_to(make_box: MakeBox) -> None:
    """As a handle of open_by_handle_at(2) makes the kernel ask: with ``.``, of any number."""

    async def scenario(user: User) -> None:
        fs = user.fs
        await user.write_file("f", b"x")
        fs.names.make(ROOT_INO, b"link", stat.S_IFLNK | 0o777, 0, 0, target=b"f")
        info = control(fs, "info")
        for path in ("info", "info/f", "stats", "metrics"):
            number = control(fs, path)
            found = fs.lookup(number, b".")
            assert found is not None
            assert found[0] == number
            assert found[1].mode == fs.getattr(number).mode
            assert fs.lookup(number, b"..") is None
        for number in (info + user.find("link"), info + 99_999, control(fs, "metrics") + 1, (1 << 64) - 1):
            assert refused(lambda number=number: fs.lookup(number, b".")) == errno.ENOENT
            assert refused(lambda number=number: fs.getattr(number)) == errno.ENOENT

    make_box("s3").run(scenario, User())


def test_a_record_has_the_size_that_it_says(make_box: MakeBox) -> None:
    async def scenario(user: User) -> None:
        fs = user.fs
        await user.write_file("f", b"x")
        number = control(fs, "info/f")
        handles = []
        for data in (b"x", b"longer"):
            await user.write_file("f", data)
            await user.sync()
            handles.append(await fs.open(number, os.O_RDONLY))
            assert len(await fs.read(handles[-1], 0, 1 << 20)) == fs.getattr(number).size
        old, new = [json.loads(await fs.read(handle, 0, 1 << 20)) for handle in handles]
        assert (old["size"], new["size"]) == (1, 6)
        begun, late = [await fs.open(number, os.O_RDONLY) for _ in range(2)]
        first = await fs.read(begun, 0, 5)
        await user.unlink("f")
        assert json.loads(first + await fs.read(begun, 5, 1 << 20)) == new
        record = json.loads(await fs.read(late, 0, 1 << 20))
        assert (record["uid"], record["visibility"]) == (new["uid"], TRASH), "as what is open lives on"
        await user.write_file("g", b"never stored")
        gone = await fs.open(control(fs, "info/g"), os.O_RDONLY)
        await user.unlink("g")
        with pytest.raises(FsError) as caught:
            await fs.read(gone, 0, 100)
        assert caught.value.errno == errno.ESTALE
        for handle in (*handles, begun, late, gone):
            fs.release(handle)
        assert fs.control.contents.kept_bytes == 0

    make_box("s3").run(scenario, User())


def test_the_numbers_show_what_was_done_before(make_box: MakeBox, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often they are read, and by whom."""
    monkeypatch.setattr(contents, "SHARED_SECONDS", 1e9)

    async def scenario(user: User) -> None:
        fs = user.fs
        made = 0
        made_by = numbers.collect

        async def read() -> dict[str, str]:
            handle = await fs.open(control(fs, "stats"), os.O_RDONLY)
            try:
                lines = (await fs.read(handle, 0, 1 << 20)).decode().splitlines()
            finally:
                fs.release(handle)
            return dict(line.split(": ", 1) for line in lines)

        def counted(context: object) -> dict[str, object]:
            nonlocal made
            made += 1
            return made_by(fs.context)

        monkeypatch.setattr(numbers, "collect", counted)
        await read()
        await read()
        assert made == 1
        opened = await user.create("f")
        await user.pwrite(opened, b"12345", 0)
        assert (await read())["write_bytes"] == "5"
        await user.pread(opened)
        assert (await read())["read_bytes"] == "5"
        await user.close(opened)
        assert (await read())["owed_bytes"] == "5"
        await user.sync()
        assert (await read())["owed_bytes"] == "0"

    make_box("s3").run(scenario, User())


@pytest.mark.parametrize("path", ["stats", "info/0"])
def test_many_handles_take_little(make_box: MakeBox, path: str) -> None:
    async def scenario(user: User) -> None:
        fs = user.fs
        for name in range(5):
            await user.write_file(str(name), b"x")
        await user.sync()
        handles = [await fs.open(control(fs, path), os.O_RDONLY) for _ in range(2000)]
        assert fs.control.contents.kept_bytes == 0
        for handle in handles:
            assert len(await fs.read(handle, 0, 10)) == 10
        assert 0 < fs.control.contents.kept_bytes < 100_000
        for handle in handles:
            fs.release(handle)
        assert fs.control.contents.kept_bytes < 10_000

    make_box("s3").run(scenario, User())
