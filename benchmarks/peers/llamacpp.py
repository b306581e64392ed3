"""llama.cpp through its low-level interface: many sequences in one `llama_batch`, sampled greedily here.

Options: `flash_attention` (bool), `kv_type` ("f16" or "bf16"), `ubatch_tokens`.

Two contexts over one model, each the better one for its workloads. In the first every sequence has a KV stream of its
own, so that none looks at another's cells. In the second all share one buffer, where `llama_memory_seq_cp` lets any
number of sequences use the cells of one prefix; prefixes stay there until others are asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import llama_cpp as llama  # type: ignore[import-not-found,unused-ignore]
import numpy as np

from benchmarks.peers.line import Settings, Tokens, main

BATCH_TOKENS = 8192
STREAM_TOKENS = 1024  # room of a sequence that shares nothing
KV_TYPES = {"f16": 1, "bf16": 30}  # ggml_type


@dataclass(frozen=True)
class Row:
    """One token to compute: of which sequence, where, and whether its logits are wanted."""

    token: int
    position: int
    sequence: int
    wanted: bool


@dataclass
class Context:
    """One llama context and the batch that feeds it. Mutated only by LlamaCpp."""

    handle: Any
    vocab_size: int
    batch: Any = field(default_factory=lambda: llama.llama_batch_init(BATCH_TOKENS, 0, 1))

    @property
    def memory(self) -> Any:
        return llama.llama_get_memory(self.handle)

    def compute(self, rows: Sequence[Row]) -> Tokens:
        """Put the rows through the model; the most probable next token after each wanted one, in order."""
        found: Tokens = []
        for begin in range(0, len(rows), BATCH_TOKENS):
            part = rows[begin : begin + BATCH_TOKENS]
            self._fill(part)
            status = llama.llama_decode(self.handle, self.batch)
            if status:
                raise RuntimeError(f"llama_decode failed with status {status}")
            found += self._best(sum(row.wanted for row in part))
        return found

    def _fill(self, rows: Sequence[Row]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, row in enumerate(rows):
            batch.token[index] = row.token
            batch.pos[index] = row.position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row.sequence
            batch.logits[index] = row.wanted

    def _best(self, num: int) -> Tokens:
        if not num:
            return []
        logits = np.ctypeslib.as_array(llama.llama_get_logits(self.handle), shape=(num, self.vocab_size))
        return [int(token) for token in logits.argmax(axis=1)]


class LlamaCpp:
    """The engine. Sequences [0, max_batch) are prompts, those from max_batch on are prefixes."""

    def __init__(self, settings: Settings) -> None:
        llama.llama_backend_init()
        llama.llama_log_set(_SILENT, ctypes.c_void_p(0))
        parameters = llama.llama_model_default_params()
        self._settings = settings
        self._model = llama.llama_model_load_from_file(str(settings.model).encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {settings.model}")
        self._streams = self._context(settings.max_batch * STREAM_TOKENS, settings.max_batch, unified=False)
        self._unified = self._context(settings.kv_tokens, 2 * settings.max_batch, unified=True)
        self._prefixes: list[Tokens] = []

    def facts(self) -> Mapping[str, object]:
        system = llama.llama_print_system_info().decode()
        return {"llama-cpp-python": version("llama-cpp-python"), "system": system, **self._settings.options}

    def warm(self, prefixes: Sequence[Tokens]) -> None:
        prefixes = list(prefixes)
        if prefixes == self._prefixes:
            return
        llama.llama_memory_clear(self._unified.memory, False)
        self._prefixes = []
        for prefix in prefixes:
            sequence = self._settings.max_batch + len(self._prefixes)
            shared = self._copy_longest(prefix, sequence)
            last = len(prefix) - 1
            self._unified.compute(
                [Row(prefix[at], at, sequence, at == last) for at in range(min(shared, last), len(prefix))]
            )
            self._prefixes.append(prefix)

    def run(self, prompts: Sequence[Tokens], max_tokens: int) -> list[Tokens]:
        if any(_common(prompt, prefix) for prompt in prompts for prefix in self._prefixes):
            begins = [self._copy_longest(prompt, sequence) for sequence, prompt in enumerate(prompts)]
            context = self._unified
        else:
            begins, context = [0] * len(prompts), self._streams
        try:
            return list(map(list, zip(*_steps(context, prompts, begins, max_tokens), strict=True)))
        finally:
            for sequence in range(len(prompts)):
                llama.llama_memory_seq_rm(context.memory, sequence, -1, -1)

    def _copy_longest(self, tokens: Tokens, sequence: int) -> int:
        """Let the sequence use the cells of the longest prefix that it begins with; how many those are."""
        shared, best = max(
            ((_common(tokens, prefix), index) for index, prefix in enumerate(self._prefixes)), default=(0, 0)
        )
        if shared:
            source = self._settings.max_batch + best
            llama.llama_memory_seq_cp(self._unified.memory, source, sequence, 0, shared)
        return shared

    def _context(self, num_tokens: int, num_sequences: int, *, unified: bool) -> Context:
        settings, parameters = self._settings, llama.llama_context_default_params()
        parameters.n_ctx = num_tokens
        parameters.n_batch = BATCH_TOKENS
        parameters.n_ubatch = settings.options["ubatch_tokens"]
        parameters.n_seq_max = num_sequences
        parameters.n_threads = parameters.n_threads_batch = settings.threads
        parameters.kv_unified = unified
        parameters.flash_attn_type = int(settings.options["flash_attention"])
        parameters.type_k = parameters.type_v = KV_TYPES[settings.options["kv_type"]]
        parameters.offload_kqv = parameters.op_offload = False
        handle = llama.llama_init_from_model(self._model, parameters)
        if not handle:
            raise RuntimeError(f"llama.cpp could not make a context of {num_tokens} tokens")
        return Context(handle, llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model)))


def _steps(context: Context, prompts: Sequence[Tokens], begins: Sequence[int], max_tokens: int) -> Iterator[Tokens]:
    """The next token of every prompt, `max_tokens` times."""
    rows = [
        Row(prompt[at], at, sequence, at == len(prompt) - 1)
        for sequence, (prompt, begin) in enumerate(zip(prompts, begins, strict=True))
        for at in range(begin, len(prompt))
    ]
    for step in range(max_tokens):
        tokens = context.compute(rows)
        yield tokens
        rows = [Row(token, len(prompts[sequence]) + step, sequence, True) for sequence, token in enumerate(tokens)]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with, short of all of the first: its last one must be computed."""
    limit = min(len(one) - 1, len(other))
    if list(one[:limit]) == list(other[:limit]):
        return limit
    return next(index for index in range(limit) if one[index] != other[index])


@llama.llama_log_callback  # type: ignore[untyped-decorator,unused-ignore]
def _SILENT(level: int, text: bytes, data: Any) -> None:  # noqa: N802 - a constant to the reader
    """llama.cpp tells of every context and graph; errors come back as status."""


if __name__ == "__main__":
    main(LlamaCpp)
