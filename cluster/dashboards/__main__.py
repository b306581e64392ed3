"""`python -m cluster.dashboards [FOLDER]`: write every dashboard, as FOLDER/UID.json; by default to deploy/grafana."""

from __future__ import annotations

import sys
from pathlib import Path

from cluster.dashboards.boards import BOARDS
from cluster.dashboards.grafana import encode

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana"


def main(folder: Path) -> None:
    """Dashboards that are no longer made are removed."""
    for file in folder.glob("*.json"):
        file.unlink()
    for board in BOARDS:
        (folder / f"{board.uid}.json").write_text(encode(board), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
