"""Our drafters in vLLM's worker process: after each step, a chain for each sequence, to be verified in the next one.

vLLM calls `propose` when it has taken a step's tokens in. By then what was drafted before has been verified (walk.py),
so the drafters learn first and are asked for more then. Which of them, and for how much, is decided as for the torch
engine: by what they have really gained.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from protos.tls import Certificates, PeerTLS
from protos.v1 import drafting_pb2 as pb
from workers.engine.vllm.requests import EXTRA, sampling_of
from workers.engine.vllm.settings import SECTION
from workers.model.greedy import is_plain
from workers.speculative.controller import Controller
from workers.speculative.copying import Copying
from workers.speculative.factory import target_hello
from workers.speculative.panel import Panel
from workers.speculative.pool.channel import Channel
from workers.speculative.pool.client import Pool
from workers.speculative.pool.lane import Lane
from workers.speculative.pool.members import Members
from workers.speculative.protocol import Context, Drafter, Draws, Key, Verified
from workers.speculative.tree import MAX_NODES, DraftTree

BRANCHES = 2  # a draft has as many nodes as so many chains, at most, of which the most promising path is taken


@dataclass(slots=True)
class _Sequence:
    """A request of vLLM's. Mutated only by Proposer."""

    context: Context
    tokens: list[int]  # the context's
    max_tokens: int  # prompt and output
    may_draft: bool
    draft: DraftTree = field(default_factory=DraftTree)  # the chain that was proposed last
    last_step: int = -1  # in which it had new tokens

    @property
    def room(self) -> int:
        """Tokens that may be drafted: after them comes at least one of the target's own."""
        return max(self.max_tokens - len(self.tokens) - 1, 0) if self.may_draft else 0


class _Row(NamedTuple):
    """A sequence that the step has given new tokens."""

    number: int  # in vLLM's batch
    sequence: _Sequence
    num_new: int
    num_verified: int  # drafted tokens that were verified
    decodes: bool  # it had new tokens in the step before, too

    def verified(self) -> Verified:
        draft = self.sequence.draft.cut(self.num_verified)
        return Verified(self.sequence.context, self.num_new, draft, tuple(range(min(self.num_new - 1, len(draft)))))


class _Step(NamedTuple):
    """The sequences of vLLM's batch, all of which decode in the next step."""

    rows: Sequence[_Row]

    @property
    def num_sequences(self) -> int:
        return len(self.rows)

    @property
    def has_new(self) -> bool:
        return any(not row.decodes for row in self.rows)

    @property
    def is_sampled(self) -> bool:
        return 2 * sum([row.sequence.context.draws is not None for row in self.rows]) > len(self.rows)

    def contexts(self) -> list[Context]:
        return [row.sequence.context for row in self.rows if row.sequence.room]


@dataclass(slots=True)
class _Credentials:
    """What lets this target in at drafters: told after the pool has been made. Mutated only by Proposer."""

    token: str = field(default="", repr=False)
    certificates: Certificates | None = None

    def lane(self, drafter_id: str, address: str, hello: pb.TargetHello) -> Lane:
        told = pb.TargetHello(token=self.token, vocabulary=hello.vocabulary, vocab_size=hello.vocab_size)
        return Lane(drafter_id, address, told, connect=partial(Channel.connect, certificates=self.certificates))


class Proposer:
    """A proposer of vLLM's kind `custom_class`. Mutated only by the worker that it runs in.

    Of workers that share a model, the first alone drafts: vLLM takes no other's word.
    """

    def __init__(self, vllm_config: Any) -> None:
        """Raises ModelError if the pool is wanted and the model's directory does not say what its tokens are."""
        settings = vllm_config.additional_config[SECTION]["speculation"]
        parallel = vllm_config.parallel_config
        self._is_heard = parallel.rank % parallel.tensor_parallel_size == 0
        self._max_tokens = int(vllm_config.model_config.max_model_len)
        self._members, self._credentials = Members(), _Credentials()
        num_drafted = min(settings["max_nodes"], vllm_config.speculative_config.num_speculative_tokens)
        self._panel = self._make_panel(settings, num_drafted)
        self._runner: Any = None
        self._sequences: dict[str, _Sequence] = {}  # by request of vLLM's
        self._num_steps = 0
        self._began = 0.0  # the step at hand, with drafting for it
        self._was_asked = False  # for drafts for it

    def load_model(self, model: object) -> None:
        """Part of vLLM's interface. There is none to load."""

    def bind(self, runner: Any) -> None:
        """Draft for this model runner: vLLM's V1 runner, without asynchronous scheduling."""
        self._runner = runner
        runner._input_fits_in_drafter = _is_known  # else nobody has drafts while one sequence is near its longest

    def set_pool(self, addresses: Mapping[str, str], token: str, tls: Mapping[str, str] | None) -> None:
        """From now on there are these drafters.

        `tls`: the fields of PeerTLS. Raises SetupError for certificates that cannot be used.
        """
        self._credentials.token = token
        self._credentials.certificates = Certificates.of_peer(_peer(tls)) if tls else None
        self._members.set(addresses)

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: object = None,
        token_ids_cpu: object = None,
        slot_mappings: object = None,
    ) -> list[list[int]]:
        """A chain for each request of the batch, by what was sampled of each in the step that has ended.

        None for a request that is amid its prompt, has no room for drafts or does not want them.
        """
        chains: list[list[int]] = [[] for _ in sampled_token_ids]
        if not self._is_heard:
            return chains
        began = time.perf_counter()
        self.sweep()
        rows = self._rows(sampled_token_ids)
        self._learn(rows, began - self._began, is_whole=len(rows) == len(chains))
        self._began = began
        drafts = self._draft(rows, is_whole=len(rows) == len(chains))
        for row in rows:
            sequence = row.sequence
            sequence.draft = drafts.get(sequence.context.key, DraftTree()).cut(sequence.room)
            chains[row.number] = list(sequence.draft.tokens)
        return chains

    def sweep(self) -> None:
        """Forget the requests that vLLM has dropped. To be called after steps of which no drafts are asked, too."""
        live = self._runner.requests
        for request_id in [request_id for request_id in self._sequences if request_id not in live]:
            self._drop(request_id)

    def stats(self) -> dict[str, Any]:
        """SpeculationStats as plain values."""
        stats = self._panel.stats
        return {**stats._asdict(), "pool": None if stats.pool is None else stats.pool._asdict()}

    def close(self) -> None:
        """End the channels to drafters. Idempotent."""
        self._panel.close()

    def _make_panel(self, settings: Mapping[str, Any], num_drafted: int) -> Panel:
        drafters: list[Drafter] = [Copying()] if "copy" in settings["drafters"] else []
        pool = None
        if "pool" in settings["drafters"]:
            hello = target_hello(Path(settings["target"]), token="")
            lane = self._credentials.lane
            pool = Pool(self._members, hello, deadline_s=settings["deadline_s"], make_lane=lane)
            drafters.append(pool)
        controller = Controller(len(drafters), max_nodes=min(BRANCHES * num_drafted, MAX_NODES))
        return Panel(drafters, max_nodes=num_drafted, controller=controller, pool=pool, chains=True)

    def _rows(self, sampled_token_ids: Sequence[Sequence[int]]) -> list[_Row]:
        """What has new tokens."""
        self._num_steps += 1
        batch = self._runner.input_batch
        rows: list[_Row] = []
        for number, sampled in enumerate(sampled_token_ids):
            if sampled:
                sequence = self._sequence(batch.req_ids[number])
                decodes = sequence.last_step == self._num_steps - 1
                sequence.last_step = self._num_steps
                rows.append(_Row(number, sequence, len(sampled), len(batch.spec_token_ids[number]), decodes))
        return rows

    def _sequence(self, request_id: str) -> _Sequence:
        """With all of its tokens."""
        state = self._runner.requests[request_id]
        prompt, output = state.prompt_token_ids, state.output_token_ids
        sequence = self._sequences.get(request_id)
        if sequence is not None and len(sequence.tokens) > len(prompt) + len(output):
            self._drop(request_id)  # vLLM has lost some of its keys, and computes it anew from there
            sequence = None
        if sequence is None:
            sequence = self._sequences[request_id] = _followed(state, self._max_tokens)
        sequence.tokens.extend(output[len(sequence.tokens) - len(prompt) :])
        return sequence

    def _learn(self, rows: Sequence[_Row], seconds: float, *, is_whole: bool) -> None:
        """`is_whole`: every sequence of the step is among the rows."""
        only_decodes = is_whole and all(row.decodes for row in rows)
        if self._panel.is_resting:
            return
        if not self._was_asked:
            self._panel.note_plain(len(rows), seconds, only_decodes=only_decodes)
            return
        self._panel.learn([row.verified() for row in rows])
        if only_decodes:
            num_rows, num_new = sum([1 + row.num_verified for row in rows]), sum([row.num_new for row in rows])
            self._panel.note_drafted(len(rows), num_rows, num_new, seconds)

    def _draft(self, rows: Sequence[_Row], *, is_whole: bool) -> Mapping[Key, DraftTree]:
        """Steps that go on with a prompt are not speculated upon: they are long in any case, and would be longer."""
        drafts = None
        if is_whole and rows:
            drafts = self._panel.draft(_Step(rows))
        else:
            self._panel.skip()
        self._was_asked = drafts is not None
        return drafts or {}

    def _drop(self, request_id: str) -> None:
        self._panel.forget(self._sequences.pop(request_id).context.key)


def _followed(state: Any, max_tokens: int) -> _Sequence:
    """A request of vLLM's that has just begun: its prompt."""
    extra, tokens = state.sampling_params.extra_args[EXTRA], list(state.prompt_token_ids)
    sampling = sampling_of(extra)
    draws = None if is_plain(sampling) else Draws(sampling, extra["index"])
    key, trace = (state.req_id, extra["index"]), extra["traceparent"]
    context = Context(key, extra["salt"], tokens, extra["num_prompt"], draws=draws, traceparent=trace)
    longest = min(len(tokens) + state.sampling_params.max_tokens, max_tokens)
    return _Sequence(context, tokens, longest, extra["speculation"] != "off")


def _peer(tls: Mapping[str, str]) -> PeerTLS:
    files = {name: Path(tls[name]) for name in ("cert_file", "key_file", "ca_file")}
    return PeerTLS(**files, server_name=tls["server_name"])


def _is_known(common_attn_metadata: object) -> bool:
    """In the place of the model runner's question whether all sequences have room: each chain is cut to what fits."""
    return common_attn_metadata is not None
