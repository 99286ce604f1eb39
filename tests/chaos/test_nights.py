"""Nights that take vectors over, whose driver is killed at any moment, once or several times.

However it went, the run after it leaves readers what a quiet run of the whole corpus embeds.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from embedjob.config.recipe import Recipe
from embedjob.encoder.encoder import Encoder
from tests.chaos.nights import Nights
from tests.cluster import Cluster
from tests.drivers import SEEDS, SLOW_SEEDS, chance_of
from tests.running import texts

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
SHARDS, SHARD_ROWS = 3, 40


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_night_whose_driver_is_killed_is_made_whole(
    seed: int,
    place: Callable[[int], str],
    slow_model: Path,
    cluster: Cluster,
    tmp_path: Path,
) -> None:
    chance = chance_of(seed, "night")
    nights = Nights(tmp_path, place(seed), slow_model, cluster, chance)
    nights.bodies = [text for shard in range(SHARDS) for text in texts(SHARD_ROWS, seed=shard)]
    nights.write()
    nights.run()
    full = Encoder.from_recipe(Recipe.model_validate_json(json.dumps(nights.document["encoder"])))
    for night in range(1 if seed < SLOW_SEEDS else 3):
        before = nights.vectors()
        nights.night_of_kills(night)
        nights.require_whole(before, full)
