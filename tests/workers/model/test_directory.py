"""Bad model directories: each is refused with the file, the key or tensor, and a remedy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from protos.errors import ModelError
from tests.workers.model.tiny import VOCAB_SIZE, save_tiny
from workers.model.checkpoint import tensor_shapes
from workers.model.config import ModelConfig
from workers.model.directory import check_directory

REMOVED = object()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A good directory in one file."""
    save_tiny(tmp_path, "llama")
    save_tokenizer(tmp_path, VOCAB_SIZE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good directory in several files."""
    save_tiny(tmp_path, "llama").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    save_tokenizer(tmp_path / "sharded", VOCAB_SIZE)
    return tmp_path / "sharded"


def save_tokenizer(directory: Path, num_words: int) -> None:
    words = {f"word{index}": index for index in range(num_words)}
    Tokenizer(WordLevel(words, unk_token="word0")).save(str(directory / "tokenizer.json"))


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file, or remove them."""
    kept = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in kept.items() if value is not REMOVED}))


def rewrite_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit a safetensors file's header and leave its data."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    data = json.dumps(header).encode()
    path.write_bytes(len(data).to_bytes(8, "little") + data + content[8 + length :])


def assert_refused(directory: Path, *parts: str) -> None:
    """The message holds all the parts, in order."""
    with pytest.raises(ModelError) as caught:
        check_directory(directory)
    assert re.search(".*".join(re.escape(part) for part in parts), caught.value.message), caught.value.message


def test_a_good_directory_gives_its_config(directory: Path) -> None:
    config = check_directory(directory)
    assert (config.architecture, config.num_layers, config.num_kv_heads) == ("LlamaForCausalLM", 3, 2)
    assert config.eos_token_ids == (2,)


def test_a_good_sharded_directory(sharded: Path) -> None:
    assert check_directory(sharded).vocab_size == VOCAB_SIZE


def test_end_tokens_of_both_files(directory: Path) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 5]}))
    assert check_directory(directory).eos_token_ids == (2, 5, 7)


def test_windows_per_layer(directory: Path) -> None:
    config = directory / "config.json"
    change(config, architectures=["Qwen2ForCausalLM"], use_sliding_window=True, sliding_window=9, max_window_layers=2)
    assert ModelConfig.from_directory(directory).windows == (None, None, 9)
    change(config, use_sliding_window=False)
    assert ModelConfig.from_directory(directory).windows == (None, None, None)
    change(config, architectures=["MistralForCausalLM"])
    assert ModelConfig.from_directory(directory).windows == (9, 9, 9)
    change(config, sliding_window=None)
    assert ModelConfig.from_directory(directory).windows == (None, None, None)


def test_no_directory(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent", "absent", "no such directory", "model.path")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file(directory: Path, name: str) -> None:
    (directory / name).unlink()
    assert_refused(directory, name)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_a_file_that_is_not_what_it_should_be(directory: Path, name: str, content: bytes) -> None:
    (directory / name).write_bytes(content)
    assert_refused(directory, name, "copy the file again")


@pytest.mark.parametrize(
    "key",
    [
        "architectures",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    ],
)
def test_a_missing_key(directory: Path, key: str) -> None:
    change(directory / "config.json", **{key: REMOVED})
    assert_refused(directory, "config.json", key, "is missing")


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"vocab_size": "96"}, ("vocab_size", "'96'", "integer")),
        ({"vocab_size": True}, ("vocab_size", "True", "integer")),
        ({"hidden_size": 0}, ("hidden_size", "0", "at least 1")),
        ({"num_key_value_heads": 4}, ("num_key_value_heads", "4", "num_attention_heads, 6")),
        ({"head_dim": 15}, ("head_dim", "15", "even")),
        ({"head_dim": None, "hidden_size": 50}, ("hidden_size", "50", "num_attention_heads, 6")),
        ({"rms_norm_eps": -1}, ("rms_norm_eps", "-1", "above 0")),
        ({"tie_word_embeddings": "yes"}, ("tie_word_embeddings", "'yes'", "true or false")),
        ({"architectures": ["GPT2LMHeadModel"]}, ("architectures", "GPT2LMHeadModel", "LlamaForCausalLM")),
        ({"architectures": "LlamaForCausalLM"}, ("architectures", "list of strings")),
        ({"architectures": []}, ("architectures", "supported: LlamaForCausalLM")),
        ({"hidden_act": "gelu"}, ("hidden_act", "'gelu'", "silu")),
        ({"quantization_config": {"bits": 4}}, ("quantization_config", "not supported")),
        ({"eos_token_id": "</s>"}, ("eos_token_id", "integer")),
        ({"eos_token_id": [2, VOCAB_SIZE]}, ("eos_token_id", str(VOCAB_SIZE), "vocab_size")),
        ({"rope_parameters": 3}, ("rope_parameters", "object")),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            ("rope_parameters.rope_type", "'longrope'", "supported: default"),
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, ("rope_parameters.factor", "is missing")),
        ({"rope_parameters": {**ROPE, "factor": "8"}}, ("rope_parameters.factor", "'8'")),
        (
            {"rope_parameters": {**ROPE, "high_freq_factor": 1.0}},
            ("rope_parameters.high_freq_factor", "low_freq_factor"),
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ("rope_parameters.partial_rotary_factor", "1.0")),
        ({"rope_parameters": {"full_attention": {}}}, ("rope_parameters.full_attention", "per layer type")),
        ({"rope_parameters": None, "rope_scaling": {"type": "su"}}, ("rope_scaling.type", "'su'")),
        ({"rope_parameters": None, "rope_theta": 0}, ("rope_theta", "above 0")),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, ("sliding_window", "at least 1")),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention"]},
            ("layer_types", "1 entries", "3 layers"),
        ),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["chunked"] * 3}, ("layer_types", "'chunked'")),
    ],
)
def test_a_wrong_key(directory: Path, values: dict[str, Any], parts: tuple[str, ...]) -> None:
    change(directory / "config.json", **values)
    assert_refused(directory, "config.json", *parts)


def test_a_tokenizer_larger_than_the_vocabulary(directory: Path) -> None:
    save_tokenizer(directory, VOCAB_SIZE + 1)
    assert_refused(directory, "tokenizer.json", str(VOCAB_SIZE), "vocab_size")


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, -1])
def test_truncated_weights(directory: Path, kept_bytes: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    assert_refused(directory, "model.safetensors", "truncated", "again")


def test_weights_with_something_behind_them(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    assert_refused(directory, "model.safetensors", "too long")


def test_a_header_that_is_not_json(directory: Path) -> None:
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8] = ord("!")
    path.write_bytes(content)
    assert_refused(directory, "model.safetensors", "not JSON")


def test_an_error_page_instead_of_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"<html>404 not found</html>")
    assert_refused(directory, "model.safetensors", "truncated")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"dtype": "F8_E4M3"}, ("model.norm.weight.dtype", "'F8_E4M3'", "BF16")),
        ({"shape": [24]}, ("model.norm.weight.data_offsets", "96 bytes")),
        ({"shape": "48"}, ("model.norm.weight.shape", "integer")),
        ({"data_offsets": [0]}, ("model.norm.weight.data_offsets",)),
    ],
)
def test_a_wrong_header_entry(directory: Path, changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    path = directory / "model.safetensors"
    rewrite_header(path, lambda header: header["model.norm.weight"].update(changes))
    assert_refused(directory, "model.safetensors", *parts)


def test_every_tensor_is_needed(directory: Path) -> None:
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    for name in tensor_shapes(ModelConfig.from_directory(directory)):
        rewrite_header(path, lambda header, name=name: header.update({f"other.{name}": header.pop(name)}))
        with pytest.raises(ModelError, match=rf"no safetensors file holds {re.escape(name)};"):
            check_directory(directory)
        path.write_bytes(whole)


def test_a_tensor_of_another_shape(directory: Path) -> None:
    change(directory / "config.json", intermediate_size=81)
    assert_refused(directory, "model.safetensors", "mlp.gate_proj.weight", "[80, 48]", "[81, 48]")


def test_an_untied_model_needs_its_head(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    save_tokenizer(tmp_path, VOCAB_SIZE)
    check_directory(tmp_path)
    change(tmp_path / "config.json", tie_word_embeddings=False)
    assert_refused(tmp_path, "lm_head.weight")


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert_refused(sharded, shard.name, "copy the whole model directory")


def test_a_truncated_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    assert_refused(sharded, shard.name, "truncated")


def test_an_index_that_lists_what_its_shard_lacks(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = next(shard for shard in weight_map.values() if shard != weight_map["model.norm.weight"])
    change(index, weight_map={**weight_map, "model.norm.weight": other})
    assert_refused(sharded, other, "model.norm.weight", "model.safetensors.index.json")


@pytest.mark.parametrize("value", [REMOVED, [], {"model.norm.weight": 3}])
def test_a_wrong_index(sharded: Path, value: Any) -> None:
    change(sharded / "model.safetensors.index.json", weight_map=value)
    assert_refused(sharded, "model.safetensors.index.json", "weight_map")


def test_the_check_does_not_import_torch() -> None:
    code = "import sys, workers.model.directory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
