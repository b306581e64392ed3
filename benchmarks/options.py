"""The command-line options that every benchmark has."""

from __future__ import annotations

import argparse
import secrets
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """How a benchmark is run, whatever it measures."""

    rounds: int = 5
    warmup_rounds: int = 1
    pause_s: float = 0.4  # a spinning thread pool of one arm would disturb the next
    seed: int = 0
    quick: bool = False
    json_path: Path | None = None


def add_options(
    parser: argparse.ArgumentParser, *, rounds: int = Options.rounds, seed: int | None = Options.seed
) -> None:
    """Declare the shared options with the benchmark's own defaults. `seed` None: a new one each time, for what outlives
    a run and would find the last one's prompts in its cache.
    """
    default_seed = "a new one each time" if seed is None else seed
    group = parser.add_argument_group("every benchmark")
    group.add_argument("--rounds", type=positive, help=f"counted rounds (default {rounds}; 1 if quick)")
    group.add_argument("--warmup-rounds", type=int, default=Options.warmup_rounds, help="rounds not counted")
    group.add_argument("--pause", type=float, default=Options.pause_s, help="seconds between two measurements")
    group.add_argument(
        "--seed", type=int, default=seed, help=f"every workload's derives from it (default {default_seed})"
    )
    group.add_argument("--quick", action="store_true", help="few rounds, small workloads: not for quoting")
    group.add_argument("--json", type=Path, help="also write one JSON object a line to this file")
    parser.set_defaults(default_rounds=rounds)


def read_options(args: argparse.Namespace) -> Options:
    """The shared options among parsed arguments."""
    return Options(
        rounds=args.rounds or (1 if args.quick else args.default_rounds),
        warmup_rounds=max(args.warmup_rounds, 0),
        pause_s=max(args.pause, 0.0),
        seed=secrets.randbelow(2**32) if args.seed is None else args.seed,
        quick=args.quick,
        json_path=args.json,
    )


def positive(text: str) -> int:
    """An option's value that must be 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
