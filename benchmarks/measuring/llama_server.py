"""llama.cpp in this process, as xllamacpp brings it: token ids in, last-token embeddings out."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measuring.encoders import Vectors
from benchmarks.measuring.workers import Workers

Prompts = Sequence[Sequence[int]]


class Setting(NamedTuple):
    """How llama.cpp is run: in one process or several, and what each of them does at once."""

    processes: int
    slots: int
    ubatch: int
    flash: bool = True
    unified: bool = True


class Ask(NamedTuple):
    """The prompts of one process, and the setting under which they are to be run."""

    setting: Setting
    prompts: Prompts


def llama_encode(weights: Path, *, threads: int, longest: int) -> Callable[[Ask], Vectors]:
    """Embeddings by a server that is kept until another setting is asked for."""
    held: dict[Setting, Any] = {}

    def encode(ask: Ask) -> Vectors:
        if ask.setting not in held:
            held.clear()
            held[ask.setting] = _server(weights, ask.setting, threads=threads, longest=longest)
        return _embed(held[ask.setting], ask.prompts)

    return encode


class Llama:
    """llama.cpp on `cores`: one process with all of them, and as many processes with one each."""

    def __init__(self, make: Callable[..., Callable[[Ask], Vectors]], *, cores: int) -> None:
        """Starts the processes; `make` takes the threads that one is to have."""
        self._workers = {
            count: Workers(_Make(make, cores // count), count=count, threads=cores // count).ready()
            for count in {1, cores}
        }
        for count, workers in self._workers.items():
            workers.map([Ask(Setting(count, 1, 512), [[0]])] * 4 * count)

    def __call__(self, setting: Setting, prompts: Prompts) -> Vectors:
        """The embeddings of all prompts, in order."""
        share = math.ceil(len(prompts) / setting.processes)
        asks = [
            Ask(setting, prompts[start : start + share]) for start in range(0, len(prompts), share)
        ]
        return np.concatenate(self._workers[setting.processes].map(asks))

    def end(self) -> None:
        """Ends the processes."""
        for workers in self._workers.values():
            workers.end()


class _Make(NamedTuple):
    make: Callable[..., Callable[[Ask], Vectors]]
    threads: int

    def __call__(self) -> Callable[[Ask], Vectors]:
        return self.make(threads=self.threads)


def _server(weights: Path, setting: Setting, *, threads: int, longest: int) -> Any:
    import xllamacpp as llama

    params = llama.CommonParams()
    params.model.path = str(weights)
    params.embedding = True
    params.pooling_type = llama.llama_pooling_type.LLAMA_POOLING_TYPE_LAST
    params.flash_attn_type = llama.llama_flash_attn_type(int(setting.flash))
    params.kv_unified = setting.unified
    params.n_parallel = setting.slots
    params.n_ubatch = setting.ubatch
    params.n_batch = max(2048, setting.ubatch)
    params.n_ctx = setting.slots * 256 * math.ceil((longest + 1) / 256)
    params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    # Prompts that it remembers from an earlier round would cost nothing in the next.
    params.cache_ram_mib = 0
    params.verbosity = -1
    return llama.Server(params)


def _embed(server: Any, prompts: Prompts) -> Vectors:
    answer = server.handle_embeddings({"input": [list(one) for one in prompts]})
    if "data" not in answer:
        raise RuntimeError(f"llama.cpp embeds nothing: {answer}")
    read, given = answer["usage"]["prompt_tokens"], sum(map(len, prompts))
    if read != given:
        raise RuntimeError(f"llama.cpp read {read} tokens of the {given} that it was given")
    rows = sorted(answer["data"], key=lambda row: row["index"])
    return np.array([row["embedding"] for row in rows], np.float32)
