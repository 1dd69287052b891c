"""Prefetch waits for a fake mover and for time alone, so these tests never really wait."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_time_passes(jumping_clock: object) -> None:
    """See tests.support.clock."""
