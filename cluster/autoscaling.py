"""How many workers there should be: a pure rule over what they report, and its tie to Serve, which asks it.

Requests come to workers past Serve's handles, so Serve's own rule would see none. Workers know what there is: their own
load, and what waits at all routers, which those tell them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from cluster.config import AutoscalingSection
from workers.usage import Usage

HEADROOM = 0.8  # how full the others may get by letting one go: less than makes one more wanted, so that none flaps
ROUNDING = 1e-6  # of sums of shares
REPORT_S = 1.0  # between two reports of a worker
AVERAGE_S = 3.0  # reports are averaged over this


def desired_workers(config: AutoscalingSection, usages: Sequence[Usage], current: int) -> int:
    """The number of workers for the load that those who report have; `current` is how many are asked for now.

    Within the bounds; more at once, fewer one by one. Without reports nothing is known and nothing changes.
    """
    needed, wanted = _needed(config, usages), current
    if needed > current:
        wanted = math.ceil(needed - ROUNDING)
    elif usages and needed - ROUNDING <= HEADROOM * (current - 1):
        wanted = current - 1
    return min(max(wanted, config.min_workers), config.max_workers)


def _needed(config: AutoscalingSection, usages: Sequence[Usage]) -> float:
    """How many workers the load would fill to their targets: the most that any one measure asks for."""
    queued_tokens = max((usage.queued_tokens for usage in usages), default=0.0)  # all say the same, some later
    return max(
        (queued_tokens + sum(usage.pending_tokens for usage in usages)) / config.target_queued_tokens,
        sum(usage.kv_use for usage in usages) / config.target_kv_use,
        sum(usage.num_running / usage.max_running for usage in usages),
        _needed_in_time(config, usages),
    )


def _needed_in_time(config: AutoscalingSection, usages: Sequence[Usage]) -> float:
    """By the time to first token: one more than there are if it is too long; nobody goes while it nearly is."""
    if config.target_first_token_s is None or not usages:
        return 0.0
    share = sum(usage.first_token_s for usage in usages) / len(usages) / config.target_first_token_s
    return len(usages) + 1.0 if share > 1 else len(usages) * share


def follow(config: AutoscalingSection) -> AutoscalingConfig:
    """What Serve is told instead of a number of workers."""
    with warnings.catch_warnings():  # Ray 2.60 names another way to set the interval, which it does not read
        warnings.filterwarnings("ignore", ".*metrics_interval_s", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=config.min_workers,
            max_replicas=config.max_workers,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
            metrics_interval_s=REPORT_S,
            look_back_period_s=AVERAGE_S,
            policy=AutoscalingPolicy(policy_function=Policy, policy_kwargs=config.model_dump(mode="json")),
        )


class Policy:
    """What Serve's controller asks, ten times a second. Serve copies this module by value; the delays are Serve's."""

    def __init__(self, **config: Any) -> None:
        self._config = AutoscalingSection.model_validate(config)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of workers, and nothing to remember."""
        usages = reported(context.aggregated_metrics or {}, context.running_replicas)
        return desired_workers(self._config, usages, context.target_num_replicas), {}


def reported(metrics: Mapping[str, Mapping[Any, float]], workers: Sequence[Any]) -> list[Usage]:
    """What the workers have said, measure by measure; those that have not spoken are left out."""
    names = [field.name for field in fields(Usage)]
    spoken = [worker for worker in workers if all(worker in metrics.get(name, {}) for name in names)]
    return [Usage(**{name: metrics[name][worker] for name in names}) for worker in spoken]
