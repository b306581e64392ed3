"""Where speculation pays, predicted from what drafting and verifying cost.

    python -m benchmarks.speculation_model                     numbers like those of an H200, assumed
    python -m benchmarks.speculation_model --alpha .8 --draft-ms 1.2 --step-ms 8 --round-trip-ms 1 --sequences 8
    python -m benchmarks.speculation_model --check             predictions against measurements on this machine

The first two measure nothing. A step of n rows is taken to last step-ms up to a knee, as long as memory sets the pace,
and from there in proportion to n; a draft takes draft-ms a token, however many sequences. See drafting_rounds.py for
the ways of drafting and the formulas, drafting_check.py for what is measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.benchmark import Measured
from benchmarks.conditions import Observation
from benchmarks.drafting_rounds import MAX_DRAFT, WAYS, Curve, Ready, Setting, StepTime, Way, best, best_draft
from benchmarks.options import add_options, positive, read_options
from benchmarks.trial import Trial
from protos.errors import ModelError

if TYPE_CHECKING:
    from benchmarks.drafting_check import Compared, Inputs

NOT_MEASURED = "PREDICTIONS from assumed numbers, not measurements."
TABLE_SEQUENCES = (1, 8, 32, 128)
TABLE_ALPHAS = (0.6, 0.8)
TABLE_ROUND_TRIPS_MS = (0.2, 1.0, 4.0)
CHECK_ROUNDS = 4  # in less than two minutes, even beside something else


@dataclass(frozen=True, slots=True)
class Assumed:
    """The numbers of a prediction, as people write them. The defaults stand for a large model on an H200.

    With them `remote` and `ahead` give the figures of the design's research (8 sequences, alpha 0.8), which did not say
    how often a draft made ahead serves: they follow from four times in five, whatever became of the one before. Its
    0.96 at 128 sequences fixes the knee.
    """

    alpha: float = 0.8
    draft_ms: float = 1.2
    step_ms: float = 8.0
    knee_rows: float = 250.0
    round_trip_ms: float = 1.0
    overhead_ms: float = 0.0
    num_sequences: int = 8
    ready: Ready = field(default_factory=Ready)

    @property
    def setting(self) -> Setting:
        return Setting(
            alpha=self.alpha,
            draft=Curve.level(self.draft_ms / 1000),
            step=StepTime.with_knee(self.step_ms / 1000, self.knee_rows),
            num_sequences=self.num_sequences,
            round_trip_s=self.round_trip_ms / 1000,
            overhead_s=self.overhead_ms / 1000,
            ready=self.ready,
        )

    def __str__(self) -> str:
        row_ms = self.step_ms / self.knee_rows
        return (
            f"t(n) = {self.step_ms:g} ms up to {self.knee_rows:g} rows, then {row_ms:.3g} ms a row; "
            f"d = {self.draft_ms:g} ms a token; o = {self.overhead_ms:g} ms a step; a draft made ahead serves in "
            f"{self.ready.accepted:.0%} of cases after one that was right, in {self.ready.rejected:.0%} after others"
        )


def settings(assumed: Assumed) -> Iterator[Assumed]:
    """The table's, one line each."""
    for num_sequences in TABLE_SEQUENCES:
        for alpha in TABLE_ALPHAS:
            for round_trip_ms in TABLE_ROUND_TRIPS_MS:
                yield replace(assumed, num_sequences=num_sequences, alpha=alpha, round_trip_ms=round_trip_ms)


def print_table(console: Console, assumed: Assumed, max_draft: int) -> None:
    """Every way's gain and best length over sequences, acceptance and distance."""
    console.print(f"{NOT_MEASURED} Gain in tokens/s over plain decoding (best k); off: nothing pays", soft_wrap=True)
    console.print(str(assumed), soft_wrap=True)
    table = _table(console, "b", "alpha", "r, ms", *WAYS)
    for line in settings(assumed):
        gains = [_gain(way, line.setting, max_draft) for way in WAYS]
        table.add_row(str(line.num_sequences), f"{line.alpha:g}", f"{line.round_trip_ms:g}", *gains)
    console.print(table)
    console.print(
        "ahead: each sequence waits for its own draft alone; ahead-together: all wait for all, as a batch would; "
        "ahead-unwaiting: a sequence without a draft takes a plain token",
        soft_wrap=True,
    )


def print_what_if(console: Console, assumed: Assumed, max_draft: int) -> None:
    """Every way's gain and best length in one setting."""
    console.print(NOT_MEASURED, soft_wrap=True)
    console.print(
        f"b = {assumed.num_sequences}; alpha = {assumed.alpha:g}; r = {assumed.round_trip_ms:g} ms; {assumed}",
        soft_wrap=True,
    )
    table = _table(console, "way", "best k", "gain", "best gain with a draft")
    for way in WAYS:
        choice, drafted = best(way, assumed.setting, max_draft), best_draft(way, assumed.setting, max_draft)
        table.add_row(way, str(choice.num_draft), f"{choice.gain:.2f}x", f"{drafted.gain:.2f}x at {drafted.num_draft}")
    console.print(table)


def _gain(way: Way, setting: Setting, max_draft: int) -> str:
    choice = best(way, setting, max_draft)
    if choice.num_draft:
        return f"{choice.gain:.2f}x ({choice.num_draft})"
    return f"off ({best_draft(way, setting, max_draft).gain:.2f}x)"


def check(console: Console, args: argparse.Namespace) -> int:
    """Measure, predict, and print both with the run's conditions. Returns the program's exit code."""
    # Torch and the engine are of no use to the predictions.
    from benchmarks.drafting_check import Rig, compare

    options = replace(read_options(args), pause_s=0.0)  # with one engine, nobody's threads need time to go to sleep
    config = {"model": args.model, "draft_model": args.draft_model, "threads": args.threads}
    observation = Observation.begin("speculation_model", options, config)
    try:
        rig = Rig(Path(args.model), Path(args.draft_model), threads=args.threads, seed=options.seed)
    except ModelError as error:
        print(error, file=sys.stderr)
        return 2
    inputs, compared = compare(rig, options)
    if not inputs.are_possible:
        print("some steps seem to take no time: the machine is too busy; try again, or more --rounds", file=sys.stderr)
        return 1
    trials = list(_trials(compared))
    found = report.Report(observation.end(), trials, list(dict.fromkeys(trial.arm for trial in trials)), "plain")
    report.print_report(replace(found, trials=()), sys.stdout)
    print_comparison(console, inputs, compared)
    if options.json_path is not None:
        report.write_json(found, options.json_path)
    return 0


def print_comparison(console: Console, inputs: Inputs, compared: Sequence[Compared]) -> None:
    """What the predictions are made from, each point, and how far off they are."""
    for line in _described(inputs):
        console.print(line, soft_wrap=True)
    names = ("b", "draft", "alpha", "k", "tokens a round", "E", "measured gain", "predicted", "predicted / measured")
    table = _table(console, *names)
    for one in compared:
        point = one.point
        table.add_row(
            *(str(point.num_sequences), point.kind, f"{point.alpha:g}", str(point.num_draft)),
            *(f"{one.tokens_per_round:.2f}", f"{one.expected_tokens:.2f}"),
            *(f"{one.measured:.2f}x", f"{one.predicted:.2f}x", f"{one.predicted / one.measured:.2f}"),
        )
    console.print(table)
    for size in dict.fromkeys(one.point.num_sequences for one in compared):
        measured_ms = 1000 * median(one.plain_step_s for one in compared if one.point.num_sequences == size)
        predicted_ms = 1000 * inputs.step(size, size)
        console.print(f"plain step of {size}: measured {measured_ms:.3f} ms, predicted {predicted_ms:.3f} ms")
    for kind in dict.fromkeys(one.point.kind for one in compared):
        _print_errors(console, kind, [abs(one.error) for one in compared if one.point.kind == kind])
    _print_errors(console, "all", [abs(one.error) for one in compared])


def _print_errors(console: Console, what: str, errors: Sequence[float]) -> None:
    console.print(
        f"{what}: {len(errors)} points, off by {median(errors):.1%} in the median and by {max(errors):.1%} at worst"
    )


def _described(inputs: Inputs) -> Iterator[str]:
    yield f"t(n), ms: {_points(inputs.step.by_rows)}"
    yield f"c = {inputs.step.per_sequence_s * 1000:.3f} ms a sequence; o = {inputs.overhead_s * 1000:.3f} ms a step"
    yield f"d(b), ms a token: {_points(inputs.draft)}; and of a draft besides: {_points(inputs.draft_fixed)}"


def _points(curve: Curve) -> str:
    return ", ".join(f"{x:g}: {y * 1000:.3f}" for x, y in curve.points)


def _trials(compared: Sequence[Compared]) -> Iterator[Trial]:
    for one in compared:
        for index, gain in enumerate(one.rounds):
            values = {
                "tokens_per_s": gain.tokens_per_s,
                "tokens_per_round": gain.tokens_per_round,
                "gain": gain.against_plain(one.point.num_sequences),
                "predicted_gain": one.predicted,
            }
            yield Trial(f"{one.point.num_sequences} sequences", str(one.point), index, Measured(values))


def _table(console: Console, *names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.MARKDOWN)
    for name in names:
        table.add_column(name, justify="right")
    return table


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.speculation_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what_if = made.add_argument_group("a setting of one's own (any of these: one line for each way of drafting)")
    default = Assumed()
    for name, kind, number, text in (
        ("--alpha", _probability, default.alpha, "probability that the next drafted token is right"),
        ("--draft-ms", _not_negative, default.draft_ms, "d: a drafted token of every sequence"),
        ("--step-ms", _above_zero, default.step_ms, "t: the target's step, as long as it waits for memory"),
        ("--round-trip-ms", _not_negative, default.round_trip_ms, "r: between target and drafter"),
        ("--sequences", positive, default.num_sequences, "b: how many decode at once"),
    ):
        what_if.add_argument(name, type=kind, help=f"{text} (default {number:g})")
    assumed = made.add_argument_group("assumptions of every prediction")
    for name, kind, number, text in (
        ("--knee-rows", _above_zero, default.knee_rows, "rows from which a step grows in proportion"),
        ("--overhead-ms", _not_negative, default.overhead_ms, "o: of each speculated step"),
        ("--ready-accepted", _probability, default.ready.accepted, "a draft made ahead serves after one all right"),
        ("--ready-rejected", _probability, default.ready.rejected, "the same after one that was not"),
        ("--max-draft", positive, MAX_DRAFT, "longest draft looked at, tokens"),
    ):
        assumed.add_argument(name, type=kind, default=number, help=f"{text} (default {number:g})")
    checked = made.add_argument_group("check")
    checked.add_argument("--check", action="store_true", help="measure on this machine; takes a minute or two")
    checked.add_argument("--model", default="models/target", help="a Hugging Face directory (default models/target)")
    checked.add_argument("--draft-model", default="models/drafter", help="the small one (default models/drafter)")
    checked.add_argument("--threads", type=positive, default=2, help="CPU threads of the target (default 2)")
    add_options(made, rounds=CHECK_ROUNDS)
    return made


def _number(text: str, is_good: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and is_good(value)):
        raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
    return value


def _probability(text: str) -> float:
    return _number(text, lambda value: 0 <= value <= 1, "a probability in [0, 1]")


def _not_negative(text: str) -> float:
    return _number(text, lambda value: value >= 0, "a number of 0 or more")


def _above_zero(text: str) -> float:
    return _number(text, lambda value: value > 0, "a number above 0")


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser()
    args = made.parse_args(arguments)
    given = {
        "alpha": args.alpha,
        "draft_ms": args.draft_ms,
        "step_ms": args.step_ms,
        "round_trip_ms": args.round_trip_ms,
        "num_sequences": args.sequences,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if args.check and given:
        made.error("--check measures: leave out --alpha, --draft-ms, --step-ms, --round-trip-ms and --sequences")
    console = _console()
    if args.check:
        return check(console, args)
    ready = Ready(args.ready_accepted, args.ready_rejected)
    assumed = Assumed(knee_rows=args.knee_rows, overhead_ms=args.overhead_ms, ready=ready)
    if given:
        print_what_if(console, replace(assumed, **given), args.max_draft)
    else:
        print_table(console, assumed, args.max_draft)
    return 0


def _console() -> Console:
    console = Console(highlight=False)
    if console.is_terminal:
        return console
    return Console(highlight=False, width=report.PIPED_WIDTH, color_system=None)


if __name__ == "__main__":
    sys.exit(main())
