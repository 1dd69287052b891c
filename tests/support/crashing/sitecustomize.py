"""First on the PYTHONPATH of a daemon that a test wants to crash: kills it, by SIGKILL, at a named point of its work.

LAMFS_TEST_CRASH is ``point:skip``: the point, and how many times it is passed before the crash. Not imported by tests.
The mover, which inherits the environment, is left alone.
"""

import importlib.abc
import importlib.util
import os
import signal
import sys

POINTS = {
    "put": ("lamfs.mover.client", "Mover", "put"),
    "copy": ("lamfs.mover.client", "Mover", "copy"),
    "delete": ("lamfs.mover.client", "Mover", "delete"),
    "hash": ("lamfs.mover.client", "Mover", "hash"),
    "commit": ("lamfs.registry.commits", "Commits", "put"),
    "moved": ("lamfs.registry.commits", "Commits", "moved"),
    "acknowledge": ("lamfs.fs.spooling", "Spooling", "acknowledge"),
    "create": ("lamfs.registry.namespace", "Namespace", "create_file"),
    "snapshot": ("lamfs.ops.snapshot", None, "push"),
}


class _Finder(importlib.abc.MetaPathFinder):
    """Loads the module as usual, and then wraps one function of it with the crash point."""

    def __init__(self, point, skip):
        self.name, _, self.when = point.partition(".")
        self.left = skip
        self.module, self.owner, self.function = POINTS[self.name]

    def find_spec(self, name, path, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader = spec.loader
        run = loader.exec_module

        def exec_module(module):
            run(module)
            self.wrap(module)

        loader.exec_module = exec_module
        return spec

    def strike(self):
        if self.left:
            self.left -= 1
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, module):
        owner = module if self.owner is None else getattr(module, self.owner)
        function = getattr(owner, self.function)

        if function.__code__.co_flags & 0x80:

            async def wrapped(*args, **kwargs):
                if self.when == "before":
                    self.strike()
                result = await function(*args, **kwargs)
                if self.when == "after":
                    self.strike()
                return result

        else:

            def wrapped(*args, **kwargs):
                if self.when == "before":
                    self.strike()
                result = function(*args, **kwargs)
                if self.when == "after":
                    self.strike()
                return result

        setattr(owner, self.function, wrapped)


if "LAMFS_TEST_CRASH" in os.environ and "lamfs.mover.server" not in sys.orig_argv:
    _point, _, _skip = os.environ["LAMFS_TEST_CRASH"].partition(":")
    sys.meta_path.insert(0, _Finder(_point, int(_skip)))
