"""Patterns over keys mean what they mean to a shell."""

from __future__ import annotations

import pytest

from lamfs.keys import glob_pattern

KEYS = ["a.bam", "b.csv", "d/a.bam", "d/e/f/a.bam", "d/e/b.csv", "d/[x].csv", "d/x.csv", "d/y\n.csv", "d/]"]


@pytest.mark.parametrize(
    ("glob", "matches"),
    [
        ("*", ["a.bam", "b.csv"]),
        ("?.bam", ["a.bam"]),
        ("*.*m", ["a.bam"]),
        ("d/*.csv", ["d/[x].csv", "d/x.csv", "d/y\n.csv"]),
        ("d/**/*.bam", ["d/a.bam", "d/e/f/a.bam"]),
        ("**/*.bam", ["a.bam", "d/a.bam", "d/e/f/a.bam"]),
        ("**", KEYS),
        ("d/**", KEYS[2:]),
        ("d/e**", []),
        ("**/e/**", ["d/e/f/a.bam", "d/e/b.csv"]),
        ("d/[xz].csv", ["d/x.csv"]),
        ("d/[w-z].csv", ["d/x.csv"]),
        ("d/[!x].csv", []),
        ("d/[!y]*", ["d/a.bam", "d/[x].csv", "d/x.csv", "d/]"]),
        ("d/[[]x].csv", ["d/[x].csv"]),
        ("d/[]]", ["d/]"]),
        ("d[/]a.bam", []),
        ("d/[", []),
        ("D/A.BAM", []),
        ("/d//a.bam/", ["d/a.bam"]),
    ],
)
def test_what_a_pattern_matches(glob: str, matches: list[str]) -> None:
    pattern = glob_pattern(glob)
    assert [key for key in KEYS if pattern.fullmatch(key)] == matches


def test_a_pattern_of_many_stars_ends() -> None:
    assert not glob_pattern("*a*a*a*b").fullmatch("a" * 200)
