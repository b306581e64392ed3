"""The threads of the kernels: any number of them, on cores that others use, and none left behind."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.workers.kernels.stream import Growth, Stream, kv_shape, logits_of, native_model, random_tokens
from tests.workers.model.tiny import CPU, VOCAB_SIZE, save_tiny
from workers.kernels.library import Library
from workers.model.decoder import Decoder
from workers.model.loader import load_decoder

pytestmark = pytest.mark.timeout(120)  # a thread that is waited for in vain ends the run

MIB = 1 << 20


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    directory = tmp_path_factory.mktemp("model")
    save_tiny(directory, "llama", num_hidden_layers=2)
    return load_decoder(directory, dtype=torch.float32, device=CPU)


def steps_of(seed: int, *, num_steps: int) -> list[Growth]:
    """Three prompts, then tokens one by one: steps of ten microseconds, so that helpers are often late."""
    tokens = [random_tokens(20 + num_steps, VOCAB_SIZE, seed=10 * seed + index) for index in range(3)]
    prompts = {str(index): each[:20] for index, each in enumerate(tokens)}
    return [prompts, *({str(i): each[20 + s : 21 + s] for i, each in enumerate(tokens)} for s in range(num_steps))]


def run(library: Library, decoder: Decoder, steps: list[Growth], *, threads: int) -> Tensor:
    kv = kv_shape(decoder, num_pages=64)
    logits = logits_of(native_model(library, decoder, kv, threads=threads), Stream(kv), steps)
    return torch.cat([logits[name] for name in sorted(logits)])


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def virtual_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmSize"))


@pytest.fixture
def busy_cores() -> Iterator[None]:
    """More processes that never rest than there are cores here: the system puts helpers aside all the time."""
    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    busy = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    try:
        for process in busy:
            assert process.stdout is not None
            process.stdout.readline()  # it has begun
        yield
    finally:
        for process in busy:
            process.kill()
            process.communicate()


def test_many_steps_on_any_number_of_threads(generic: Library, decoder: Decoder) -> None:
    steps = steps_of(1, num_steps=400)
    expected = run(generic, decoder, steps, threads=1)
    for threads in (2, 3, 5, 8):
        assert torch.equal(run(generic, decoder, steps, threads=threads), expected), threads


def test_cores_that_others_use(generic: Library, decoder: Decoder, busy_cores: None) -> None:
    steps = steps_of(2, num_steps=40)
    expected = run(generic, decoder, steps, threads=1)
    for threads in (2, 8):
        assert torch.equal(run(generic, decoder, steps, threads=threads), expected), threads


def test_helpers_that_sleep_wake_up(generic: Library, decoder: Decoder) -> None:
    """Pauses around the time after which a helper stops spinning: it may be falling asleep as the next step begins."""
    steps = steps_of(3, num_steps=60)
    expected = run(generic, decoder, steps, threads=1)
    kv = kv_shape(decoder, num_pages=64)
    model, stream = native_model(generic, decoder, kv, threads=3), Stream(kv)
    found: dict[str, list[Tensor]] = {}
    for index, growth in enumerate(steps):
        for name, logits in logits_of(model, stream, [growth]).items():
            found.setdefault(name, []).append(logits)
        time.sleep(index % 12 * 1e-4)
    assert torch.equal(torch.cat([torch.cat(found[name]) for name in sorted(found)]), expected)


def test_nothing_is_left_of_decoders(generic: Library, decoder: Decoder) -> None:
    kv = kv_shape(decoder, num_pages=4096)
    store_bytes = 4 * 2 * kv.num_layers * kv.num_pages * kv.page_size * kv.num_kv_heads * 32  # a head is padded to 32
    assert store_bytes > 64 * MIB

    def live(threads: int) -> int:
        model = native_model(generic, decoder, kv, threads=threads)
        model.forward(Stream(kv).batch({"only": [1, 2, 3]}), with_logits=True)
        return num_threads()

    live(8)  # what the system keeps for the next threads is there from now on
    gc.collect()
    threads_before, bytes_before = num_threads(), virtual_bytes()
    for index in range(24):
        assert live(1 + index % 8) == threads_before + index % 8
        assert num_threads() == threads_before
    assert virtual_bytes() < bytes_before + store_bytes


def test_decoders_that_never_computed_end_too(generic: Library, decoder: Decoder) -> None:
    before = num_threads()
    for _ in range(50):
        native_model(generic, decoder, kv_shape(decoder), threads=4)
    assert num_threads() == before


def test_two_decoders_at_once(generic: Library, decoder: Decoder) -> None:
    steps = [steps_of(seed, num_steps=150) for seed in (4, 5)]
    expected = [run(generic, decoder, each, threads=1) for each in steps]
    found: dict[int, Tensor] = {}

    def work(index: int) -> None:
        found[index] = run(generic, decoder, steps[index], threads=3)

    both = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
