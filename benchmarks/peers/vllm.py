"""vLLM's CPU build, offline, with prefix caching.

Options: any keyword of `vllm.LLM`, such as `enforce_eager`. What it needs in its environment variables is set by the
host, because the thread binding and the preloaded libraries must be there before Python starts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from vllm import LLM, SamplingParams, TokensPrompt  # type: ignore[import-not-found,unused-ignore]

from benchmarks.peers.line import Settings, Tokens, main

TOLD = ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE", "VLLM_ENABLE_V1_MULTIPROCESSING", "LD_PRELOAD")


class Vllm:
    """The engine. Prefixes are found by its own cache."""

    def __init__(self, settings: Settings) -> None:
        self._options = settings.options
        self._llm = LLM(
            str(settings.model),
            dtype="bfloat16",
            max_model_len=settings.max_context,
            max_num_seqs=settings.max_batch,
            enable_prefix_caching=True,
            disable_log_stats=True,
            skip_tokenizer_init=True,
            **settings.options,
        )

    def facts(self) -> Mapping[str, object]:
        told = {name: os.environ.get(name, "") for name in TOLD}
        versions = {"vllm-cpu": version("vllm-cpu"), "torch": version("torch")}
        return {**versions, "tcmalloc": "tcmalloc" in told["LD_PRELOAD"], **self._options, **told}

    def warm(self, prefixes: Sequence[Tokens]) -> None:
        for prefix in prefixes:
            self.run([prefix], 1)

    def run(self, prompts: Sequence[Tokens], max_tokens: int) -> list[Tokens]:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        asked = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        return [list(done.outputs[0].token_ids) for done in self._llm.generate(asked, sampling, use_tqdm=False)]


if __name__ == "__main__":
    main(Vllm)
