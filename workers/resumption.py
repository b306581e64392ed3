"""Where a request goes on that others have answered in part: what is left to compute, and the ends nobody has heard of.

Stands between the session, which hands in the request, and the engine. A worker tells an output's last token and its
finish together, so an output has all of its tokens and no finish only if someone on the way took them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from protos.errors import InvalidParameter
from protos.messages import Delta, Finish, Request, ResumePoint, Sampling
from workers.text import OutputText, TokenTexts


@dataclass(frozen=True, slots=True)
class Resumption:
    """A request as this worker begins it."""

    request: Request  # its ended outputs are marked as finished: nothing is left to compute of them
    outputs: dict[int, OutputText]  # those that go on, as far as they have come
    ends: tuple[Delta, ...]  # finishes that can be told at once


def take_up(request: Request, texts: TokenTexts, eos_token_ids: Sequence[int]) -> Resumption:
    """Find where each output stands. Raises InvalidParameter if one has tokens behind its end."""
    outputs = {index: OutputText(texts, request.sampling) for index in range(request.sampling.n)}
    points, ends = [], []
    for point in request.resume:
        finish = None if point.finished else _go_on(outputs[point.index], point, request.sampling, eos_token_ids)
        if finish is not None:
            text = outputs[point.index].flush() if finish.stop is None else ""
            ends.append(Delta(request.request_id, point.index, text, (), finish=finish))
        is_over = point.finished or finish is not None
        points.append(replace(point, finished=is_over))
        if is_over:
            del outputs[point.index]
    return Resumption(replace(request, resume=tuple(points)), outputs, tuple(ends))


def _go_on(output: OutputText, point: ResumePoint, sampling: Sampling, eos_token_ids: Sequence[int]) -> Finish | None:
    """Feed the output its tokens; its finish, if they are all it has."""
    num_tokens = len(point.token_ids)
    stop_at = _stop_token_at(point.token_ids, sampling, eos_token_ids)
    piece = output.feed(point.token_ids[:stop_at])
    if piece.stop is not None:
        end, finish = piece.num_tokens, Finish("stop", stop=piece.stop)
    elif stop_at is not None:
        end, finish = stop_at + 1, Finish("stop", stop_token_id=point.token_ids[stop_at])
    elif num_tokens and num_tokens >= sampling.max_tokens:
        end, finish = sampling.max_tokens, Finish("length")
    else:
        return None
    if end < num_tokens:
        raise InvalidParameter(
            f"output {point.index} ends after {end} tokens ({finish.reason}), {num_tokens} are said to be received; "
            "resume with the prompt, the parameters and the seed of the call that sent them"
        )
    return finish


def _stop_token_at(token_ids: Sequence[int], sampling: Sampling, eos_token_ids: Sequence[int]) -> int | None:
    """Where the first token stands that ends an output; it is not part of the text."""
    stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)}
    first = max(1, sampling.min_tokens) - 1
    return next((at for at in range(first, len(token_ids)) if token_ids[at] in stops), None)
