"""Starting a mount: in the background, as its own process, or in the foreground. Called by the CLI."""

from __future__ import annotations

import errno
import gc
import logging
import logging.handlers
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO

from lamfs import config, jsonlines
from lamfs.daemon.first import FirstMover, close_files_but
from lamfs.daemon.options import MountOptions
from lamfs.errors import LamfsError
from lamfs.ops import written
from lamfs.printable import LogFormatter

log = logging.getLogger("lamfs.daemon")

LOG_BYTES = 8 << 20
FOLDERS = ("LAMFS_CONFIG_DIR", "LAMFS_DATA_DIR", "LAMFS_CACHE_DIR", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")
"""Environment variables with paths. Relative ones are below the directory where the command was given."""


def log_path(slug: str) -> Path:
    """Where the daemons of an instance write their log."""
    return config.load_instance(slug).directory / "mount.log"


def launch(options: MountOptions, *, warn: Callable[[str], None] = log.warning) -> int:
    """Start the daemon in the background. Returns its pid when the mount is ready. For a process without threads.

    ``warn`` gets a sentence for each thing that the storage lacks. Raises LamfsError with the daemon's own sentence
    when it cannot mount. The daemon is a fork, so it has already imported what both need: imports are half of the time
    that a mount takes. In the daemon this does not return, but ends the program.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    # The caller may have closed these; then one of our descriptors would be taken for stdin, stdout or stderr.
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            code = _background(options, writing)
        finally:
            os._exit(code)  # do nothing that the command would do next
    try:
        os.close(writing)
        # The child reports its result in one line.
        with open(reading, "rb") as pipe:
            line = pipe.readline()
    except KeyboardInterrupt:
        os.kill(pid, signal.SIGTERM)
        raise
    try:
        reply = jsonlines.decode(line)
    except ValueError:
        reply = {}
    if reply.get("ready"):
        for sentence in reply.get("warnings", ()):
            warn(sentence)
        return pid  # it lives on; nobody waits for it
    os.waitpid(pid, 0)
    message = reply.get("error") or f"The mount's daemon ended before it was ready; see {log_path(options.slug)}."
    raise LamfsError(message, errno=reply.get("errno"))


def _background(options: MountOptions, writing: int) -> int:
    """Main function of the background process; its exit code. ``writing``: where it reports that it is ready."""
    # No garbage collection during imports: nearly all of what they allocate stays.
    gc.disable()
    reply = os.fdopen(writing, "wb", buffering=0)
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # signal handlers of the command are not for the daemon
        for name in FOLDERS:
            if os.environ.get(name):
                os.environ[name] = os.path.abspath(os.path.expanduser(os.environ[name]))
        os.chdir("/")
        written.refuse_missing(config.load_instance(options.slug))
        path = log_path(options.slug)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600))
        # The mover's stderr, and Python's last words, go to the log too. Nothing of the terminal stays open.
        null, words = os.open(os.devnull, os.O_RDWR), os.open(path, os.O_WRONLY | os.O_APPEND)
        for target, source in enumerate((null, null, words)):
            os.dup2(source, target)
        close_files_but(writing)
        handler = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=2)
    except (OSError, LamfsError) as error:
        reply.write(jsonlines.encode({"error": str(error), "errno": error.errno}))
        return 1
    return _run(options, handler, reply)


def run_foreground(options: MountOptions) -> int:
    """Mount and serve in this process, logging to stderr, until unmounted. Returns the exit code."""
    return _run(options, logging.StreamHandler(), None)


def is_of_interest(record: logging.LogRecord) -> bool:
    """False for a reply that the kernel no longer waited for (ENOENT of a write to /dev/fuse).

    For example, a file is closed while the mount is being removed. pyfuse3 logs an error, but nothing is lost.
    """
    text = record.getMessage()
    return not ("fuse_reply" in text and text.endswith(os.strerror(errno.ENOENT)))


def _run(options: MountOptions, handler: logging.Handler, reply: IO[bytes] | None) -> int:
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(name)s[%(process)d]: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("lamfs").setLevel(logging.DEBUG if options.debug else logging.INFO)
    logging.getLogger("pyfuse3").addFilter(is_of_interest)

    def answer(message: dict[str, object]) -> None:
        nonlocal reply
        if reply is not None:
            reply.write(jsonlines.encode(message))
            reply.close()
            reply = None

    try:
        # Before all other imports, so that both processes go on at the same time.
        mover = FirstMover(options)
        mover.begin()

        from lamfs.daemon.progress import Drain
        from lamfs.daemon.serve import serve

        with Drain(show=options.foreground) as drain:
            ready = lambda warnings: answer({"ready": True, "warnings": list(warnings)})  # noqa: E731
            serve(options, ready, drain.progress, mover)
    except LamfsError as error:
        return _failed(error, str(error), error.errno, answer)
    except KeyboardInterrupt:  # Ctrl-C before the mount is ready
        raise
    except BaseException as error:
        log.exception("the mount at %s ended with an unexpected error", options.mountpoint)
        text = traceback.format_exception_only(error)[-1].strip()
        return _failed(error, f"The mount ended with an unexpected error ({text}).", None, answer)
    return 0


def _failed(error: BaseException, text: str, number: int | None, answer: Callable[[dict[str, object]], None]) -> int:
    if isinstance(error, LamfsError):
        log.error("%s", text)
    answer({"error": text, "errno": number})
    return 1
