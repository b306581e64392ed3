"""OpenVINO GenAI's continuous batching, bf16, with prefix caching.

Options: `batch_tokens` of one step, and `properties` of the CPU plug-in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version

import numpy as np
import openvino  # type: ignore[import-not-found,unused-ignore]
import openvino_genai as genai  # type: ignore[import-not-found,unused-ignore]

from benchmarks.peers.line import Settings, Tokens, main


class OpenVino:
    """The engine. Prefixes are found by its own cache."""

    def __init__(self, settings: Settings) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = settings.options["cache_gib"]
        scheduler.max_num_seqs = settings.max_batch
        scheduler.max_num_batched_tokens = settings.options["batch_tokens"]
        scheduler.enable_prefix_caching = True
        self._options = settings.options
        properties = {"INFERENCE_NUM_THREADS": settings.threads, **settings.options["properties"]}
        self._pipe = genai.ContinuousBatchingPipeline(str(settings.model), scheduler, "CPU", properties)

    def facts(self) -> Mapping[str, object]:
        return {"openvino-genai": version("openvino-genai"), **self._options}

    def warm(self, prefixes: Sequence[Tokens]) -> None:
        for prefix in prefixes:
            self.run([prefix], 1)

    def run(self, prompts: Sequence[Tokens], max_tokens: int) -> list[Tokens]:
        config = genai.GenerationConfig(max_new_tokens=max_tokens, ignore_eos=True, do_sample=False)
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        done = self._pipe.generate(inputs, [config] * len(prompts))
        return [list(result.m_generation_ids[0]) for result in done]


if __name__ == "__main__":
    main(OpenVino)
