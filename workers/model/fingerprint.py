"""A name for a model's weights: workers that give each other keys and values must have the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from protos.errors import ModelError
from workers.model.checkpoint import open_checkpoint
from workers.model.config import ModelConfig

WHOLE_BYTES: Final = 1 << 30  # weights up to this size are read in full: half a second at sha256's 2 GB/s
SAMPLE_BYTES: Final = 1 << 20  # at the begin and the end of a larger model's files

_CHUNK_BYTES: Final = 1 << 20


def weights_fingerprint(directory: Path, *, max_context: int) -> str:
    """32 hexadecimal digits: the models of directories that have the same ones compute the same keys and values.

    Taken from config.json and the files of the weights: their names, sizes, and bytes. Of weights of more than
    WHOLE_BYTES together only each file's first and last SAMPLE_BYTES are read, which hold the safetensors header, or
    most of it, and some weights: further training changes those, but an edit of single weights in the middle of a
    file goes unnoticed. Not a protection against forgery. `max_context`, tokens, counts where the rotation depends on
    it. Raises ModelError.
    """
    config = ModelConfig.from_directory(directory)
    files = sorted({tensor.file for tensor in open_checkpoint(directory, config).values()})
    return files_fingerprint(directory, files, note=f"{max_context} tokens" if config.rope.kind == "dynamic" else "")


def files_fingerprint(directory: Path, files: Sequence[Path], *, note: str = "") -> str:
    """The same of a directory's config.json and these files; `note`: what else must be equal. Raises ModelError."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    digest.update(note.encode())
    sizes = [path.stat().st_size for path in files]
    is_large = sum(sizes) > WHOLE_BYTES
    for path, size in zip(files, sizes, strict=True):
        digest.update(f"\0{path.name}\0{size}\0".encode())
        for part in _parts(path, size, is_large=is_large):
            digest.update(part)
    return digest.hexdigest()[:32]


def _parts(path: Path, size: int, *, is_large: bool) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            if is_large and size > 2 * SAMPLE_BYTES:
                yield file.read(SAMPLE_BYTES)
                file.seek(-SAMPLE_BYTES, os.SEEK_END)
            yield from _chunks(file)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); copy the whole model directory") from error


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk
