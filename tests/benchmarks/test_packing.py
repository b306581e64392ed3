"""The packing benchmark: what its arms send, and what the engine computes for them."""

import itertools
import random

from benchmarks.benchmark import Measured, Workload
from benchmarks.packing import DISTRIBUTIONS, PACKINGS, Bench, Lengths, Prompts, make_batches, make_prompts
from workers.config import WorkerConfig


def test_prompts_are_of_the_asked_lengths_and_begin_alike_nowhere() -> None:
    prompts = make_prompts(Prompts(Lengths(48, 0.9, 5, 200), 300), 4096, seed=1)
    sizes = sorted(map(len, prompts))
    assert sizes[0] >= 5
    assert sizes[-1] <= 200
    assert 35 < sizes[len(sizes) // 2] < 65
    assert len({tuple(prompt[:4]) for prompt in prompts}) == len(prompts)
    assert prompts != make_prompts(Prompts(Lengths(48, 0.9, 5, 200), 300), 4096, seed=2)


def test_short_ones_are_mixed_in() -> None:
    source = random.Random(3)
    drawn = [DISTRIBUTIONS["wikitext512-like"].draw(source) for _ in range(2000)]
    assert 0.3 < sum(size < 20 for size in drawn) / len(drawn) < 0.45


def test_batches_hold_every_prompt_once_and_pad_to_the_longest() -> None:
    prompts = make_prompts(Prompts(DISTRIBUTIONS["mmlu-like"], 150), 4096, seed=1)
    filler = itertools.count(10_000)
    for packing in PACKINGS:
        batches = make_batches(prompts, packing, lambda: next(filler))
        sent = [[token for token in prompt if token < 10_000] for batch in batches for prompt in batch]
        assert sorted(sent) == sorted(prompts)
        for batch in batches:
            assert packing == "packed" or len({len(prompt) for prompt in batch}) == 1


def test_packing_computes_what_is_needed_and_padding_more() -> None:
    config = WorkerConfig.model_validate(
        {"engine": {"kv": {"num_pages": 2048, "prefix_cache": False}, "scheduler": {"step_tokens": 512}}}
    )
    bench = Bench(config, threads=1)
    bench.setup()
    workload = Workload("short", Prompts(Lengths(20, 0.8, 3, 90), 80))
    found: dict[str, Measured] = {packing: bench.measure(packing, workload) for packing in PACKINGS}
    computed = {packing: measured.values["computed_per_needed"] for packing, measured in found.items()}
    assert computed["packed"] == 1.0
    assert 1.0 < computed["length-ordered"] < computed["padded"]
