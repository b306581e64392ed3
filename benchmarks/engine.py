"""Our engine, in process, against the engines a user could pick instead, on this CPU.

    python -m benchmarks.engine --setup                      # environments and models: once, many minutes
    python -m benchmarks.engine --models random --only ours,vllm --workloads shared-1k,tree
    python -m benchmarks.engine --variant 'per-sequence={"engine": {"sharing": {"mode": "never"}}}'
    python -m benchmarks.engine --only ours,cluster          # what client, gRPC, router and session leave of it

Every engine is one process in an environment of its own, resident throughout, asked in turn, with the same weights and
the same prompts as token ids, greedy. A workload is run twice in a round, with other prompts: to one token, and to all:

    e2e tokens/s = B * n / wall(n)        decode tokens/s = B * (n - 1) / (wall(n) - wall(1))

Prompts are new in every round and run; shared prefixes are computed before the clock starts. What an engine declines
is told with its reason, and an engine that fails, hangs or dies is reported and costs the others nothing. The engines
and their settings are in `peers/contenders.py`, the line protocol in `peers/line.py`, the floor in `peers/floor.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import harness, report
from benchmarks.benchmark import Benchmark, Workload
from benchmarks.conditions import ROOT, Observation
from benchmarks.options import Options, add_options, positive, read_options
from benchmarks.peers import plots
from benchmarks.peers.answers import Agreement, Answers
from benchmarks.peers.contenders import CLUSTER, OURS, PEERS, Contender, Entrant, Race, prepare, usable_cores
from benchmarks.peers.environment import SetupFailedError
from benchmarks.peers.floor import Floor, measure_floor
from benchmarks.peers.leads import Lead, leads
from benchmarks.peers.models import MODEL_NAMES, Model, ModelName
from benchmarks.peers.workloads import LARGE_WORKS, WORKS, Work, source, works
from benchmarks.progress import Progress
from benchmarks.results import cells

CACHE = ROOT / ".headwater" / "benchmarks"


@dataclass(frozen=True)
class Outcome:
    """One model's run: the harness's report and what only this benchmark knows."""

    model: ModelName
    works: Mapping[str, Work]
    report: report.Report
    leads: Sequence[Lead]
    agreements: Sequence[Agreement]

    def rows(self) -> Iterator[dict[str, object]]:
        """As JSON objects."""
        yield from report.rows(self.report)
        for lead in self.leads:
            yield {"lead": asdict(lead)}
        for agreement in self.agreements:
            yield {"model": self.model, "agreement": asdict(agreement)}


async def compare(model: Model, chosen: Sequence[Contender], args: argparse.Namespace, options: Options) -> Outcome:
    """Run every chosen engine on every chosen workload of one model."""
    asked = workloads(model, args)
    floor, answers = await asyncio.to_thread(measure_floor, len(usable_cores())), Answers()
    named = {workload.name: workload.params for workload in asked}
    race = Race(model, named, source(model.name), options.seed, floor, answers, usable_cores(), args.answer_timeout)
    entrants = [Entrant(contender, race, say) for contender in chosen]
    benchmark = Benchmark(f"engine, {model.name}", asked, [entrant.arm() for entrant in entrants])
    observation = Observation.begin(benchmark.name, options, {})
    num_steps = sum(1 for _ in harness.schedule(benchmark, options))
    with Progress(num_steps) as progress:
        trials = await harness.run(benchmark, options, progress.step)
    conditions = replace(observation.end(), config=_config(race, floor, entrants))
    arms = [contender.name for contender in chosen]
    peers = [contender.name for contender in chosen if not contender.is_ours]
    return Outcome(
        model.name,
        named,
        report.Report(conditions, trials, arms, benchmark.baseline_arm),
        leads(trials, OURS.name, peers),
        answers.agreement(OURS.name),
    )


def _config(race: Race, floor: Floor, entrants: Sequence[Entrant]) -> dict[str, object]:
    """What a reader must know beyond the machine."""
    model = asdict(race.model.shape)
    told = {f"engine {entrant.contender.name}": entrant.facts for entrant in entrants}
    asked = {f"workload {name}": asdict(work) for name, work in race.works.items()}
    return {"model": model, "floor": floor.facts(), **told, **asked}


def workloads(model: Model, args: argparse.Namespace) -> list[Workload[Work]]:
    """Those chosen that the model has and can hold; the others are named on standard error."""
    made = []
    for name, work in works(model.name).items():
        if args.workloads and name not in args.workloads:
            continue
        sized = work.quick() if args.quick else work
        if sized.context_tokens > model.shape.max_position_embeddings:
            say(f"{model.name}, {name}: skipped, {sized.context_tokens} tokens exceed the model's context")
            continue
        made.append(Workload(f"{model.name}, {name}", sized))
    return made


def contenders(args: argparse.Namespace) -> list[Contender]:
    """Ours first, then its variants, then the peers; only those named, if any are."""
    variants = [replace(OURS, name=name, options=options) for name, options in args.variant or []]
    everybody = [replace(OURS, options=args.ours), *variants, replace(CLUSTER, options=args.ours), *PEERS]
    wanted = args.only or [contender.name for contender in everybody if contender.program != CLUSTER.program]
    unknown = set(wanted) - {contender.name for contender in everybody}
    if unknown:
        names = ", ".join(contender.name for contender in everybody)
        raise ValueError(f"--only names {', '.join(sorted(unknown))}; there are {names}")
    return [contender for contender in everybody if contender.name in wanted]


def set_up(models: Sequence[Model], chosen: Sequence[Contender]) -> int:
    """Make all environments and models; the exit code. One that fails keeps no other from being made."""
    failed = 0
    for contender in chosen:
        for model in models:
            try:
                prepare(contender, model, say)
            except SetupFailedError as error:
                say(f"FAILED  {contender.name}, {model.name}: {error}")
                failed = 1
                continue
            say(f"{contender.name}, {model.name}: set up")
    return failed


def print_outcome(outcome: Outcome) -> None:
    """The harness's tables, then the leads and the agreement."""
    report.print_report(outcome.report, sys.stdout)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=report.PIPED_WIDTH, color_system=None)
    style = box.SIMPLE_HEAD if console.is_terminal else box.MARKDOWN
    ahead = Table("workload", "metric", "best peer", "ours is faster", title="ours against the best peer", box=style)
    for lead in outcome.leads:
        ahead.add_row(lead.workload, lead.metric, lead.peer, f"{lead.times:.2f}x")
    equal = Table("arm", "outputs", "first token, %", "until they part, %", title="tokens equal to ours", box=style)
    for found in outcome.agreements:
        equal.add_row(found.arm, str(found.num_outputs), f"{found.first_percent:.1f}", f"{found.all_percent:.1f}")
    for table in (ahead, equal):
        if table.row_count:
            console.print(table)


def say(text: str) -> None:
    """Progress that is no result."""
    print(text, file=sys.stderr, flush=True)


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _tree(text: str) -> dict[str, Any]:
    """A part of WorkerConfig's tree, as JSON."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object")
    return value


def _variant(text: str) -> tuple[str, dict[str, Any]]:
    name, _, tree = text.partition("=")
    return name, _tree(tree)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--setup", action="store_true", help="make environments and models, measure nothing")
    made.add_argument("--only", type=_names, help="these engines, such as ours,vllm (default all)")
    made.add_argument("--models", type=_names, default=list(MODEL_NAMES), help=f"of {', '.join(MODEL_NAMES)}")
    made.add_argument("--workloads", type=_names, help=f"of {', '.join({**WORKS, **LARGE_WORKS})} (default all)")
    made.add_argument("--ours", type=_tree, default={}, metavar="JSON", help="laid over our engine's configuration")
    made.add_argument("--variant", type=_variant, action="append", metavar="NAME=JSON", help="another arm of ours")
    made.add_argument("--cache", type=Path, default=CACHE, help="where environments and models are kept")
    made.add_argument("--plots", type=Path, metavar="DIR", help="also draw the results there; needs matplotlib")
    made.add_argument("--answer-timeout", type=positive, default=300, help="seconds that one run may take")
    add_options(made, rounds=5)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, set up or run; the exit code."""
    command_line = parser()
    args = command_line.parse_args(arguments)
    for option, known in (("models", MODEL_NAMES), ("workloads", {**WORKS, **LARGE_WORKS})):
        unknown = set(getattr(args, option) or []) - set(known)
        if unknown:
            command_line.error(f"--{option} names {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    try:
        chosen = contenders(args)
    except ValueError as error:
        command_line.error(str(error))
    models = [Model(name, args.cache.resolve()) for name in MODEL_NAMES if name in args.models]
    if args.setup:
        return set_up(models, chosen)
    return _run(models, chosen, args)


def _run(models: Sequence[Model], chosen: Sequence[Contender], args: argparse.Namespace) -> int:
    options, outcomes = read_options(args), []
    for model in models:
        if not workloads(model, args):
            continue
        outcome = asyncio.run(compare(model, chosen, args, options))
        outcomes.append(outcome)
        print_outcome(outcome)
        if options.json_path is not None:
            _write_json(outcomes, options.json_path)
        if args.plots is not None:
            found = cells(outcome.report.trials, outcome.report.baseline)
            plots.draw(found, outcome.works, args.plots, f"engine {model.name}")
    return 0 if all(trial.is_clean for outcome in outcomes for trial in outcome.report.trials) else 1


def _write_json(outcomes: Sequence[Outcome], path: Path) -> None:
    """After every model, so that what was measured is not lost with what comes later."""
    rows = (row for outcome in outcomes for row in outcome.rows())
    path.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
