"""Lines, sizes, columns, progress."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from lamfs.cli import output
from lamfs.ops import messages


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        ((1 << 30) - 1, "1024.0 MiB"),
        (3 << 40, "3.0 TiB"),
        (5000 << 40, "5000.0 TiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert output.size(count) == text


def test_what_a_key_may_hold_does_nothing_to_a_terminal() -> None:
    assert output.shown("plain ü 文.csv") == "plain ü 文.csv"
    assert output.shown("a\nb\x1b[31m\x9b") == r"a\nb\x1b[31m\x9b"
    assert output.shown("not\udcff utf-8") == r"not\udcff utf-8"


def test_columns_are_aligned_and_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    output.columns([["a", "1", "x" * 200], ["文文", "22", ""], ["\n", "333", "z"]], right=frozenset({1}))
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["a       1  " + "x" * 200, "文文   22", r"\n    333  z"]


def test_no_rows_no_output(capsys: pytest.CaptureFixture[str]) -> None:
    output.columns([])
    assert capsys.readouterr().out == ""


def test_when_takes_both_forms_of_a_moment() -> None:
    assert output.when(1_700_000_000_000_000_000) == output.when("2023-11-14T22:13:20+00:00")


def test_without_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: clock[0])
    with output.Progress("big\nfile", 2048) as progress:
        for second in range(21):
            clock[0] = float(second)
            progress.add(10)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        r"big\nfile: 110 B of 2.0 KiB, 11 B/s, 0:02:56 left",
        r"big\nfile: 210 B of 2.0 KiB, 10 B/s, 0:02:55 left",
    ]


def test_what_was_done_before_does_not_count_for_the_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: clock[0])
    with output.Progress("reading") as progress:
        progress.begin(1000, 1400)
        clock[0] = 20.0
        progress.add(200)
    assert capsys.readouterr().err == "reading: 1.2 KiB of 1.4 KiB, 10 B/s, 0:00:20 left\n"


def test_what_is_owed_may_grow_and_the_bar_follows() -> None:
    with output.OwedProgress() as progress:
        seen = []
        for owed in (3, 2, 5, 0):
            progress.report({"owed": owed, "bytes": 10 * owed})
            seen.append((progress._done, progress._total))
    assert seen == [(0, 3), (1, 3), (0, 5), (5, 5)]
    assert (progress.owed, progress.bytes) == (0, 0)


def on_a_terminal(code: str) -> str:
    """What code writes to a terminal on stderr."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", f"from lamfs.cli import output\n{code}"],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        stdin=subprocess.DEVNULL,
        stderr=slave,
    ) as process:
        os.close(slave)
        written = b""
        # Reading fails with EIO when the last process has closed its end.
        try:
            while data := os.read(master, 65536):
                written += data
        except OSError:
            pass
        finally:
            os.close(master)
    assert process.returncode == 0, written
    return written.decode()


def test_on_a_terminal_there_is_a_bar() -> None:
    text = on_a_terminal(
        "with output.Progress('[red]a', 4096) as progress:\n    progress.add(1024)\n    progress.add(3072)"
    )
    assert "[red]a" in text
    assert "4.1/4.1 kB" in text or "4.0/4.0 KiB" in text
    assert "\x1b[2K" in text


def test_what_is_owed_has_a_bar_only_while_something_is() -> None:
    assert on_a_terminal("with output.OwedProgress('owing') as progress:\n    progress.report({'owed': 0})") == ""
    text = on_a_terminal(
        "with output.OwedProgress('owing') as progress:\n"
        "    progress.report({'owed': 3, 'bytes': 2048})\n    progress.report({'owed': 1, 'bytes': 0})\n"
        "progress.report({'owed': 9})\n"
    )
    assert "2/3" in text
    assert "9" not in text.rpartition("2/3")[2].rpartition("\x1b[?25h")[2]


EVIL = "x\x1b[2J\x9by\r\u202e\u2028"
SPELLED = r"x\x1b[2J\x9by\r\u202e\u2028"


def test_what_others_wrote_does_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.say(f"{EVIL}\nsecond\tline")
    output.note(f"{EVIL}\nnot a second line")
    output.complain(f"{EVIL}\nlamfs: not a second line")
    with output.Progress("p") as progress:
        progress.note(EVIL)
    said = capsys.readouterr()
    assert said.out == f"{SPELLED}\nsecond\tline\n"
    assert said.err == (f"{SPELLED}\\nnot a second line\nlamfs: {SPELLED}\\nlamfs: not a second line\n{SPELLED}\n")


def test_json_holds_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({EVIL: [f"{EVIL}\n文"]})
    said = capsys.readouterr().out
    assert json.loads(said) == {EVIL: [f"{EVIL}\n文"]}
    assert said.replace("\n", "").isprintable()
    assert "文" in said
    output.print_json({"a": 1}, indent=None)
    assert capsys.readouterr().out == '{"a": 1}\n'


def test_beside_a_bar_neither() -> None:
    text = on_a_terminal("with output.Progress('a', 10) as progress:\n    progress.note('n\\x1b]0;evil\\x07\\x9b2J')")
    assert r"n\x1b]0;evil\x07\x9b2J" in text
    assert "\x1b]0" not in text


def test_messages_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    messages.show_messages()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(logging.getLogger(), "handlers", [])
        messages.warn(f"{EVIL}\nsecond")
    assert capsys.readouterr().err == f"! {SPELLED}\\nsecond\n"
