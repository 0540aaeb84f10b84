"""`generate` of transformers under an attached policy is `fq generate --decoder hf`: 200 greedy tokens of real models.

The embedded model is always tried. `FQ_REAL_MODELS=FOLDER` tries every model directory in FOLDER too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import run
from document_blocks import save_random_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexquant_rl import FlexQuantConfig, attach_policy, cli
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.artefact import PROFILE_FILE, load_policy
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.request import Request
from flexquant_rl.engine.embedded import embedded_model_path
from flexquant_rl.engine.huggingface.quantizer import nested_model
from flexquant_rl.engine.serving import Engine

COUNT, KL_WEIGHT = 200, 9.0
PROMPT = "def read_lines(path):\n"
_FOLDER = os.environ.get("FQ_REAL_MODELS")
REAL = sorted(file.parent for file in Path(_FOLDER).glob("*/config.json")) if _FOLDER else []


@pytest.mark.slow
@pytest.mark.parametrize("source", [embedded_model_path(), *REAL], ids=lambda path: path.name)
def test_tokens_and_widths_of_fq_generate(source: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=FlexQuantConfig())
    nested = load_model(str(source), keep_reference=False)
    assert nested.fingerprint == nested_model(model).fingerprint
    save_random_policy(nested, tmp_path / "policy")
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids

    policy, profile = load_policy(tmp_path / "policy"), Profile.load(tmp_path / "policy" / PROFILE_FILE)
    engine = Engine(nested, policy, profile, decoder="hf")
    asked = Request(prompt[0], COUNT, kl_weight=KL_WEIGHT, eos_token_ids=())
    expected = list(engine.generate(asked))
    engine.close()

    attached = attach_policy(model, str(tmp_path / "policy"), kl_weight=KL_WEIGHT)
    endless: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": COUNT}
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **endless)[0, prompt.shape[1] :].tolist()
    widths = torch.cat(attached.bit_widths)
    assert found == [token.token_id for token in expected]
    assert torch.equal(widths, torch.stack([token.bit_widths for token in expected[1:]]))
    assert len(found) == COUNT
    assert len(widths.unique(dim=0)) > 10, "widths do not differ from token to token"

    result = run(
        *(cli.main, "generate", source, "--policy", tmp_path / "policy", "--kl-weight", KL_WEIGHT, "--decoder", "hf"),
        *("--prompt", PROMPT, "--raw", "--max-new-tokens", COUNT),
    )
    ends = [place for place, token in enumerate(found) if token in nested.eos_token_ids]
    whole = found[: ends[0] + 1] if ends else found
    assert result.result["num_tokens"] == len(whole)
    *lines, _ = result.out.splitlines(keepends=True)
    read = prompt[0].tolist()
    before, after = (nested.tokenizer.decode(ids, skip_special_tokens=True) for ids in (read, [*read, *whole]))
    assert "".join(lines).rstrip("\n") == after.removeprefix(before).rstrip("\n")
    mean = float(nested.mean_bit_width(torch.stack([token.bit_widths for token in expected[: len(whole)]])).mean())
    assert result.result["mean_bit_width"] == pytest.approx(mean)
