"""Train the pair of models that ships with Headwater: a byte-level BPE tokenizer, a target and a drafter.

    python -m models.train tokenizer
    python -m models.train target    # 11 M parameters
    python -m models.train drafter   # 1.6 M parameters, distilled from the target
    python -m models.train evaluate  # held-out loss and greedy agreement

The learning rate is warmed up, held, and decayed linearly to zero over the last `--decay` share of the steps, so a run
that was interrupted before its decay can be resumed with more steps. Hidden matrices are trained by Muon (Jordan et
al., 2024; scaled to AdamW's update size as in Liu et al., arXiv:2502.16982), the embedding and the norms by AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models.corpus import Split, documents

HERE = Path(__file__).parent
END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
MAX_POSITIONS = 40_960  # 32K-token benchmarks plus room to generate
SHARD_SIZE = "15MB"


@dataclass(frozen=True)
class Shape:
    """The size of one model of the pair."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=64,
            max_position_embeddings=MAX_POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=0,
            eos_token_id=0,
            attention_dropout=0.0,
        )


SHAPES = {
    "target": Shape(hidden_size=384, intermediate_size=1024, num_layers=6, num_heads=6, num_kv_heads=2),
    "drafter": Shape(hidden_size=192, intermediate_size=512, num_layers=2, num_heads=3, num_kv_heads=1),
}


def train_tokenizer(out: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training split; digits stand alone, so numbers are spelled the same everywhere."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents("train"), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, out)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write tokenizer.json, and a config that transformers 4 and 5 and vLLM all read."""
    tokenizer.save_pretrained(out)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def token_stream(tokenizer_dir: Path, split: Split) -> np.ndarray:
    """The split as one array of token ids, each document preceded by the end-of-text token. [tokens]"""
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    encodings = tokenizer.encode_batch(list(documents(split)), add_special_tokens=False)
    return np.concatenate([np.array([0, *encoding.ids], dtype=np.uint16) for encoding in encodings])


class Batches:
    """Random windows of the token stream, reproducible from the step number alone."""

    def __init__(self, tokens: np.ndarray, *, rows: int, length: int, seed: int) -> None:
        self._tokens, self._rows, self._length, self._seed = tokens, rows, length, seed

    def at(self, step: int) -> Tensor:
        """The batch of one step, inputs and the shifted label in one. [rows, length + 1]"""
        random = np.random.default_rng((self._seed, step))
        starts = random.integers(0, len(self._tokens) - self._length - 1, size=self._rows)
        windows = [self._tokens[start : start + self._length + 1] for start in starts]
        return torch.from_numpy(np.stack(windows).astype(np.int64))


def learning_rate(step: int, *, steps: int, peak: float, warmup: int, decay: float) -> float:
    """Warm-up, plateau, linear decay to zero over the last `decay` share of the steps."""
    decay_steps = max(1, int(steps * decay))
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / decay_steps)


def optimizers(model: LlamaForCausalLM, *, weight_decay: float) -> list[torch.optim.Optimizer]:
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(hidden, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.0, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean KL(teacher || student) per token."""
    student = F.log_softmax(logits.float().flatten(0, 1), dim=-1)
    teacher = F.log_softmax(teacher_logits.float().flatten(0, 1), dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def objective_of(model: LlamaForCausalLM, teacher: LlamaForCausalLM | None) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss as a function of (inputs, labels): next tokens, or mostly the teacher's distribution."""

    def objective(inputs: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = next_token_loss(logits, labels)
        if teacher is None:
            return loss
        with torch.no_grad():
            teacher_logits = teacher(input_ids=inputs, use_cache=False).logits
        return 0.1 * loss + 0.9 * distillation_loss(logits, teacher_logits)

    return objective


def fit(args: argparse.Namespace) -> None:
    """Train one model of the pair and write it as a Hugging Face directory."""
    out: Path = args.out or HERE / args.model
    torch.manual_seed(args.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(HERE / "target")
    batches = Batches(token_stream(HERE / "target", "train"), rows=args.rows, length=args.length, seed=args.seed)
    model = LlamaForCausalLM(SHAPES[args.model].config()).to(args.device)
    teacher = load(HERE / "target", args.device) if args.model == "drafter" else None
    objective = torch.compile(objective_of(model, teacher)) if args.compile else objective_of(model, teacher)
    both = optimizers(model, weight_decay=args.weight_decay)
    step = resume(args.state, model, both)
    began, first = time.monotonic(), step
    while step < args.steps:
        tokens = batches.at(step).to(args.device)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            loss = objective(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = learning_rate(step, steps=args.steps, peak=args.lr, warmup=args.warmup, decay=args.decay)
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % args.log_every == 0:
            speed = (step - first) * args.rows * args.length / (time.monotonic() - began)
            print(f"step {step}/{args.steps} loss {loss.item():.3f} lr {rate:.2e} {speed:.0f} tokens/s", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            save(model, tokenizer, out)
            torch.save({"step": step, "model": model.state_dict(), "opt": [o.state_dict() for o in both]}, args.state)


def resume(state: Path, model: LlamaForCausalLM, both: list[torch.optim.Optimizer]) -> int:
    """Load a saved run if there is one; the step to go on from."""
    if not state.exists():
        return 0
    saved = torch.load(state, weights_only=True)
    model.load_state_dict(saved["model"])
    for optimizer, values in zip(both, saved["opt"], strict=True):
        optimizer.load_state_dict(values)
    return int(saved["step"])


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model in bf16 with its tokenizer, in shards below 16 MiB."""
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob("*.safetensors*"):
        stale.unlink()
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config.eos_token_id = 0
    copy.to(torch.bfloat16).save_pretrained(out, max_shard_size=SHARD_SIZE)
    for file in out.iterdir():
        file.chmod(0o644)
    save_tokenizer(tokenizer, out)


def load(directory: Path, device: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(device).eval()


@torch.inference_mode()
def evaluate(args: argparse.Namespace) -> None:
    """Held-out loss of both models, and how often the drafter's greedy token is the target's."""
    tokens = token_stream(HERE / "target", "heldout").astype(np.int64)
    rows = torch.from_numpy(tokens[: len(tokens) // (args.length + 1) * (args.length + 1)].reshape(-1, args.length + 1))
    pair = {name: load(HERE / name, args.device).float() for name in SHAPES}
    losses = dict.fromkeys(SHAPES, 0.0)
    agree = 0
    for row in rows.split(args.rows):
        row = row.to(args.device)
        greedy = {}
        for name, model in pair.items():
            logits = model(input_ids=row[:, :-1], use_cache=False).logits
            losses[name] += next_token_loss(logits, row[:, 1:]).item() * len(row)
            greedy[name] = logits.argmax(-1)
        agree += int((greedy["target"] == greedy["drafter"]).sum())
    num_tokens = rows.shape[0] * args.length
    report = {
        "heldout_tokens": num_tokens,
        **{f"{name}_loss": losses[name] / len(rows) for name in SHAPES},
        **{f"{name}_perplexity": math.exp(losses[name] / len(rows)) for name in SHAPES},
        **{f"{name}_parameters": sum(p.numel() for p in model.parameters()) for name, model in pair.items()},
        "greedy_agreement": agree / num_tokens,
    }
    print(json.dumps(report, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["tokenizer", "target", "drafter", "evaluate"])
    parser.add_argument("--out", type=Path, help="where to write the model (default: beside this script)")
    parser.add_argument("--state", type=Path, help="where to keep the run's state (default: .train-MODEL.pt here)")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay", type=float, default=0.25)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--save-every", type=int, default=250)
    args = parser.parse_args()
    args.state = args.state or HERE / f".train-{args.model}.pt"
    match args.model:
        case "tokenizer":
            for name in SHAPES:
                train_tokenizer(HERE / name)
        case "evaluate":
            evaluate(args)
        case _:
            fit(args)


if __name__ == "__main__":
    main()
