"""The night at its full size, by the program that measures it, whose own checks end it early.

Seconds are the machine's, and not looked at here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import AUTH

ROOT = Path(__file__).parents[2]
# With `make chaos`: together they take longer than all slow tests may.
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]


def measured(*arguments: str) -> dict[str, Any]:
    """What the program says at its end."""
    environment = {**os.environ, **AUTH, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.night", *arguments]
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    said: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return said


@pytest.mark.ray
def test_exactly_what_is_new_is_encoded_and_the_night_equals_a_full_run() -> None:
    """120,000 rows in three layouts: ids, kept values and vectors, row for row."""
    figures = measured("--only", "nights", "--rows", "120000")["figures"]
    for layout in ("in place", "re-sharded", "shuffled"):
        # Of 1,200 edited and 1,200 new rows, 120 have the text of another one.
        assert figures[f"{layout}: texts encoded"] == 2 * 1200 - 120


def test_gathering_reads_few_bytes_more_than_the_vectors() -> None:
    claims = measured("--only", "bytes", "--rows", "120000")["claims"]
    assert [claim["holds"] for claim in claims] == [True] * 3, claims


def test_ten_million_keys_are_joined_in_two_gibibytes() -> None:
    [claim] = measured("--only", "joins", "--keys", "10000000")["claims"]
    assert claim["holds"], claim
    assert claim["ceiling"] == 2
