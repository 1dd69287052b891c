"""Keys, names and suffixes: LaminDB's tables, POSIX's limits, and properties that hold for any text."""

from __future__ import annotations

import errno

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lamfs.errors import FsError, InvalidName
from lamfs.keys import (
    COMPOSITE_SUFFIXES,
    FORMAT_SUFFIXES,
    check_key,
    check_name,
    check_spool_name,
    is_spool_name,
    key_with_suffix,
    object_key_for,
    root_path,
    spool_name,
    suffix_of,
)

UID = "0123456789abcdefABCD"

names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=60).filter(
    lambda name: name not in (".", "..")
)
keys = st.lists(names, min_size=1, max_size=6).map("/".join)


# Suffixes


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("iris.csv", ".csv"),
        ("iris.data", ".data"),
        ("README", ""),
        ("v1.2", ""),
        ("run.2024", ""),
        ("sample.001", ""),
        ("v1.2a", ".2a"),
        ("a.tar.gz", ".tar.gz"),
        ("a.csv.gz", ".csv.gz"),
        ("reads.fastq.gz", ".fastq.gz"),
        ("reads_R1.001.fastq.gz", ".fastq.gz"),
        ("calls.vcf.gz", ".vcf.gz"),
        ("x.h5ad.zst", ".h5ad.zst"),
        ("my.file.csv", ".csv"),
        ("release.1.0.csv", ".csv"),
        ("unknown.part.gz", ".gz"),
        ("a.b.2", ""),
        ("atlas.anndata.zarr", ".anndata.zarr"),
        ("tissue.spatialdata.zarr", ".spatialdata.zarr"),
        ("view.vitessce.json", ".vitessce.json"),
        ("x.y.anndata.zarr", ".anndata.zarr"),
        ("plain.zarr", ".zarr"),
        ("other.json", ".json"),
        (".bashrc", ""),
        (".hidden.csv", ".csv"),
        ("ends.", ""),
        ("Upper.CSV", ".CSV"),
        ("folder.d/file", ""),
        ("folder.tar/file.gz", ".gz"),
        ("a/b/c.parquet", ".parquet"),
        ("größe.täb", ".täb"),
    ],
)
def test_suffix_of(name: str, suffix: str) -> None:
    assert suffix_of(name) == suffix


@pytest.mark.parametrize("composite", COMPOSITE_SUFFIXES)
def test_composite_suffixes_count_as_one(composite: str) -> None:
    assert suffix_of(f"a{composite}") == suffix_of(f"folder.x/a.b{composite}") == composite


@pytest.mark.parametrize("known", sorted(FORMAT_SUFFIXES))
def test_known_format_before_the_last_joins_it(known: str) -> None:
    assert suffix_of(f"a{known}") == known
    assert suffix_of(f"a{known}.gz") == known + ".gz"
    assert suffix_of(f"a.other{known}") == known


@given(keys)
def test_a_suffix_is_the_end_of_the_last_name_and_never_all_of_it(key: str) -> None:
    suffix = suffix_of(key)
    last = key.rpartition("/")[2]
    assert last.endswith(suffix)
    assert len(suffix) < len(last)
    assert suffix == "" or suffix.startswith(".")
    assert suffix.count(".") <= 2
    assert not suffix[1:].isdigit() or suffix.count(".") == 2


@given(names, st.integers(min_value=0, max_value=10**9))
def test_a_number_alone_is_no_suffix(stem: str, number: int) -> None:
    assume("." not in stem)
    assert suffix_of(f"{stem}.{number}") == ""


@pytest.mark.parametrize(
    ("key", "old", "new", "result"),
    [
        ("iris.csv", ".csv", ".data", "iris.data"),
        ("a.tar.gz", ".tar.gz", ".csv", "a.csv"),
        ("a.csv", ".csv", ".tar.gz", "a.tar.gz"),
        ("x/a.b.csv", ".csv", ".parquet", "x/a.b.parquet"),
        ("README", "", ".csv", "README.csv"),
        ("v1.2", "", ".csv", "v1.2.csv"),
        ("iris.csv", ".csv", "", "iris"),
        ("iris.csv", ".csv", ".csv", "iris.csv"),
        ("odd", ".csv", ".data", "odd.data"),
        ("a.csv.csv", ".csv", ".data", "a.csv.data"),
    ],
)
def test_replace_swaps_the_suffix_for_the_new_one(key: str, old: str, new: str, result: str) -> None:
    assert key_with_suffix(key, old, new) == result


@given(keys)
def test_swapping_the_suffix_for_itself_changes_nothing(key: str) -> None:
    assert key_with_suffix(key, suffix_of(key), suffix_of(key)) == key


@given(keys, st.sampled_from([".csv", ".data", ".parquet", ".tar.gz", ".anndata.zarr"]))
def test_swapping_there_and_back(key: str, new: str) -> None:
    old = suffix_of(key)
    assert key_with_suffix(key_with_suffix(key, old, new), new, old) == key


# Object keys


@pytest.mark.parametrize(
    ("suffix", "key", "virtual", "result"),
    [
        (".csv", None, True, f".lamindb/{UID}.csv"),
        (".csv", None, False, f".lamindb/{UID}.csv"),
        (".csv", "a/iris.csv", True, f".lamindb/{UID}.csv"),
        (".csv", "a/iris.csv", False, "a/iris.csv"),
        ("", None, True, f".lamindb/{UID}"),
        (".tar.gz", "x.tar.gz", True, f".lamindb/{UID}.tar.gz"),
        # The object of a real key is the key, whatever the suffix says.
        (".data", "iris.csv", False, "iris.csv"),
    ],
)
def test_object_key(suffix: str, key: str | None, virtual: bool, result: str) -> None:
    assert object_key_for(UID, suffix, key, virtual) == result


# Names from the kernel


@pytest.mark.parametrize(
    "name", [b"a", b".hidden", b"...", b" ", b"a\nb", b"a\\b", "größe".encode(), b"-rf", b"x" * 255]
)
def test_names_that_a_file_may_have(name: bytes) -> None:
    assert check_name(name).encode() == name


@pytest.mark.parametrize(
    ("name", "number"),
    [
        (b"", errno.EINVAL),
        (b".", errno.EINVAL),
        (b"..", errno.EINVAL),
        (b"a/b", errno.EINVAL),
        (b"/", errno.EINVAL),
        (b"a\0b", errno.EINVAL),
        (b"\xff", errno.EILSEQ),
        (b"caf\xe9", errno.EILSEQ),
        (b"\xed\xa0\x80", errno.EILSEQ),  # a surrogate, encoded
        (b"\xc0\xaf", errno.EILSEQ),  # "/" in an overlong form
        (b"x" * 256, errno.ENAMETOOLONG),
        (b"\xff" * 256, errno.ENAMETOOLONG),
        (("é" * 128).encode(), errno.ENAMETOOLONG),
    ],
)
def test_names_that_are_refused(name: bytes, number: int) -> None:
    with pytest.raises(FsError) as caught:
        check_name(name)
    assert caught.value.errno == number


def test_the_limit_of_a_name_is_in_bytes() -> None:
    assert check_name(("é" * 127 + "x").encode()) == "é" * 127 + "x"


@given(names)
def test_any_name_that_fits_comes_back_whole(name: str) -> None:
    assert check_name(name.encode()) == name


@given(st.binary(max_size=300))
def test_any_bytes_are_a_name_or_one_of_three_errnos(raw: bytes) -> None:
    refused = None
    text = ""
    try:
        text = check_name(raw)
    except FsError as error:
        refused = error.errno
    if refused is not None:
        assert refused in (errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG)
    else:
        assert text.encode() == raw
        assert "/" not in text
        assert "\0" not in text


# Keys given by hand


@pytest.mark.parametrize(
    ("key", "result"),
    [
        ("iris.csv", "iris.csv"),
        ("a/b/c.csv", "a/b/c.csv"),
        ("a///b", "a/b"),
        ("a b/ä.csv", "a b/ä.csv"),
        ("...", "..."),
        ("a..b/c..", "a..b/c.."),
        # Reserved at the start alone, and as a whole component.
        ("x/.lamindb/y", "x/.lamindb/y"),
        (".lamindbs/x", ".lamindbs/x"),
        (".lamfsx", ".lamfsx"),
        ("x/.lamfs", "x/.lamfs"),
    ],
)
def test_good_keys(key: str, result: str) -> None:
    assert check_key(key) == check_key(key, real=True) == result


@pytest.mark.parametrize(
    ("key", "says", "number"),
    [
        ("", "empty", errno.EINVAL),
        ("/", "empty", errno.EINVAL),
        ("///", "empty", errno.EINVAL),
        ("..", r"'\.\.'", errno.EINVAL),
        ("a/../b", r"'\.\.'", errno.EINVAL),
        ("../a", r"'\.\.'", errno.EINVAL),
        ("a/..", r"'\.\.'", errno.EINVAL),
        ("./a", r"'\.'", errno.EINVAL),
        ("a/./b", r"'\.'", errno.EINVAL),
        ("a\0b", "NUL", errno.EINVAL),
        (".lamindb/x.csv", "reserved", errno.EINVAL),
        ("/.lamindb/x.csv", "reserved", errno.EINVAL),
        ("//.lamindb//x.csv", "reserved", errno.EINVAL),
        (".lamindb", "reserved", errno.EINVAL),
        ("/a/b", "begins with '/'.*give 'a/b'", errno.EINVAL),
        ("a/b/", "ends with '/'", errno.EINVAL),
        (".lamfs/info", "reserved", errno.EINVAL),
        (".lamfs", "reserved", errno.EINVAL),
        ("a\ud800b", "UTF-8", errno.EILSEQ),
        ("caf\udce9", "UTF-8", errno.EILSEQ),  # how Python shows a file name that is not UTF-8
        ("x" * 256, "255 bytes", errno.ENAMETOOLONG),
        ("a/" + "é" * 128, "255 bytes", errno.ENAMETOOLONG),
        ("/".join(["x" * 255] * 17), "4096 bytes", errno.ENAMETOOLONG),
    ],
)
@pytest.mark.parametrize("real", [False, True])
def test_refused_keys(key: str, says: str, number: int, real: bool) -> None:
    with pytest.raises(InvalidName, match=says) as caught:
        check_key(key, real=real)
    assert caught.value.errno == number
    assert isinstance(caught.value, ValueError)
    # The sentence can be printed and logged anywhere, also when the key is not UTF-8.
    str(caught.value).encode()
    assert "\0" not in str(caught.value)


def test_the_longest_key_has_4096_bytes() -> None:
    key = "/".join(["x" * 255] * 15 + ["y" * 254, "z"])
    assert len(key) == 4096
    assert check_key(key) == key
    with pytest.raises(InvalidName, match="4096 bytes"):
        check_key(key + "z")


@pytest.mark.parametrize("letter", ["x", "é"])
def test_the_longest_real_key_has_1024_bytes(letter: str) -> None:
    part = letter * (254 // len(letter.encode()))
    key = "/".join([part] * 4)
    key += "/" + "z" * (1023 - len(key.encode()))
    assert len(key.encode()) == 1024
    assert check_key(key, real=True) == key
    assert check_key(key + "z") == key + "z"
    with pytest.raises(InvalidName, match="1024 bytes") as caught:
        check_key(key + "z", real=True)
    assert caught.value.errno == errno.ENAMETOOLONG


@given(st.text(st.characters(), max_size=400))
def test_any_text_is_a_sound_key_or_an_invalid_name(text: str) -> None:
    refused = None
    key = ""
    try:
        key = check_key(text)
    except InvalidName as error:
        refused = error.errno
    if refused is not None:
        assert refused in (errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG)
        return
    assert check_key(key) == key
    parts = key.split("/")
    assert all(check_name(part.encode()) == part for part in parts)
    assert parts[0] not in (".lamindb", ".lamfs")


@given(keys)
def test_a_key_is_split_into_parent_and_name(key: str) -> None:
    parent, name = root_path(key)
    assert "/" not in name
    assert (f"{parent}/{name}" if parent else name) == key


@pytest.mark.parametrize(("key", "pair"), [("a", ("", "a")), ("a/b", ("a", "b")), ("a/b/c.csv", ("a/b", "c.csv"))])
def test_root_path(key: str, pair: tuple[str, str]) -> None:
    assert root_path(key) == pair


@pytest.mark.parametrize("ino", [1, 0xABC, (1 << 63) - 1])
def test_a_spool_name_is_one(ino: int) -> None:
    name = spool_name(ino)
    assert name.startswith(f"{ino:x}-")
    assert name != spool_name(ino)
    assert is_spool_name(name)
    assert check_spool_name(name) == name


@given(st.one_of(st.text(), st.from_regex(r"[0-9a-f]{0,17}-[0-9a-f]{11,13}\n?"), st.none(), st.integers()))
def test_any_other_value_is_not_one(value: object) -> None:
    sound = isinstance(value, str) and len(value.encode("utf-8", "surrogatepass")) == len(value)
    stem, _, tail = str(value).partition("-")
    sound = sound and 1 <= len(stem) <= 16 and len(tail) == 12 and not set(stem + tail) - set("0123456789abcdef")
    assert is_spool_name(value) == sound
    if not sound:
        with pytest.raises(InvalidName, match="is not the name of a spool file"):
            check_spool_name(value)


def test_no_object_lies_where_registries_do() -> None:
    key = f"{'0' * 32}.lndb"
    assert object_key_for(UID, ".lndb", key, False) == f".lamindb/{UID}.lndb"
    for other in ("x.lndb", f"a/{key}", f"{key}\n", f"x{key}"):
        assert object_key_for(UID, ".lndb", other, False) == other
    assert object_key_for(UID, ".lndb", "d/x.lndb", False) == "d/x.lndb"
