"""Where errors become sentences and exit codes: the one place in the CLI that catches. Main thread only.

Exit codes: 0 ok; 1 failure; 2 misuse (click's own, InvalidArgument, InvalidName); 130 interrupted, 143 and 129 likewise
by SIGTERM and SIGHUP. A user never sees a traceback: an unexpected error is one line, and its traceback goes to a log
file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from lamfs.cli.output import complain
from lamfs.errors import InvalidArgument, InvalidName, LamfsError
from lamfs.printable import lines

FAILURE, MISUSE, INTERRUPTED = 1, 2, 130
LOG_LIMIT = 1 << 20
"""Bytes after which the log of unexpected errors starts anew."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP has come: unfinished work is undone, as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.code = 128 + number


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """Inside the context, SIGTERM and SIGHUP raise Terminated, once. The next one ends the program at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]

    def back() -> None:
        for number in numbers:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)

    def end(number: int, frame: object) -> NoReturn:
        back()
        raise Terminated(number)

    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        back()


class Command(click.Command):
    """A command whose help ends with examples, printed as they are written."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the epilog and then the examples, unchanged."""
        super().format_epilog(ctx, formatter)
        lines = [line.strip() for line in self.examples.strip().splitlines()]
        with formatter.section("Example" if len(lines) == 1 else "Examples"):
            for line in lines:
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Program(click.Group):
    """The group of all commands. Every command runs inside ``invoke``, which is the seam."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections: dict[str, list[str]] = {}

    def add_section(self, title: str, *commands: click.Command) -> None:
        """Add commands, to be listed below this headline in this order."""
        for command in commands:
            self.add_command(command)
            self.sections.setdefault(title, []).append(command.name or "")

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the help."""
        return [name for names in self.sections.values() for name in names]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list per section, with all columns aligned."""
        widest = max(len(name) for name in self.commands)
        for title, names in self.sections.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(name.ljust(widest), self.commands[name].get_short_help_str(100)) for name in names]
                )

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command. Turn what it raises into a sentence on stderr and an exit code."""
        with contextlib.suppress(ValueError):  # not the main thread, but a test's
            if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
                signal.signal(signal.SIGINT, signal.default_int_handler)
        # File names are bytes: a name that is not UTF-8 is printed as the bytes that it came as.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, ValueError):
                stream.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        try:
            with orderly_end():
                return super().invoke(ctx)
        except click.Abort:
            complain("nothing was done")
            leave(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except Terminated as ended:
            complain(str(ended))
            leave(ended.code)
        except KeyboardInterrupt:
            complain("interrupted")
            leave(INTERRUPTED)
        except LamfsError as error:
            complain(str(error))
            leave(MISUSE if isinstance(error, InvalidArgument | InvalidName) else FAILURE)
        except OSError as error:
            # A path of the user's own, given to a command: the system's words say what is wrong with it.
            if error.filename is None or error.strerror is None:
                unexpected(error)
            complain(f"{os.fsdecode(error.filename)}: {error.strerror}")
            leave(FAILURE)
        except Exception as error:
            unexpected(error)


def leave(code: int) -> NoReturn:
    """End the program with this exit code."""
    raise click.exceptions.Exit(code)


def leave_at_once() -> NoReturn:
    """Exit with 0 without Python's cleanup, which takes a tenth of the time of a mount."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(0)


def unexpected(error: BaseException) -> NoReturn:
    """Write the traceback of an unexpected error to the log, say so in one line, and exit with 1."""
    kind = type(error).__name__
    detail = f"{kind}: {error}".splitlines()[0].strip() if str(error).strip() else kind
    where = write_log(error)
    complain(f"this should not have happened ({detail}); the traceback is in {where}")
    leave(FAILURE)


def write_log(error: BaseException) -> Path:
    """Append a traceback to ``<data directory>/error.log`` (mode 0600), or to a temporary file. Returns its path."""
    text = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {sys.argv[1:]}\n{''.join(traceback.format_exception(error))}\n"
    raw = lines(text).encode(errors="surrogateescape")
    try:
        from lamfs.config import data_dir

        path = data_dir() / "error.log"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        if path.exists() and path.stat().st_size > LOG_LIMIT:
            flags |= os.O_TRUNC
        descriptor = os.open(path, flags, 0o600)
    except (OSError, LamfsError):
        descriptor, name = tempfile.mkstemp(prefix="lamfs-", suffix=".log")
        path = Path(name)
    with open(descriptor, "wb") as log:
        log.write(raw)
    return path
