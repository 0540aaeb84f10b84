"""What 40 steps of tuned scales gain on a real model at 3 and 4 bits: test KL before and after.

`FQ_REAL_MODELS=FOLDER pytest tests/engine/quantisation/test_tuning_quality.py -s` takes half an hour on two cores.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flexquant_rl.engine.control.output_kl import ReferenceDistribution
from flexquant_rl.engine.loading import load_causal_lm
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig, TuningConfig
from flexquant_rl.engine.quantisation.tuning import tune_pairs
from flexquant_rl.fq_env.prompts import Split, cut_windows, file_documents, spread, thinned

TEXTS = ("tinystories_valid_head.txt", "wikitext2_valid.tokens.txt")
WIDTHS = (3, 4)
STEPS, WINDOW, TEST_WINDOWS, HELD_OUT_WINDOWS = 40, 192, 8, 8

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]


def cut(
    tokenizer: PreTrainedTokenizerBase, files: list[Path], split: Split, count: int, length: int = WINDOW
) -> Tensor:
    documents = thinned(tokenizer, file_documents(files, tokenizer=tokenizer)[split], length, length - 1, count)
    return spread(cut_windows(tokenizer, documents, length, length - 1)[0], count)


def output_kl_nats(model: NestedCausalLM, windows: Tensor, width: int) -> float:
    """Mean KL(unquantised || width) over all tokens of all windows."""
    total = 0.0
    for tokens in windows[:, None, :-1]:
        logits = [
            model.forward(tokens, torch.full((*tokens.shape, model.num_units), b), keep=tokens.shape[1]).logits
            for b in (0, width)
        ]
        total += float(ReferenceDistribution(logits[0]).kl_nats(logits[1]).double().mean())
    return total / len(windows)


@pytest.mark.skipif(not os.environ.get("FQ_REAL_MODELS"), reason="FQ_REAL_MODELS names no folder of real models")
def test_tuning_a_real_model(shared_dir: Path) -> None:
    files = [shared_dir / "text" / name for name in TEXTS]
    hf_model, tokenizer = load_causal_lm(str(Path(os.environ["FQ_REAL_MODELS"]) / "smollm2-135m"))
    config = QuantizationConfig(method="gptq", rotate=True)
    model = nest(hf_model, tokenizer, config, calibration=cut(tokenizer, files, "train", 64, 256))
    windows = torch.cat([cut(tokenizer, [file], "train", STEPS // len(files)) for file in files])
    held_out = torch.cat([cut(tokenizer, [file], "validation", HELD_OUT_WINDOWS // len(files)) for file in files])
    tests = {file.name: cut(tokenizer, [file], "test", TEST_WINDOWS) for file in files}
    before = {(name, b): output_kl_nats(model, test, b) for name, test in tests.items() for b in WIDTHS}
    seconds = tune_pairs(model, windows, held_out, TuningConfig(STEPS, widths=WIDTHS, evaluations=2), report=print)
    after = {(name, b): output_kl_nats(model, test, b) for name, test in tests.items() for b in WIDTHS}
    for name, b in before:
        print(f"{name} at {b} bits: {before[name, b]:.4f} -> {after[name, b]:.4f} nats ({seconds:.0f} s)")
    assert all(after[key] < before[key] for key in before)
    # Behind weighed tokens there is less to gain than behind others (docs/weights.md).
    assert all(after[name, 3] < 0.9 * before[name, 3] for name in tests)
