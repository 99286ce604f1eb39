"""Ours against llama.cpp on the same token ids, weights and cores, in turns.

The weights are those of a 4-bit GGUF file. Ours has them dequantised to float32, so llama.cpp is
given a float32 GGUF of them; with its 4-bit weights, its home ground, it is run as well and only
reported. The wheel of xllamacpp is built without AVX-512, so ours is run a second time as on a
processor that has AVX2 alone: that is the even comparison, the other is what each installs.

    python -m benchmarks.llama_cpp [--rows 192] [--rounds 3]
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.measuring.claims import SAME, Claim, report
from benchmarks.measuring.encoders import Vectors, our_encode, prompteol_recipe
from benchmarks.measuring.float_gguf import write_float32
from benchmarks.measuring.llama_server import Llama, Prompts, Setting, llama_encode
from benchmarks.measuring.machine import watched
from benchmarks.measuring.texts import SMOLLM, corpus, duplicates, sample
from benchmarks.measuring.turns import Turns, least_cosine, quickest, take_turns
from benchmarks.measuring.workers import Workers
from embedjob.config.recipe import Recipe
from embedjob.models.source import address
from embedjob.models.tokenizer import load_tokenizer

PACKAGES = ("torch", "transformers", "tokenizers", "gguf", "xllamacpp")
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
FLOAT32 = "llama.cpp, float32"
FOUR_BITS = "llama.cpp, 4-bit weights"
Part = tuple[list[Claim], dict[str, object]]


def settings(cores: int) -> list[Setting]:
    """What is tried of llama.cpp, with each kind of weights."""
    spread = {1, cores}
    return [
        *(Setting(count, slots, 512) for count in spread for slots in (8, 32)),
        *(Setting(count, 32, 2048) for count in spread),
        Setting(cores, 32, 512, flash=False),
        Setting(cores, 32, 512, unified=False),
    ]


def with_avx2(recipe: Recipe) -> Callable[[list[str]], Vectors]:
    """Our encoder's `encode` in a process that has yet to compute something, without AVX-512."""
    os.environ.update(AVX2)
    return our_encode(recipe)


def prompts_of(texts: list[str]) -> Prompts:
    """The token ids that our encoder runs, each prompt with all of its own."""
    views = load_tokenizer(prompteol_recipe()).views(texts)
    return [views.full_ids(view).tolist() for view in range(views.texts)]


def compare(asked: argparse.Namespace, folder: Path) -> Part:
    """Our ratios to llama.cpp, and what they rest on."""
    texts = sample(corpus("quora"), asked.rows)
    prompts = prompts_of(texts)
    few = prompts[: max(8, len(prompts) // 4)]
    cores = asked.threads
    peers = peers_of(prompts, folder, cores=cores)
    best = {way: quickest(settings(cores), partial(_run, one, few)) for way, one in peers.items()}
    makes = {"ours": our_encode, "ours, AVX2": with_avx2}
    ours = {
        way: Workers(partial(make, prompteol_recipe()), count=cores, threads=1).ready()
        for way, make in makes.items()
    }
    for workers in ours.values():
        workers.map([texts[:4]] * 4 * cores)
    for way, peer in peers.items():
        peer(best[way], few)
    share = -(-len(texts) // cores)
    chunks = [texts[start : start + share] for start in range(0, len(texts), share)]
    ways = {way: partial(_run, peer, prompts, best[way]) for way, peer in peers.items()}
    ways |= {way: partial(_joined, workers, chunks) for way, workers in ours.items()}
    turns = take_turns(ways, rounds=asked.rounds)
    for each in (*peers.values(), *ours.values()):
        each.end()
    figures: dict[str, object] = {f"{way}, rows/s": len(texts) / turns.median(way) for way in ways}
    figures |= {f"{way}, best setting": str(setting) for way, setting in best.items()}
    figures |= {"tokens": sum(map(len, prompts)), "duplicates": duplicates(texts)}
    return claims_of(turns), figures


def peers_of(prompts: Prompts, folder: Path, *, cores: int) -> dict[str, Llama]:
    """llama.cpp with each kind of weights."""
    gguf = Path(address(SMOLLM))
    weights = {FLOAT32: write_float32(gguf, folder / "float32.gguf"), FOUR_BITS: gguf}
    longest = max(map(len, prompts))
    return {
        way: Llama(partial(llama_encode, path, longest=longest), cores=cores)
        for way, path in weights.items()
    }


def claims_of(turns: Turns[Vectors]) -> list[Claim]:
    """Each way of llama.cpp against each of ours; other weights need not give the same vectors."""
    return [
        Claim(
            f"{ours} against {peer}",
            turns.ratio(peer, ours),
            spread=turns.ratios(peer, ours),
            cosine=least_cosine(turns.results[peer], turns.results[ours]),
            least_cosine=SAME if peer == FLOAT32 else -1.0,
        )
        for peer in (FLOAT32, FOUR_BITS)
        for ours in ("ours, AVX2", "ours")
    ]


def _run(peer: Llama, prompts: Prompts, setting: Setting) -> Vectors:
    return peer(setting, prompts)


def _joined(workers: Workers, chunks: list[list[str]]) -> Vectors:
    return np.concatenate(workers.map(chunks))


def main() -> None:
    """Prints every figure, and all of them as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="cores that each side may use")
    asked = parser.parse_args()
    if importlib.util.find_spec("xllamacpp") is None:
        sys.exit("not run: xllamacpp is not installed (pip install -c constraints.txt xllamacpp)")
    corpus("quora")
    import xllamacpp

    with (
        watched(PACKAGES, threads=asked.threads) as machine,
        tempfile.TemporaryDirectory() as folder,
    ):
        claims, figures = compare(asked, Path(folder))
    figures["llama.cpp is built with"] = xllamacpp.get_system_info().strip(" |")
    report(claims, figures, asked=vars(asked), machine=machine)


if __name__ == "__main__":
    main()
