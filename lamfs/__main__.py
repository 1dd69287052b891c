"""``lamfs``, and ``python -m lamfs``: the start of the program. Ctrl-C ends it with 130 from the first moment on.

The imports take a moment, and Ctrl-C during them must not give a traceback: SIGINT ends the process at once. Once the
command runs, it handles SIGINT itself, with a message (cli/seam.py).
"""

import os
import signal
from typing import Any


def _interrupted(number: int, frame: Any) -> None:
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as below nohup(1)
    signal.signal(signal.SIGINT, _interrupted)


def main() -> None:
    """Run the command line."""
    from lamfs.cli import main as program

    program(prog_name="lamfs")


if __name__ == "__main__":
    main()
