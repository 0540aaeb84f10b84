"""Trains `assets/tiny-code-llama` from scratch: a small Llama that reads Python. Resumable; hours on two cores.

    python assets/train_tiny_code_llama.py --work DIR --out assets/tiny-code-llama

The text is the standard library without the modules that `fq_env/stdlib_text.py` holds out, and permissively licensed
packages installed beside it. Weights are trained in bfloat16 with float32 master copies; hidden matrices by Muon,
embeddings and norms by AdamW; the learning rate is flat, then falls linearly to zero. Batches depend on the step number
alone, so an interrupted run that is started again continues as if nothing had happened.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flexquant_rl.fq_env.stdlib_text import stdlib_text

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCAB_SIZE = 4096
CONTEXT = 512
# Permissive licences only (BSD, MIT, Apache-2.0, PSF, HPND); MPL packages (hypothesis, certifi, tqdm) are left out.
PACKAGES = (
    "torch transformers sympy numpy matplotlib networkx pip pygments fontTools mypy huggingface_hub setuptools "
    "tensorboard "
    "pydantic mpmath triton _pytest gymnasium rich PIL torchgen fsspec tyro werkzeug stable_baselines3 grpc "
    "filelock anyio "
    "jinja2 packaging absl click typer virtualenv"
).split()
MAX_PACKAGE_CHARS = 3_000_000  # so that no package drowns the others
MAX_FILE_CHARS = 150_000  # larger ones are tables
STDLIB_REPEATS = 3  # the evaluation text is standard library, so it is read three times
# cl100k-like: keeps indentation together and lets a word take the one space before it.
SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result; saved in the model card's folder as `recipe.json`."""

    total_tokens: int = 25_300_000
    tokens_per_step: int = 16_384
    short_window: int = 256  # first 90% of the tokens
    long_window: int = CONTEXT  # the rest
    short_share: float = 0.9
    decay_share: float = 0.45  # learning rate falls to zero over the last 45%
    warmup_steps: int = 40
    muon_lr: float = 1e-2
    adamw_lr: float = 6e-3
    weight_decay: float = 0.05
    seed: int = 0


def held_out_lines() -> set[str]:
    """Long lines of every held-out module: a training file that repeats many of them is a vendored copy."""
    lines: set[str] = set()
    for split in ("policy-train", "validation", "test"):
        for source in stdlib_text(split).values():
            lines.update(line.strip() for line in source.splitlines() if len(line.strip()) >= 40)
    return lines


def package_texts(site: Path, package: str) -> Iterator[tuple[str, str]]:
    """Yields `(name, source)` in an order fixed by the hash of the name, up to the cap."""
    paths = [path.relative_to(site).as_posix() for path in (site / package).rglob("*.py")]
    budget = MAX_PACKAGE_CHARS
    for name in sorted(paths, key=lambda name: hashlib.sha256(name.encode()).digest()):
        source = (site / name).read_text(encoding="utf-8", errors="strict")
        if 200 <= len(source) <= MAX_FILE_CHARS and budget >= len(source):
            budget -= len(source)
            yield name, source


def build_corpus(work: Path, recipe: Recipe) -> None:
    """Writes `tokenizer.json`, `train.npy` (uint16 tokens) and `corpus.json` (what is in it) once."""
    if (work / "corpus.json").exists():
        return
    banned, seen = held_out_lines(), set[str]()
    documents: list[tuple[str, str, int]] = []
    dropped = []
    site = Path(sysconfig.get_paths()["purelib"])
    sources: list[tuple[str, str, int]] = [
        (f"stdlib/{name}", source, 1 if name.startswith("test/") else STDLIB_REPEATS)
        for name, source in stdlib_text("model-train", with_tests=True).items()
        if len(source) <= MAX_FILE_CHARS
    ]
    for package in PACKAGES:
        sources += [(name, source, 1) for name, source in package_texts(site, package)]
    for name, source, repeats in sources:
        digest = hashlib.sha256(source.encode()).hexdigest()
        copied = sum(line.strip() in banned for line in source.splitlines())
        if digest in seen or copied > max(8, 0.05 * source.count("\n")):
            dropped.append(name)
            continue
        seen.add(digest)
        documents.append((name, source, repeats))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    weighted = (text for name, text, repeats in documents if repeats > 1 or hash_below(name, 0.25))
    tokenizer.train_from_iterator(weighted, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    tokenizer.save(str(work / "tokenizer.json"))
    eos = tokenizer.token_to_id(EOS)
    encoded = [
        np.array([*encoding.ids, eos], dtype=np.uint16)
        for encoding in tokenizer.encode_batch([text for _, text, _ in documents], add_special_tokens=False)
    ]
    order = [index for index, (_, _, repeats) in enumerate(documents) for _ in range(repeats)]
    order = list(np.random.default_rng(recipe.seed).permutation(order))
    np.save(work / "train.npy", np.concatenate([encoded[index] for index in order]))
    facts = {
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "documents": len(documents),
        "dropped_as_copies": dropped,
        "characters": sum(len(text) for _, text, _ in documents),
        "distinct_tokens": int(sum(map(len, encoded))),
        "stream_tokens": int(sum(len(encoded[index]) for index in order)),
    }
    (work / "corpus.json").write_text(json.dumps(facts, indent=1))


def hash_below(name: str, share: float) -> bool:
    """A stable coin flip."""
    return hashlib.sha256(name.encode()).digest()[0] < 256 * share


def package_version(name: str) -> str:
    """Version of the distribution that provides an import name."""
    distributions = importlib.metadata.packages_distributions().get(name, [])
    return importlib.metadata.version(distributions[0]) if distributions else "unknown"


def batch(tokens: np.ndarray, step: int, recipe: Recipe) -> torch.Tensor:
    """Windows of one step, `[batch, window + 1]` int64, BOS first; a pure function of the step number."""
    blocks = len(tokens) // recipe.long_window
    order = np.random.default_rng(recipe.seed + 1).permutation(blocks)
    per_step = recipe.tokens_per_step // recipe.long_window
    chosen = order[np.arange(step * per_step, (step + 1) * per_step) % blocks]
    rows = np.stack([tokens[block * recipe.long_window :][: recipe.long_window] for block in chosen])
    if step < recipe.short_share * num_steps(recipe):
        rows = rows.reshape(-1, recipe.short_window)
    with_bos = np.concatenate([np.zeros((len(rows), 1), rows.dtype), rows], axis=1)
    return torch.from_numpy(with_bos.astype(np.int64))


def num_steps(recipe: Recipe) -> int:
    """Optimizer steps of the whole recipe."""
    return recipe.total_tokens // recipe.tokens_per_step


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Share of the base learning rate: warm-up, flat, then linearly to zero."""
    left = (num_steps(recipe) - step) / (recipe.decay_share * num_steps(recipe))
    return min(1.0, (step + 1) / recipe.warmup_steps, left)


class MixedPrecisionTrainer:
    """A bfloat16 model for the arithmetic, float32 master weights for the updates."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            attn_implementation="eager",  # faster than the CPU flash kernel in bfloat16 at this length
        )
        self.recipe = recipe
        self.model = LlamaForCausalLM(config)
        self.masters = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.model.to(torch.bfloat16)
        hidden = [p for name, p in self.masters.items() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in self.masters.items() if p.ndim != 2 or "embed" in name]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                hidden, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.base_lrs = [recipe.muon_lr, recipe.adamw_lr]
        self._loss = torch.compile(self._eager_loss)

    def _eager_loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = self.model.model(input_ids=inputs, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden).flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, targets.flatten())

    def step(self, rows: torch.Tensor, factor: float) -> float:
        """One update on `rows` `[batch, window + 1]`; returns the loss in nats."""
        loss = self._loss(rows[:, :-1], rows[:, 1:])
        loss.backward()
        parameters = dict(self.model.named_parameters())
        for name, master in self.masters.items():
            gradient = parameters[name].grad
            assert gradient is not None, name
            master.grad = gradient.float()
            parameters[name].grad = None
        torch.nn.utils.clip_grad_norm_(list(self.masters.values()), 1.0)
        for optimizer, base in zip(self.optimizers, self.base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * factor
            optimizer.step()
        with torch.no_grad():
            for name, master in self.masters.items():
                parameters[name].copy_(master)
        return float(loss.detach())

    def save(self, path: Path, step: int) -> None:
        """Atomic: an interruption leaves the previous checkpoint."""
        tensors = dict(self.masters)
        for index, optimizer in enumerate(self.optimizers):
            for key, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    tensors[f"optimizer.{index}.{key}.{name}"] = torch.as_tensor(value).contiguous()
        save_file(tensors, path.with_suffix(".tmp"), metadata={"step": str(step)})
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        """Restores what `save` wrote."""
        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.masters[name].copy_(tensors[name])
                parameter.copy_(tensors[name])
        for index, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith(f"optimizer.{index}."):
                    _, _, key, field = name.split(".", 3)
                    state.setdefault(int(key), {})[field] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokenizer: Tokenizer, text: str, max_windows: int) -> float:
    """Contiguous windows of context-1 tokens, BOS first, float32 log-probabilities."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    size = CONTEXT - 1
    windows = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)][:max_windows]
    nll, count = 0.0, 0
    for window in windows:
        logits = model(torch.tensor([[0, *window]])).logits[0, :-1].float()
        nll += float(torch.nn.functional.cross_entropy(logits, torch.tensor(window), reduction="sum"))
        count += len(window)
    return math.exp(nll / count)


def export(trainer: MixedPrecisionTrainer, tokenizer: Tokenizer, out: Path, facts: dict[str, object]) -> None:
    """Writes the Hugging Face directory in bfloat16."""
    trainer.model.config._attn_implementation = "sdpa"
    trainer.model.save_pretrained(out)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=CONTEXT
    )
    wrapped.save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps(facts, indent=1))


def main() -> None:
    """Builds the corpus, trains, measures and writes the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for corpus and checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--total-tokens", type=int, default=Recipe.total_tokens)
    arguments = parser.parse_args()
    recipe = Recipe(total_tokens=arguments.total_tokens)
    arguments.work.mkdir(parents=True, exist_ok=True)
    build_corpus(arguments.work, recipe)
    corpus = json.loads((arguments.work / "corpus.json").read_text())
    tokens = np.load(arguments.work / "train.npy", mmap_mode="r")
    tokenizer = Tokenizer.from_file(str(arguments.work / "tokenizer.json"))
    validation = "\n".join(stdlib_text("validation").values())
    trainer, start = MixedPrecisionTrainer(recipe), 0
    checkpoint = arguments.work / "checkpoint.safetensors"
    if checkpoint.exists():
        from safetensors import safe_open

        with safe_open(checkpoint, "pt") as file:
            start = int(file.metadata()["step"])
        trainer.load(checkpoint)
    began, losses = time.monotonic(), []
    for step in range(start, num_steps(recipe)):
        losses.append(trainer.step(batch(tokens, step, recipe), learning_rate_factor(step, recipe)))
        if (step + 1) % 10 == 0:
            rate = (step + 1 - start) * recipe.tokens_per_step / (time.monotonic() - began)
            loss = np.mean(losses[-10:])
            print(f"step {step + 1}/{num_steps(recipe)} loss {loss:.4f} {rate:.0f} tokens/s", flush=True)
        if (step + 1) % 50 == 0:
            trainer.save(checkpoint, step + 1)
        if (step + 1) % 200 == 0:
            held_out = perplexity(trainer.model, tokenizer, validation, 24)
            print(f"step {step + 1} validation perplexity {held_out:.2f}", flush=True)
    trainer.save(checkpoint, num_steps(recipe))
    final = {
        split: perplexity(trainer.model, tokenizer, "\n".join(stdlib_text(split).values()), 400)
        for split in ("policy-train", "validation", "test")
    }
    export(trainer, tokenizer, arguments.out, {"recipe": asdict(recipe), "corpus": corpus, "perplexity": final})
    print(json.dumps({"out": str(arguments.out), "perplexity": final}))


if __name__ == "__main__":
    main()
