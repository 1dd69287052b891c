"""A few minutes of chaos with small files and fixed seeds. ``scripts/soak chaos`` is for more."""

from __future__ import annotations

import pytest

from tests.chaos.__main__ import main

pytestmark = pytest.mark.usefixtures("fuse")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("storage", ["folder", "s3"])
@pytest.mark.parametrize(
    "words", [["--only", "kills", "--steps", "12"], ["--steps", "24"]], ids=["kills", "everything"]
)
def test_nothing_acknowledged_is_lost(words: list[str], storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--seed", "1", "--rounds", "1", "--large", "0", "--storage", storage, *words]
    assert main(words) == 0, capsys.readouterr().out
