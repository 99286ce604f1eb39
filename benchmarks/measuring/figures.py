"""The figures of quality that the docs show: docs/quality.yaml, and the page made from it."""

import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from embedjob.reports.method_pages import page

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "quality.yaml"
SHOWN = ROOT / "docs" / "methods.md"
SETS = ("stsb.dev", "sickr.dev")
HEADER = """\
# Spearman x 100 of cosine against the score, float32, on a CPU: all 1,500 pairs of STS-B dev, all
# 500 of SICK-R dev. `tokens` is the average number of tokens in all views of a text, `computed` the
# number without shared prefixes, which run once; `cpu_seconds` are the process' own. Written by
# `make bench-quality`; `recipe` is the fingerprint of the knobs, without the weights. The set "200
# pairs" is of STS-B dev, drawn by a seed, its trajectories compared by distance; "scifact" has
# nDCG@10 of 300 queries.
"""
Figures = dict[str, dict[str, dict[str, Any]]]


def kept() -> Figures:
    """The figures taken so far, by set and method."""
    return yaml.safe_load(KEPT.read_text("utf-8")) if KEPT.exists() else {}


def keep(figures: Figures) -> None:
    """Writes the figures down, and the page that shows them."""
    others = [data for data in figures if data not in SETS]
    ordered = {data: dict(sorted(figures.get(data, {}).items())) for data in (*SETS, *others)}
    lines = yaml.safe_dump(ordered, default_flow_style=None, width=200, sort_keys=False)
    KEPT.write_text(HEADER + lines, "utf-8")
    SHOWN.write_text(page(KEPT), "utf-8")


def taken_today(*packages: str) -> dict[str, str]:
    """What a figure says of when it was taken, and with which versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return {"date": datetime.date.today().isoformat(), "versions": versions}
