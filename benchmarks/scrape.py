"""What workers counted while they were measured: how speculation went, read from their metrics endpoints."""

from __future__ import annotations

import asyncio
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 5.0
Totals = Mapping[tuple[str, str], float]  # by the metric's name and its last label, over all workers

_DRAFTS = "vllm:spec_decode_num_drafts_total"
_ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
_DRAFTED_BY, _ACCEPTED_BY = "headwater_drafted_tokens_total", "headwater_accepted_draft_tokens_total"
_STEPS = "headwater_speculation_steps_total"
_LABELS = {_DRAFTED_BY: "drafter", _ACCEPTED_BY: "drafter", _STEPS: "drafters"}
_POOL = {"headwater_pool_late_total": "late_drafts", "headwater_pool_stale_total": "stale_drafts"}


class NoMetricsError(Exception):
    """A worker's metrics cannot be read."""


async def totals(endpoints: Sequence[str]) -> Totals:
    """The counters of these endpoints, host:port, added up. Raises NoMetricsError."""
    texts = await asyncio.gather(*(asyncio.to_thread(_read, endpoint) for endpoint in endpoints))
    found: defaultdict[tuple[str, str], float] = defaultdict(float)
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                label = _LABELS.get(sample.name)
                found[sample.name, sample.labels[label] if label else ""] += sample.value
    return found


def drafting(before: Totals, after: Totals) -> dict[str, float]:
    """What became of drafts between two scrapes; empty if nothing speculates."""

    def grown(name: str, label: str = "") -> float:
        return after.get((name, label), 0.0) - before.get((name, label), 0.0)

    num_steps = sum(grown(name, label) for name, label in after if name == _STEPS)
    if not any(name == _STEPS for name, _ in after):
        return {}
    num_drafts = grown(_DRAFTS)
    values = {"drafted_steps_percent": 100 * (1 - grown(_STEPS, "off") / num_steps) if num_steps else 0.0}
    if num_drafts:
        values["tokens_per_drafted_step"] = 1 + grown(_ACCEPTED) / num_drafts
    for name, drafter in sorted(after):
        if name == _DRAFTED_BY and grown(name, drafter):
            values[f"{drafter}_accepted_percent"] = 100 * grown(_ACCEPTED_BY, drafter) / grown(name, drafter)
    values |= {called: grown(name) for name, called in _POOL.items() if (name, "") in after}
    return values


def _read(endpoint: str) -> str:
    try:
        with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=TIMEOUT_S) as answer:
            return str(answer.read().decode())
    except OSError as error:
        raise NoMetricsError(
            f"no metrics at {endpoint} ({error}); `headwater serve` prints where its workers' are"
        ) from error
