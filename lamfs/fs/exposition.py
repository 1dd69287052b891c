"""A mount's numbers as the text of ``.lamfs/stats`` and ``.lamfs/metrics``. Pure.

``.lamfs/metrics`` is the text exposition format of Prometheus, version 0.0.4
(https://prometheus.io/docs/instrumenting/exposition_formats/).
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

Numbers = dict[str, Any]


def stats_text(numbers: Numbers) -> str:
    """``name: value`` lines, numbers plain; ``upload``, ``retry``, ``error``, ``storage_damage``, ``storage_changed``
    lines repeat."""
    return "".join(f"{name}: {_one_line(_word(value))}\n" for name, value in _lines(numbers))


def _lines(numbers: Numbers) -> Iterator[tuple[str, Any]]:
    cache = numbers["cache"]
    yield "mountpoint", numbers["mountpoint"]
    yield "instance", numbers["slug"]
    for name in ("pid", "started_at", "read_only", "open_files", "inodes"):
        yield name, numbers[name]
    if numbers["notice"]:
        yield "notice", numbers["notice"]
    for name in ("reads", "read_bytes", "writes", "write_bytes"):
        yield name, numbers[name]
    yield from numbers["rates"].items()
    yield "cache_hits", cache["read_hits"]
    yield "cache_misses", cache["read_misses"]
    yield "cache_hit_percent", None if cache["hit_rate"] is None else round(100 * cache["hit_rate"], 2)
    yield "cache_bytes", cache["cached_bytes"]
    yield "cache_limit_bytes", cache["limit_bytes"]
    yield "fetched_blocks", cache["misses"]
    yield "fetched_bytes", cache["fetched_bytes"]
    for name in ("prefetched_files", "prefetched_used", "prefetched_wasted"):
        yield name, cache[name]
    yield "stored_files", numbers["stored_files"]
    yield "stored_bytes", numbers["stored_bytes"]
    for op in ("put", "save", "move", "delete"):
        yield f"owed_{op}s", numbers["owed"].get(op, 0)
    yield "owed_bytes", numbers["owed_bytes"]
    yield "uploads", len(numbers["uploading"])
    yield "retries", numbers["retrying"]
    yield "failed_tries", numbers["failed_tries"]
    yield "io_errors", numbers["io_errors"]
    yield "timeouts", numbers["timeouts"]
    yield "cache_damage_blocks", _cache_damage(numbers)
    yield "storage_damage_blocks", numbers["storage_damage_total"]
    for upload in numbers["uploading"]:
        yield "upload", f"{upload['done']} of {upload['size']} bytes, {upload['key']}"
    for retry in numbers["retries"]:
        yield (
            "retry",
            f"{retry['next_at'] or 'never'} attempt {retry['attempts'] + 1}, {retry['what']}: {retry['error']}",
        )
    for error in numbers["errors"]:
        yield "error", f"{error['at']} {error['what']}: {error['error']}"
    for damage in numbers["storage_damage"]:
        yield (
            "storage_damage",
            f"{damage['at']} block {damage['block']} of {damage['object']}, artifact"
            f" {damage['uid'] or 'none'} {damage['key'] or ''}".rstrip(),
        )
    for changed in numbers["storage_changed"]:
        yield "storage_changed", f"{changed['at']} {changed['object']}, artifact {changed['uid']} {changed['key']}"


def _cache_damage(numbers: Numbers) -> int:
    return int(numbers["cache"]["damaged"] - numbers["storage_damage_total"])


def _word(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _one_line(text: str) -> str:
    """A key may contain any character: control characters are escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def metrics_text(numbers: Numbers) -> str:
    """Every number as a sample with the labels ``mountpoint`` and ``lamfs_instance``.

    (Prometheus itself sets a label ``instance``.)
    """
    labels = {"mountpoint": numbers["mountpoint"], "lamfs_instance": numbers["slug"]}
    parts = []
    for name, kind, text, samples in _families(numbers):
        parts.append(f"# HELP lamfs_{name} {text}\n# TYPE lamfs_{name} {kind}\n")
        for more, value in samples:
            inner = ",".join(f'{label}="{_escaped(word)}"' for label, word in {**labels, **more}.items())
            parts.append(f"lamfs_{name}{{{inner}}} {value}\n")
    return "".join(parts)


Samples = list[tuple[dict[str, str], Any]]


def _families(numbers: Numbers) -> Iterator[tuple[str, str, str, Samples]]:
    """Name, type, help and samples of each metric."""
    cache = numbers["cache"]
    uploading = numbers["uploading"]

    def counter(name: str, text: str, value: int) -> tuple[str, str, str, Samples]:
        return f"{name}_total", "counter", text, [({}, value)]

    def gauge(name: str, text: str, value: float) -> tuple[str, str, str, Samples]:
        return name, "gauge", text, [({}, value)]

    yield counter("reads", "Reads that reached lamfs.", numbers["reads"])
    yield counter("read_bytes", "Bytes given to those reads.", numbers["read_bytes"])
    yield counter("writes", "Writes.", numbers["writes"])
    yield counter("write_bytes", "Bytes written.", numbers["write_bytes"])
    yield counter("cache_hits", "Reads of stored bytes that did not wait for storage.", cache["read_hits"])
    yield counter("cache_misses", "Reads that waited for storage.", cache["read_misses"])
    yield counter("fetched_blocks", "Blocks asked of storage, read ahead too.", cache["misses"])
    yield counter("fetched_bytes", "Bytes fetched from storage.", cache["fetched_bytes"])
    yield counter("prefetched_files", "Small files fetched before a program asked.", cache["prefetched_files"])
    yield counter("prefetched_used", "Those of them that were read then.", cache["prefetched_used"])
    yield counter("prefetched_wasted", "Those of them that were given up.", cache["prefetched_wasted"])
    yield counter("cache_damage", "Blocks found damaged in the cache, and fetched again.", _cache_damage(numbers))
    yield counter("storage_damage", "Blocks found damaged in storage.", numbers["storage_damage_total"])
    yield counter("stored_files", "Files stored.", numbers["stored_files"])
    yield counter("stored_bytes", "Bytes of the files stored.", numbers["stored_bytes"])
    yield counter("failed_tries", "Steps of storage work that failed and are tried again.", numbers["failed_tries"])
    yield counter("io_errors", "Calls answered with EIO.", numbers["io_errors"])
    yield counter("timeouts", "Calls that ended because storage took too long.", numbers["timeouts"])
    yield gauge("cache_bytes", "Bytes in the block cache of this user.", cache["cached_bytes"])
    yield gauge("cache_limit_bytes", "The mount option cache_limit.", cache["limit_bytes"])
    owed = [({"op": op}, numbers["owed"].get(op, 0)) for op in ("put", "save", "move", "delete")]
    yield "owed", "gauge", "Steps owed to storage.", owed
    yield gauge("owed_bytes", "Bytes written that are not in storage yet.", numbers["owed_bytes"])
    yield gauge("uploads", "Uploads under way.", len(uploading))
    yield gauge("upload_bytes", "Bytes of the files being uploaded.", sum(upload["size"] for upload in uploading))
    yield gauge("upload_done_bytes", "Bytes of them that are sent.", sum(upload["done"] for upload in uploading))
    yield gauge("retries", "Steps that have failed and are not done yet.", numbers["retrying"])
    yield gauge("open_files", "Open file descriptions.", numbers["open_files"])
    yield gauge("inodes", "Inodes that the kernel knows.", numbers["inodes"])
    yield gauge("read_only", "1 when the mount is read-only.", int(numbers["read_only"]))
    started = datetime.fromisoformat(numbers["started_at"]).timestamp()
    yield gauge("start_time_seconds", "When the mount began, seconds since the epoch.", started)


def _escaped(text: str) -> str:
    """The value of a label."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
