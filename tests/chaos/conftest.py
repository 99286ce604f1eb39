"""Fixtures of the tests that kill, suspend and disturb."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], str]:
    """Outputs on both kinds of storage by turns."""

    def out_of(seed: int) -> str:
        if seed % 2:
            return f"{request.getfixturevalue('bucket')}/out"
        return str(tmp_path / "out")

    return out_of
