"""All limits of prefetching, with their units. Modules read them when they use them, so a test can change one here."""

# ---- how much at a time (scheduler.py)

JOBS = 18
"""Prefetches in flight, of all files. The mover has 32 readers: some are always left for a read that waits."""
JOBS_OF_FILE = 6
"""Prefetches in flight of one file. When it stalls, other files are still prefetched."""

# ---- a whole file (scheduler.py)

WHOLE_MISSES = 32
"""Random reads of one file that had to fetch leaves before the rest of the file is prefetched, ..."""
WHOLE_BYTES_PER_MISS = 10 << 20
"""... or one for each so many bytes of it, if that is more: by then they took about as long as the whole file would."""
WHOLE_SECONDS = 60.0
"""Seconds within which these misses must happen."""
WHOLE_SOON = 5.0
"""Seconds. When the rest of the file arrives sooner, a random read fetches its whole block: none is fetched twice."""

# ---- one open handle (patterns.py)

RUN_NEAR = 1 << 20
"""Bytes. A request belongs to a run when it starts at most this far before or behind the run's end."""
RUN_SURE = 1 << 20
"""Bytes by which a run must grow to count as a sequence: more than the kernel reads around one page fault."""
RUNS = 4
"""Runs that one handle remembers."""
STRIDE_RUNS = 3
"""Runs at equal distances that make a stride."""

# ---- files nobody has opened (files.py)

LARGEST_FILE = 1 << 30
"""Bytes of the largest file that is prefetched. Of a file of more than one block, only the first block is."""
BATCH_FILES = 6
"""Files that are worth a batch. Fewer wait until others have arrived."""

# ---- files in order (ordered.py)

ORDER_PAGE = 64
"""Directory entries that one query reads, once the order is sure."""
ORDER_FIRST_PAGE = 8
"""The same, before it is sure."""
ORDER_PAGES = 8
"""Pages that are read at a time. They are read on the loop: a few hundred microseconds each."""
ORDER_DEPTH = 32
"""Levels below the directory at which the search for the next file stops."""
ORDER_SURE = 2
"""Hits after which the order is sure and prefetching starts."""
ORDER_NEAR = 4
"""Places by which the next file may be ahead of the last one, before the order is sure."""
ORDER_FAR = 16
"""The same, once it is sure."""
ORDER_BACK = 16
"""Places by which a file may be behind the last one: several threads read in turn."""
ORDER_FIRST_WINDOW = 4
"""Files ahead of the program when prefetching starts."""
ORDER_WINDOW = 64
"""Files ahead of the program at most."""

# ---- files in no order (scattered.py)

SCATTER_MISSES = 64
"""Files of a directory that a program must have waited for before the others are prefetched, ..."""
SCATTER_PART = 8
"""... which must be at least this part (1/8) of its entries."""
SCATTER_SECONDS = 60.0
"""Seconds within which these misses must happen."""
SCATTER_COUNT_EVERY = 32
"""Misses between two counts of the directory's entries."""
SCATTER_STEP = 12
"""Files that are prefetched with each file that is read."""
SCATTER_PAGE = 64
"""Directory entries that one query reads."""
SCATTER_PAGES = 4
"""Pages that are read with each file that is read."""

# ---- all directories of a mount (directories.py)

ORDERED_BYTES = 64 << 20
"""Bytes that were prefetched in order, or are in flight, and have not been read yet."""
SCATTERED_PART = 8
"""Files in no order may use this part (1/8) of the spare cache, ..."""
SCATTERED_FILES = 16384
"""... and no more than so many files: some MB of memory."""
SURE_ORDERS = 8
"""Sure orders that are remembered."""
UNSURE_ORDERS = 6
"""Other orders that are remembered."""
SCATTERED_DIRECTORIES = 8
"""Directories read in no order that are remembered."""
ORDER_IDLE = 10.0
"""Seconds without a hit after which an order is forgotten."""
SCATTER_IDLE = 60.0
"""Seconds without a read after which a directory read in no order is forgotten."""
LEVELS = 8
"""Levels above two directories that are searched for a common one."""
