"""The encoder: texts to finished embeddings, by a model that it loads. Needs no Ray.

A static table needs no torch either: what loads and runs a model is imported where it is loaded.

Legend: R texts, V views, L lines, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from embedjob.config.recipe import Recipe, Role
from embedjob.encoder.method_recipes import MethodRecipes
from embedjob.errors import ConfigError
from embedjob.job.recorded import recorded_alignment, recorded_recipes
from embedjob.job.resolve import resolve_encoder
from embedjob.models.architecture import check_quantizer
from embedjob.models.source import materialize, source_of
from embedjob.models.tables.static_tables import may_be_static
from embedjob.models.tokenizer import load_tokenizer
from embedjob.static.bag_of_words import static_encoder
from embedjob.text.conversations import embedded_texts
from embedjob.text.variants import views_with_variants
from embedjob.text.views import Headings, TokenizesTexts, TokenViews
from embedjob.vectors.encoded import Encoded, Lines, Vectors
from embedjob.vectors.finishing import NO_FITS, finished
from embedjob.vectors.fits.fit_arithmetic import applied
from embedjob.vectors.fits.fitted import Fitted
from embedjob.vectors.quantizing import Codes, quantize

if TYPE_CHECKING:
    from embedjob.encoder.backbone import Backbone
    from embedjob.encoder.generator import Generator
    from embedjob.encoder.view_encoder import ViewEncoder


class Encoder:
    """A model and a recipe, loaded once and used for many texts."""

    backbone: "Backbone"

    def __init__(self, backbone: "Backbone", recipe: Recipe, **how: Any) -> None:
        """Take a loaded model, and what `ViewEncoder` takes; `from_recipe` loads one."""
        from embedjob.encoder.view_encoder import ViewEncoder

        self.backbone = backbone
        self._encode_by(ViewEncoder(backbone, recipe, **how))

    def _encode_by(self, views: "ViewEncoder | _TableViews") -> None:
        self._views = views
        self.recipe = views.recipes.own
        self.ranges: Vectors | None = None
        self.alignment: Fitted | None = None
        self._tokenizers: dict[Role, TokenizesTexts] = {}
        self._generator: Generator | None = None

    @classmethod
    def from_recipe(  # noqa: PLR0913 - each is a place, or a part of the encoder
        cls,
        recipe: Recipe,
        *,
        recipes: Mapping[Role, Recipe] | None = None,
        fitted: Mapping[str, Fitted] = NO_FITS,
        device: str | None = None,
        tokens_per_microbatch: Literal["auto"] | int = "auto",
        gpus: int = 1,
        threads: int | None = None,
    ) -> "Encoder":
        """Load the encoder of a resolved recipe, and of the same method's recipes for other roles.

        Without a device, the first GPU is taken if there is one; with several `gpus` the model is
        spread over them. `threads` is for a process that only encodes: torch computes with that
        many, and on a CPU the process keeps the memory that it frees, for the next micro-batch.
        """
        check_quantizer(recipe)  # before a model is fetched
        if may_be_static(materialize(source_of(recipe), tokenizer_only=True)):
            return _TableEncoder(recipe, recipes=recipes, fitted=fitted)
        import torch

        from embedjob.encoder.backbone import first_device, load_backbone
        from embedjob.encoder.batching.transfers import own_process

        place = torch.device(device or first_device())
        if threads is not None:
            own_process(place, threads)
        backbone = load_backbone(recipe, device=place, gpus=gpus)
        budget = tokens_per_microbatch
        return cls(backbone, recipe, recipes=recipes, fitted=fitted, tokens_per_microbatch=budget)

    @classmethod
    def from_method(
        cls,
        name: str,
        *,
        model: str | None = None,
        device: str | None = None,
        gpus: int = 1,
        generate: Mapping[str, Any] | None = None,
        **keys: Any,
    ) -> "Encoder":
        """Load the encoder of a method of the literature, or of a method file; no job is needed.

        Args:
            name: the method, as in `encoder.method`.
            model: the model; the method's own if None.
            device: as for `from_recipe`.
            gpus: as for `from_recipe`.
            generate: keys of the `generate` section, which win over the method's.
            keys: further keys of the `encoder` section, which win over the method's.

        Raises:
            ConfigError: there is no such method, or a key does not fit it.
            ModelError: there is no such model.
        """
        named = {} if model is None else {"model": model}
        config = {"method": name, **named, **keys}
        return cls.from_config(config, device=device, gpus=gpus, generate=generate)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        device: str | None = None,
        gpus: int = 1,
        generate: Mapping[str, Any] | None = None,
    ) -> "Encoder":
        """Load the encoder of an `encoder` section of a job file, under every role of its method.

        Keys that it leaves out come from the method, then from the model's folder. Neither Ray,
        nor an input or an output, is needed. `generate` is the section of that name.
        """
        from embedjob.encoder.backbone import first_device

        place = device or first_device()
        on_gpu = place.partition(":")[0] != "cpu"
        resolved = resolve_encoder(config, on_gpu=on_gpu, generate=generate)
        return cls.from_recipe(resolved.recipe, recipes=resolved.recipes, device=place, gpus=gpus)

    @classmethod
    def from_output(  # noqa: PLR0913 - each key is a consent, or the place of a copy
        cls,
        out: str,
        *,
        model: str | None = None,
        base: str | None = None,
        adapters: Sequence[str] | None = None,
        generator: str | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        aligned_to: str | None = None,
        device: str | None = None,
        gpus: int = 1,
    ) -> "Encoder":
        """Load the encoder of exactly the recipe that wrote an output, without Ray.

        Whoever wrote the output named the model: its code runs, and its pickles are read, only
        where the caller says so as well.

        Args:
            out: the output.
            model: where a copy of the model lies, if not where the job had it.
            base: as `model`, for `encoder.base`.
            adapters: as `model`, for `encoder.adapters`.
            generator: as `model`, for `generate.model`.
            trust_remote_code: whether the model's own Python code may run, if the job let it run.
            allow_pickle: whether pickled weights may be read, if the job let them be read.
            aligned_to: another output in whose space embeddings are given, by the rotation that
                the `align` fit of this output's job has made.
            device: as for `from_recipe`.
            gpus: as for `from_recipe`.

        Raises:
            OutputError: the output has no recipe, or no rotation to the other output.
            ModelError: the model is not the one that wrote, or needs what is not allowed here.
        """
        copies = {"model": model, "base": base, "adapters": adapters, "generator": generator}
        kept = recorded_recipes(
            out,
            copies=copies,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
        alignment = None if aligned_to is None else recorded_alignment(out, aligned_to)
        encoder = cls.from_recipe(
            kept.recipe, recipes=kept.recipes, fitted=kept.fitted, device=device, gpus=gpus
        )
        if kept.calibration is not None:
            encoder.ranges = kept.calibration.array
        encoder.alignment = alignment
        return encoder

    def encode_views(
        self, views: TokenViews, *, role: Role | None = None, **callbacks: Any
    ) -> Encoded:
        """Return the embeddings of the views' texts, and why some of them have none.

        `callbacks` are those of `ViewEncoder.encode_views`.
        """
        return self._views.encode_views(views, role=role, **callbacks)

    def encode(self, texts: Sequence[str], role: Role | None = None) -> Vectors:
        """Return the embeddings [R, D] of texts, by a role's recipe; InputError if one has none.

        With `aggregation: keep` they are those of the V views [R, V, D]. With `long_text:
        late_chunk` or `split` a longer text has several: `encode_parts` gives them.
        """
        recipe = self._views.recipes.of(role)
        vectors_LD, lines = self.encode_parts(texts, role)
        if recipe.long_text in ("late_chunk", "split"):
            lines.require_single(f"long_text: {recipe.long_text}")
        elif recipe.aggregation == "keep":
            return vectors_LD.reshape(len(texts), recipe.views, vectors_LD.shape[1])
        return vectors_LD

    def encode_parts(
        self, texts: Sequence[str], role: Role | None = None, headings: Headings = None
    ) -> tuple[Vectors, Lines]:
        """Return all embeddings [L, D] of texts, and the text and the characters of each.

        They are what the lines of an output would hold; InputError if a text has none. `headings`
        stand before the passages of each text, as the columns of `split.carry` in a job.
        """
        outputs = self.outputs(texts, role, headings)
        return outputs.embeddings, outputs.lines or Lines(np.arange(len(texts) + 1))

    def outputs(
        self, texts: Sequence[str], role: Role | None = None, headings: Headings = None
    ) -> Encoded:
        """Return all that a role's recipe makes of texts: embeddings, lines, sparse and routers.

        `sparse.row(r)` are the indices and values of text r, or of line r where texts are split.
        `headings` are those of `encode_parts`. InputError if a text has no embedding.
        """
        recipe = self._views.recipes.of(role)
        if recipe.role not in self._tokenizers:
            self._tokenizers[recipe.role] = load_tokenizer(recipe)
        tokenizer = self._tokenizers[recipe.role]
        if tokenizer.splitter is not None:
            passages = tokenizer.splitter(texts, headings)
            outputs = self.encode_views(tokenizer.views(passages.texts), role=recipe.role)
            outputs = outputs.of_passages(Lines(passages.offsets, passages.chars))
        elif headings is not None:
            raise ConfigError("headings: only long_text: split puts them before passages; got some")
        elif recipe.generate is None:
            outputs = self.encode_views(tokenizer.views(texts), role=recipe.role)
        else:
            views = views_with_variants(tokenizer, texts, self.generated(texts, recipe.role))
            outputs = self.encode_views(views, role=recipe.role)
        outputs.require_all(len(texts))
        if self.alignment is not None:
            rotated = applied(self.alignment, outputs.embeddings)
            unit = finished(rotated, recipe.finish[-1:] if recipe.normalized else ())
            outputs = replace(outputs, embeddings=unit)
        return outputs

    def generated(self, texts: Sequence[str], role: Role | None = None) -> list[list[str]]:
        """Return the texts that are embedded beside each text, made by the recipe's generator.

        The generator is loaded at the first call, on the encoder's device. ConfigError where the
        recipe generates nothing.
        """
        recipe = self._views.recipes.of(role)
        if recipe.generate is None:
            raise ConfigError(
                "generate: the recipe generates nothing; use a method that does, such as geneol"
            )
        if self._generator is None:
            # Here alone: actors that only encode need not import it.
            from embedjob.encoder.generator import Generator

            place = str(self.backbone.device)
            self._generator = Generator.from_recipe(recipe, device=place)
        made = self._generator.generate(list(dict.fromkeys(texts)))
        by_text = dict(zip(dict.fromkeys(texts), made, strict=True))
        return [embedded_texts(text, by_text[text]) for text in texts]

    def encode_stored(self, texts: Sequence[str], role: Role | None = None) -> Codes:
        """Return the embeddings of texts in the documents' `vector_dtype`, as an output holds them.

        int8 and uint8 go by `ranges`, which are those of the output that the encoder is from;
        ConfigError where there are none, or where embeddings are given in another output's space.
        """
        if self.alignment is not None:
            raise ConfigError(
                "aligned_to: got another output's space, and encode_stored gives what this output"
                " holds; use encode"
            )
        floats = self.encode(texts, role)
        flat = floats.reshape(-1, floats.shape[-1])
        codes = quantize(flat, self.recipe.vector_dtype, ranges_2D=self.ranges)
        return codes.reshape(*floats.shape[:-1], codes.shape[-1])


class _TableEncoder(Encoder):
    """The encoder of a static table: the same, but for what turns views into embeddings."""

    def __init__(
        self, recipe: Recipe, *, recipes: Mapping[Role, Recipe] | None, fitted: Mapping[str, Fitted]
    ) -> None:
        self._encode_by(_TableViews(MethodRecipes(recipe, recipes), fitted))


class _TableViews:
    """A static table under the recipes of one method, for token views."""

    def __init__(self, recipes: MethodRecipes, fitted: Mapping[str, Fitted]) -> None:
        self.recipes = recipes
        self._lookups = {one.role: static_encoder(one, fitted=fitted) for one in recipes}

    def encode_views(
        self, views: TokenViews, *, role: Role | None = None, **callbacks: Any
    ) -> Encoded:
        return self._lookups[self.recipes.of(role).role].encode_views(views, **callbacks)
