"""transformers' `generate`: one batch padded on the left, SDPA, bf16.

Options: `most_cells`: rows x positions beyond which a batch is declined, because it would take minutes.

It has no prefix cache of its own; a user who shares a prefix computes its keys and values once and gives every row a
copy, which is done here. The padding then stands between prefix and suffix, and is masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.peers.line import Settings, Skip, Tokens, main

Layers = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values: [1, kv_heads, tokens, head_dim]


class Transformers:
    """The engine."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self._most_cells: int = settings.options["most_cells"]
        self._max_batch = settings.max_batch
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=torch.bfloat16, attn_implementation="sdpa", local_files_only=True
        ).eval()
        self._prefixes: list[tuple[Tokens, Layers]] = []

    def facts(self) -> Mapping[str, object]:
        return {"transformers": version("transformers"), "torch": version("torch"), "attention": "sdpa"}

    def warm(self, prefixes: Sequence[Tokens]) -> None:
        if [prefix for prefix, _ in self._prefixes] == list(prefixes):
            return
        self._decline_beyond(self._max_batch * max(map(len, prefixes), default=0))
        self._prefixes = [(prefix, self._computed(prefix)) for prefix in prefixes]

    def run(self, prompts: Sequence[Tokens], max_tokens: int) -> list[Tokens]:
        longest = max(map(len, prompts))
        self._decline_beyond(len(prompts) * longest)
        found = [self._prefix_of(prompt) for prompt in prompts]
        shared = len(found[0][0]) if found[0] else 0
        padded = [prompt[:shared] + [0] * (longest - len(prompt)) + prompt[shared:] for prompt in prompts]
        mask = [[1] * shared + [0] * (longest - len(prompt)) + [1] * (len(prompt) - shared) for prompt in prompts]
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=torch.tensor(padded),
                attention_mask=torch.tensor(mask),
                past_key_values=_stacked([layers for _, layers in found]) if shared else None,
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return [[int(token) for token in row] for row in out[:, longest:]]

    def _decline_beyond(self, num_cells: int) -> None:
        if num_cells > self._most_cells:
            raise Skip(f"skipped: {num_cells:,} keys in all rows, copied again at every step, would take minutes")

    def _prefix_of(self, prompt: Tokens) -> tuple[Tokens, Layers]:
        """The longest prefix that the prompt begins with; prompts of one run have equally long ones."""
        fitting = [entry for entry in self._prefixes if prompt[: len(entry[0])] == entry[0]]
        return max(fitting, key=lambda entry: len(entry[0]), default=([], []))

    def _computed(self, prefix: Tokens) -> Layers:
        with torch.inference_mode():
            cache = self._model(torch.tensor([prefix]), use_cache=True, logits_to_keep=1).past_key_values
        return [(layer.keys, layer.values) for layer in cache.layers]


def _stacked(rows: Sequence[Layers]) -> DynamicCache:
    """One cache with a row for each."""
    layers = zip(*rows, strict=True)
    stacked = [(torch.cat([keys for keys, _ in layer]), torch.cat([values for _, values in layer])) for layer in layers]
    return DynamicCache(stacked)


if __name__ == "__main__":
    main(Transformers)
