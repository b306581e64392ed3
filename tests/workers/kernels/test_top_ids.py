"""The most probable tokens that the native decoder names, against torch: of equals the first."""

from __future__ import annotations

from array import array

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.workers.kernels.stream import Stream, kv_shape, native_model, random_tokens, torch_model
from tests.workers.model.tiny import CPU, VOCAB_SIZE, save_tiny
from workers.kernels.library import Library
from workers.model.loader import load_decoder

SIZES = [1, 2, 7, 8, 63, 64, 65, 127, 129, 1000, 4096, 4133]


def top_ids(library: Library, logits: Tensor, count: int) -> list[list[int]]:
    """What the kernel finds of logits [rows, vocab]; nothing is written beyond."""
    num_rows, size = logits.shape
    ids = array("i", [-7] * (num_rows * count + 1))
    library.call("top_ids", logits.data_ptr(), num_rows, size, count, ids.buffer_info()[0])
    assert ids.pop() == -7
    flat = ids.tolist()
    return [flat[at : at + count] for at in range(0, len(flat), count)]


def expected(logits: Tensor, count: int) -> list[list[int]]:
    """A stable sort keeps the order of equals."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    return [row[:count] for row in order.tolist()]


@pytest.mark.parametrize("size", SIZES)
def test_the_largest_are_named_best_first(library: Library, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(5, size, generator=generator)
    for count in range(1, min(8, size) + 1):
        found = top_ids(library, logits, count)
        assert found == logits.topk(count).indices.tolist()
        assert found == expected(logits, count)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_values", [1, 2, 5])
def test_of_equals_the_first_are_named(library: Library, size: int, num_values: int) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randint(num_values, (6, size), generator=generator).float()
    for count in range(1, min(8, size) + 1):
        assert top_ids(library, logits, count) == expected(logits, count)


@pytest.mark.parametrize("size", [1, 2, 8, 63, 64, 65, 100])
def test_all_tokens_may_be_asked_for(library: Library, size: int) -> None:
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(size)).round(decimals=1)
    assert top_ids(library, logits, size) == expected(logits, size)


@pytest.mark.parametrize("order", [1, -1])
def test_ascending_and_descending_logits(library: Library, order: int) -> None:
    logits = order * torch.arange(200.0)[None]
    assert top_ids(library, logits, 8) == expected(logits, 8)


@pytest.mark.parametrize("num_finite", [0, 1, 3, 7, 8, 9])
def test_tokens_that_cannot_be_are_named_last_and_none_twice(generic: Library, num_finite: int) -> None:
    """Where fewer than are asked for have a probability at all, the first of the others follow."""
    for size in (8, 9, 64, 100, 130):
        generator = torch.Generator().manual_seed(num_finite)
        for _ in range(5):
            logits = torch.full((1, size), -torch.inf)
            places = torch.randperm(size, generator=generator)[:num_finite]
            logits[0, places] = torch.randn(len(places), generator=generator)
            for count in range(1, 9):
                [found] = top_ids(generic, logits, count)
                assert len(set(found)) == count
                assert found == expected(logits, count)[0]


@given(
    st.lists(st.sampled_from([-torch.inf, -1e30, -1.0, -0.5, 0.0, 0.5, 3.0, 1e30]), min_size=8, max_size=150),
    st.integers(1, 8),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_logits_a_stable_sort_agrees(generic: Library, values: list[float], count: int) -> None:
    logits = torch.tensor([values])
    [found], [wanted] = top_ids(generic, logits, count), expected(logits, count)
    num_finite = sum(value > -torch.inf for value in values)
    assert found[:num_finite] == wanted[:num_finite]


@pytest.mark.parametrize("with_logits", [True, False])
def test_the_native_decoder_names_what_the_torch_model_names(
    library: Library, tmp_path_factory: pytest.TempPathFactory, with_logits: bool
) -> None:
    directory = tmp_path_factory.mktemp("top")
    save_tiny(directory, "llama")
    decoder = load_decoder(directory, dtype=torch.float32, device=CPU)
    kv = kv_shape(decoder)
    growth = {"a": random_tokens(9, VOCAB_SIZE, seed=1), "b": random_tokens(3, VOCAB_SIZE, seed=2)}
    native, plain = native_model(library, decoder, kv), torch_model(decoder, kv)
    for count in (1, 5, 8, VOCAB_SIZE + 1):
        scores, wanted = (
            model.forward(Stream(kv).batch(growth), with_logits=with_logits, num_top_ids=count)
            for model in (native, plain)
        )
        assert scores.top_ids == wanted.top_ids
        assert scores.top_ids is not None
        assert [len(row) for row in scores.top_ids] == [min(count, VOCAB_SIZE)] * 12
        assert [row[0] for row in scores.top_ids] == scores.greedy
    assert native.forward(Stream(kv).batch(growth), with_logits=False).top_ids is None
