import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from embedjob.config.job_file import JobSource, Layer
from embedjob.errors import InputError
from embedjob.reports.preview import preview, show
from tests import running
from tests.encoder.tiny import save_chat
from tests.running import texts, write_shard


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    """An input with a null, and a model whose weights are gone: a preview needs none."""
    bodies: list[str | None] = [*texts(20)]
    bodies[1] = None
    write_shard(tmp_path / "in" / "a.parquet", bodies)
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "model" / name).write_bytes((model / name).read_bytes())
    return tmp_path


def job(folder: Path, **encoder: object) -> running.Job:
    return running.job(folder / "in", folder / "out", folder / "model", encoder=encoder)


def draft(folder: Path, **encoder: object) -> JobSource:
    return JobSource((Layer("job.yaml", job(folder, **encoder)),))


def test_every_good_row_is_shown_as_the_model_would_see_it(folder: Path) -> None:
    found = preview(draft(folder, span="text", max_tokens=70), 4)
    assert [view["row"] for view in found] == [0, 2, 3]
    for view in found:
        assert len(view["tokens"]) == len(view["ids"])
        start, stop = view["span"]
        spelled = "".join(view["tokens"][start:stop]).replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
        assert spelled.strip().startswith(f"0 {view['row']} ")
        assert view["shared_prefix"] <= start
        assert view["truncated"] is False
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("number", "told"),
    [(1, "1 fault (named above)"), (23, "23 faults (the first 20 are named above)")],
)
def test_where_no_shard_can_be_shown_faults_are_named_and_counted(
    folder: Path, number: int, told: str
) -> None:
    write_shard(folder / "in" / "a.parquet", [])
    for one in range(number):
        (folder / "in" / f"{one}.parquet").write_bytes(b"PAR1")
    said: list[str] = []
    with pytest.raises(InputError) as refused:
        preview(draft(folder), 3, said.append)
    assert f"input.path: no shard can be shown: {told}, and no rows" in str(refused.value)
    assert sum(line.startswith("fault: ") for line in said) == min(number, 20)


def test_each_template_is_a_view(folder: Path) -> None:
    found = preview(draft(folder, templates=["It says: {text}", "{text} means"]), 3)
    assert [(view["row"], view["view"]) for view in found] == [(0, 0), (0, 1), (2, 0), (2, 1)]


def test_the_command_prints_one_object_per_view(folder: Path) -> None:
    path = running.job_file(job(folder), folder)
    ran = running.command("preview", str(path), "--json", "--rows", "3")
    assert ran.code == 0, ran.err
    objects = [json.loads(line) for line in ran.out.splitlines()]
    assert [one["row"] for one in objects] == [0, 2]
    assert all({"ids", "tokens", "span"} <= one.keys() for one in objects)


def test_people_see_tokens_and_spans(folder: Path) -> None:
    told = io.StringIO()
    show(preview(draft(folder, max_tokens=12), 5), Console(file=told, width=200))
    assert "row 0 view 0: " in told.getvalue()
    assert "span 0:" in told.getvalue()
    assert ", cut" in told.getvalue()


def test_each_passage_is_shown_with_its_place(folder: Path) -> None:
    split = {"max_tokens": 30, "carry": ["title"]}
    bodies = [
        "The quick brown fox. It jumps over the dog. Near the river bank. " * 3,
        None,
        "A fox.",
    ]
    write_shard(folder / "in" / "a.parquet", bodies, title=["Fable", "Null", None])
    found = preview(draft(folder, span="text", max_tokens=60, long_text="split", split=split), 3)
    long = [view for view in found if view["row"] == 0]
    assert [view["part"] for view in long] == list(range(len(long)))
    assert len(long) > 2
    chars = [view["chars"] for view in long]
    assert (chars[0][0], chars[-1][1]) == (0, len(str(bodies[0])))
    assert [start for start, _ in chars[1:]] == [stop for _, stop in chars[:-1]]
    for view in long:
        assert "".join(view["tokens"]).count("able\n") == 1
        start, stop = view["span"]
        assert stop - start <= 30
    assert [(view["row"], view["part"]) for view in found[len(long) :]] == [(2, 0)]
    told = io.StringIO()
    show(found, Console(file=told, width=200))
    assert ", part 1" in told.getvalue()


def test_the_parts_of_long_texts_are_shown(folder: Path) -> None:
    late = preview(draft(folder, span="text", max_tokens=8, long_text="late_chunk"), 14)
    longest = max(late, key=lambda view: len(view["parts"]))
    spans = [part["span"] for part in longest["parts"]]
    assert len(spans) > 1
    assert [spans[0][0], spans[-1][1]] == longest["span"]
    assert longest["parts"][0]["chars"][0] == 0
    told = io.StringIO()
    show(late, Console(file=told, width=200))
    assert f", parts end at {spans[0][1]}" in told.getvalue()


def test_a_text_that_is_cut_is_shown_part_by_part(folder: Path) -> None:
    found = preview(draft(folder, max_tokens=20, long_text="chunk_mean"), 14)
    parts = [(view["row"], view["part"]) for view in found]
    assert parts == sorted(set(parts))
    assert {row for row, _ in parts} == {*range(14)} - {1}
    assert len(parts) > 13
    told = io.StringIO()
    show(found, Console(file=told, width=200))
    assert ", part 1" in told.getvalue()


def test_what_a_generator_is_asked_is_shown_without_its_weights(folder: Path) -> None:
    save_chat(folder / "chat")
    (folder / "chat" / "model.safetensors").unlink()
    kinds = {"shorter": {"instruction": "Say less."}, "longer": {"instruction": "Say more."}}
    own = {"kinds": kinds, "model": str(folder / "chat"), "max_prompt_tokens": 100}
    document = {**job(folder), "generate": own}
    found = preview(JobSource((Layer("job.yaml", document),)), 3)
    asked = [one for one in found if "prompt" in one]
    assert [(one["row"], one["kind"]) for one in asked] == [
        (row, kind) for row in (0, 2) for kind in kinds
    ]
    assert len(found) - len(asked) == 2
    text = texts(3)[2]
    assert asked[2]["prompt"] == (
        "<|im_start|>user\nSay less.<|im_end|>\n<|im_start|>assistant\nAlright.<|im_end|>\n"
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    told = io.StringIO()
    show(found, Console(file=told, width=200))
    assert "row 2 shorter 0: " in told.getvalue()
    assert text in told.getvalue()


def test_an_input_without_rows_has_no_preview(folder: Path) -> None:
    write_shard(folder / "in" / "a.parquet", [])
    with pytest.raises(InputError, match="every shard is empty"):
        preview(draft(folder), 3)


def test_tokenizer_files_that_disagree_are_said_once(folder: Path) -> None:
    said: list[str] = []
    preview(draft(folder), 3, said.append)
    assert said == []
    beside = folder / "model" / "tokenizer_config.json"
    beside.write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    preview(draft(folder), 3, said.append)
    assert [line.startswith("encoder.model: the tokenizer files in") for line in said] == [True]
