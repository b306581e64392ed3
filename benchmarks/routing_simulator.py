"""What a routing policy is worth: the router's own policies and index, run against simulated workers.

    python -m benchmarks.routing_simulator
    python -m benchmarks.routing_simulator --scenarios herd --policies prefix,least_loaded --routers 3
    python -m benchmarks.routing_simulator --workers 1000 --rate 10000 --seconds 3 --scenarios steady --policies prefix

Workers are models (`benchmarks/route_workers.py`), so the times are simulated and the same on every machine; the seed
decides everything. What is compared are policies, not products: how long first tokens take, what is found in caches,
how evenly workers are busy, who is refused.

steady: tenants with contexts of their own, popular by Zipf's law, conversations of some turns. hot-spot: half of the
requests belong to one more tenant. herd: 500 siblings of a new context at one moment, over half of the steady load.
churn: twice a quarter of the workers is lost and replaced. nothing-shared: no prompt begins like another.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

from benchmarks import harness
from benchmarks.benchmark import Arm, Benchmark, Measured, Workload
from benchmarks.options import add_options, positive, read_options
from benchmarks.percentiles import percentile
from benchmarks.route_cluster import Change, Cluster, Fleet, Tally
from benchmarks.route_traces import Traffic, make_trace
from benchmarks.route_workers import Hardware
from router.config import RoutingSection

SCENARIOS: Final = ("steady", "hot-spot", "herd", "churn", "nothing-shared")
POLICIES: Final = ("prefix", "least_loaded", "round_robin", "random", "consistent_hash")
BASELINE: Final = "least_loaded"
REQUESTS_PER_WORKER_S: Final = 7.5
TENANTS_PER_WORKER: Final = 19
SECONDS: Final = 30.0
QUICK_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """What arrives at which cluster, and what becomes of the cluster."""

    traffic: Traffic
    fleet: Fleet
    changes: tuple[Change, ...] = ()


def make_scenario(name: str, fleet: Fleet, *, requests_per_s: float, seconds: float) -> Scenario:
    """One of SCENARIOS at a size."""
    steady = Traffic(seconds, requests_per_s, num_tenants=TENANTS_PER_WORKER * fleet.num_workers)
    match name:
        case "steady":
            return Scenario(steady, fleet)
        case "hot-spot":
            return Scenario(replace(steady, hot_share=0.5), fleet)
        case "herd":
            return Scenario(replace(steady, requests_per_s=requests_per_s / 2, num_siblings=500), fleet)
        case "churn":
            quarter = max(1, fleet.num_workers // 4)
            return Scenario(steady, fleet, (Change(seconds / 3, quarter), Change(seconds * 2 / 3, quarter)))
        case "nothing-shared":
            return Scenario(replace(steady, num_tenants=0, mean_turns=1.0), fleet)
        case _:
            raise ValueError(f"no scenario is called {name!r}; there are {', '.join(SCENARIOS)}")


def measure(policy: RoutingSection, workload: Workload[Scenario]) -> Measured:
    """Play the workload's trace under a policy."""
    scenario = workload.params
    cluster = Cluster(scenario.fleet, Hardware(block_size=scenario.traffic.block_size), policy)
    tally = cluster.run(make_trace(scenario.traffic, workload.seed), scenario.changes)
    return Measured(_values(tally, cluster), refusals={"queue full": tally.num_refused} if tally.num_refused else {})


def _values(tally: Tally, cluster: Cluster) -> Mapping[str, float]:
    predictions = cluster.predictions
    reasons = {f"{reason}_percent": 100 * n / tally.reasons.total() for reason, n in sorted(tally.reasons.items())}
    return {
        "output_tokens_per_s": tally.output_tokens / tally.end_s,
        "ttft_p50_ms": 1000 * percentile(tally.ttft_s, 50),
        "ttft_p90_ms": 1000 * percentile(tally.ttft_s, 90),
        "hit_percent": 100 * tally.cached_tokens / max(1, tally.prompt_tokens),
        "imbalance": tally.imbalance,
        "num_ended": tally.num_ended,
        "num_moved": tally.num_moved,
        "num_resyncs": tally.num_resyncs,
        "mean_prediction_error_tokens": predictions.error_tokens / max(1, predictions.num_replies),
        **reasons,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing_simulator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, rounds=3)
    parser.add_argument("--workers", type=positive, default=8, help="simulated workers (default 8)")
    parser.add_argument("--routers", type=positive, default=1, help="routers, which do not talk (default 1)")
    parser.add_argument("--rate", type=float, help=f"requests per second (default {REQUESTS_PER_WORKER_S} a worker)")
    parser.add_argument("--seconds", type=float, help=f"of arrivals (default {SECONDS:g}; {QUICK_SECONDS:g} if quick)")
    parser.add_argument("--scenarios", type=_listed(SCENARIOS), default=SCENARIOS, help="some, with commas between")
    parser.add_argument("--policies", type=_listed(POLICIES), default=POLICIES, help="some, with commas between")
    args = parser.parse_args(arguments)
    options = replace(read_options(args), warmup_rounds=0, pause_s=0.0)  # nothing here depends on the machine
    return harness.main(_benchmark(args, quick=options.quick), options)


def _benchmark(args: argparse.Namespace, *, quick: bool) -> Benchmark[Scenario]:
    fleet = Fleet(num_workers=args.workers, num_routers=args.routers)
    requests_per_s = args.rate or REQUESTS_PER_WORKER_S * args.workers
    seconds = args.seconds or (QUICK_SECONDS if quick else SECONDS)
    return Benchmark(
        "routing simulator",
        [
            Workload(name, make_scenario(name, fleet, requests_per_s=requests_per_s, seconds=seconds))
            for name in args.scenarios
        ],
        [_arm(policy) for policy in args.policies],
        baseline=BASELINE if BASELINE in args.policies else args.policies[0],
        config={"worker": asdict(Hardware())},
    )


def _arm(name: str) -> Arm[Scenario]:
    routing = RoutingSection.model_validate({"policy": name})
    return Arm(name, lambda workload: measure(routing, workload))


def _listed(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of some of the known names, with commas between."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not among {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
