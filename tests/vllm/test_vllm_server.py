"""vLLM's own server in the benchmarks: it is given the settings of Headwater's engine."""

from __future__ import annotations

from pathlib import Path

from vllm import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from benchmarks.vllm_server import SAME, flags
from cluster.config import load
from workers.engine.vllm.settings import engine_args


def test_vllm_reads_from_the_command_line_what_the_worker_gives_its_engine(target_dir: Path, tmp_path: Path) -> None:
    settings = ["worker.engine.kind=vllm", "worker.engine.vllm.enforce_eager=true", "worker.engine.kv.num_pages=300"]
    config = load(None, [*settings, f"worker.model.path={target_dir}", "worker.model.dtype=bfloat16"]).worker
    ours = engine_args(config, threads=1, sockets=tmp_path)
    given = flags({name: getattr(ours, name) for name in SAME})
    theirs = AsyncEngineArgs.from_cli_args(make_arg_parser(FlexibleArgumentParser()).parse_args(given))
    found = {name: getattr(theirs, name) for name in SAME if name != "served_model_name"}
    assert found == {name: getattr(ours, name) for name in SAME if name != "served_model_name"}
    assert theirs.served_model_name == [ours.served_model_name]
    assert (found["num_gpu_blocks_override"], found["enforce_eager"], found["dtype"]) == (301, True, "bfloat16")
