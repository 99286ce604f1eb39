"""Empty outputs."""

from pathlib import Path

import pytest
from hypothesis import settings

# How long one example takes says more about the machine than about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture
def out(tmp_path: Path) -> str:
    """An output on the local disk."""
    return str(tmp_path / "out")


@pytest.fixture(params=["local", "s3"])
def any_out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An output wherever writers can meet: what they settle between them holds on both."""
    if request.param == "local":
        return str(tmp_path / "out")
    return f"{request.getfixturevalue('bucket')}/out"
