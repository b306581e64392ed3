"""Which sampling is greedy: known of a request before there are logits, and without torch."""

from __future__ import annotations

from protos.messages import Sampling

GREEDY_TEMPERATURE = 1e-5  # at or below it, dividing logits would overflow


def is_plain(sampling: Sampling) -> bool:
    """Whether the token is the largest logit, whatever came before."""
    return sampling.temperature <= GREEDY_TEMPERATURE and sampling.min_tokens == 0 and not weighs(sampling)


def weighs(sampling: Sampling) -> bool:
    """Whether penalties or a bias move logits."""
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
        or bool(sampling.logit_bias)
    )
