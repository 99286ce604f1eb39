"""The claim: before its first commit, a run reproduces the vectors that the output began with."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from embedjob.errors import AccessError, OutputError
from embedjob.output.calibration import Calibration
from embedjob.output.claim import Claim, Probes, check_probes, put_claim, read_claims
from embedjob.output.lease import Lease, is_seen, unseen
from embedjob.stages.calibrating import FindRanges
from embedjob.stages.engine import EncodesViews, Engine, PlannedFiles
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
class ClaimAndCheck:
    """Claims an output with a freshly loaded encoder's probes, or holds the encoder to the claim.

    `lease` is the run's: a node that does not see it has another disk at the output's path. `claim`
    is the run's too, without probes and ranges; `dtype` is what the model computes in, and says how
    alike vectors must be. `files` are the model's as planned; `calibrate` finds the ranges of int8
    and uint8.
    """

    lease: Lease
    claim: Claim
    dtype: str
    files: PlannedFiles
    new_fingerprint: bool = False
    calibrate: FindRanges | None = None

    def __call__(self, encoder: EncodesViews, engine: Engine) -> None:
        """Claim or check, after the encoder was loaded.

        OutputError where ids or vectors are not those of the standing claim, ModelError where the
        files are not those of the plan, AccessError where this node must not write.
        """
        if not is_seen(self.lease):
            raise AccessError(unseen(self.lease))
        self.files.check()
        views = engine.load_tokenizer().views(PROBE_TEXTS)
        encoded = encoder.encode_views(views, stop=lambda: False, on_progress=lambda *_: None)
        ids = _ids(views)
        # A table of words has nothing for a text in another language.
        blank = [text for text, own in enumerate(ids) if not own]
        for text in encoded.failed.keys() - blank:
            reason, detail = encoded.failed[text]
            raise OutputError(f"the model cannot embed {PROBE_TEXTS[text]!r}: {reason}, {detail}")
        vectors = [[] if text in blank else own for text, own in enumerate(_vectors(encoded))]
        probes = Probes(texts=PROBE_TEXTS, ids=ids, vectors=vectors)
        claim = replace(self.claim, probes=probes, calibration=self._ranges(encoder, engine))
        stands = put_claim(self.lease.out, claim, new_fingerprint=self.new_fingerprint)
        check_probes(stands, ids=probes.ids, vectors=probes.vectors, dtype=self.dtype)

    def _ranges(self, encoder: EncodesViews, engine: Engine) -> Calibration | None:
        """Return the ranges to claim with; None if nothing needs them, or a claim has them."""
        claims = read_claims(self.lease.out)
        stands = any(one.fingerprint == self.claim.fingerprint for one in claims)
        if stands or self.calibrate is None:
            return self.claim.calibration  # those that a fit has made, if any
        return self.calibrate(encoder, engine)


def _ids(views: TokenViews) -> list[list[int]]:
    """Return, per text, the ids of all its views, one after the other."""
    return [
        np.concatenate([views.full_ids(view) for view in range(first, stop)]).tolist()
        for first, stop in pairwise(views.text_views.tolist())
    ]


def _vectors(encoded: Encoded) -> list[list[float]]:
    """Return, per text, all its embeddings, one after the other."""
    wide = encoded.embeddings.astype(np.float64)
    edges = pairwise(encoded.line_offsets.tolist())
    return [wide[first:stop].reshape(-1).tolist() for first, stop in edges]
