"""The connector beside the model, without a model: what it copies, what it refuses, and what it tells of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from workers.engine.vllm.block_bytes import BlockBytes
from workers.engine.vllm.connector import Copies, HeadwaterConnector, describe
from workers.engine.vllm.handover import Handover, Outcome
from workers.engine.vllm.ledger import Copy

NUM_BLOCKS, HEADS, PAGE, CONTENT = 9, 2, 32, 8
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8]
ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)]  # of axes in memory


def cache(dtype: torch.dtype = torch.float32, order: tuple[int, ...] = (0, 1, 2, 3)) -> torch.Tensor:
    """Random bytes, as [blocks, heads, tokens, content]."""
    shape = NUM_BLOCKS, HEADS, PAGE, CONTENT
    stored = torch.randint(0, 256, (*(shape[axis] for axis in order[:3]), CONTENT * dtype.itemsize), dtype=torch.uint8)
    return stored.view(dtype).permute([order.index(axis) for axis in range(4)])


def equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_come_in_as_they_went_out(dtype: torch.dtype, order: tuple[int, ...]) -> None:
    theirs, ours = [cache(dtype, order) for _ in range(3)], [cache(dtype) for _ in range(3)]
    before = [layer.clone() for layer in ours]
    data = bytearray(3 * BlockBytes(theirs).page_bytes)
    BlockBytes(theirs).read([5, 1, 7], memoryview(data))
    BlockBytes(ours).write([2, 8, 0], memoryview(data))
    for layer, old, source in zip(ours, before, theirs, strict=True):
        assert equal(layer[[2, 8, 0]], source[[5, 1, 7]])
        assert equal(layer[[1, 3, 4, 5, 6, 7]], old[[1, 3, 4, 5, 6, 7]])


def test_pages_follow_each_other_whole() -> None:
    blocks = BlockBytes([cache(), cache(torch.bfloat16)])
    data = bytearray(2 * blocks.page_bytes)
    blocks.read([3, 4], memoryview(data))
    one = bytearray(blocks.page_bytes)
    blocks.read([4], memoryview(one))
    assert data[blocks.page_bytes :] == one


class Caches:
    """As vLLM describes them."""

    def __init__(self, spec: Any = None, *, num_groups: int = 1) -> None:
        plain = FullAttentionSpec(block_size=PAGE, num_kv_heads=HEADS, head_size=CONTENT // 2, dtype=torch.float32)
        group = SimpleNamespace(kv_cache_spec=spec or plain, layer_names=["0"])
        self.kv_cache_groups = [group] * num_groups
        self.num_blocks = NUM_BLOCKS


def vllm_config(world_size: int = 1, *, is_caching: bool = True) -> Any:
    layer = SimpleNamespace(get_attn_backend=lambda: Caches, isa="vec")
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(is_kv_producer=True),
        cache_config=SimpleNamespace(
            block_size=PAGE, enable_prefix_caching=is_caching, kv_cache_layout="LBHNC", cache_dtype="auto"
        ),
        parallel_config=SimpleNamespace(world_size=world_size),
        compilation_config=SimpleNamespace(static_forward_context={"0": layer}),
        model_config=SimpleNamespace(quantization=None, dtype=torch.float32),
    )


def connector(config: Any = None, caches: Any = None, **layers: torch.Tensor) -> HeadwaterConnector:
    one = HeadwaterConnector(config or vllm_config(), KVConnectorRole.WORKER, caches or Caches())
    one.register_kv_caches(layers or {"0": cache()})
    return one


def step(one: HeadwaterConnector, *copies: Copy) -> set[int]:
    """Blocks that could not be copied in."""
    one.bind_connector_metadata(Copies(copies))
    one.start_load_kv(None)
    one.wait_for_save()
    lost = one.get_block_ids_with_load_errors()
    one.clear_connector_metadata()
    return lost


def test_a_step_copies_in_and_out() -> None:
    layers = {name: cache() for name in "01"}
    source, target = connector(**layers), connector(**{name: torch.zeros_like(layers[name]) for name in "01"})
    size = BlockBytes(list(layers.values())).page_bytes
    with Handover(3 * size) as handover:
        assert step(source, Copy("export", handover.ticket, 0, (4, 6, 2))) == set()
        assert handover.outcome is Outcome.COPIED
        handover.outcome = Outcome.OPEN
        assert step(target, Copy("import", handover.ticket, 1, (7, 8))) == set()
        assert handover.outcome is Outcome.COPIED
        again = bytearray(2 * size)
        with handover.payload as payload:
            assert target._bytes is not None
            target._bytes.read([7, 8], memoryview(again))
            assert payload[size:] == again


def test_blocks_that_do_not_come_are_told() -> None:
    one = connector()
    size = BlockBytes([cache()]).page_bytes
    with Handover(2 * size) as handover:
        ticket = handover.ticket
        assert step(one, Copy("import", ticket, 1, (3, 4))) == {3, 4}, "it is too short"
        assert handover.outcome is Outcome.OPEN
    assert step(one, Copy("import", ticket, 0, (5, 6)), Copy("export", ticket, 0, (1, 2))) == {5, 6}, "it is gone"
    assert step(one) == set()


@pytest.mark.parametrize(
    ("config", "caches", "shape"),
    [
        (vllm_config(world_size=2), None, None),
        (vllm_config(is_caching=False), None, None),
        (None, Caches(num_groups=2), None),
        (
            None,
            Caches(
                SlidingWindowSpec(block_size=PAGE, num_kv_heads=2, head_size=4, dtype=torch.float32, sliding_window=64)
            ),
            None,
        ),
        (None, None, (2, NUM_BLOCKS, HEADS, PAGE, CONTENT)),
        (None, None, (NUM_BLOCKS + 1, HEADS, PAGE, CONTENT)),
    ],
    ids=["split", "no cache", "groups", "window", "other axes", "other blocks"],
)
def test_caches_that_cannot_be_copied_are_not(config: Any, caches: Any, shape: tuple[int, ...] | None) -> None:
    one = connector(config, caches, **({"0": torch.zeros(shape)} if shape else {}))
    assert one.describe() is None
    with Handover(4096) as handover:
        assert step(one, Copy("import", handover.ticket, 0, (1,)), Copy("export", handover.ticket, 0, (1,))) == {1}
        assert handover.outcome is Outcome.OPEN


def test_layouts_tell_all_that_pages_depend_on() -> None:
    def layout(config: Any, **layers: torch.Tensor) -> str:
        found = connector(config, **layers).describe()
        assert found is not None
        assert (found["page_size"], found["page_bytes"]) == (PAGE, sum(layer[0].nbytes for layer in layers.values()))
        return str(found["layout"])

    layers, other = {"0": cache()}, vllm_config()
    other.compilation_config.static_forward_context["0"].isa = "amx"
    quantized = vllm_config()
    quantized.model_config.quantization = "fp8"
    texts = [layout(config, **layers) for config in (vllm_config(), other, quantized)]
    texts.append(layout(vllm_config(), **layers, more=cache()))
    assert len(set(texts)) == len(texts)
    assert layout(vllm_config(), **layers) == texts[0]


def test_a_cache_that_layers_share_is_copied_once() -> None:
    layer = cache()
    found = connector(first=layer, second=layer[:]).describe()
    assert found is not None
    assert found["page_bytes"] == layer[0].nbytes


def test_without_vllm_around_there_is_nothing_to_describe() -> None:
    assert describe() is None
