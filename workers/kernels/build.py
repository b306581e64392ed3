"""Builds the native kernels: one shared library for each variant of the instruction set, kept in a cache folder.

    python -m workers.kernels.build [--directory DIR] [VARIANT ...]

builds variants ahead of time (an image's build does this); otherwise a worker builds the one it needs when it starts.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from protos.errors import SetupError
from workers.kernels.variants import VARIANTS, Variant, named

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
ENTRY = SOURCES / "library.cpp"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=fast", "-fno-math-errno")
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler that runs."""

    path: str

    @classmethod
    def find(cls) -> Compiler:
        """The first compiler on the PATH. Raises SetupError if there is none."""
        for name in COMPILERS:
            if path := shutil.which(name):
                try:
                    subprocess.run([path, "--version"], capture_output=True, timeout=TIMEOUT_S)
                except (OSError, subprocess.TimeoutExpired) as error:
                    raise SetupError(f"{path} does not run ({error}); repair it, or take it off the PATH") from error
                return cls(path)
        raise SetupError(f"no C++ compiler is on the PATH ({', '.join(COMPILERS)}); install one, for example g++")


def default_directory() -> Path:
    """Where libraries are kept when nothing else is said: the user's cache folder."""
    return Path.home() / ".cache" / "headwater" / "kernels"


def build(variant: Variant, directory: Path | None = None) -> Path:
    """The variant's library, compiled unless the folder has it. Raises SetupError with the compiler's first complaint.

    Several processes may build at once: one compiles, the others wait for it.
    """
    library = library_of(variant, directory)
    if library.exists():
        return library
    compiler, directory = Compiler.find(), library.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _compile(variant, compiler, library)
    except OSError as error:
        raise SetupError(
            f"{directory}: {error.strerror or error}; set engine.kernels.directory to a folder that can be written"
        ) from error
    return library


def library_of(variant: Variant, directory: Path | None = None) -> Path:
    """Where a variant's library is, or would be."""
    return (directory or default_directory()) / f"{variant.name}-{_fingerprint(variant)}.so"


def _fingerprint(variant: Variant) -> str:
    """Of sources and flags, not of the compiler: a library built elsewhere serves where there is none."""
    digest = hashlib.blake2b(digest_size=8)
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update("\0".join([*FLAGS, *variant.flags]).encode())
    return digest.hexdigest()


def _compile(variant: Variant, compiler: Compiler, library: Path) -> None:
    log.info("compiling the %s kernels; this takes a few seconds, once", variant.name)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # the linker's file has the modes others need
        partial = Path(folder) / library.name
        command = [compiler.path, *FLAGS, *variant.flags, str(ENTRY), "-o", str(partial)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise SetupError(
                f"{compiler.path} took longer than {TIMEOUT_S:.0f} s for the {variant.name} kernels"
            ) from error
        if done.returncode:
            raise SetupError(f"{compiler.path} cannot build the {variant.name} kernels: {_complaint(done.stderr)}")
        os.replace(partial, library)


def _complaint(stderr: str) -> str:
    lines = stderr.strip().splitlines() or ["it said nothing"]
    return next((line for line in lines if "error" in line), lines[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m workers.kernels.build", description=__doc__)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="default: all of them")
    parser.add_argument("--directory", type=Path, default=None, help="default: the user's cache folder")
    options = parser.parse_args(arguments)
    try:
        for variant in [named(name) for name in options.variants] or VARIANTS:
            print(build(variant, options.directory))
    except SetupError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
