"""What the machine could do at best, and how near a measured decoding step comes to it.

For one step of a batch of B sequences, with P parameters in layers and head, K tokens whose keys and values are read
(each shared prefix once; of each sequence's own part what it has half way through the output), k bytes a token:

    bytes = 2 P + K k                                   bf16 weights, each read once
    FLOPs = 2 B P + 4 L H d (B x prefix + own tokens)   products, then QK and PV of L layers with H heads of size d
    share of bandwidth = bytes / bandwidth / step time; share of matrix rate = FLOPs / rate / step time

and the share of the floor is the larger one: 100 % would be a step that does nothing but read, or nothing but multiply.
Bandwidth is that of a buffer of the nearest size: what fits a cache in part is read faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.peers.models import Shape
from benchmarks.peers.workloads import Work

READ_BYTES = (20_000_000, 50_000_000, 400_000_000)
MATRIX_SIZES = (1024, 2048)
REPEATS = 15
GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True, slots=True)
class Floor:
    """Measured rates of this machine, all its cores together."""

    reads: Mapping[int, float]  # size of a buffer that is read again and again, bytes: bytes per second
    flops_per_s: float  # bf16 products, the better of two sizes

    def bandwidth(self, num_bytes: float) -> float:
        """Bytes per second when this many are read in a turn: those of the buffer nearest in ratio."""
        nearest = min(self.reads, key=lambda size: max(size / num_bytes, num_bytes / size))
        return self.reads[nearest]

    def facts(self) -> Mapping[str, object]:
        """For people."""
        return {
            **{f"GB/s at {size // 10**6} MB": round(rate / GIGA, 1) for size, rate in self.reads.items()},
            "bf16 TFLOP/s": round(self.flops_per_s / TERA, 2),
        }


@dataclass(frozen=True, slots=True)
class StepCost:
    """What one decoding step must read and multiply."""

    num_bytes: float
    flops: float

    def shares(self, floor: Floor, step_s: float) -> Mapping[str, float]:
        """Percent of the measured step that the floor would take."""
        bandwidth = 100 * self.num_bytes / floor.bandwidth(self.num_bytes) / step_s
        matrix = 100 * self.flops / floor.flops_per_s / step_s
        return {
            "floor_bandwidth_percent": bandwidth,
            "floor_matrix_percent": matrix,
            "floor_percent": max(bandwidth, matrix),
        }


def step_cost(shape: Shape, work: Work, own_tokens: int) -> StepCost:
    """The mean step of a batch whose prompts' own parts have `own_tokens` together."""
    parameters = shape.layer_parameters + shape.head_parameters
    own = own_tokens + work.batch * work.max_tokens / 2
    num_bytes = 2 * parameters + (work.distinct_prefix_tokens + own) * shape.kv_bytes_per_token
    attended = work.batch * work.prefix_tokens + own
    attention = 4 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * attended
    return StepCost(num_bytes, 2 * work.batch * parameters + attention)


def measure_floor(threads: int) -> Floor:
    """Measure the machine. Takes seconds, with all the cores; nothing else should run."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return Floor({size: _read_rate(size) for size in READ_BYTES}, max(map(_matrix_rate, MATRIX_SIZES)))
    finally:
        torch.set_num_threads(before)


def _read_rate(num_bytes: int) -> float:
    """Bytes per second of a reduction over a buffer, which reads it and writes nothing."""
    import torch

    buffer = torch.ones(num_bytes // 4, dtype=torch.float32)
    return num_bytes / _fastest_s(buffer.sum)


def _matrix_rate(size: int) -> float:
    import torch

    left, right = (torch.randn(size, size).to(torch.bfloat16) for _ in range(2))
    out = torch.empty(size, size, dtype=torch.bfloat16)
    return 2 * size**3 / _fastest_s(lambda: torch.mm(left, right, out=out))


def _fastest_s(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        begin_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin_s)
    return min(times)
