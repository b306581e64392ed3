"""Our drafters as vLLM's proposer, driven by a model runner that is made up: no engine, and a target that counts on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from protos.errors import ModelError
from protos.messages import Request, ResumePoint, Sampling
from tests.certificates import Authority
from tests.workers.speculative.oracle import Always
from tests.workers.speculative.pool.ends import TOKEN, Counting, ScriptedDrafter, silent, until
from workers.engine.vllm.proposer import Proposer
from workers.engine.vllm.requests import Output
from workers.speculative.factory import target_hello
from workers.speculative.panel import Panel
from workers.speculative.pool.server import DraftServer
from workers.speculative.protocol import Context, Key, Verified
from workers.speculative.tree import ROOT, DraftTree

NUM_DRAFTED = 6
MAX_CONTEXT = 100
DEADLINE_S = 0.05


def vllm_config(target: Path, *drafters: str, deadline_s: float = DEADLINE_S, **changes: Any) -> Any:
    """As much of vLLM's as a proposer reads."""
    settings = {"drafters": drafters, "max_nodes": NUM_DRAFTED, "deadline_s": deadline_s, "target": str(target)}
    return SimpleNamespace(
        additional_config={"headwater": {"speculation": settings}},
        parallel_config=SimpleNamespace(**{"rank": 0, "tensor_parallel_size": 1, **changes}),
        model_config=SimpleNamespace(max_model_len=MAX_CONTEXT),
        speculative_config=SimpleNamespace(num_speculative_tokens=NUM_DRAFTED),
    )


def after(tokens: Sequence[int]) -> int:
    """The target: it counts on."""
    return tokens[-1] + 1


@dataclass
class Batch:
    req_ids: list[str] = field(default_factory=list)
    spec_token_ids: list[list[int]] = field(default_factory=list)


@dataclass
class Runner:
    """vLLM's model runner and scheduler, as a proposer sees them. Mutated only by its test."""

    proposer: Proposer
    target: Callable[[Sequence[int]], int] = after
    input_batch: Batch = field(default_factory=Batch)
    requests: dict[str, Any] = field(default_factory=dict)
    drafts: dict[str, list[int]] = field(default_factory=dict)
    num_verified: int = 0
    num_right: int = 0

    def add(self, request_id: str, prompt: Sequence[int], *, max_tokens: int = 40, **fields: Any) -> None:
        names = Sampling.__dataclass_fields__
        told = {"temperature": 0.0, **{name: fields.pop(name) for name in list(fields) if name in names}}
        request = Request(request_id, tuple(prompt), Sampling(seed=3, max_tokens=max_tokens, **told), **fields)
        for output in Output.all_of(request, frozenset()):
            state = SimpleNamespace(
                req_id=output.request_id,
                prompt_token_ids=list(output.prompt),
                output_token_ids=[],
                sampling_params=output.to_params(),
            )
            self.requests[output.request_id] = state
            self.input_batch.req_ids.append(output.request_id)
            self.input_batch.spec_token_ids.append([])

    def end(self, request_id: str) -> None:
        """vLLM drops it before its next step."""
        del self.requests[request_id]
        self.leave(request_id)

    def leave(self, request_id: str) -> None:
        """It is not in the next batch."""
        number = self.input_batch.req_ids.index(request_id)
        del self.input_batch.req_ids[number], self.input_batch.spec_token_ids[number]

    def step(self, *, amid_prompt: Sequence[str] = (), at_most: int = NUM_DRAFTED) -> dict[str, list[int]]:
        """Verify what was drafted, ask for more; the new drafts."""
        sampled = [
            [] if request_id in amid_prompt else self._walk(request_id, at_most)
            for request_id in self.input_batch.req_ids
        ]
        chains = self.proposer.propose(sampled, None, None, slot_mappings=None)
        self.drafts = dict(zip(self.input_batch.req_ids, chains, strict=True))
        return self.drafts

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step()

    def tokens(self, request_id: str) -> list[int]:
        state = self.requests[request_id]
        return [*state.prompt_token_ids, *state.output_token_ids]

    def _walk(self, request_id: str, at_most: int) -> list[int]:
        draft, tokens, new = self.drafts.get(request_id, [])[:at_most], self.tokens(request_id), []
        while True:
            new.append(self.target([*tokens, *new]))
            if len(new) > len(draft) or new[-1] != draft[len(new) - 1]:
                break
        self.num_verified += len(draft)
        self.num_right += len(new) - 1
        self.input_batch.spec_token_ids[self.input_batch.req_ids.index(request_id)] = draft
        state = self.requests[request_id]
        state.output_token_ids += new
        assert len(state.output_token_ids) <= state.sampling_params.max_tokens
        assert len(self.tokens(request_id)) <= MAX_CONTEXT
        return new


class Local:
    """A drafter that counts on, as the target does, and says beside it what is wrong. Keeps what it is told."""

    num_top_ids = 0

    def __init__(self, *, name: str = "local", skips: int = 0, fails_at: str = "") -> None:
        """`skips`: by how much its third token is wrong."""
        self.name, self._skips, self._fails_at = name, skips, fails_at
        self.asked: list[Context] = []
        self.learnt: list[Verified] = []
        self.forgotten: list[Key] = []

    def propose(self, contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
        self._fail("propose")
        self.asked += [one._replace(tokens=list(one.tokens)) for one in contexts]
        return [self._draft(one.tokens[-1]) for one in contexts]

    def learn(self, verified: Sequence[Verified]) -> None:
        self._fail("learn")
        self.learnt += [one._replace(context=one.context._replace(tokens=list(one.context.tokens))) for one in verified]

    def forget(self, key: Key) -> None:
        self._fail("forget")
        self.forgotten.append(key)

    def _draft(self, last: int) -> DraftTree:
        tokens = [last + 1 + step + (self._skips if step == 2 else 0) for step in range(NUM_DRAFTED)]
        chain = DraftTree.chain([7, *tokens], [0.1, *[0.9] * len(tokens)])
        return DraftTree(chain.tokens, (ROOT, ROOT, *range(1, len(tokens))), chain.probabilities, chain.sources)

    def _fail(self, where: str) -> None:
        if where == self._fails_at:
            raise RuntimeError(where)


def bound(config: Any, *drafters: Any) -> Runner:
    """A runner whose proposer has these drafters, if any are given, and asks them all in every step."""
    proposer = Proposer(config)
    if drafters:
        proposer._panel = Panel(drafters, max_nodes=NUM_DRAFTED, chains=True)
    proposer._panel._controller = Always(len(proposer._panel._drafters), max_nodes=NUM_DRAFTED)
    runner = Runner(proposer)
    proposer.bind(runner)
    return runner


@pytest.fixture
def copying(target_dir: Path) -> Any:
    return vllm_config(target_dir, "copy")


# Chains, and what becomes of them


def test_the_best_path_is_drafted_and_what_was_right_is_learnt(copying: Any) -> None:
    drafter = Local(skips=5)
    runner = bound(copying, drafter)
    runner.add("a", [10, 11], cache_salt="mine")
    assert runner.step() == {"a/0": [13, 14, 20, 16, 17, 18]}
    assert [(one.key, one.salt, one.tokens, one.num_prompt, one.draws) for one in drafter.asked] == [
        (("a/0", 0), "mine", [10, 11, 12], 2, None)
    ]
    runner.step()
    [one] = drafter.learnt
    assert one.context.tokens == [10, 11, 12, 13, 14, 15]
    assert (one.num_new, one.draft.tokens, one.nodes) == (3, (13, 14, 20, 16, 17, 18), (0, 1))
    assert one.draft.is_chain
    assert runner.tokens("a/0") == list(range(10, 16))


def test_what_was_drafted_and_accepted_is_counted(copying: Any) -> None:
    runner = bound(copying, Local(), Local(name="other", skips=1))
    runner.add("a", [10, 11])
    runner.add("b", [50, 51])
    runner.run(4)
    stats = runner.proposer.stats()
    assert stats["num_drafts"] == 6
    assert stats["drafted_tokens"] == runner.num_verified == 6 * NUM_DRAFTED
    assert stats["accepted_tokens"] == runner.num_right > 0
    assert stats["accepted_by_depth"][:3] == (6, 6, 6)
    assert sum(stats["accepted_by_depth"]) == runner.num_right
    assert stats["drafted_by"] == {"local": 36, "other": 12}  # they go together for two tokens
    assert stats["accepted_by"] == {"local": 36, "other": 12}
    assert stats["pool"] is None


def test_copying_finds_what_stood_before(copying: Any) -> None:
    runner = bound(copying)
    runner.add("a", [*range(10, 30), 10, 11])
    assert runner.step() == {"a/0": [13, 14, 15, 16, 17, 18]}
    runner.run(2)
    assert runner.proposer.stats()["accepted_tokens"] == runner.num_right == 2 * NUM_DRAFTED


def test_drafts_that_the_scheduler_cuts_or_drops_are_learnt_as_they_were_verified(copying: Any) -> None:
    drafter = Local()
    runner = bound(copying, drafter)
    runner.add("a", [10, 11])
    runner.step()
    runner.step(at_most=2)
    assert (drafter.learnt[-1].draft.tokens, drafter.learnt[-1].nodes) == ((13, 14), (0, 1))
    runner.step(at_most=0)
    assert (drafter.learnt[-1].draft, drafter.learnt[-1].num_new) == (DraftTree(), 1)
    assert runner.proposer.stats()["drafted_tokens"] == runner.num_verified == 2


def test_a_draft_that_waits_for_a_step_is_learnt_then(copying: Any) -> None:
    """As where the step's budget of tokens was used up by others."""
    drafter = Local()
    runner = bound(copying, drafter)
    runner.add("a", [10, 11])
    runner.add("b", [50, 51])
    kept = runner.step()["a/0"]
    runner.leave("a/0")
    assert set(runner.step()) == {"b/0"}
    assert not drafter.forgotten
    runner.input_batch.req_ids.append("a/0")
    runner.input_batch.spec_token_ids.append([])
    runner.drafts["a/0"] = kept
    runner.step()
    assert [one.nodes for one in drafter.learnt if one.context.key == ("a/0", 0)] == [tuple(range(NUM_DRAFTED))]
    assert runner.proposer.stats()["accepted_tokens"] == runner.num_right


def test_tokens_that_vllm_takes_back_begin_the_sequence_anew(copying: Any) -> None:
    drafter = Local()
    runner = bound(copying, drafter)
    runner.add("a", [10, 11])
    runner.run(2)
    del runner.requests["a/0"].output_token_ids[2:]
    runner.drafts.clear()
    runner.step()
    assert drafter.forgotten == [("a/0", 0)]
    assert drafter.asked[-1].tokens == runner.tokens("a/0") == [10, 11, 12, 13, 14]


# Room


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens"), [(4, 9), (4, 1), (4, 2), (MAX_CONTEXT - 9, 40), (MAX_CONTEXT - 1, 5)]
)
def test_chains_leave_room_for_the_targets_own_token(copying: Any, num_prompt: int, max_tokens: int) -> None:
    """And others keep their drafts while one comes to its end."""
    runner = bound(copying, Local())
    runner.add("a", range(num_prompt), max_tokens=max_tokens)
    runner.add("b", [500, 501])
    longest = min(num_prompt + max_tokens, MAX_CONTEXT)
    while True:
        drafts = runner.step()
        room = longest - len(runner.tokens("a/0")) - 1
        assert len(drafts["a/0"]) == max(min(room, NUM_DRAFTED), 0)
        assert len(drafts["b/0"]) == NUM_DRAFTED
        if room < 0:
            break
    assert len(runner.tokens("a/0")) == longest


def test_vllm_does_not_take_all_drafts_away_near_the_longest_context(copying: Any) -> None:
    runner = bound(copying)
    assert runner._input_fits_in_drafter(SimpleNamespace(max_seq_len=MAX_CONTEXT))  # type: ignore[attr-defined]
    assert not runner._input_fits_in_drafter(None)  # type: ignore[attr-defined]


# Who has drafts


def test_requests_may_go_without_drafts(copying: Any) -> None:
    drafter = Local()
    runner = bound(copying, drafter)
    runner.add("a", [10, 11], speculation="off")
    runner.add("b", [50, 51])
    runner.run(3)
    assert {one.key for one in drafter.asked} == {("b/0", 0)}
    assert runner.tokens("a/0") == [10, 11, 12, 13, 14]
    assert len(runner.tokens("b/0")) > 10
    runner.end("b/0")
    assert runner.step() == {"a/0": []}
    assert len(drafter.asked) == 3


def test_steps_that_go_on_with_a_prompt_have_no_drafts(copying: Any) -> None:
    drafter = Local()
    runner = bound(copying, drafter)
    runner.add("a", [10, 11])
    runner.add("b", range(50, 90))
    assert runner.step(amid_prompt=["b/0"]) == {"a/0": [], "b/0": []}
    assert all(len(draft) == NUM_DRAFTED for draft in runner.step().values())


def test_several_outputs_are_sequences_of_their_own(copying: Any) -> None:
    drafter = Local()
    runner = bound(copying, drafter)
    runner.add("a", [10, 11], n=2, temperature=0.7)
    runner.step()
    assert [one.key for one in drafter.asked] == [("a/0", 0), ("a/1", 1)]
    assert [one.draws.output for one in drafter.asked if one.draws] == [0, 1]
    assert {(one.draws.sampling.seed, one.draws.sampling.temperature) for one in drafter.asked if one.draws} == {
        (3, 0.7)
    }


def test_of_a_resumed_output_what_was_made_elsewhere_is_no_prompt(copying: Any) -> None:
    drafter = Local()
    runner = bound(copying, drafter)
    runner.add("a", [10, 11], resume=(ResumePoint(0, (12, 13)),), max_tokens=5)
    assert runner.step() == {"a/0": [15]}
    assert (drafter.asked[0].tokens, drafter.asked[0].num_prompt) == ([10, 11, 12, 13, 14], 2)


def test_only_the_first_of_workers_that_share_a_model_drafts(target_dir: Path) -> None:
    drafter = Local()
    runner = bound(vllm_config(target_dir, "copy", rank=1, tensor_parallel_size=2), drafter)
    runner.add("a", [10, 11])
    assert runner.step() == {"a/0": []}
    assert not drafter.asked


@pytest.mark.parametrize("is_swept", [True, False])
def test_who_has_ended_is_forgotten(copying: Any, is_swept: bool) -> None:
    drafter = Local()
    runner = bound(copying, drafter)
    runner.add("a", [10, 11])
    runner.add("b", [50, 51])
    runner.run(2)
    runner.end("a/0")
    runner.proposer.sweep() if is_swept else runner.step()
    assert drafter.forgotten == [("a/0", 0)]
    assert set(runner.proposer._sequences) == {"b/0"}
    runner.end("b/0")
    runner.proposer.sweep()
    assert not runner.proposer._sequences


@pytest.mark.parametrize("where", ["propose", "learn", "forget"])
def test_a_drafter_that_fails_is_left_out(copying: Any, where: str) -> None:
    broken, whole = Local(name="broken", fails_at=where), Local()
    runner = bound(copying, broken, whole)
    runner.add("a", [10, 11])
    runner.add("b", [50, 51])
    runner.run(2)
    runner.end("b/0")
    runner.run(2)
    assert runner.proposer._panel.broken == {0}
    assert runner.num_right == runner.num_verified > 0
    assert whole.learnt
    assert whole.forgotten == [("b/0", 0)]


@pytest.mark.parametrize(("cost", "is_worth"), [(1.0, True), (9.0, False)])
def test_the_controller_decides_by_the_time_that_steps_take(
    copying: Any, monkeypatch: pytest.MonkeyPatch, cost: float, is_worth: bool
) -> None:
    """`cost`: of a step with drafts, all of them right, in plain ones. Steps of prompts are long, and not counted."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("workers.engine.vllm.proposer.time", SimpleNamespace(perf_counter=lambda: clock.now))
    proposer = Proposer(copying)
    runner = Runner(proposer, target=lambda tokens: (tokens[-1] + 1) % 20)
    proposer.bind(runner)
    for turn in range(40):
        runner.add(f"{turn}", [*range(20), 0, 1], max_tokens=70)
        clock.now += 1000.0
        runner.step()
        while len(runner.tokens(f"{turn}/0")) < 60:
            clock.now += cost if any(runner.drafts.values()) else 1.0
            runner.step()
        runner.end(f"{turn}/0")
        runner.drafts.clear()
    decisions = proposer.stats()["decisions"]
    assert (decisions["copy"] > decisions["off"]) == is_worth


# The pool


@pytest.fixture
def exits() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def served(exits: ExitStack, target: Path, drafter: Any, **fields: Any) -> tuple[DraftServer, str]:
    hello = target_hello(target, TOKEN)
    server = DraftServer(
        [drafter],
        token=TOKEN,
        vocabulary=hello.vocabulary,
        vocab_size=hello.vocab_size,
        max_sequences=8,
        **fields,
    )
    address = server.start("127.0.0.1")
    exits.callback(server.stop)
    return server, address


def pooled(exits: ExitStack, config: Any) -> Runner:
    runner = bound(config)
    exits.callback(runner.proposer.close)
    return runner


def run_until(runner: Runner, is_done: Callable[[], bool]) -> None:
    """Have one output after another."""
    numbers = iter(range(1000))

    def advance() -> bool:
        if not runner.requests:
            runner.add(f"r{next(numbers)}", [10, 11, 12], max_tokens=60)
        [request_id] = runner.requests
        runner.step()
        if len(runner.tokens(request_id)) >= 50:
            runner.end(request_id)
        return is_done()

    until(advance)


def test_the_pool_drafts_as_soon_as_it_is_known(exits: ExitStack, target_dir: Path) -> None:
    runner = pooled(exits, vllm_config(target_dir, "pool"))
    runner.add("early", [10, 11])
    runner.run(3)
    assert not runner.num_verified
    runner.end("early/0")
    drafter = Counting()
    server, address = served(exits, target_dir, drafter)
    runner.proposer.set_pool({"0": address}, TOKEN, None)
    run_until(runner, lambda: runner.num_right > 30)
    stats = runner.proposer.stats()
    assert stats["pool"]["num_drafters"] == 1
    assert stats["accepted_by"] == {"pool": runner.num_right}
    assert runner.num_right > 0.5 * runner.num_verified
    assert all(one.tokens[:3] == [10, 11, 12] and one.num_prompt == 3 for asked in drafter.asked for one in asked)
    for request_id in list(runner.requests):
        runner.end(request_id)
    runner.proposer.sweep()
    until(lambda: server.stats.num_sequences == 0, "the end of the sequences")


def test_the_pool_may_be_reached_by_certificates(exits: ExitStack, target_dir: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    member = authority.issue("member")
    _, address = served(exits, target_dir, Counting(), certificates=authority.certificates(member))
    runner = pooled(exits, vllm_config(target_dir, "pool"))
    tls = {name: str(value) for name, value in asdict(authority.peer(member)).items()}
    runner.proposer.set_pool({"0": address}, TOKEN, tls)
    run_until(runner, lambda: runner.num_right > 5)


def test_drafters_may_change(exits: ExitStack, target_dir: Path) -> None:
    runner = pooled(exits, vllm_config(target_dir, "pool"))
    for name in ("a", "b"):
        server, address = served(exits, target_dir, Counting())
        runner.proposer.set_pool({name: address}, TOKEN, None)
        before = runner.num_right
        run_until(runner, lambda before=before: runner.num_right > before + 20)
        assert server.stats.num_targets == 1
        server.stop()
    runner.proposer.set_pool({}, TOKEN, None)
    run_until(runner, lambda: runner.proposer.stats()["pool"]["num_drafters"] == 0)


def test_a_drafter_that_dies_or_hangs_costs_drafts_alone(exits: ExitStack, target_dir: Path) -> None:
    runner = pooled(exits, vllm_config(target_dir, "pool"))
    server, address = served(exits, target_dir, Counting())
    hung = exits.enter_context(ScriptedDrafter(silent))
    runner.proposer.set_pool({"0": address}, TOKEN, None)
    run_until(runner, lambda: runner.num_right > 10)
    server.stop()
    before = runner.num_right
    run_until(runner, lambda: runner.proposer.stats()["pool"]["num_drafters"] == 0)
    runner.proposer.set_pool({"1": hung.address}, TOKEN, None)
    run_until(runner, lambda: len(hung.batches) > 2)
    pool = runner.proposer.stats()["pool"]
    assert runner.num_right <= before + 2 * NUM_DRAFTED  # what had come before it died
    assert pool["num_late"] <= 4  # nobody waits twice for who has not answered


def test_a_drafter_that_refuses_the_token_is_not_used(exits: ExitStack, target_dir: Path, caplog: Any) -> None:
    runner = pooled(exits, vllm_config(target_dir, "pool"))
    _, address = served(exits, target_dir, Counting())
    runner.proposer.set_pool({"0": address}, "a wrong secret", None)
    runner.add("a", [10, 11])
    until(lambda: runner.proposer._panel._pool.propose([], 1) == [] and "refuses" in caplog.text)  # type: ignore[union-attr]
    runner.run(3)
    assert not runner.num_verified
    assert "a wrong secret" not in caplog.text
    assert "a wrong secret" not in repr(runner.proposer._credentials)


def test_a_model_without_a_tokenizer_has_no_pool(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Proposer(vllm_config(tmp_path, "pool"))
