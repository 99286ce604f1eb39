"""Templates and their segments: filled in order, or refused with the reason.

Covers: embedjob.config.segments
"""

from typing import Any

import pytest

from embedjob.config.job_file import recipe_from
from embedjob.config.recipe import Recipe
from embedjob.config.templates import FilledSegment, FilledTemplate, slots_read, templates
from embedjob.errors import ConfigError

TEXT: dict[str, Any] = {"text": {}}
POOLED: dict[str, Any] = {"text": {"pool": True}}


def recipe(*found: Any, **knobs: Any) -> Recipe:
    return recipe_from({"model": "m", "templates": list(found), **knobs}, {})


def one(*segments: Any, **knobs: Any) -> FilledTemplate:
    return templates(recipe(list(segments), **knobs))[0]


def against(template: str) -> dict[str, Any]:
    return {"contrast": {"template": template, "layer": 0, "mode": "norm"}}


def test_segments_are_filled_in_order() -> None:
    found = one(
        {"special": "<s>"},
        {"literal": "{x} "},
        {"instruction": {"after": ","}},
        {"demonstrations": {}},
        TEXT,
        POOLED,
        {"special": "</s>", "pool": True},
        instruction="Find {text}",
        demonstrations=["One. ", {"text": "a", "answer": "b"}],
        demonstration="{{{text}}} {instruction} {answer}; ",
        span="pooled",
    )
    assert found == FilledTemplate(
        (
            FilledSegment("<s>", special=True),
            FilledSegment("{x} "),
            FilledSegment("Find {text},"),
            FilledSegment("One. {a} Find {text} b; "),
            FilledSegment(None),
            FilledSegment(None, marked=True),
            FilledSegment("</s>", marked=True, special=True),
        )
    )


def test_an_instruction_may_be_stripped() -> None:
    filled = one({"instruction": {"strip": True, "after": " "}}, TEXT, instruction=" Find it:\n")
    assert filled.segments[0] == FilledSegment("Find it: ")


def test_a_tag_marks_its_own_segments() -> None:
    segments = ({"literal": "x", "tag": "a"}, {"text": {"tag": "b"}}, {"literal": "y", "tag": "b"})
    marked = [piece.marked for piece in one(*segments, span={"tag": "b"}).segments]
    assert marked == [False, True, True]


def test_join_and_weight_stand_beside_the_segments() -> None:
    written = {"template": [TEXT, {"literal": "!"}], "join": "separate", "weight": 2.0}
    assert templates(recipe(written)) == (
        FilledTemplate((FilledSegment(None), FilledSegment("!")), False, 2.0),
    )


def test_demonstrations_go_into_strings_too() -> None:
    found = templates(recipe("{demonstrations}Q: {text}", demonstrations=["Q: a\n"]))[0]
    assert [segment.content for segment in found.segments] == ["Q: a\nQ: ", None, ""]
    none = templates(recipe("{demonstrations}Q: {text}"))[0]
    assert [segment.content for segment in none.segments] == ["Q: ", None, ""]


@pytest.mark.parametrize(
    ("template", "knobs", "message"),
    [
        ([{"literal": "x"}], {}, r"no \{text: \{\}\}"),
        ([{"literal": "x", "text": {}}], {}, "got literal and text"),
        ([{}], {}, "a segment has exactly one of literal, .* got none"),
        ([{"text": {}, "pool": True}], {}, r"write pool and tag inside, as \{text:"),
        (
            [TEXT, {"instruction": {"max_tokens": 3}}],
            {},
            "applies to text segments only",
        ),
        ([{"text": {"max_tokens": 9}}], {}, "join: separate only"),
        ([{"text": {"strip": True}}], {}, "strip applies to instructions only"),
        ([{"text": {"after": "x"}}], {}, "after does not apply to a text segment"),
        ([POOLED], {}, "span: pooled reads"),
        ([POOLED], {"span": {"tag": "a"}}, "has tag: a"),
        ([TEXT], {"span": "pooled"}, "no segment of a template has pool: true"),
        (["{text}"], {"span": "pooled"}, "templates"),
        ([TEXT], {"span": {"tag": "a"}}, "has tag: a"),
        ([POOLED, {"literal": "x"}, POOLED], {"span": "pooled"}, "not neighbours"),
        ([{"instruction": {}}, TEXT], {}, "encoder.instruction is not set"),
        ({"template": [TEXT], "join": "separate"}, {"prepare": "eol"}, "strips the whole prompt"),
        (
            {"template": [TEXT], "join": "separate"},
            {"prepare": "moee"},
            "encoder.prepare: got moee, which strips the whole prompt",
        ),
        (
            [{"text": {"tag": "a"}}, {"literal": "x", "pool": True}],
            {"span": {"tag": "a"}},
            "got 'tag: a', but a segment has pool: true",
        ),
        ({"template": "{text}", "join": "separate"}, {}, "needs a list of segments"),
        ({"template": [TEXT], "join": "sideways"}, {}, "sideways"),
        (
            "{demonstrations}{text}",
            {"demonstrations": [{"text": "a", "answer": "b"}]},
            "encoder.demonstration: is not set",
        ),
        (
            "{demonstrations}{text}",
            {"demonstrations": [{"text": "a", "answer": "b"}], "demonstration": "{x}"},
            r"encoder.demonstration: .* unknown slot \{x\}",
        ),
        ("{demonstrations}{text}", {"demonstration": "{text}."}, r"'\{text\}\.' has no \{answer\}"),
        ("{demonstrations}{text}", {"demonstration": "{answer}"}, r"has no \{text\}, which would"),
        (
            "{demonstrations}{text}",
            {"demonstration": "{text} {answer"},
            r"^encoder\.demonstration: .* cannot be read",
        ),
        (
            "{text}",
            {"interventions": [against("{text")]},
            r"^encoder\.interventions: contrast\.template: .* cannot be read",
        ),
        (
            "{text}",
            {"interventions": [against("Not this")]},
            r"^encoder\.interventions: contrast\.template: .* has 0 \{text\} slots",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(
    template: Any, knobs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        templates(recipe(template, **knobs))


def test_the_slots_of_a_recipe_are_those_of_all_that_is_written_into_its_views() -> None:
    pattern = {"demonstration": "{instruction} {text} {answer}"}
    assert slots_read(recipe("x {text}", instruction="unread", **pattern)) == {"text"}
    assert slots_read(recipe("{{instruction}} {text}")) == {"text"}
    assert slots_read(recipe("{instruction}{text}", "{text}")) == {"text", "instruction"}
    segments = [{"instruction": {}}, {"literal": "{demonstrations}"}, TEXT]
    assert slots_read(recipe({"template": segments, "join": "separate"})) == {
        "instruction",
        "literal",
        "text",
    }
    steered = recipe("{text}", interventions=[against("{instruction}{text}")])
    assert slots_read(steered) == {"text", "instruction"}
    shown = recipe("{demonstrations}{text}", **pattern)
    assert slots_read(shown) == {"demonstrations", "text", "answer", "instruction"}


def test_joint_and_separate_views_do_not_mix() -> None:
    with pytest.raises(ConfigError, match="set the same join in all"):
        templates(recipe("{text}", {"template": [TEXT], "join": "separate"}))


def test_a_recipe_with_segments_survives_its_record() -> None:
    found = recipe(
        {"template": [{"special": "<s>"}, POOLED], "join": "separate"},
        span={"tag": "x", "offset": -1},
        demonstrations=[{"text": "a", "answer": "b"}],
    )
    assert recipe_from(found.model_dump(mode="json"), {}) == found
