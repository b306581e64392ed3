"""A routing policy from its configuration."""

from __future__ import annotations

from typing import assert_never

from router.config import RoutingSection
from router.routing.baselines import ConsistentHash, LeastLoaded, Random, RoundRobin
from router.routing.cost import CostModel
from router.routing.prefix import PrefixAffinity
from router.routing.protocol import Policy


def make_cost(config: RoutingSection) -> CostModel:
    """The scale that the configured policy compares on."""
    return CostModel(load_weight=config.load_weight, crowd_tokens=config.crowd_tokens)


def make_policy(config: RoutingSection) -> Policy:
    """The configured policy, new: nothing is shared with another router's."""
    cost = make_cost(config)
    match config.policy:
        case "prefix":
            return PrefixAffinity(cost)
        case "least_loaded":
            return LeastLoaded(cost)
        case "round_robin":
            return RoundRobin(cost)
        case "random":
            return Random(cost, seed=config.seed)
        case "consistent_hash":
            return ConsistentHash(cost)
        case _:
            assert_never(config.policy)
