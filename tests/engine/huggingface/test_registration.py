"""transformers knows nested checkpoints once this package is imported, and refuses them before."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import flexquant_rl
from flexquant_rl.engine.checkpoint import QUANT_METHOD, WEIGHTS_NOTE, save_checkpoint
from flexquant_rl.engine.huggingface.registration import register_with_transformers
from flexquant_rl.engine.model import NestedCausalLM

ROOT = Path(__file__).resolve().parents[3]

# What somebody does who got a nested checkpoint and does not know what it is.
WITHOUT_IMPORT = """
import sys
from transformers import AutoModelForCausalLM, LlamaForCausalLM, pipeline

for load in (AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained):
    try:
        load(sys.argv[1])
    except ValueError as error:
        print("refused:", error)
    else:
        print("loaded")
try:
    pipeline("text-generation", model=sys.argv[1])
except Exception as error:
    print("refused:", " ".join(str(error).split()))
else:
    print("loaded")
print("flexquant_rl" in sys.modules)
"""

WITH_IMPORT = """
import importlib.util, sys
import flexquant_rl

heavy = {"torch", "transformers", "numpy", "safetensors"} & set(sys.modules)
assert not heavy, heavy
import transformers
assert importlib.util.find_spec("transformers.quantizers.auto") is not None  # looked for, and not yet run
from transformers.quantizers import auto

print(auto.AUTO_QUANTIZATION_CONFIG_MAPPING["flexquant"].__name__, auto.AUTO_QUANTIZER_MAPPING["flexquant"].__name__)
print(any(getattr(finder, "module", None) == "transformers.quantizers.auto" for finder in sys.meta_path))
"""


def run(code: str, *arguments: object) -> list[str]:
    """What a program prints in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def checkpoint(nested_model: NestedCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("registration") / "nested"
    save_checkpoint(nested_model, path)
    return path


def test_without_the_import_a_nested_checkpoint_is_refused(checkpoint: Path) -> None:
    *refusals, is_imported = run(WITHOUT_IMPORT, checkpoint)
    assert is_imported == "False"
    assert len(refusals) == 3
    for refusal in refusals:
        assert refusal.startswith("refused: ")
        assert WEIGHTS_NOTE in refusal


def test_import_costs_nothing_and_registers_when_transformers_loads() -> None:
    assert run(WITH_IMPORT) == ["FlexQuantConfig FlexQuantizer", "False"]


def test_import_after_transformers_registers_at_once() -> None:
    # This process imported transformers first (conftest).
    assert AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] is flexquant_rl.FlexQuantConfig
    assert QUANT_METHOD in AUTO_QUANTIZER_MAPPING


def test_registering_again_changes_nothing() -> None:
    before = list(sys.meta_path)
    register_with_transformers()
    importlib.reload(flexquant_rl)
    assert sys.meta_path == before
