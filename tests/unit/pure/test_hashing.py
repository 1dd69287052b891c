"""Content hashes, against a second implementation that reads everything into memory and knows no blocks."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamfs.hashing import (
    MD5_MAX,
    encode_digest,
    hash_block,
    hash_ends,
    hash_fd,
    hash_file,
    hash_leaves,
    hash_range,
    hash_view,
    join_ranges,
    zero_block,
    zero_leaves,
)
from lamfs.model import BLOCK_SIZE

TEST_FILES = Path(__file__).parents[3] / "test-files"
FIFTY_MIB = 52_428_800


def b64(digest: bytes) -> str:
    return base64.b64encode(digest).decode().replace("+", "-").replace("/", "_").replace("=", "")[:22]


def plain_hash(data: bytes) -> tuple[str, str]:
    """LaminDB's rule, word for word."""
    if len(data) <= FIFTY_MIB:
        return b64(hashlib.md5(data).digest()), "md5"
    first = hashlib.sha1(data[:FIFTY_MIB]).digest()
    last = hashlib.sha1(data[-FIFTY_MIB:]).digest()
    return b64(hashlib.sha1(first + last).digest()), "sha1-fl"


def plain_blocks(data: bytes) -> bytes:
    return b"".join(blake3(data[at : at + 4_194_304]).digest() for at in range(0, len(data), 4_194_304))


def pattern(size: int) -> bytes:
    """Bytes in which no two blocks are equal."""
    return hashlib.shake_128(b"lamfs").digest(4099) * (size // 4099) + b"\x07" * (size % 4099)


@pytest.mark.parametrize(
    ("name", "size", "text"),
    [
        ("iris.csv", 224, "iwc1TmF1TW_l5weDvscSHw"),
        ("iris.data", 182, "42Br6no9CjB6s5ZbmO-bmw"),
        ("new_iris.csv", 229, "lp2-ycXcKcaliUTnR_TqHA"),
    ],
)
def test_known_files(name: str, size: int, text: str) -> None:
    found = hash_file(TEST_FILES / name)
    assert (found.size, found.hash, found.hash_type) == (size, text, "md5")
    assert found.blocks == blake3((TEST_FILES / name).read_bytes()).digest()


def test_empty_file_has_no_blocks(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    found = hash_file(tmp_path / "empty")
    assert (found.size, found.hash, found.hash_type, found.blocks) == (0, "1B2M2Y8AsgTpgAmY7PhCfg", "md5", b"")


def test_the_limit_of_md5_is_fifty_mib() -> None:
    assert MD5_MAX == FIFTY_MIB == 50 * 1024 * 1024


@pytest.mark.parametrize(
    "size",
    [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, FIFTY_MIB - 1, FIFTY_MIB, FIFTY_MIB + 1, 2 * FIFTY_MIB + 12345],
)
def test_sizes_at_the_edges(tmp_path: Path, size: int) -> None:
    data = pattern(size)
    path = tmp_path / "file"
    path.write_bytes(data)
    found = hash_file(path)
    assert (found.hash, found.hash_type) == plain_hash(data)
    assert found.hash_type == ("md5" if size <= 52_428_800 else "sha1-fl")
    assert found.size == size
    assert found.blocks == plain_blocks(data)


def test_sparse_files_at_the_edge(tmp_path: Path) -> None:
    """Known values of zeros, computed with coreutils: md5sum, and sha1sum of the two sums."""
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, FIFTY_MIB)
    zeros = hash_file(path)
    assert zeros.hash == b64(bytes.fromhex("25e317773f308e446cc84c503a6d1f85"))
    assert zeros.hash_type == "md5"
    os.truncate(path, FIFTY_MIB + 1)
    larger = hash_file(path)
    half = bytes.fromhex("49886561f8e26ed5e2ae549897a28aaab44881bd")
    assert larger.hash == b64(hashlib.sha1(half + half).digest())
    assert larger.hash_type == "sha1-fl"
    assert len(zeros.blocks) == 13 * 32
    assert len(larger.blocks) == 13 * 32
    assert zeros.blocks[: 12 * 32] == larger.blocks[: 12 * 32]
    assert zeros.blocks[12 * 32 :] != larger.blocks[12 * 32 :]


@pytest.mark.parametrize("size", [1, 65536, 65537, BLOCK_SIZE, BLOCK_SIZE + 65536 + 1, FIFTY_MIB + BLOCK_SIZE])
def test_leaves(tmp_path: Path, size: int) -> None:
    data = pattern(size)
    (tmp_path / "file").write_bytes(data)
    found = hash_file(tmp_path / "file").leaves
    if size <= 65536:
        assert not found
        return
    plain = [blake3(data[at : at + 65536]).digest()[:16] for at in range(0, size, 65536)]
    assert found == {
        number: b"".join(plain[64 * number : 64 * number + 64]) for number in range(-(-size // BLOCK_SIZE))
    }


def test_leaves_of_holes_are_known_without_being_listed(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.write_bytes(b"x" * (FIFTY_MIB + BLOCK_SIZE))
    os.truncate(path, 3 * FIFTY_MIB)
    found = hash_file(path)
    holes = set(range(-(-found.size // BLOCK_SIZE))) - set(found.leaves)
    assert len(holes) > 20
    assert {found.block(block) for block in holes} == {zero_block()}
    assert zero_leaves() == hash_leaves(bytes(BLOCK_SIZE))


def test_sha1_fl_is_blind_to_the_middle_and_the_blocks_are_not(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, 2 * FIFTY_MIB + 1000)
    before = hash_file(path)
    with path.open("r+b") as stream:
        stream.seek(FIFTY_MIB + 500)
        stream.write(b"x")
    after = hash_file(path)
    assert before.hash == after.hash
    assert not before.same_bytes(after)


@pytest.mark.parametrize("where", [0, FIFTY_MIB - 1, FIFTY_MIB, FIFTY_MIB + 9])
def test_sha1_fl_sees_both_ends_to_the_last_byte(tmp_path: Path, where: int) -> None:
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, FIFTY_MIB + 10)
    before = hash_file(path)
    with path.open("r+b") as stream:
        stream.seek(where)
        stream.write(b"x")
    assert hash_file(path).hash != before.hash


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=5000))
def test_small_contents(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    found = hash_file(path)
    assert (found.hash, found.hash_type) == plain_hash(data)
    assert (found.size, found.blocks) == (len(data), plain_blocks(data))


@given(st.one_of(st.binary(min_size=16, max_size=16), st.binary(min_size=20, max_size=20)))
def test_digests_are_22_url_safe_characters(digest: bytes) -> None:
    assert re.fullmatch("[A-Za-z0-9_-]{22}", encode_digest(digest))
    assert encode_digest(digest) == b64(digest)


def test_a_digest_of_zeros_and_of_ones() -> None:
    assert encode_digest(bytes(16)) == "A" * 22
    assert encode_digest(b"\xff" * 16) == "_" * 21 + "w"


def test_hash_block_is_blake3_of_bytes_and_views() -> None:
    known = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"  # BLAKE3's test vector of no input
    assert hash_block(b"").hex() == known
    assert hash_block(memoryview(bytearray(b"abc"))) == hash_block(b"abc") == blake3(b"abc").digest()


def test_hash_fd_leaves_the_offset_and_reads_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"hello, world")
    with path.open("rb") as stream:
        os.lseek(stream.fileno(), 3, os.SEEK_SET)
        found = hash_fd(stream.fileno(), 12)
        assert os.lseek(stream.fileno(), 0, os.SEEK_CUR) == 3
    assert found.hash == plain_hash(b"hello, world")[0]


def test_hash_fd_hashes_as_many_bytes_as_it_was_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"hello, world")
    with path.open("rb") as stream:
        found = hash_fd(stream.fileno(), 5)
    assert (found.size, found.hash, found.blocks) == (5, plain_hash(b"hello")[0], plain_blocks(b"hello"))


@pytest.mark.parametrize("size", [4, BLOCK_SIZE + 1, FIFTY_MIB + 1])
def test_a_file_that_is_shorter_than_promised_is_an_error(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with path.open("rb") as stream, pytest.raises(EOFError, match="byte 3"):
        hash_fd(stream.fileno(), size)


def test_progress_adds_up_to_the_size(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    size = FIFTY_MIB + BLOCK_SIZE + 17
    os.truncate(path, size)
    steps: list[int] = []
    hash_file(path, steps.append)
    assert sum(steps) == size
    assert max(steps) == BLOCK_SIZE
    assert len(steps) == 14


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        hash_file(tmp_path / "none")


def test_hash_file_leaves_no_descriptor_open(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        hash_file(tmp_path / "file")
    assert len(os.listdir("/proc/self/fd")) == before


def test_holes_are_hashed_as_the_zeros_they_are(tmp_path: Path) -> None:
    size = 96 * 1024 * 1024 + 5
    sparse, dense = tmp_path / "sparse", tmp_path / "dense"
    pieces = {0: b"begin", 60 * 1024 * 1024 + 3: b"middle", size - 4: b"end!"}
    for path in (sparse, dense):
        with path.open("wb") as out:
            if path == dense:
                for _ in range(size // (1 << 20)):
                    out.write(bytes(1 << 20))
                out.write(bytes(size % (1 << 20)))
            out.truncate(size)
            for offset, data in pieces.items():
                out.seek(offset)
                out.write(data)
    assert sparse.stat().st_blocks < dense.stat().st_blocks // 2, "this disk keeps no holes"
    assert hash_file(sparse) == hash_file(dense)
    with sparse.open("rb") as file:
        file.seek(7)
        with pytest.raises(EOFError):
            hash_fd(file.fileno(), size + 64 * 1024 * 1024)
        assert hash_fd(file.fileno(), size) == hash_file(dense)


@pytest.mark.parametrize("data", [b"x", pattern(BLOCK_SIZE), pattern(BLOCK_SIZE - 1), bytes(BLOCK_SIZE)])
def test_a_block_in_memory_hashes_as_a_range_does(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "f").write_bytes(data)
    with (tmp_path / "f").open("rb") as stream:
        expected = hash_range(stream.fileno(), 0, len(data))
    assert hash_view(memoryview(data)) == expected


def test_ranges_and_ends_make_the_hash_of_one_pass(tmp_path: Path) -> None:
    size = FIFTY_MIB + 3 * BLOCK_SIZE + 77
    path = tmp_path / "large"
    path.write_bytes(pattern(size - BLOCK_SIZE - 5) + bytes(BLOCK_SIZE) + b"tail!")
    whole = hash_file(path)
    with path.open("rb") as stream:
        fd = stream.fileno()
        ranges = [hash_range(fd, at, min(4 * BLOCK_SIZE, size - at)) for at in range(0, size, 4 * BLOCK_SIZE)]
        joined = join_ranges(ranges, hash_ends(fd, size))
        with pytest.raises(EOFError):
            hash_range(fd, size - 5, 6)
        known = {block: whole.block(block) for block in range(size // BLOCK_SIZE)}
        assert hash_fd(fd, size, known=known, ends=whole.hash) == whole
        known.pop(3)
        assert hash_fd(fd, size, known=known, head=whole.head) == whole
    assert joined == whole
    assert joined.head == whole.head == hashlib.sha1(path.read_bytes()[:FIFTY_MIB]).digest()
    assert {**joined.leaves} == {block: found for block, found in whole.leaves.items() if found != zero_leaves()}
