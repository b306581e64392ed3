"""The sampled walk over chains: exactly what the target says without drafts, by enumeration of all it may say."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm.triton_utils import HAS_TRITON
from vllm.utils import cpu_triton_utils
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from protos.messages import Sampling
from workers.engine.vllm.walk import Place, Walk
from workers.model.sampler import Row, probabilities, sample

VOCAB_SIZE = 5
Chains = list[list[int]]
chains = st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=4), min_size=1, max_size=4)


def metadata_of(drafts: Chains) -> SpecDecodeMetadata:
    """As vLLM's model runner makes it."""
    counts = np.array([len(chain) for chain in drafts])
    ends = np.cumsum(counts + 1)
    rows = [range(end - count - 1, end) for end, count in zip(ends, counts, strict=True)]
    return SpecDecodeMetadata(
        draft_token_ids=torch.tensor([token for chain in drafts for token in chain], dtype=torch.int32),
        num_draft_tokens=counts.tolist(),
        cu_num_draft_tokens=torch.from_numpy(np.cumsum(counts)).int(),
        cu_num_sampled_tokens=torch.from_numpy(ends).int(),
        target_logits_indices=torch.tensor([row for own in rows for row in own[:-1]], dtype=torch.int32),
        bonus_logits_indices=torch.from_numpy(ends - 1).int(),
        logits_indices=torch.arange(int(ends[-1])),
    )


def sampling_metadata(
    num_requests: int, *, temperature: float = 0.0, num_logprobs: int | None = None
) -> SamplingMetadata:
    nothing = torch.zeros(num_requests)
    return SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=num_logprobs,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=nothing,
        presence_penalties=nothing,
        repetition_penalties=nothing,
        output_token_ids=[[] for _ in range(num_requests)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
        spec_token_ids=[[] for _ in range(num_requests)],
    )


def greedily(logits: Tensor, places: Sequence[Place]) -> list[int]:
    assert len(logits) == len(places)
    return logits.argmax(dim=-1).tolist()


def walked(drafts: Chains, choose: Callable[[Tensor, Sequence[Place]], list[int]], logits: Tensor) -> list[list[int]]:
    """What vLLM takes from the walk's answer; the same whether rows are chosen one depth at a time or at once."""
    walk, metadata = Walk(choose), metadata_of(drafts)
    output = walk(metadata, None, logits, sampling_metadata(len(drafts)))
    assert output.sampled_token_ids.shape == (len(drafts), metadata.max_spec_len + 1)
    assert output.sampled_token_ids.dtype == torch.int32
    found, _ = RejectionSampler.parse_output(output.sampled_token_ids, logits.shape[1])
    assert found == walk._at_once([tuple(chain) for chain in drafts], logits)
    return found


def said(drafts: Chains, chosen: Callable[[int, tuple[int, ...]], int]) -> list[list[int]]:
    """What a target says that is asked for one token after the other, as far as drafts tell what comes before."""
    outputs = []
    for at, chain in enumerate(drafts):
        tokens: list[int] = []
        while len(tokens) <= len(chain) and tokens == chain[: len(tokens)]:
            tokens.append(chosen(at, tuple(tokens)))
        outputs.append(tokens)
    return outputs


@given(chains, st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_a_walk_says_what_the_target_says(drafts: Chains, seed: int) -> None:
    logits = torch.randn(sum(len(chain) + 1 for chain in drafts), VOCAB_SIZE, generator=torch.manual_seed(seed))
    first = np.cumsum([0, *[len(chain) + 1 for chain in drafts]])
    before = logits.clone()
    expected = said(drafts, lambda at, tokens: int(logits[first[at] + len(tokens)].argmax()))
    assert walked(drafts, greedily, logits) == expected
    assert torch.equal(logits, before)


@given(chains)
@settings(deadline=None)
def test_only_rows_that_count_are_chosen_each_after_its_own_drafts(drafts: Chains) -> None:
    """Each row of these logits says which row it is."""
    places = [(at, tuple(chain[:depth])) for at, chain in enumerate(drafts) for depth in range(len(chain) + 1)]
    logits = torch.arange(len(places))[:, None].expand(-1, VOCAB_SIZE).float()
    asked: list[Place] = []

    def choose(rows: Tensor, wanted: Sequence[Place]) -> list[int]:
        assert [places[int(row[0])] for row in rows] == list(wanted)
        asked.extend(wanted)
        return [(sum(before) + at) % VOCAB_SIZE for at, before in wanted]

    output = Walk(choose)(metadata_of(drafts), None, logits, sampling_metadata(len(drafts)))
    found, _ = RejectionSampler.parse_output(output.sampled_token_ids, VOCAB_SIZE)
    assert found == said(drafts, lambda at, tokens: (sum(tokens) + at) % VOCAB_SIZE)
    assert sorted(asked) == sorted(
        (at, tuple(tokens[:depth])) for at, tokens in enumerate(found) for depth in range(len(tokens))
    )


@pytest.mark.parametrize("drafted", list(itertools.product(range(3), repeat=2)))
def test_the_law_of_a_walk_is_that_of_the_target(drafted: tuple[int, int]) -> None:
    """Every choice of every row, weighed by its probability: after each prefix, the target's own distribution."""
    rows = torch.randn(3, 3, generator=torch.manual_seed(7)).double().softmax(dim=-1)
    law: Counter[tuple[int, ...]] = Counter()
    for choice in itertools.product(range(3), repeat=3):
        weight = float(np.prod([rows[depth, token] for depth, token in enumerate(choice)]))
        [tokens] = walked([list(drafted)], lambda _, wanted, c=choice: [c[len(drafts)] for _, drafts in wanted], rows)
        law[tuple(tokens)] += weight  # type: ignore[assignment]
    assert sum(law.values()) == pytest.approx(1.0)
    for tokens, weight in law.items():
        assert tokens[:-1] == drafted[: len(tokens) - 1]
        assert weight == pytest.approx(float(np.prod([rows[depth, token] for depth, token in enumerate(tokens)])))


@given(chains, st.integers(0, 3), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_logprobs_are_those_of_each_token_alone(drafts: Chains, num_logprobs: int, seed: int) -> None:
    logits = torch.randn(sum(len(chain) + 1 for chain in drafts), VOCAB_SIZE, generator=torch.manual_seed(seed))
    metadata = metadata_of(drafts)
    output = Walk(greedily)(metadata, None, logits, sampling_metadata(len(drafts), num_logprobs=num_logprobs))
    found, told = RejectionSampler.parse_output(
        output.sampled_token_ids, VOCAB_SIZE, logprobs_tensors=output.logprobs_tensors
    )
    assert told is not None
    first = np.cumsum([0, *[len(chain) + 1 for chain in drafts]])
    rows = [int(first[at]) + depth for at, tokens in enumerate(found) for depth in range(len(tokens))]
    flat = torch.tensor([token for tokens in found for token in tokens])
    expected = Sampler.gather_logprobs(Sampler.compute_logprobs(logits[rows]), num_logprobs, flat).tolists()
    assert told.logprob_token_ids.tolist() == expected.logprob_token_ids.tolist()
    assert np.allclose(told.logprobs, expected.logprobs, atol=1e-6)
    assert told.sampled_token_ranks.tolist() == expected.sampled_token_ranks.tolist()
    assert told.cu_num_generated_tokens == np.cumsum([0, *[len(tokens) for tokens in found]]).tolist()


# Sampled drafts on a CPU

NUM_SEEDS = 4000
LIMIT = 30.0  # of chi-square with 4 degrees of freedom: beyond it once in 200,000 times
TEMPERATURE = 0.5
LOGITS = torch.tensor([[1.0, 0.5, 0.0, -0.5, -1.0]]).repeat(2, 1)
DRAFTED = 1


def chi_square(first: Sequence[int], expected: Tensor) -> float:
    counts = torch.bincount(torch.tensor(first), minlength=VOCAB_SIZE).double()
    return float(((counts - len(first) * expected) ** 2 / (len(first) * expected)).sum())


def target_law() -> Tensor:
    return probabilities(LOGITS[:1], [Row(Sampling(0, 1, temperature=TEMPERATURE), 0, [1], 1)])[0]


def test_the_first_token_of_a_sampled_walk_is_drawn_from_the_target() -> None:
    """By the sampler's own draws, over seeds."""
    drafts = [[DRAFTED]] * NUM_SEEDS

    def choose(logits: Tensor, places: Sequence[Place]) -> list[int]:
        rows = [Row(Sampling(at, 1, temperature=TEMPERATURE), 0, [1, *before], 1) for at, before in places]
        return sample(logits, list(rows))

    found = walked(drafts, choose, LOGITS.repeat(NUM_SEEDS, 1))
    assert {len(tokens) for tokens in found} == {1, 2}
    assert all(len(tokens) == 2 for tokens in found if tokens[0] == DRAFTED)
    assert chi_square([tokens[0] for tokens in found], target_law()) < LIMIT
    assert chi_square([tokens[1] for tokens in found if len(tokens) == 2], target_law()) < LIMIT


@pytest.mark.skipif(HAS_TRITON, reason="its own kernels are used then")
def test_vllm_itself_gives_rows_no_temperatures_on_a_cpu() -> None:
    """Why there is a walk: it writes them to a copy. When this fails, vLLM has mended it."""
    temperatures, ends, rows = torch.full((4,), 7.0), torch.tensor([2, 4, 6, 8], dtype=torch.int32), torch.zeros(8)
    cpu_triton_utils._expand_kernel_impl(rows, temperatures, ends, 0, 0)
    assert rows.tolist() == [0.0] * 8
