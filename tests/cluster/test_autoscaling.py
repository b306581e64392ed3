"""The rule for the number of workers, and what Serve makes of it."""

from __future__ import annotations

from dataclasses import asdict, fields
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.build_app import build_app as flatten
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingContext

from cluster.app import ROUTER_NAME, WORKER_NAME, build, threads_per_worker
from cluster.autoscaling import desired_workers, follow, reported
from cluster.commands.serve import _workers as workers_in_words
from cluster.config import AutoscalingSection, load
from protos.errors import ConfigError
from workers.usage import Usage

NAMES = [field.name for field in fields(Usage)]
CONFIG = AutoscalingSection(min_workers=1, max_workers=8, target_queued_tokens=1000, target_kv_use=0.8)
IN_TIME = CONFIG.model_copy(update={"target_first_token_s": 0.5})

shares = st.floats(0, 1)
tokens = st.floats(0, 20_000)
usages = st.builds(
    Usage,
    queued_tokens=tokens,
    pending_tokens=tokens,
    kv_use=shares,
    num_running=st.floats(0, 8),
    max_running=st.just(8.0),
    first_token_s=st.floats(0, 2),
)
fleets = st.lists(usages, max_size=8)
configs = st.builds(
    lambda least, more, target_s: AutoscalingSection(
        min_workers=least, max_workers=max(least + more, 1), target_queued_tokens=1000, target_first_token_s=target_s
    ),
    st.integers(0, 4),
    st.integers(0, 8),
    st.none() | st.floats(0.1, 1),
)


def fleet(number: int, **usage: float) -> list[Usage]:
    """Workers that all say the same."""
    return [Usage(**{"max_running": 8.0, **usage})] * number


@pytest.mark.parametrize(
    ("told", "current", "wanted"),
    [
        pytest.param(fleet(2), 2, 1, id="idle: one goes"),
        pytest.param(fleet(4), 4, 3, id="idle: only one goes"),
        pytest.param(fleet(1), 1, 1, id="idle: the last stays"),
        pytest.param([], 3, 3, id="nobody says anything"),
        pytest.param(fleet(1, queued_tokens=900), 1, 1, id="little waits"),
        pytest.param(fleet(1, queued_tokens=1001), 1, 2, id="a little too much waits"),
        pytest.param(fleet(1, queued_tokens=4500), 1, 5, id="much waits"),
        pytest.param(fleet(1, queued_tokens=90_000), 1, 8, id="more than the most would do waits"),
        pytest.param(fleet(3, queued_tokens=2500), 3, 3, id="enough for what waits, which all tell"),
        pytest.param([Usage(queued_tokens=4500), *fleet(1)], 2, 5, id="one has not yet heard what waits"),
        pytest.param(fleet(2, pending_tokens=1500), 2, 3, id="prompts wait at the workers"),
        pytest.param(fleet(2, queued_tokens=1200, pending_tokens=500), 2, 3, id="prompts wait here and there"),
        pytest.param(fleet(1, queued_tokens=4500), 5, 5, id="those asked for are not there yet"),
        pytest.param(fleet(2, kv_use=0.9), 2, 3, id="memory is full"),
        pytest.param(fleet(3, kv_use=0.8), 3, 3, id="memory is as full as it should be"),
        pytest.param(fleet(3, kv_use=0.45), 3, 3, id="memory would be too full without one"),
        pytest.param(fleet(3, kv_use=0.4), 3, 2, id="memory would do without one"),
        pytest.param(fleet(3, num_running=8), 3, 3, id="all run what they can, and nothing waits"),
        pytest.param(fleet(3, num_running=5), 3, 3, id="what runs would fill two"),
        pytest.param(fleet(3, num_running=4), 3, 2, id="what runs fits two"),
        pytest.param(fleet(2, first_token_s=99), 2, 1, id="slow, and no matter"),
        pytest.param(fleet(12, queued_tokens=99_000), 12, 8, id="more than there may be"),
    ],
)
def test_the_number_of_workers_follows_the_load(told: list[Usage], current: int, wanted: int) -> None:
    assert desired_workers(CONFIG, told, current) == wanted


@pytest.mark.parametrize(
    ("first_token_s", "current", "wanted"),
    [(0.6, 2, 3), (9.0, 2, 3), (9.0, 3, 3), (0.5, 2, 2), (0.25, 2, 2), (0.19, 2, 1)],
)
def test_slow_first_tokens_ask_for_one_more_than_there_are(first_token_s: float, current: int, wanted: int) -> None:
    """Of the two workers that speak; a third may have been asked for already."""
    assert desired_workers(IN_TIME, fleet(2, first_token_s=first_token_s), current) == wanted


def test_none_are_left_only_where_that_is_allowed() -> None:
    to_none = CONFIG.model_copy(update={"min_workers": 0})
    assert desired_workers(to_none, fleet(1), 1) == 0
    assert desired_workers(to_none, [], 0) == 0
    assert desired_workers(to_none, fleet(1, num_running=0.01), 1) == 1
    assert desired_workers(to_none, fleet(1, queued_tokens=1), 1) == 1


@given(configs, fleets, st.integers(0, 16))
def test_it_stays_within_its_bounds_and_goes_down_by_one(
    config: AutoscalingSection, told: list[Usage], current: int
) -> None:
    wanted = desired_workers(config, told, current)
    assert config.min_workers <= wanted <= config.max_workers
    assert wanted >= min(current - 1, config.max_workers)


@given(configs, st.data(), st.lists(st.tuples(usages, usages), max_size=8), st.integers(0, 12))
def test_more_load_never_means_fewer_workers(
    config: AutoscalingSection, data: st.DataObject, pairs: list[tuple[Usage, Usage]], current: int
) -> None:
    less = [Usage(**{name: min(getattr(a, name), getattr(b, name)) for name in NAMES}) for a, b in pairs]
    more = [Usage(**{name: max(getattr(a, name), getattr(b, name)) for name in NAMES}) for a, b in pairs]
    fewer = data.draw(st.integers(0, current))
    assert desired_workers(config, less, fewer) <= desired_workers(config, more, current)


def spread(num_outputs: float, num_workers: int) -> list[Usage]:
    """What workers say that share this many outputs: those that do not fit wait, with 300 tokens each."""
    running = min(num_outputs / num_workers, 8.0)
    queued_tokens = max(num_outputs - 8 * num_workers, 0) * 300
    return fleet(num_workers, num_running=running, kv_use=running / 16, queued_tokens=queued_tokens)


@given(st.floats(0, 80), st.integers(1, 8), st.lists(st.floats(0.9, 1.1), min_size=40, max_size=40))
def test_a_steady_load_settles_whatever_its_noise(num_outputs: float, current: int, noise: list[float]) -> None:
    counts = [current]
    for factor in noise:
        counts.append(desired_workers(CONFIG, spread(num_outputs * factor, counts[-1]), counts[-1]))
    changes = [after - before for before, after in pairwise(counts) if after != before]
    first_fall = next((i for i, change in enumerate(changes) if change < 0), len(changes))
    assert all(change < 0 for change in changes[first_fall:]), "it has grown again"
    least = spread(num_outputs * 0.9, counts[-1])[0]
    assert least.queued_tokens <= CONFIG.target_queued_tokens * counts[-1] or counts[-1] == CONFIG.max_workers


def context(told: dict[str, Usage], *, current: int, silent: tuple[str, ...] = ()) -> AutoscalingContext:
    """What Serve's controller shows a policy."""
    deployment = DeploymentID("Worker", "headwater")
    ids = {name: ReplicaID(name, deployment) for name in (*told, *silent)}
    metrics = {name: {ids[worker]: getattr(usage, name) for worker, usage in told.items()} for name in NAMES}
    return AutoscalingContext(
        deployment_id=deployment,
        deployment_name="Worker",
        app_name="headwater",
        current_num_replicas=len(ids),
        target_num_replicas=current,
        running_replicas=list(ids.values()),
        total_num_requests=0,
        total_queued_requests=0,
        aggregated_metrics=metrics if told else {},
        raw_metrics={},
        capacity_adjusted_min_replicas=CONFIG.min_workers,
        capacity_adjusted_max_replicas=CONFIG.max_workers,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=None,
    )


def test_serve_asks_the_same_rule() -> None:
    """As its controller does: from the bytes that it was sent."""
    serve_config = follow(IN_TIME)
    assert (serve_config.min_replicas, serve_config.max_replicas) == (1, 8)
    assert serve_config.upscale_delay_s == IN_TIME.upscale_delay_s
    assert serve_config.downscale_delay_s == IN_TIME.downscale_delay_s
    policy = serve_config.policy.get_policy()(**serve_config.policy.policy_kwargs)
    busy = Usage(queued_tokens=4500, max_running=8)
    assert policy(context({"a": busy}, current=1)) == (5, {})
    assert policy(context({"a": busy}, current=1, silent=("b",))) == (5, {})
    assert policy(context({"a": Usage(), "b": Usage()}, current=2)) == (1, {})
    assert policy(context({"a": Usage(first_token_s=2), "b": Usage(first_token_s=2)}, current=2)) == (3, {})
    assert policy(context({}, current=3, silent=("a",))) == (3, {})


def test_workers_that_have_not_spoken_are_left_out() -> None:
    told: dict[str, Any] = {"a": Usage(kv_use=0.5), "b": Usage(kv_use=0.25)}
    metrics = {name: {worker: asdict(usage)[name] for worker, usage in told.items()} for name in NAMES}
    del metrics["num_running"]["b"]
    assert reported(metrics, ["a", "b", "c"]) == [told["a"]]
    assert reported({}, ["a"]) == []


FROM_NONE = "cluster.autoscaling={min_workers: 0, max_workers: 3}"
PATIENT = "router.limits.no_worker_grace_s=120"


def test_serve_is_given_bounds_instead_of_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.app.num_cores", lambda: 6)
    config = load(None, [FROM_NONE, PATIENT])
    deployments = {deployment.name: deployment for deployment in flatten(build(config), name="headwater").deployments}
    scaling = deployments[WORKER_NAME]._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (0, 3)
    assert deployments[ROUTER_NAME]._deployment_config.autoscaling_config is None
    assert deployments[ROUTER_NAME].init_kwargs["on_demand"] is True
    assert threads_per_worker(config, local=True) == 2


def test_a_fixed_number_of_workers_is_always_there() -> None:
    deployments = {one.name: one for one in flatten(build(load(None)), name="headwater").deployments}
    assert deployments[WORKER_NAME]._deployment_config.autoscaling_config is None
    assert deployments[ROUTER_NAME].init_kwargs["on_demand"] is False
    some = flatten(build(load(None, ["cluster.autoscaling={max_workers: 3}"])), name="headwater").deployments
    assert {one.name: one for one in some}[ROUTER_NAME].init_kwargs["on_demand"] is False


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.autoscaling={}"], "`cluster.autoscaling.max_workers`"),
        (["cluster.autoscaling={min_workers: 3, max_workers: 2}"], "max_workers 2 is below min_workers 3"),
        (["cluster.autoscaling={min_workers: -1, max_workers: 2}"], "`cluster.autoscaling.min_workers`"),
        (["cluster.autoscaling={max_workers: 2, target_kv_use: 1.5}"], "`cluster.autoscaling.target_kv_use`"),
        (["cluster.autoscaling={max_workers: 2, target_queued_tokens: 0}"], "target_queued_tokens"),
        (["cluster.autoscaling={max_wokers: 2}"], "did you mean `cluster.autoscaling.max_workers`"),
        ([FROM_NONE], "router.limits.no_worker_grace_s is 5; set that to 120 or more"),
        ([FROM_NONE, PATIENT, "cluster.ready_timeout_s=121"], "cluster.ready_timeout_s = 121 s"),
    ],
)
def test_bounds_that_cannot_be_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, overrides)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.num_workers=1"], "1 worker"),
        (["cluster.autoscaling={max_workers: 4}"], "1 to 4 workers"),
        (["cluster.autoscaling={min_workers: 2, max_workers: 2}"], "2 workers"),
        ([FROM_NONE, PATIENT], "0 to 3 workers"),
    ],
)
def test_the_welcome_says_how_many_there_may_be(overrides: list[str], words: str) -> None:
    assert workers_in_words(load(None, overrides).cluster) == words
