"""What the weight format costs on real models: perplexity and output KL by width, against plain round to nearest."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from flexquant_rl.engine.quantize import quantize_rtn
from flexquant_rl.kernels.reference import dequantize

STORED_WIDTHS = (3, 4, 5, 6, 8)
DECODED_WIDTHS = (2, 3, 4, 5, 6, 7, 8)
ROUNDED_WIDTHS = (3, 4)
GROUP_SIZE = 128
NUM_WINDOWS = 20
TEXTS = {
    "stories260K": "tinystories_valid_head.txt",
    "babyllama-361": "tinystories_valid_head.txt",
    "multi-7m": "wikitext2_valid.tokens.txt",
}

# Half a minute of one free core for the largest model; the limit leaves room for a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Quality:
    """Perplexity, and mean output KL from full precision in nats."""

    perplexity: float
    output_kl_nats: float


@dataclass(frozen=True)
class Measurement:
    """One model: full precision, nested by width, plain min-max round to nearest by width."""

    full: Quality
    nested: dict[int, Quality]
    rounded: dict[int, Quality]


def round_to_nearest(weight: Tensor, bit_width: int) -> Tensor:
    """Plain rounding between minimum and maximum of each group of `GROUP_SIZE` inputs; the last may be shorter."""
    columns = []
    for group in torch.split(weight.double(), GROUP_SIZE, dim=1):
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        step = ((high - low) / (2**bit_width - 1)).clamp(min=1e-30)
        columns.append(((group - low) / step).round() * step + low)
    return torch.cat(columns, dim=1).float()


def read_windows(model_dir: Path, text: Path, num_windows: int) -> Tensor:
    """The first contiguous windows of context - 1 tokens, each after a BOS: `[num_windows, context]` int64."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    config = AutoConfig.from_pretrained(model_dir)
    length = config.max_position_embeddings - 1
    characters = text.read_text(encoding="utf-8").replace("\n\n", "\n")[: 8 * num_windows * length]
    ids = tokenizer(characters, add_special_tokens=False, return_tensors="pt").input_ids[0]
    assert ids.numel() >= num_windows * length
    windows = ids[: num_windows * length].view(num_windows, length)
    return functional.pad(windows, (1, 0), value=config.bos_token_id)


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Next-token log probabilities of every position but the last, `[num_windows, context - 1, vocab]`."""
    batches = torch.split(windows, 5)
    return torch.cat([model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1) for ids in batches])


def judge(log_probs: Tensor, reference: Tensor, windows: Tensor) -> Quality:
    nll = functional.nll_loss(log_probs.flatten(0, 1), windows[:, 1:].flatten())
    kl = functional.kl_div(log_probs, reference, reduction="none", log_target=True).sum(-1).mean()
    return Quality(math.exp(float(nll)), float(kl))


def measure(model_dir: Path, text: Path) -> Measurement:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    windows = read_windows(model_dir, text, NUM_WINDOWS)
    reference = log_probabilities(model, windows)
    # Every linear of a Llama is in a decoder layer or is the head; a new parameter unties the head from the embedding.
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert "lm_head" in linears
    dense = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    nested = {
        name: quantize_rtn(weight, group_size=GROUP_SIZE, bit_widths=STORED_WIDTHS, name=name)
        for name, weight in dense.items()
    }

    def with_weights(decode: Callable[[str, int], Tensor], bit_width: int) -> Quality:
        for name, linear in linears.items():
            linear.weight = nn.Parameter(decode(name, bit_width), requires_grad=False)
        return judge(log_probabilities(model, windows), reference, windows)

    return Measurement(
        full=judge(reference, reference, windows),
        nested={b: with_weights(lambda name, b: dequantize(nested[name], bit_width=b), b) for b in DECODED_WIDTHS},
        rounded={b: with_weights(lambda name, b: round_to_nearest(dense[name], b), b) for b in ROUNDED_WIDTHS},
    )


@pytest.fixture(scope="module", params=sorted(TEXTS))
def measured(request: pytest.FixtureRequest, shared_dir: Path) -> Measurement:
    model_dir, text = shared_dir / "models" / request.param, shared_dir / "text" / TEXTS[request.param]
    if not (model_dir / "model.safetensors").is_file() or not text.is_file():
        pytest.skip(f"needs {model_dir.name} and {text.name} in the shared folder")
    result = measure(model_dir, text)
    print(f"\n{request.param}, {NUM_WINDOWS} windows of {text.name}, groups of {GROUP_SIZE}")
    print(f"{'':>9} {'bits':>4} {'perplexity':>10} {'KL nats':>9}\n{'full':>9} {'':>4} {result.full.perplexity:>10.4f}")
    for label, by_width in (("nested", result.nested), ("plain rtn", result.rounded)):
        for bit_width, quality in by_width.items():
            print(f"{label:>9} {bit_width:>4} {quality.perplexity:>10.4f} {quality.output_kl_nats:>9.2e}")
    return result


def test_8_bits_are_within_half_a_percent_of_full_precision(measured: Measurement) -> None:
    assert measured.nested[8].perplexity == pytest.approx(measured.full.perplexity, rel=0.005)


def test_4_bits_are_no_worse_than_plain_round_to_nearest(measured: Measurement) -> None:
    assert measured.nested[4].perplexity <= measured.rounded[4].perplexity
    assert measured.nested[4].output_kl_nats <= measured.rounded[4].output_kl_nats


def test_perplexity_of_every_stored_width_is_no_worse_than_of_the_next_lower_one(measured: Measurement) -> None:
    in_order = [measured.nested[bit_width].perplexity for bit_width in STORED_WIDTHS]
    assert in_order == sorted(in_order, reverse=True)


def test_output_kl_falls_at_least_2_5_times_with_every_bit(measured: Measurement) -> None:
    # Covers the derived widths 2 and 7 too. Perplexity cannot: between 6, 7 and 8 bits it moves by less than its own
    # standard error over 20 windows, in either direction, while KL is measured on the same prefixes and falls 4 times.
    in_order = [measured.nested[bit_width].output_kl_nats for bit_width in DECODED_WIDTHS]
    assert all(wider < narrower / 2.5 for narrower, wider in pairwise(in_order))
