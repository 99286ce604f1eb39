"""What there is to do: the job resolved, the input listed, the output compared. No Ray, no GPU."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from embedjob.config.job import Input
from embedjob.config.job_file import JobSource, merge, validate, validate_partial
from embedjob.config.recipe import HubModel
from embedjob.errors import InputError
from embedjob.input.chunks import Shard
from embedjob.input.columns import columns_of
from embedjob.input.listing import Footer, find_shards, read_footers
from embedjob.job.planning import Plan, Request, plan
from embedjob.methods.resolution import Resolved, default_model, resolve
from embedjob.models.architecture import (
    HeadWidths,
    ModelInfo,
    check_model,
    check_quantizer,
    config_of,
    head_widths,
    model_info,
)
from embedjob.models.checkpoint import BASE
from embedjob.models.components import components_of
from embedjob.models.digests import model_digests
from embedjob.models.sentence_transformers import folder_layer, vector_width
from embedjob.models.source import ModelSource, materialize
from embedjob.models.tokenizer import load_tokenizer
from embedjob.output.file_names import data_directory
from embedjob.output.fingerprint import fingerprint
from embedjob.storage import objects
from embedjob.storage.create_only import require_create_only
from embedjob.vectors.finishing import width


@dataclass(frozen=True)
class Survey:
    """A resolved job beside the world that it meets."""

    resolved: Resolved
    model: ModelInfo
    digests: Mapping[str, str]
    fingerprint: str
    width: int
    beside: HeadWidths
    shards: tuple[Shard, ...]
    plan: Plan

    @property
    def out(self) -> str:
        """The output's URL, the same from every directory."""
        return objects.absolute(self.resolved.job.output.path)


def survey(draft: JobSource) -> Survey:
    """The survey of a job.

    Raises RefusedError for whatever can be known now, cheapest first: config, then input, then
    model, then output.
    """
    validate_partial(draft)
    draft = default_model(draft)
    shards, footers = listed_input(draft)
    source = source_in(draft)
    known = model_info(source)
    folder = materialize(source, tokenizer_only=True)
    resolved = resolve(draft, folder_layer(folder))
    made_of = components_of(resolved.job.encoder).pinned()
    resolved = resolved.on(made_of.keys())
    job = resolved.job
    check_model(job.encoder, known)
    check_quantizer(job.encoder)
    wide = vector_width(job.encoder, known.hidden_size, folder)
    beside = head_widths(job.encoder, config_of(folder))
    # Refuses templates without a slot, or without room for a token of text.
    load_tokenizer(job.encoder)
    require_create_only(job.output.path)
    found = model_digests(made_of)
    mark = fingerprint(job.encoder, found)
    done = objects.list_files(data_directory(job.output.path, mark))
    request = Request(job.input, mark, job.output.chunk_rows, job.run.limit)
    return Survey(
        resolved=resolved,
        model=known,
        digests=found,
        fingerprint=mark,
        beside=beside,
        width=width(wide + beside.joined, views=job.encoder.views, recipe=job.encoder),
        shards=shards,
        plan=plan(shards, footers, listed=[file.url for file in done], request=request),
    )


def relisted(found: Survey, *, without: Collection[str] = ()) -> Survey:
    """The survey after another look at the output, less the chunks of these names."""
    listed = objects.list_files(data_directory(found.out, found.fingerprint))
    done = {file.name for file in listed} - set(without)
    left = tuple(chunk for chunk in found.plan.chunks if chunk.name not in done)
    return replace(found, plan=replace(found.plan, left=left))


def source_in(draft: JobSource) -> ModelSource:
    """Where the draft's model comes from."""
    source = ModelSource(
        model=draft.get("encoder.model"),
        revision=draft.get("encoder.revision"),
        trust_remote_code=bool(draft.get("encoder.trust_remote_code")),
        allow_pickle=bool(draft.get("encoder.allow_pickle")),
    )
    base = draft.get("encoder.base")
    named = HubModel(**base) if isinstance(base, dict) else base
    return replace(source, base=source.derive(named, BASE)) if named else source


def listed_input(draft: JobSource) -> tuple[tuple[Shard, ...], dict[str, Footer | str]]:
    """The shards and their footers; InputError where not one shard can be read."""
    written, origins = merge(draft.layers)
    job_input = validate(Input, written["input"], at="input", origins=origins)
    shards = find_shards(job_input.path)
    text = columns_of(job_input).text
    footers = read_footers([shard.stored for shard in shards], text=text)
    problems = [reason for reason in footers.values() if isinstance(reason, str)]
    if problems and len(problems) == len(footers):
        raise InputError(f"input.path: {shards[0].url} is {problems[0]}; no shard can be read")
    return shards, footers
