"""Before its first commit, every run must reproduce the vectors that this output began with."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from embedjob.errors import OutputError
from embedjob.output.calibration import Calibration
from embedjob.output.claim import Claim, Probes, check_probes, put_claim, read_claims
from embedjob.stages.calibrating import Calibrate
from embedjob.stages.engine import EncodesViews, Engine
from embedjob.text.views import TokenViews
from embedjob.vectors.encoded import Encoded

# Short and long, other scripts, digits, what templates and tokenizers trip over.
PROBE_TEXTS = (
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "How do I reset my password?",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "敏捷的棕色狐狸跳过了懒狗。",
    'She said: "no", and then\n\t{left} <s> [SEP] quickly!',
    "3.14159 + 2.71828 = 5.85987",
    "embeddings " * 40,
)


@dataclass(frozen=True)
class Prove:
    """Claims the output with a freshly loaded encoder's probes, or holds them to the claim."""

    out: str
    claim: Claim
    dtype: str
    new_fingerprint: bool = False
    calibrate: Calibrate | None = None

    def __call__(self, encoder: EncodesViews, engine: Engine) -> None:
        """OutputError where ids or vectors are not those of the claim that stands."""
        views = engine.load_tokenizer().views(PROBE_TEXTS)
        encoded = encoder.encode_views(views, stop=lambda: False, on_progress=lambda *_: None)
        if encoded.failed:
            text, (reason, detail) = next(iter(encoded.failed.items()))
            raise OutputError(f"the model cannot embed {PROBE_TEXTS[text]!r}: {reason}, {detail}")
        found = Probes(
            texts=PROBE_TEXTS,
            ids=_ids(views),
            vectors=_vectors(encoded),
        )
        calibration = self._calibration(encoder, engine)
        claim = replace(self.claim, probes=found, calibration=calibration)
        stands = put_claim(self.out, claim, new_fingerprint=self.new_fingerprint)
        check_probes(stands, ids=found.ids, vectors=found.vectors, dtype=self.dtype)

    def _calibration(self, encoder: EncodesViews, engine: Engine) -> Calibration | None:
        """The ranges to claim with; None where nothing needs them, or a claim has them already."""
        stands = any(one.fingerprint == self.claim.fingerprint for one in read_claims(self.out))
        return None if stands or self.calibrate is None else self.calibrate(encoder, engine)


def _ids(views: TokenViews) -> list[list[int]]:
    """Per text, the ids of all its views, one after the other."""
    return [
        np.concatenate([views.full_ids(view) for view in range(first, stop)]).tolist()
        for first, stop in pairwise(views.text_views.tolist())
    ]


def _vectors(encoded: Encoded) -> list[list[float]]:
    """Per text, all its embeddings, one after the other."""
    wide = encoded.embeddings.astype(np.float64)
    edges = pairwise(encoded.line_offsets.tolist())
    return [wide[first:stop].reshape(-1).tolist() for first, stop in edges]
