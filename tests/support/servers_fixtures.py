"""Fixtures around tests/support/servers.py and proxy.py."""

from __future__ import annotations
