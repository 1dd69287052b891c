"""Prefetch: which blocks and files are fetched before a program asks for them.

It is above the cache, which fetches, and below the file system, which says what programs do. A `Prefetcher`
(scheduler.py) decides how much is in flight. It is fed by the pattern of each open handle (patterns.py) and, for files
that nobody has opened (files.py), by the way programs go through directories (directories.py, ordered.py,
scattered.py). All limits are in settings.py.
"""
