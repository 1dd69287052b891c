"""A minute of chaos with small files and fixed seeds. ``scripts/soak chaos`` is for more."""

from __future__ import annotations

import pytest

from tests.chaos.__main__ import main

pytestmark = pytest.mark.usefixtures("fuse")

KINDS = "kills"
"""What holds."""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("storage", ["folder", "s3"])
def test_nothing_acknowledged_is_lost(storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--seed", "1", "--rounds", "1", "--steps", "12", "--large", "0", "--only", KINDS, "--storage", storage]
    assert main(words) == 0, capsys.readouterr().out
