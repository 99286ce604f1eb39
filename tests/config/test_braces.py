"""Braces in templates: filled, doubled, or refused.

Covers: embedjob.config.templates
"""

import pytest

from embedjob.config.templates import filled, literals_and_slots, slots
from embedjob.errors import ConfigError


def test_slots_are_filled_once_and_doubled_braces_are_literal() -> None:
    template = "{{x}} {a}{b} and {a:>9}{text}."
    assert slots(template, key="k") == {"a", "b", "a:>9", "text"}
    values = {"a": lambda: "{b}", "b": lambda: "B"}
    assert filled(template, values, key="k") == [
        ("{x} {b}B and ", "a:>9"),
        ("", "text"),
        (".", None),
    ]


def test_a_value_that_no_slot_asks_for_is_not_made() -> None:
    def unasked() -> str:
        raise AssertionError

    assert filled("x", {"a": unasked}, key="k") == [("x", None)]


@pytest.mark.parametrize("template", ["{text", "text}", "{te{xt}"])
def test_a_broken_brace_is_told_under_its_own_key(template: str) -> None:
    with pytest.raises(ConfigError, match=r"^some\.key: .* cannot be read .*'\{\{' or '\}\}'"):
        literals_and_slots(template, key="some.key")
