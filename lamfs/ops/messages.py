"""Messages to the person at a terminal or notebook: one logger, on stderr. Any thread; no state but a handler.

The handler is installed only while the application has no logging of its own. An application that has decides what to
show, and where.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from lamfs.printable import one_line

logger = logging.getLogger("lamfs")

SUCCESS = 25
"""Between INFO and WARNING: something was done, and the user wants to know."""

_PREFIX = {logging.DEBUG: "· ", logging.INFO: "→ ", SUCCESS: "✓ ", logging.WARNING: "! ", logging.ERROR: "✗ "}


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _PREFIX.get(record.levelno, "") + one_line(record.getMessage())


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to the current sys.stderr (notebooks replace it), and only while nobody has configured logging."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(_Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return
        self.setStream(sys.stderr)
        super().emit(record)


def show_messages(level: int = logging.INFO) -> None:
    """Show lamfs's messages on stderr, unless logging is configured already. May be called again."""
    if logger.level == logging.NOTSET:
        logger.setLevel(level)
    if not logger.handlers:
        logging.addLevelName(SUCCESS, "SUCCESS")
        logger.addHandler(_Stderr())


def success(text: str) -> None:
    """Tell the user that something was done."""
    logger.log(SUCCESS, text)


def info(text: str) -> None:
    """Tell the user something helpful."""
    logger.info(text)


def warn(text: str) -> None:
    """Tell the user something that must not be missed."""
    logger.warning(text)
