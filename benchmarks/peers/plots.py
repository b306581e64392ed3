"""Pictures of a run: throughput against the length of the shared prefix, and against the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.peers.workloads import Work
from benchmarks.results import Cell

METRIC = "decode_tokens_per_s"
Line = list[tuple[int, float]]


def lines(found: Sequence[Cell], works: Mapping[str, Work], *, shared: bool) -> dict[str, Line]:
    """By arm: decoding speed over prefix length where one prefix is shared, or over batch where none is."""
    made: dict[str, Line] = {}
    for cell in found:
        work = works[cell.workload]
        if cell.metric != METRIC or len(work.shared) != int(shared):
            continue
        made.setdefault(cell.arm, []).append((work.prefix_tokens if shared else work.batch, cell.median))
    return {arm: sorted(line) for arm, line in made.items()}


def draw(found: Sequence[Cell], works: Mapping[str, Work], folder: Path, title: str) -> list[Path]:
    """Write both pictures as PNG. Raises ImportError where matplotlib is not installed."""
    import matplotlib  # type: ignore[import-not-found,unused-ignore]

    matplotlib.use("agg")
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, label, shared in (("prefix", "shared prefix, tokens", True), ("batch", "sequences", False)):
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        drawn = lines(found, works, shared=shared)
        for arm, line in drawn.items():
            axes.plot(*zip(*line, strict=True), marker="o", label=arm)
        axes.set(title=title, xlabel=label, ylabel="decoded tokens/s", xscale="log", yscale="log")
        ticks = sorted({at for line in drawn.values() for at, _ in line})
        axes.set_xticks(ticks, labels=[f"{at:,}" for at in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter("{x:,.0f}")
        axes.legend()
        axes.grid(alpha=0.3)
        written.append(folder / f"{title.replace(' ', '-')}-{name}.png")
        figure.savefig(written[-1], dpi=110)
        pyplot.close(figure)
    return written
