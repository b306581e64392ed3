"""The models that engines are compared on: made once, kept in the cache folder, the same weights for everybody.

`<cache>/models/<name>/` is a Hugging Face directory; beside it lie the conversions that some engines need, each made by
a program that runs in an environment of its own.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from benchmarks.conditions import ROOT
from benchmarks.peers.environment import Environment, SetupFailedError
from workers.model.checkpoint import tensor_shapes
from workers.model.config import ModelConfig

ModelName = Literal["random", "target", "half-billion"]
MODEL_NAMES: tuple[ModelName, ...] = ("random", "target", "half-billion")
Format = Literal["directory", "gguf", "openvino"]

SHIPPED = ROOT / "models" / "target"
SEED = 20261121
COMPLETE = ".complete"  # written last; a folder without it is made again


@dataclass(frozen=True)
class Shape:
    """A Llama-architecture model, as its config.json has it."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool

    @classmethod
    def of(cls, name: ModelName) -> Shape:
        """The shape of one of the models."""
        match name:
            case "random":
                return cls(4096, 512, 8, 8, 4, 64, 1536, 32768, True)
            case "half-billion":
                return cls(151936, 896, 24, 14, 2, 64, 4864, 32768, True)
            case "target":
                config = json.loads((SHIPPED / "config.json").read_text())
                return cls(**{key: config[key] for key in cls.__dataclass_fields__})

    @property
    def layer_parameters(self) -> int:
        """Of all layers' matrices together."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (2 * queries + 2 * keys)
        return self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_parameters(self) -> int:
        """Of the product that makes logits."""
        return self.vocab_size * self.hidden_size

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers, in bf16."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * 2

    def config(self) -> dict[str, object]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            **asdict(self),
        }


@dataclass(frozen=True)
class Model:
    """One model in the cache folder."""

    name: ModelName
    cache: Path

    @property
    def shape(self) -> Shape:
        return Shape.of(self.name)

    @property
    def directory(self) -> Path:
        return self.cache / "models" / self.name

    def path(self, form: Format) -> Path:
        """Where the model lies in this form, once `prepare` has run."""
        match form:
            case "directory":
                return self.directory
            case "gguf":
                return self.cache / "models" / f"{self.name}-gguf" / "model.gguf"
            case "openvino":
                return self.cache / "models" / f"{self.name}-openvino"

    def prepare(self, form: Format, converter: Environment | None) -> Path:
        """Make the model, and its conversion with `converter`, unless they are there. Raises SetupFailedError."""
        if not (self.directory / COMPLETE).exists():
            _write_directory(self)
        path = self.path(form)
        folder = path if form == "openvino" else path.parent
        if form != "directory" and not (folder / COMPLETE).exists():
            if converter is None:
                raise SetupFailedError(f"nothing converts to {form}")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            program = ["-m", f"benchmarks.peers.convert_{form}", str(self.directory), str(path)]
            converter.run(*program, label=f"convert {self.name} to {form}")
            (folder / COMPLETE).touch()
        return path


def _write_directory(model: Model) -> None:
    shutil.rmtree(model.directory, ignore_errors=True)
    if model.name == "target":
        shutil.copytree(SHIPPED, model.directory)
    else:
        model.directory.mkdir(parents=True)
        _write_random(model)
        _write_tokenizer(model)
    (model.directory / COMPLETE).touch()


def _write_random(model: Model) -> None:
    """Normal weights of deviation 0.02 and norms of one, the same on every machine with this torch."""
    import torch
    from safetensors.torch import save_file

    (model.directory / "config.json").write_text(json.dumps(model.shape.config(), indent=2))
    generator = torch.Generator().manual_seed(SEED)

    def made(name: str, size: tuple[int, ...]) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(size, dtype=torch.bfloat16)
        return torch.empty(size).normal_(0.0, 0.02, generator=generator).to(torch.bfloat16)

    sizes = tensor_shapes(ModelConfig.from_directory(model.directory))
    tensors = {name: made(name, size) for name, size in sizes.items()}
    save_file(tensors, model.directory / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(model: Model) -> None:
    """The shipped tokenizer, filled up with tokens of no merge to the model's vocabulary: every id has a text."""
    tokenizer = json.loads((SHIPPED / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    num_known = 1 + max([*vocabulary.values(), *(added["id"] for added in tokenizer["added_tokens"])])
    vocabulary.update({f"Ġfiller{index}": index for index in range(num_known, model.shape.vocab_size)})
    (model.directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(SHIPPED / "tokenizer_config.json", model.directory)
