"""test_stress.py takes minutes and programs that scripts/test does not install: only scripts/soak collects it."""

from __future__ import annotations

import os

collect_ignore = [] if "LAMFS_SOAK" in os.environ else ["test_stress.py"]
