"""A drafter that knows what the target will say, and is right or wrong as a test wants it; and who admits it all."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal, assert_never

from tests.workers.engine.drive import Outputs
from workers.speculative.controller import Controller
from workers.speculative.protocol import Context, Key, Verified
from workers.speculative.tree import MAX_NODES, ROOT, DraftTree

Style = Literal["chain", "tree", "wild"]


class Oracle:
    """A Drafter that is right with a probability per token, drawn from the seed, the sequence and the position.

    `chain`: one continuation, on past its first wrong token and past the output's end. `tree`: the right node stands
    among wrong siblings that have children of their own, before it and after it. `wild`: a random tree of up to
    MAX_NODES nodes, whose tokens are those of the true path, here at their own depth, there at another.
    """

    num_top_ids = 0

    def __init__(
        self,
        truth: Mapping[Key, Sequence[int]],
        *,
        vocab_size: int,
        style: Style = "chain",
        alpha: float = 1.0,
        depth: int = 6,
        seed: int = 0,
        name: str = "oracle",
    ) -> None:
        """`truth`: each output's tokens, those that were resumed too; what lies beyond is made up."""
        self.name = name
        self._truth = truth
        self._vocab_size = vocab_size
        self._style = style
        self._alpha = alpha
        self._depth = depth
        self._seed = seed
        self.learnt: list[Verified] = []
        self.forgotten: list[Key] = []

    def propose(self, contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
        """As the style says, and as deep: max_nodes is ignored, as drafters can be wrong in that too."""
        return [self._draft(context) for context in contexts]

    def learn(self, verified: Sequence[Verified]) -> None:
        """Kept as it is now: the sequences go on growing."""
        for one in verified:
            self.learnt.append(one._replace(context=one.context._replace(tokens=list(one.context.tokens))))

    def forget(self, key: Key) -> None:
        self.forgotten.append(key)

    def _draft(self, context: Context) -> DraftTree:
        num_output = len(context.tokens) - context.num_prompt
        draw = random.Random(f"{self._seed} {context.key} {num_output}")
        known = self._truth.get(context.key, ())[num_output : num_output + self._depth]
        path = [*known, *(self._any(draw) for _ in range(self._depth - len(known)))]
        match self._style:
            case "chain":
                tokens = [token_id if draw.random() < self._alpha else self._wrong(draw, token_id) for token_id in path]
                return DraftTree.chain(tokens, [0.5] * len(tokens))
            case "tree":
                return self._among_siblings(draw, path)
            case "wild":
                return self._wild(draw, path)
            case _:
                assert_never(self._style)

    def _among_siblings(self, draw: random.Random, path: Sequence[int]) -> DraftTree:
        tree = _Growing()
        at = ROOT
        for token_id in path:
            before, after = draw.randrange(3), draw.randrange(2)
            for _ in range(before):
                tree.add(tree.add(at, self._wrong(draw, token_id)), self._any(draw))
            right = tree.add(at, token_id) if draw.random() < self._alpha else None
            for _ in range(after):
                tree.add(tree.add(at, self._wrong(draw, token_id)), path[0])
            if right is None:
                break
            at = right
        return tree.draft()

    def _wild(self, draw: random.Random, path: Sequence[int]) -> DraftTree:
        tree = _Growing()
        for _ in range(draw.randint(1, MAX_NODES)):
            parent = draw.randrange(-1, len(tree.tokens))
            depth = 0 if parent == ROOT else tree.depths[parent]
            is_placed = depth < len(path) and draw.random() < self._alpha
            tree.add(parent, path[depth] if is_placed else draw.choice([*path, self._any(draw)]))
        return tree.draft()

    def _any(self, draw: random.Random) -> int:
        return draw.randrange(self._vocab_size)

    def _wrong(self, draw: random.Random, token_id: int) -> int:
        return (token_id + draw.randrange(1, self._vocab_size)) % self._vocab_size


class _Growing:
    """A tree while it grows. Lives within one draft."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self._nodes: dict[tuple[int, int], int] = {}

    def add(self, parent: int, token_id: int) -> int:
        """The node of this token after that one, a new one unless there is one already."""
        node = self._nodes.setdefault((parent, token_id), len(self.tokens))
        if node == len(self.tokens):
            self.tokens.append(token_id)
            self.parents.append(parent)
            self.depths.append(1 if parent == ROOT else self.depths[parent] + 1)
        return node

    def draft(self) -> DraftTree:
        """As far as a tree may be large."""
        tokens, parents = self.tokens[:MAX_NODES], self.parents[:MAX_NODES]
        return DraftTree(tuple(tokens), tuple(parents), (0.5,) * len(tokens), (1,) * len(tokens))


class Always(Controller):
    """A controller that asks every drafter in every step, and admits whatever they say."""

    def __init__(self, num_drafters: int, *, max_nodes: int) -> None:
        super().__init__(num_drafters, max_nodes=max_nodes)
        self._everyone = tuple(range(num_drafters))
        self._most = max_nodes

    def choose(self, num_sequences: int, **_: object) -> tuple[int, ...]:
        return self._everyone

    def num_to_propose(self, num_sequences: int) -> int:
        return self._most

    def admit(self, drafts: Mapping[Key, DraftTree], num_sequences: int) -> dict[Key, DraftTree]:
        return {key: draft for key, draft in drafts.items() if len(draft)}


def truth_of(outputs: Outputs) -> dict[Key, list[int]]:
    """By output, its tokens: what an Oracle must know."""
    return {key: output.tokens for key, output in outputs.items()}
