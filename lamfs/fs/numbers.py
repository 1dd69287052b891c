"""The numbers of one mount: reads and writes, the cache, pending work, errors. Loop only."""

from __future__ import annotations

import os
from typing import Any

from lamfs.fs.context import Context
from lamfs.fs.stats import SHOWN
from lamfs.model import iso
from lamfs.work.steps import what


def collect(context: Context) -> dict[str, Any]:
    """Everything that is shown of the mount, as JSON-compatible data. Sizes in bytes, times ISO 8601 in UTC."""
    registry, uploader, stats = context.registry, context.uploader, context.stats
    counted = stats.counters
    rows, size = uploader.owed()
    retrying, retries = registry.journal.failing(SHOWN)
    stored_reads = counted.hits + counted.misses
    return {
        "mountpoint": stats.about.mountpoint,
        "slug": stats.about.slug,
        "pid": os.getpid(),
        "started_at": iso(stats.about.started_at),
        "read_only": context.policy.read_only,
        "notice": stats.notice,
        "reads": counted.reads,
        "read_bytes": counted.read_bytes,
        "writes": counted.writes,
        "write_bytes": counted.write_bytes,
        "rates": stats.rates(context.cache.fetched_bytes, uploader.puts.stored_bytes),
        "owed": registry.journal.owed(),
        "owed_rows": rows,
        "owed_bytes": size,
        "uploading": [
            {"key": what(registry, upload.entry), "size": upload.size, "done": upload.done}
            for upload in uploader.puts.uploads.values()
        ],
        "retrying": retrying,
        "retries": [
            {
                "what": f"{entry.op} {what(registry, entry)}",
                "attempts": entry.attempts,
                # None: storage can never store it, so it is not retried.
                "next_at": None if entry.state == "refused" else iso(max(entry.next_at, 0)),
                "error": entry.error,
            }
            for entry in retries
        ],
        "stored_files": uploader.puts.stored_files,
        "stored_bytes": uploader.puts.stored_bytes,
        "cache": {
            **context.cache.stats(),
            "limit_bytes": context.cache.limit_bytes,
            "read_hits": counted.hits,
            "read_misses": counted.misses,
            "prefetched_files": counted.prefetched_files,
            "prefetched_used": counted.prefetched_used,
            "prefetched_wasted": counted.prefetched_wasted,
            "hit_rate": round(counted.hits / stored_reads, 4) if stored_reads else None,
        },
        "failed_tries": uploader.failed_tries,
        "io_errors": counted.io_errors,
        "timeouts": counted.timeouts,
        "errors": [
            {"at": iso(failure.at), "what": failure.what, "error": failure.error} for failure in uploader.failures
        ],
        "storage_damage_total": stats.damaged_blocks,
        "storage_damage": [
            {
                "at": iso(found.at),
                "key": found.key,
                "uid": found.uid,
                "object": found.url,
                "etag": found.etag,
                "block": found.block,
                "times": found.times,
            }
            for found in stats.damage()
        ],
        "storage_changed": [
            {
                "at": iso(found.at),
                "key": found.key,
                "uid": found.uid,
                "object": found.url,
                "problem": found.problem,
            }
            for found in stats.still_changed(registry, context.store)
        ],
        "open_files": sum(state.handles for state in context.states.values()),
        "inodes": len(context.nodes),
    }
