"""Starting a mount: in the background, as a process of its own, or in the foreground. Called by the CLI."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO

from lamfs import config
from lamfs.daemon.options import MountOptions
from lamfs.errors import LamfsError

log = logging.getLogger("lamfs.daemon")

LOG_BYTES = 8 << 20


def log_path(slug: str) -> Path:
    """Where the daemons of an instance write their log."""
    return config.load_instance(slug).directory / "mount.log"


def launch(options: MountOptions, *, warn: Callable[[str], None] = log.warning) -> int:
    """Start the daemon in the background; its pid when the mount is there.

    ``warn`` gets a sentence for each thing that the storage lacks. Raises LamfsError with the daemon's own sentence
    when it is not to be.
    """
    # The child reads its options from stdin, and says in one line on stdout how it went.
    child = subprocess.Popen(
        [sys.executable, "-m", "lamfs.daemon"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(json.dumps(options.to_json()).encode() + b"\n")
        child.stdin.close()
        line = child.stdout.readline()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGTERM)
        raise
    except BrokenPipeError:
        line = b""
    child.stdout.close()
    try:
        reply = json.loads(line)
    except ValueError:
        reply = {}
    if reply.get("ready"):
        for sentence in reply.get("warnings", ()):
            warn(sentence)
        child.returncode = 0  # it lives on; nobody waits for it
        return child.pid
    child.wait()
    message = reply.get("error") or f"The mount's daemon ended before it was ready; see {log_path(options.slug)}."
    raise LamfsError(message, errno=reply.get("errno"))


def run_background() -> int:
    """Main function of the background process."""
    options = MountOptions.from_json(json.loads(sys.stdin.readline()))
    reply = os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    path = log_path(options.slug)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600))
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=2)
    # The mover's stderr, and Python's last words, go to the log too.
    os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), 2)
    return _run(options, handler, reply)


def run_foreground(options: MountOptions) -> int:
    """Mount and serve in this process, logging to stderr, until unmounted; the exit code."""
    return _run(options, logging.StreamHandler(), None)


def _run(options: MountOptions, handler: logging.Handler, reply: IO[bytes] | None) -> int:
    from lamfs.daemon.progress import Drain
    from lamfs.daemon.serve import serve

    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s[%(process)d]: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("lamfs").setLevel(logging.DEBUG if options.debug else logging.INFO)

    def answer(message: dict[str, object]) -> None:
        nonlocal reply
        if reply is not None:
            reply.write(json.dumps(message).encode() + b"\n")
            reply.close()
            reply = None

    try:
        with Drain(show=options.foreground) as drain:
            serve(options, lambda warnings: answer({"ready": True, "warnings": list(warnings)}), drain.progress)
    except LamfsError as error:
        return _failed(error, str(error), error.errno, answer)
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
