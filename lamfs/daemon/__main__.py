"""``python -m lamfs.daemon``: the background process of one mount. Started by launch.py; not for people."""

from __future__ import annotations

import sys

from lamfs.daemon.launch import run_background

if __name__ == "__main__":
    sys.exit(run_background())
