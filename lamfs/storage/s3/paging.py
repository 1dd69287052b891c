"""Listings that come in pages, and must come to an end. Pure, but for the calls that it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from lamfs.errors import StorageError
from lamfs.storage.s3.calls import Marker, Page

T = TypeVar("T")

EMPTY_PAGES = 1000
"""Empty pages in a row: Amazon S3 may send some where much was deleted."""


def entries(call: Callable[[Marker], Page[T]], what: str, endpoint: str) -> Iterator[T]:
    """Every entry of a listing. ``call`` gets the page at a marker. ``what``: see errors.translate.

    Raises what ``call`` raises, and StorageError when the listing goes in circles, or on without entries. A page is
    compared with an earlier one, which is replaced at twice the distance each time (Brent's algorithm).
    """
    marker: Marker = ()
    kept: tuple[Marker | None, tuple[T, T] | None] = (None, None)
    empty = steps = 0
    power = 1
    while True:
        found, more, following = call(marker)
        yield from found
        if not more:
            return
        ends = (found[0], found[-1]) if found else None
        empty = 0 if found else empty + 1
        again = following in (marker, kept[0]) or (ends is not None and ends == kept[1])
        if not following or again or empty > EMPTY_PAGES:
            raise StorageError(
                f"Cannot {what}: {endpoint} says that there is more, and not how to go on; check that the server"
                " supports lists in pages (ListObjectsV2, ListMultipartUploads, ListParts)."
            )
        steps += 1
        if steps == power:
            kept, steps, power = (following, ends), 0, 2 * power
        marker = following
