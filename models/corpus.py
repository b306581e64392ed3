"""The text the shipped models learn from: the Python standard library's own source.

Every Python installation carries it, under the PSF License Agreement (version 2), which allows derivative works.
Files are split into training and held-out text by a hash of their path, so the split never depends on order.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]

HELDOUT_PERCENT = 2
MAX_FILE_BYTES = 400_000  # above this a file is a table, not a program
# Tables of code points, generated text and deliberately broken files: nothing to learn Python from.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__", "lib2to3"})


def library_root() -> Path:
    """The folder that holds this interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def split_of(relative: Path) -> Split:
    """Which split a file belongs to, from a hash of its path."""
    digest = hashlib.sha256(relative.as_posix().encode()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") % 100 < HELDOUT_PERCENT else "train"


def documents(split: Split) -> Iterator[str]:
    """The split's files as text, in path order. Files that are not UTF-8 or are too large are passed over."""
    root = library_root()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or split_of(relative) != split:
            continue
        if path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield text
