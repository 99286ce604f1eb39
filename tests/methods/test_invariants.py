"""What must hold for every method, whatever its knobs: METHODS' eight invariants."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedjob.text.fitting import uncounted_tokens
from embedjob.text.tokenizing import ViewTokenizer
from embedjob.text.views import TokenViews
from embedjob.vectors.encoded import Encoded
from tests.fakes import LITERALS
from tests.methods.making import Setting
from tests.methods.settings import CASES, OF_THE_TEXT_ALONE

SETTINGS = [setting for setting, _ in CASES]
EVERY = pytest.mark.parametrize("setting", SETTINGS, ids=[one.name for one in SETTINGS])
# Continuations have the one span, their own tokens: tests/encoder/outputs/test_likelihoods.py.
SPANNED_SETTINGS = [setting for setting in SETTINGS if not setting.recipe().continuations]
SPANNED = pytest.mark.parametrize(
    "setting", SPANNED_SETTINGS, ids=[one.name for one in SPANNED_SETTINGS]
)
FEW = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
NAMES = sorted({*LITERALS.values(), "<s1>", "<EMBED0>", "<query>", "{text}", "{instruction}"})
TEXTS = st.lists(
    st.text(alphabet="ab Tte.?\n\"'é日😀{}", max_size=25) | st.sampled_from(NAMES), max_size=4
).map("".join)
MADE: dict[str, ViewTokenizer] = {}


def tokenizer(setting: Setting) -> ViewTokenizer:
    key = f"{setting.name} {setting.knobs}"
    if key not in MADE:
        MADE[key] = setting.views()
    return MADE[key]


def same(one: Encoded, other: Encoded) -> bool:
    good = [row for row in range(len(one.embeddings)) if row not in one.failed]
    ours, theirs = one.embeddings[good], other.embeddings[good]
    return (
        one.failed == other.failed
        and np.allclose(ours, theirs, atol=1e-5, rtol=0)
        and all(same_beside(one, row, other, row) for row in good)
    )


def same_beside(one: Encoded, row: int, other: Encoded, place: int) -> bool:
    """Whether a row has the same sparse entries and router scores here and there."""
    if one.routers is not None and other.routers is not None:
        return np.allclose(one.routers[row], other.routers[place], atol=1e-4, rtol=0)
    if one.sparse is None or other.sparse is None:
        return one.sparse is other.sparse
    (ours, weights), (theirs, others) = one.sparse.row(row), other.sparse.row(place)
    # A weight that is rounded may fall to either side.
    slack = 1.0 if weights.size and (weights == np.rint(weights)).all() else 1e-5
    dense = np.zeros((2, 1 + int(max([0, *ours, *theirs]))))
    dense[0, ours], dense[1, theirs] = weights, others
    return bool(np.abs(dense[0] - dense[1]).max() <= slack)


def special_counts(setting: Setting, views: TokenViews) -> list[int]:
    added = setting.tokenizer().get_added_tokens_decoder()
    specials = {token for token, entry in added.items() if entry.special}
    # A letter that the tokenizer does not know is no special token that somebody typed.
    specials -= {setting.tokenizer().token_to_id(name) for name in ("[UNK]", "<unk>")}
    rows = range(len(views.prefix))
    return [sum(int(token) in specials for token in views.full_ids(row)) for row in rows]


@EVERY
@FEW
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_the_company_order_and_day_of_a_text_do_not_matter(
    setting: Setting, texts: list[str]
) -> None:
    """Alone, in a padded batch, padded on the other side, in another order, and again."""
    views = tokenizer(setting)
    texts = [*texts, "", "the quick brown fox jumps over the lazy dog"]
    whole = setting.encode(views, texts)
    if setting.method in OF_THE_TEXT_ALONE:
        assert texts.index("") in whole.failed
        reasons = {("empty_span", "no token of the view counts for pooling")}
        assert set(whole.failed.values()) == reasons
    else:
        assert not whole.failed
    assert np.isfinite(np.delete(whole.embeddings, list(whole.failed), axis=0)).all()
    assert len(texts) - 1 not in whole.failed
    again = setting.encode(views, texts)
    assert np.array_equal(again.embeddings, whole.embeddings, equal_nan=True)
    assert same(whole, setting.encode(views, texts, side="left"))
    assert same(whole, setting.encode(views, texts, budget=1))
    backwards = setting.encode(views, texts[::-1])
    for row in range(len(texts)):
        if row not in whole.failed:
            mirrored = backwards.embeddings[len(texts) - 1 - row]
            assert np.allclose(mirrored, whole.embeddings[row], atol=1e-5, rtol=0)
            assert same_beside(whole, row, backwards, len(texts) - 1 - row)


@EVERY
@FEW
@given(text=TEXTS)
def test_special_tokens_in_a_text_are_plain_text(setting: Setting, text: str) -> None:
    views = tokenizer(setting).views(["fox", text, f"{text}{LITERALS[setting.family]}"])
    counts = np.array(special_counts(setting, views)).reshape(3, -1)
    assert (counts == counts[0]).all()


@SPANNED
def test_a_long_text_keeps_the_template_and_its_eos(setting: Setting) -> None:
    """What is after the text, and before it, is the same as for a short one."""
    recipe = setting.recipe()
    long = recipe.max_tokens + int(uncounted_tokens(setting.tokenizer(), recipe).max())
    texts = ["a", "a b " * long]
    whole = tokenizer(setting).views(texts)
    after = setting.views(span={"rule": "text"}, decode=None).views(texts)
    assert whole.truncated.reshape(2, -1)[1].all()
    assert whole.lengths.max() <= long
    for view in range(whole.views_per_text):
        rows = (view, whole.views_per_text + view)
        ids = [whole.full_ids(row).tolist() for row in rows]
        ends = [row[int(after.span[at, 1]) :] for row, at in zip(ids, rows, strict=True)]
        kept = min(map(len, ends))
        # The text's last letter may share a token with the first of what is after it.
        assert max(map(len, ends)) - kept <= 1
        assert ends[0][len(ends[0]) - kept :] == ends[1][len(ends[1]) - kept :]
        prefix = len(whole.prefixes[view])
        assert ids[0][:prefix] == ids[1][:prefix]
        start, stop = whole.span[rows[1]].tolist()
        assert 0 <= start < stop <= len(ids[1])


@EVERY
def test_vectors_are_of_unit_norm_if_and_only_if_asked(setting: Setting) -> None:
    texts = ["the fox", "a dog", "Why?"]
    found = np.linalg.norm(setting.encode(setting.views(), texts).embeddings, axis=1)
    assert np.allclose(found, 1, atol=1e-5) == setting.recipe().normalized
    asked = setting.with_knobs(finish=[{"normalize": True}])
    finished = asked.encode(asked.views(), texts).embeddings
    assert np.allclose(np.linalg.norm(finished, axis=1), 1, atol=1e-5)
    raw = setting.with_knobs(finish=[]).encode(setting.views(), texts).embeddings
    norms = np.linalg.norm(raw, axis=1)
    assert not np.allclose(norms, 1, atol=1e-2)
    assert np.allclose(raw / norms[:, None], finished, atol=1e-5)


@SPANNED
def test_later_tokens_are_seen_in_a_padded_batch_exactly_by_bidirectional_methods(
    setting: Setting,
) -> None:
    texts = ["the fox is brown", "the fox is lazy", "the river bank is here " * 3]
    bare = {
        "templates": ["{text}"],
        "special_tokens": {"bos": "none", "eos": "none"},
        "interventions": [],
        "instruction": None,
        "demonstrations": [],
    }
    first = setting.with_knobs(span="first_token", decode=None, finish=[], **bare)
    vectors = first.encode(first.views(), texts).embeddings
    moved = float(np.abs(vectors[0] - vectors[1]).max())
    assert (moved > 1e-3) == (setting.recipe().attention == "bidirectional")
