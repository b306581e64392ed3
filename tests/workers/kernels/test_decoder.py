"""The native decoder against the torch one, on tiny models of every family and odd shape, in every variant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protos.messages import Request, Sampling
from tests.workers.kernels.stream import (
    Growth,
    Stream,
    kv_shape,
    logits_of,
    native_model,
    random_tokens,
    torch_model,
)
from tests.workers.model.tiny import CPU, VOCAB_SIZE, save_tiny
from workers.attention.cost import DEFAULT_COST, Corrected
from workers.attention.planner import Planner, SharingMode
from workers.attention.protocol import Segment, SegmentKind, StepBatch
from workers.kernels.library import Library
from workers.kv.cache import KVCache
from workers.model.batch import BatchBuilder
from workers.model.decoder import Decoder
from workers.model.layers import Linear
from workers.model.loader import load_decoder
from workers.scheduler.scheduler import Limits, Scheduler
from workers.scheduler.step import ChunkResults

# Relative to the largest logit. Both sides round to 24 bits; their sums have up to 400 terms, three layers deep.
FP32_TOLERANCE = 1e-4

# The native path is never less exact than the torch path on the same weights. Both round weights, keys, values and the
# products' inputs to bfloat16; the native one keeps what lies between in float32. (Measured: 0.56 to 0.68 of the mean
# error over these models.)
BF16_RATIO = 1.0

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-layer": ("llama", {"num_hidden_layers": 1}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "mistral-window-of-pages": ("mistral", {"sliding_window": 70}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-bias-tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "head-dim-80": ("llama", {"head_dim": 80, "num_attention_heads": 2}),
    "head-dim-96": ("qwen3", {"head_dim": 96, "num_attention_heads": 2}),
    "head-dim-128-group-4": ("llama", {"head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 1}),
    "group-1": ("qwen2", {"num_attention_heads": 3, "num_key_value_heads": 3}),
    "group-2": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "group-8-one-kv-head": ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "odd-sizes": ("llama", {"hidden_size": 54, "intermediate_size": 77, "vocab_size": 101, "mlp_bias": True}),
    "one-column-too-many": ("qwen2", {"hidden_size": 65, "intermediate_size": 33, "vocab_size": 97}),
    "wide": ("llama", {"hidden_size": 168, "intermediate_size": 400, "vocab_size": 700}),
}

CASES = [
    *((name, 32) for name in MODELS),
    *((name, 64) for name in ("llama", "mistral-window-of-pages", "head-dim-80", "odd-sizes")),
]

Load = Callable[[str, torch.dtype], Decoder]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A model of MODELS whose weights are bfloat16 numbers, so that they are the same in either type."""
    directories: dict[str, Path] = {}

    def loaded(name: str, dtype: torch.dtype) -> Decoder:
        if name not in directories:
            family, changes = MODELS[name]
            directories[name] = tmp_path_factory.mktemp(name)
            save_tiny(directories[name], family, **changes).bfloat16().save_pretrained(directories[name])
        return load_decoder(directories[name], dtype=dtype, device=CPU)

    return loaded


def script(vocab_size: int) -> list[Growth]:
    """Prompts packed in one stream, then chunks beside tokens one by one, then tokens alone."""
    a, b, c, d = (random_tokens(120, vocab_size, seed=seed) for seed in range(4))
    steps: list[dict[str, list[int]]] = [
        {"a": a[:1], "b": b[:37], "c": c[:70], "d": d[:2]},
        {"a": a[1:60], "b": b[37:38], "c": c[70:71], "d": d[2:14]},
        {"b": b[38:39], "a": a[60:109], "c": c[71:72]},
        {"c": c[72:73], "d": d[14:31]},
    ]
    steps += [{"a": a[109 + i : 110 + i], "c": c[73 + i : 74 + i], "b": b[39 + i : 40 + i]} for i in range(4)]
    return [*steps, {"d": d[31:32]}]


def exact(load: Load, name: str) -> tuple[list[Growth], Tensor]:
    decoder = load(name, torch.float32)
    steps = script(decoder.config.vocab_size)
    kv = kv_shape(decoder)
    return steps, together(logits_of(torch_model(decoder, kv), Stream(kv), steps))


def together(logits: dict[str, Tensor]) -> Tensor:
    return torch.cat([logits[name] for name in sorted(logits)])


@pytest.mark.parametrize(("name", "page_size"), CASES)
def test_float32(library: Library, load: Load, name: str, page_size: int) -> None:
    steps, expected = exact(load, name)
    decoder = load(name, torch.float32)
    kv = kv_shape(decoder, page_size=page_size)
    actual = together(logits_of(native_model(library, decoder, kv, threads=2), Stream(kv, seed=1), steps))
    assert expected.std() > 0.5, "a model this flat would hide mistakes"
    assert (actual - expected).abs().max() <= FP32_TOLERANCE * expected.abs().max()
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(("name", "page_size"), CASES)
def test_bfloat16(library: Library, load: Load, name: str, page_size: int) -> None:
    steps, expected = exact(load, name)
    decoder = load(name, torch.bfloat16)
    kv = kv_shape(decoder, page_size=page_size)
    plain = together(logits_of(torch_model(decoder, kv), Stream(kv), steps))
    actual = together(logits_of(native_model(library, decoder, kv, threads=2), Stream(kv, seed=1), steps))
    assert (actual - expected).abs().mean() <= BF16_RATIO * (plain - expected).abs().mean()


@dataclass
class Prompt:
    """A prompt of the small Llama, as a batch that may be run with any logit rows."""

    library: Library
    decoder: Decoder
    num_tokens: int = 40

    def scores(
        self, rows: Sequence[int], *, with_logits: bool = True, threads: int = 2
    ) -> tuple[Tensor, Tensor | None]:
        kv = kv_shape(self.decoder)
        tokens = random_tokens(self.num_tokens, self.decoder.config.vocab_size)
        model = native_model(self.library, self.decoder, kv, threads=threads)
        scores = model.forward(Stream(kv).batch({"only": tokens}, rows), with_logits=with_logits)
        return torch.tensor(scores.greedy, dtype=torch.int64), scores.logits

    def logits(self, rows: Sequence[int]) -> Tensor:
        logits = self.scores(rows)[1]
        assert logits is not None
        return logits


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def prompt(request: pytest.FixtureRequest, library: Library, load: Load) -> Prompt:
    return Prompt(library, load("odd-sizes", request.param))


def test_logit_rows_come_in_the_order_asked_for(prompt: Prompt) -> None:
    every = prompt.logits(range(40))
    for rows in ([39], [3, 2, 39, 0], [7, 7, 1], list(range(39, -1, -1))):
        assert torch.equal(prompt.logits(rows), every[rows])


def test_more_logit_rows_than_rows(prompt: Prompt) -> None:
    every = prompt.logits(range(40))
    rows = [index % 40 for index in range(4000)]
    assert torch.equal(prompt.logits(rows), every[rows])


def test_no_logit_rows(prompt: Prompt) -> None:
    greedy, logits = prompt.scores([])
    assert greedy.shape == (0,)
    assert logits is not None
    assert logits.shape == (0, 101)


def test_a_step_without_rows(prompt: Prompt) -> None:
    prompt.num_tokens = 0
    greedy, logits = prompt.scores([])
    assert greedy.shape == (0,)
    assert logits is not None
    assert logits.shape == (0, 101)


def test_keys_are_stored_by_a_step_that_wants_no_logits(generic: Library, load: Load) -> None:
    decoder = load("llama", torch.float32)
    kv = kv_shape(decoder)
    tokens = random_tokens(50, VOCAB_SIZE)
    whole = logits_of(native_model(generic, decoder, kv), Stream(kv), [{"only": tokens}])["only"]
    model, stream = native_model(generic, decoder, kv), Stream(kv)
    model.forward(stream.batch({"only": tokens[:49]}, []), with_logits=False)
    assert torch.equal(logits_of(model, stream, [{"only": tokens[49:]}])["only"], whole[49:])


def test_greedy_is_the_argmax_with_and_without_logits(prompt: Prompt) -> None:
    greedy, logits = prompt.scores(range(40))
    assert logits is not None
    assert torch.equal(greedy, logits.argmax(-1))
    assert len(set(greedy.tolist())) > 5
    alone, nothing = prompt.scores(range(40), with_logits=False)
    assert nothing is None
    assert torch.equal(alone, greedy)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_of_equal_logits_is_greedy(library: Library, load: Load, threads: int) -> None:
    """The vocabulary twice, three times: the same logits again, one panel, several panels and many units later."""
    decoder = load("wide", torch.float32)
    once = Prompt(library, decoder).scores(range(40))[0]
    for copies in (2, 3):
        config = replace(decoder.config, vocab_size=700 * copies)
        repeated = replace(
            decoder,
            config=config,
            embedding=decoder.embedding.repeat(copies, 1),
            head=Linear(decoder.head.weight.repeat(copies, 1)),
        )
        tokens = random_tokens(40, 700)
        kv = kv_shape(decoder)
        model = native_model(library, repeated, kv, threads=threads)
        scores = model.forward(Stream(kv).batch({"only": tokens}), with_logits=True)
        assert scores.logits is not None
        assert torch.equal(scores.logits[:, :700], scores.logits[:, -700:])
        assert scores.greedy == once.tolist()


def test_equal_logits_everywhere_give_the_first_token(library: Library, load: Load) -> None:
    decoder = load("odd-sizes", torch.float32)
    flat = replace(decoder, head=Linear(torch.zeros_like(decoder.head.weight)))
    assert Prompt(library, flat).scores(range(40))[0].tolist() == [0] * 40


def test_the_heads_bias_counts(generic: Library, load: Load) -> None:
    decoder = load("odd-sizes", torch.float32)
    bias = torch.linspace(-3, 3, 101)
    plain = Prompt(generic, decoder).logits(range(40))
    biased = Prompt(generic, replace(decoder, head=Linear(decoder.head.weight, bias))).logits(range(40))
    torch.testing.assert_close(biased, plain + bias)


KINDS: list[tuple[SegmentKind, tuple[int, ...]]] = [("full", ()), ("tree", (1, 3, 5, 11))]


@pytest.mark.parametrize(("kind", "mask"), KINDS, ids=["full", "tree"])
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_shared_prefixes_and_draft_trees(
    library: Library, load: Load, name: str, kind: SegmentKind, mask: tuple[int, ...]
) -> None:
    """Rows that attend to a prefix together, each group of them with what is its own."""
    decoder = load(name, torch.float32)
    kv = kv_shape(decoder)
    prefix, own = random_tokens(64, VOCAB_SIZE), random_tokens(8, VOCAB_SIZE, seed=1)
    rows = range(64, 72)
    drafts = [64, 65, 65, 66] if kind == "tree" else list(range(64, 68))
    segments = (
        Segment(0, 64, (5, 2), 0, 64),
        Segment(64, 8, (5, 2), 0, 64, "full"),
        Segment(64, 4, (5, 2, 7), 64, 4),
        Segment(68, 4, (5, 2, 9), 64, 4, "tree", mask) if kind == "tree" else Segment(68, 4, (5, 2, 9), 64, 4),
    )
    batch = StepBatch(
        torch.tensor([*prefix, *own]),
        torch.tensor([*range(64), *range(64, 68), *drafts]),
        torch.tensor([*range(160, 192), *range(64, 96), *range(224, 228), *range(288, 292)]),
        segments,
        torch.tensor(list(rows)),
    )
    expected = torch_model(decoder, kv).forward(batch, with_logits=True).logits
    actual = native_model(library, decoder, kv, threads=2).forward(batch, with_logits=True).logits
    assert expected is not None
    assert actual is not None
    assert (actual - expected).abs().max() <= FP32_TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_others_left_in_a_page_is_gone(library: Library, load: Load, dtype: torch.dtype) -> None:
    """A sequence of numbers that are none, and then others in its pages."""
    decoder = load("llama", dtype)
    embedding = decoder.embedding.clone()
    embedding[5] = torch.nan
    decoder = replace(decoder, embedding=embedding)
    kv = kv_shape(decoder, num_pages=4)
    tokens = [token for token in random_tokens(50, VOCAB_SIZE) if token != 5]
    fresh = logits_of(native_model(library, decoder, kv), Stream(kv), [{"it": tokens}])["it"]
    model = native_model(library, decoder, kv)
    assert logits_of(model, Stream(kv, seed=1), [{"bad": [5] * 128}])["bad"].isnan().all()
    assert torch.equal(logits_of(model, Stream(kv), [{"it": tokens}])["it"], fresh)
    assert fresh.isfinite().all()


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [("token_ids", VOCAB_SIZE, "token id"), ("positions", 10**6, "position"), ("slots", -1, "slot")],
)
def test_an_index_out_of_bounds_is_refused_and_costs_nothing(
    generic: Library, load: Load, field: str, value: int, complaint: str
) -> None:
    """A step that names what is not there raises; the next one is as if it had not been."""
    decoder = load("llama", torch.float32)
    kv = kv_shape(decoder)
    model, untouched = native_model(generic, decoder, kv), native_model(generic, decoder, kv)
    good, bad = (Stream(kv).batch({"a": [1, 2, 3]}) for _ in range(2))
    getattr(bad, field)[1] = value
    with pytest.raises(RuntimeError, match=f"{complaint} {value}"):
        model.forward(bad, with_logits=True)
    logits = [one.forward(good, with_logits=True).logits for one in (model, untouched)]
    assert logits[0] is not None
    assert logits[1] is not None
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("mode", ["never", "root"])
def test_a_batch_that_moves_on_is_computed_as_a_new_one(generic: Library, load: Load, mode: SharingMode) -> None:
    """Over the ends of pages, with one sequence that leaves on the way."""
    decoder = load("llama", torch.float32)

    def logits(*, goes_on: bool) -> list[Tensor]:
        kv = kv_shape(decoder)
        model = native_model(generic, decoder, kv)
        cache = KVCache(num_pages=kv.num_pages, page_size=kv.page_size)
        scheduler = Scheduler(Limits(512, 8, 8, 512), cache, frozenset())
        cost = Corrected(DEFAULT_COST)
        for index, num_tokens in enumerate((80, 45, 80)):
            prompt = random_tokens(70, VOCAB_SIZE)[:64] + random_tokens(20 + index, VOCAB_SIZE, seed=index)
            scheduler.add(Request(f"{index}", tuple(prompt), Sampling(seed=0, max_tokens=num_tokens)))
        found: list[Tensor] = []
        builder = None
        while scheduler.has_work:
            if builder is None or not goes_on:
                planner = Planner(cost, kv.page_size, mode=mode)
                builder = BatchBuilder(planner, cost, cache, page_size=kv.page_size, device=CPU)
            plan = scheduler.plan()
            scores = model.forward(builder.build(plan), with_logits=True)
            assert scores.logits is not None
            found.append(scores.logits)
            scheduler.commit(plan, ChunkResults.of_tokens(scores.greedy))
        return found

    moved, anew = logits(goes_on=True), logits(goes_on=False)
    assert all(torch.equal(*pair) for pair in zip(moved, anew, strict=True))
