"""First on the PYTHONPATH of lamfs's processes when a test wants short leases. Not imported by tests.

LAMFS_TEST_LEASE is ``seconds:look``: how long a mount's lease holds, and how often it is renewed, in seconds.
"""

import importlib.abc
import importlib.util
import os
import sys


class _Finder(importlib.abc.MetaPathFinder):
    """Loads lamfs.ops.lock as usual, and then sets its times."""

    def find_spec(self, name, path, target=None):
        if name != "lamfs.ops.lock":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader = spec.loader
        run = loader.exec_module

        def exec_module(module):
            run(module)
            seconds, _, look = os.environ["LAMFS_TEST_LEASE"].partition(":")
            module.MOUNT_SECONDS, module.MOUNT_LOOK = float(seconds), float(look)

        loader.exec_module = exec_module
        return spec


if "LAMFS_TEST_LEASE" in os.environ:
    sys.meta_path.insert(0, _Finder())
