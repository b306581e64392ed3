"""Predicted gains of speculation against measured ones, on this machine, with a target and a drafter that exist.

In every round, first the inputs of the prediction are measured, then gains at other numbers of sequences and rows:

    plain steps of n sequences        t(n) + n c        c: what a sequence costs besides its row
    drafted steps of two sequences    t(n) + 2 c + o    o: what speculation costs besides drafting and rows
    steps with and without the model  k d(b) + a fixed part, which is added to o

so c and o follow from two numbers of rows that occur in both, and t(n) from all. What drafting adds to steps is more
than it takes alone: each of the two models finds the caches full of the other.

Gains come from an oracle that knows the plain text and spoils it: right with probability alpha, token by token. No
step whose gain is predicted is among those of the inputs.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer

from benchmarks.drafting_rounds import Curve, Setting, StepTime, Way, expected_tokens, predict
from benchmarks.options import Options
from benchmarks.prompts import Code
from protos.messages import Request, Sampling
from workers.config import WorkerConfig
from workers.engine.factory import make_engine
from workers.engine.torch_engine import TorchEngine
from workers.speculative import draft_model
from workers.speculative.controller import Controller
from workers.speculative.draft_model import DraftModel
from workers.speculative.factory import THREADS, make_draft_model
from workers.speculative.protocol import Context, Key, Verified
from workers.speculative.speculator import Speculator
from workers.speculative.tree import DraftTree

SEQUENCES = (1, 4, 16)
ALPHAS = (0.0, 0.5, 0.8, 1.0)
DRAFTS = (2, 4, 8)
REMOTE_ALPHA = 0.8  # the only one measured with a round trip
ROUND_TRIP_S = 1e-3
PLAIN_ROWS = (1, 2, 8, 32)  # calibrated with one row of each sequence, …
CHAIN_SEQUENCES = 2
CHAIN_ROWS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)  # … and with all rows of two
CHAIN_ALPHA = 0.6  # steps that accept something take longer, as sequences fill their pages at different times
FEW_ROWS, MANY_ROWS = 8, 32  # in both
SHORT_DRAFT, LONG_DRAFT = 3, 10  # tokens, of the calibration of the draft model
PROMPT_TOKENS = 300
MAX_TOKENS = 200  # of an output while it is measured
WARM_STEPS = 3  # the prompts' and the first ones after it
CALIBRATION_STEPS = 32  # as many as fill a page
MEASURED_STEPS = 24
POINTS_BETWEEN = 3  # two plain windows: the machine's speed changes from second to second
GOLDEN = (math.sqrt(5) - 1) / 2


class Oracle:
    """A Drafter that is right as often as it is told to be, and takes as long as a draft model does.

    How many tokens of a draft are right is geometric, its quantiles taken in the golden ratio's even order: by the same
    law as independent draws, with less luck in few rounds. The draft model's own text is thrown away; it always
    continues the prompt, so that it neither catches up nor rolls back.
    """

    name = "oracle"
    num_top_ids = 0

    def __init__(
        self,
        truth: Mapping[Key, Sequence[int]],
        *,
        alpha: float,
        num_draft: int,
        seed: int = 0,
        model: DraftModel | None = None,
        round_trip_s: float = 0.0,
    ) -> None:
        self._truth = truth
        self._alpha = alpha
        self._num_draft = num_draft
        self._model = model
        self._round_trip_s = round_trip_s
        self._prompts: dict[Key, Context] = {}
        self._quantile = random.Random(seed).random()

    def propose(self, contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
        """A chain of the same length for each, whatever is asked for."""
        if self._model is not None:
            self._model.propose([self._prompt(context) for context in contexts], self._num_draft)
        if self._round_trip_s:
            until = time.perf_counter() + self._round_trip_s
            while time.perf_counter() < until:  # sleeping would take longer than asked for
                pass
        return [self._draft(context) for context in contexts]

    def learn(self, verified: Sequence[Verified]) -> None:
        """Nothing."""

    def forget(self, key: Key) -> None:
        if self._model is not None:
            self._model.forget(key)

    def _prompt(self, context: Context) -> Context:
        kept = self._prompts.get(context.key)
        if kept is None:
            kept = self._prompts[context.key] = context._replace(tokens=list(context.tokens))
        return kept

    def _draft(self, context: Context) -> DraftTree:
        begin = len(context.tokens) - context.num_prompt
        tokens = list(self._truth[context.key][begin : begin + self._num_draft])
        num_right = self._num_right()
        if num_right < len(tokens):
            tokens[num_right] ^= 1
        return DraftTree.chain(tokens, [0.5] * len(tokens))

    def _num_right(self) -> int:
        self._quantile = (self._quantile + GOLDEN) % 1.0
        if self._alpha in (0, 1):
            return self._num_draft * (self._alpha == 1)
        return min(int(math.log(1 - self._quantile) / math.log(self._alpha)), self._num_draft)


class Always(Controller):
    """Asks in every step, and admits everything."""

    def choose(self, num_sequences: int, *, has_new: bool = False, is_sampled: bool = False) -> tuple[int, ...]:
        return (0,)

    def admit(self, drafts: Mapping[Key, DraftTree], num_sequences: int) -> dict[Key, DraftTree]:
        return {key: draft for key, draft in drafts.items() if len(draft)}


@dataclass(frozen=True, slots=True)
class Point:
    """What is measured and predicted. `has_model`: the draft model's time is spent, too."""

    num_sequences: int
    way: Way
    alpha: float
    num_draft: int
    has_model: bool
    round_trip_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind}, alpha {self.alpha:g}, k {self.num_draft}"

    @property
    def kind(self) -> str:
        return self.way if self.has_model else "free"


def points(num_sequences: int) -> Iterator[Point]:
    """Drafts that cost nothing, a draft model inside, and one that is a round trip away."""
    for num_draft in DRAFTS:
        for alpha in ALPHAS:
            yield Point(num_sequences, "inside", alpha, num_draft, has_model=False)
            yield Point(num_sequences, "inside", alpha, num_draft, has_model=True)
        yield Point(num_sequences, "remote", REMOTE_ALPHA, num_draft, has_model=True, round_trip_s=ROUND_TRIP_S)


@dataclass(frozen=True, slots=True)
class Window:
    """Steps of a constant number of sequences that only decode."""

    num_tokens: int  # of all sequences
    steps_s: tuple[float, ...]

    @property
    def num_steps(self) -> int:
        return len(self.steps_s)

    @property
    def seconds(self) -> float:
        return sum(self.steps_s)

    @property
    def step_s(self) -> float:
        """Without the few that something else on the machine has held up."""
        return median(self.steps_s)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a prediction is made from."""

    step: StepTime
    overhead_s: float  # of a speculated step
    draft: Curve  # sequences -> seconds of a token
    draft_fixed: Curve  # sequences -> seconds of a draft besides its tokens

    @property
    def are_possible(self) -> bool:
        """Whether every step takes some time: differences of disturbed measurements may say otherwise."""
        return all(seconds > 0 for _, seconds in self.step.by_rows.points)

    def setting(self, point: Point) -> Setting:
        overhead_s = self.overhead_s + (self.draft_fixed(point.num_sequences) if point.has_model else 0.0)
        return Setting(
            alpha=point.alpha,
            draft=self.draft if point.has_model else Curve.level(0.0),
            step=self.step,
            num_sequences=point.num_sequences,
            round_trip_s=point.round_trip_s,
            overhead_s=overhead_s,
        )

    def gain(self, point: Point) -> float:
        """Predicted."""
        setting = self.setting(point)
        return predict(point.way, setting, point.num_draft).gain(setting)


@dataclass(frozen=True, slots=True)
class Times:
    """One round's measurements for the inputs, in seconds, by rows or sequences."""

    plain: Mapping[int, float]
    chains: Mapping[int, float]
    short_drafts: Mapping[int, float]
    long_drafts: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Gain:
    """One round's measurement of a point."""

    tokens_per_s: float
    tokens_per_round: float  # of one sequence; E, if all is well
    plain_step_s: float  # around it

    @classmethod
    def of(cls, window: Window, plain_step_s: float, num_sequences: int) -> Gain:
        return cls(window.tokens_per_s, window.num_tokens / window.num_steps / num_sequences, plain_step_s)

    def against_plain(self, num_sequences: int) -> float:
        """Tokens per second, against a token of each sequence in a plain step."""
        return self.tokens_per_s * self.plain_step_s / num_sequences


@dataclass(frozen=True, slots=True)
class Compared:
    """A point's measurements beside its prediction."""

    point: Point
    rounds: tuple[Gain, ...]
    predicted: float

    @property
    def measured(self) -> float:
        return median(one.against_plain(self.point.num_sequences) for one in self.rounds)

    @property
    def plain_step_s(self) -> float:
        return median(one.plain_step_s for one in self.rounds)

    @property
    def tokens_per_round(self) -> float:
        return median(one.tokens_per_round for one in self.rounds)

    @property
    def expected_tokens(self) -> float:
        return expected_tokens(self.point.alpha, self.point.num_draft)

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted / self.measured - 1


def infer(times: Sequence[Times]) -> Inputs:
    """The inputs, from the medians of all rounds."""
    plain, chains = _medians([one.plain for one in times]), _medians([one.chains for one in times])
    # plain(n) - chain(n) = (n - 2) c - o
    few, many = (plain[rows] - chains[rows] for rows in (FEW_ROWS, MANY_ROWS))
    per_sequence_s = (many - few) / (MANY_ROWS - FEW_ROWS)
    overhead_s = (FEW_ROWS - CHAIN_SEQUENCES) * per_sequence_s - few
    by_rows = {rows: chains[rows] - CHAIN_SEQUENCES * per_sequence_s - overhead_s for rows in CHAIN_ROWS}
    by_rows |= {rows: plain[rows] - rows * per_sequence_s for rows in PLAIN_ROWS if rows < min(CHAIN_ROWS)}
    short = _medians([one.short_drafts for one in times])
    long = _medians([one.long_drafts for one in times])
    token = {size: (long[size] - short[size]) / (LONG_DRAFT - SHORT_DRAFT) for size in short}
    return Inputs(
        StepTime(Curve(tuple(sorted(by_rows.items()))), per_sequence_s),
        overhead_s,
        Curve(tuple(sorted(token.items()))),
        Curve(tuple(sorted((size, short[size] - SHORT_DRAFT * token[size]) for size in short))),
    )


def _medians(rounds: Sequence[Mapping[int, float]]) -> dict[int, float]:
    return {key: median(one[key] for one in rounds) for key in rounds[0]}


class Rig:
    """An engine, a draft model, and what the engine says without drafts. Used from one thread."""

    def __init__(self, target: Path, drafter: Path, *, threads: int, seed: int) -> None:
        """Load both. Raises ModelError."""
        config = WorkerConfig.model_validate({"model": {"path": target, "dtype": "bfloat16"}})
        own = config.model_copy(update={"model": config.model.model_copy(update={"path": drafter})})
        engine = make_engine(config, threads=threads)
        assert isinstance(engine, TorchEngine), "the configuration's default"
        self._engine = engine
        self._model = make_draft_model(own, target=target, threads=THREADS, device=torch.device("cpu"))
        self._prompts = _prompts(Tokenizer.from_file(str(target / "tokenizer.json")), seed)
        self._truth: Mapping[Key, Sequence[int]] = self._plain_text()

    def calibrate(self) -> Times:
        """Everything that predictions are made from, once."""
        plain = {rows: self.window(rows, None, CALIBRATION_STEPS).step_s for rows in PLAIN_ROWS}
        chains = {rows: self._chain_s(rows) for rows in CHAIN_ROWS}
        with _never_unsure():
            short = {size: self._drafting_s(size, SHORT_DRAFT) for size in SEQUENCES}
            long = {size: self._drafting_s(size, LONG_DRAFT) for size in SEQUENCES}
        return Times(plain, chains, short, long)

    def measure(self, chosen: Sequence[Point], seed: int) -> dict[Point, Gain]:
        """Each of these points of one number of sequences, against the plain windows just before and after."""
        [num_sequences] = {point.num_sequences for point in chosen}
        found: dict[Point, Gain] = {}
        before = self.window(num_sequences, None, MEASURED_STEPS)
        for start in range(0, len(chosen), POINTS_BETWEEN):
            with _never_unsure():
                some = {point: self._speculated(point, seed) for point in chosen[start : start + POINTS_BETWEEN]}
            after = self.window(num_sequences, None, MEASURED_STEPS)
            plain_step_s = (before.seconds + after.seconds) / (before.num_steps + after.num_steps)
            found |= {point: Gain.of(window, plain_step_s, num_sequences) for point, window in some.items()}
            before = after
        return found

    def window(self, num_sequences: int, oracle: Oracle | None, num_steps: int) -> Window:
        """So many steps, or fewer if an output would become too long."""
        engine = self._engine
        # The engine's own choice of drafters would not stay the same while it is measured.
        engine._speculator = Speculator([oracle], max_nodes=64, controller=Always(1, max_nodes=64)) if oracle else None
        lengths = self._begin(num_sequences)
        num_tokens, steps_s = 0, list[float]()
        while len(steps_s) < num_steps and max(lengths.values()) < MAX_TOKENS:
            began = time.perf_counter()
            num_tokens += self._step(lengths)
            steps_s.append(time.perf_counter() - began)
        for request_id in lengths:
            engine.cancel(request_id)
        engine._speculator = None
        return Window(num_tokens, tuple(steps_s))

    def _speculated(self, point: Point, seed: int) -> Window:
        model = self._model if point.has_model else None
        oracle = self._oracle(point.alpha, point.num_draft, seed=seed, model=model, round_trip_s=point.round_trip_s)
        return self.window(point.num_sequences, oracle, MEASURED_STEPS)

    def _begin(self, num_sequences: int) -> dict[str, int]:
        """The outputs' lengths after the first steps, which are not like the others."""
        lengths = {str(number): 0 for number in range(num_sequences)}
        for number, request_id in enumerate(lengths):
            sampling = Sampling(seed=0, max_tokens=2 * MAX_TOKENS, temperature=0.0, ignore_eos=True)
            self._engine.submit(Request(request_id, self._prompts[number], sampling))
        while self._engine.load().num_waiting or self._engine.load().pending_prefill_tokens:
            self._step(lengths)
        for _ in range(WARM_STEPS):
            self._step(lengths)
        return lengths

    def _step(self, lengths: dict[str, int]) -> int:
        before = sum(lengths.values())
        result = self._engine.step()
        assert not result.failures, result.failures
        for delta in result.deltas:
            lengths[delta.request_id] += len(delta.token_ids)
        return sum(lengths.values()) - before

    def _plain_text(self) -> dict[Key, list[int]]:
        texts: dict[Key, list[int]] = {(str(number), 0): [] for number in range(len(self._prompts))}
        sampling = Sampling(seed=0, max_tokens=2 * MAX_TOKENS, temperature=0.0, ignore_eos=True)
        for number, prompt in enumerate(self._prompts):
            self._engine.submit(Request(str(number), prompt, sampling))
        while self._engine.load().num_running + self._engine.load().num_waiting:
            for delta in self._engine.step().deltas:
                texts[delta.request_id, delta.index] += delta.token_ids
        return texts

    def _chain_s(self, num_rows: int) -> float:
        """A step of this many rows, of two sequences."""
        oracle = self._oracle(CHAIN_ALPHA, num_rows // CHAIN_SEQUENCES - 1)
        return self.window(CHAIN_SEQUENCES, oracle, CALIBRATION_STEPS).step_s

    def _drafting_s(self, num_sequences: int, num_draft: int) -> float:
        """What a draft of the model adds to a step."""
        free = self.window(num_sequences, self._oracle(CHAIN_ALPHA, num_draft), CALIBRATION_STEPS)
        paid = self.window(num_sequences, self._oracle(CHAIN_ALPHA, num_draft, model=self._model), CALIBRATION_STEPS)
        return paid.step_s - free.step_s

    def _oracle(self, alpha: float, num_draft: int, **fields: Any) -> Oracle:
        return Oracle(self._truth, alpha=alpha, num_draft=num_draft, **fields)


def compare(rig: Rig, options: Options) -> tuple[Inputs, list[Compared]]:
    """Rounds of calibration and measurement, interleaved; every second one backwards. Quick: one sequence alone."""
    chosen = {size: list(points(size)) for size in SEQUENCES[: 1 if options.quick else None]}
    times: list[Times] = []
    found: dict[Point, list[Gain]] = {point: [] for some in chosen.values() for point in some}
    for index in range(-options.warmup_rounds, options.rounds):
        calibrated = rig.calibrate()
        for some in chosen.values():
            gains = rig.measure(some[::-1] if index % 2 else some, seed=options.seed + index)
            if index >= 0:
                for point, gain in gains.items():
                    found[point].append(gain)
        if index >= 0:
            times.append(calibrated)
    inputs = infer(times)
    return inputs, [Compared(point, tuple(gains), inputs.gain(point)) for point, gains in found.items()]


def _prompts(tokenizer: Tokenizer, seed: int) -> list[tuple[int, ...]]:
    source, code = random.Random(seed), Code.heldout()
    texts = [code.piece(source, 2 * PROMPT_TOKENS) for _ in range(max(*SEQUENCES, *PLAIN_ROWS))]
    return [tuple(tokenizer.encode(text).ids[:PROMPT_TOKENS]) for text in texts]


def _never_unsure() -> AbstractContextManager[object]:
    """Drafts as long as asked for: the model's own doubt would shorten them."""
    return patch.object(draft_model, "LEAST", 0.0)
