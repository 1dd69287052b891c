"""Listings that come in pages, and must come to an end. Pure, but for the calls that it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lamfs.errors import StorageError

EMPTY_PAGES = 1000
"""Empty pages in a row: Amazon S3 may send some where much was deleted."""


def pages(
    call: Callable[[dict[str, Any]], dict[str, Any]], markers: dict[str, str], entries: str, what: str, endpoint: str
) -> Iterator[dict[str, Any]]:
    """Every page of a listing. ``what``: see errors.translate.

    ``markers`` names the parameters that continue it, and where a page has their values; ``entries`` says where a page
    has its entries.

    Raises what ``call`` raises, and StorageError when the listing goes in circles, or on without entries. A page is
    compared with an earlier one, which is replaced at twice the distance each time (Brent's algorithm).
    """
    marker: dict[str, Any] = {}
    kept: tuple[Any, Any] = (None, None)
    empty = steps = 0
    power = 1
    while True:
        page = call(marker)
        yield page
        if not page.get("IsTruncated"):
            return
        following = {name: page[source] for name, source in markers.items() if page.get(source)}
        rows = page.get(entries) or []
        ends = (rows[0], rows[-1]) if rows else None
        empty = 0 if rows else empty + 1
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
