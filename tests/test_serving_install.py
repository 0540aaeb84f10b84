"""An installation that serves and does not train: nothing that training needs is imported, and each command says so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flexquant_rl.agents.commands.process import TRAINING_PACKAGES

HIDDEN = ("stable_baselines3", "gymnasium", "tensorboard", "matplotlib")
# The packages are as absent as if they had never been installed: no finder finds them.
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {HIDDEN!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
FQ = "from flexquant_rl.cli import main; sys.argv = ['fq', *sys.argv[1:]]; sys.exit(main())"


def python(code: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a process without the packages that train."""
    command = [sys.executable, "-c", WITHOUT + code, *map(str, arguments)]
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


def requirements(lines: list[str]) -> dict[str, str]:
    """Bounds by package; markers left out."""
    found = {}
    for line in lines:
        name, bound = re.fullmatch(r"([\w-]+)(.*?)(?:;.*)?", line.strip()).groups()  # type: ignore[union-attr]
        found[name] = bound.strip()
    return found


def test_the_file_has_what_the_package_has_without_what_trains(repo_root: Path) -> None:
    text = (repo_root / "requirements-serving.txt").read_text(encoding="utf-8").splitlines()
    project = tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    every = requirements(project["dependencies"])
    serving = requirements([line for line in text if line and not line.startswith("#")])
    trains = {name.replace("_", "-") for name in HIDDEN}
    assert trains <= every.keys()
    assert serving == {name: bound for name, bound in every.items() if name not in {*trains, "triton"}}
    assert set(HIDDEN) == {*TRAINING_PACKAGES}


def test_the_documents_name_the_file(repo_root: Path) -> None:
    assert "pip install -r requirements-serving.txt" in (repo_root / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_policy_is_exported_loaded_and_generates(tiny_model_dir: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "nested", tmp_path / "policy"
    assert python(FQ, "quantize", tiny_model_dir, model, cwd=tmp_path).returncode == 0
    exported = python(FQ, "export", "fixed:4", out, "--model", model, cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    for policy in (out, "draft:3,length=2"):
        asked = ("--policy", policy, "--prompt", "abc", "--max-new-tokens", 6)
        made = python(FQ, "generate", model, *asked, cwd=tmp_path)
        assert made.returncode == 0, made.stderr
        assert json.loads(made.stdout.splitlines()[-1])["num_tokens"] == 6


@pytest.mark.slow
def test_a_policy_works_in_code_and_in_huggingface(tiny_model_dir: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "nested", tmp_path / "policy"
    code = f"""
from pathlib import Path
import torch
import flexquant_rl
from transformers import AutoModelForCausalLM
from flexquant_rl import attach_policy, generate, load_model, load_policy
from flexquant_rl.engine.checkpoint import save_checkpoint
from flexquant_rl.engine.control.artefact import save_policy
from flexquant_rl.engine.control.policy import PolicyCard, StaticPolicy
from flexquant_rl.engine.control.profile import Profile, unmeasured_profile

nested = load_model({str(tiny_model_dir)!r}, keep_reference=False)
save_checkpoint(nested, Path({str(model)!r}))
widths = torch.full((nested.num_units,), 4)
policy = StaticPolicy("fixed:4", widths, PolicyCard.of_model(nested, {{}}))
save_policy(policy, unmeasured_profile(nested), Path({str(out)!r}))
policy, profile = load_policy({str(out)!r}), Profile.load({str(out / "profile.json")!r})
tokens = [token.token_id for token in generate(nested, policy, profile, "abc", max_new_tokens=5, decoder="hf")]
hf = AutoModelForCausalLM.from_pretrained({str(model)!r})
attach_policy(hf, {str(out)!r})
prompt = torch.tensor([nested.token_text.encode("abc")])
text = hf.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1]:].tolist()
print(tokens == text, *sorted(name for name in {HIDDEN!r} if name in sys.modules))
"""
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("train",), ("evaluate", "default")])
def test_what_needs_more_says_what(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = python(FQ, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        rf"error: fq {arguments[0]} needs the package \w+, which an installation that only serves leaves out; "
        r"pip install flexquant-rl, with its dependencies",
        said,
    )
    assert not list(tmp_path.iterdir())


def test_the_policy_loader_imports_little(repo_root: Path) -> None:
    """What is imported beyond torch is what decides how long loading takes: a fraction of 0.2 s."""
    code = (
        "import sys, torch; before = set(sys.modules); import flexquant_rl; flexquant_rl.load_policy; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True)
    new = done.stdout.split()
    ours = {name for name in new if name.startswith("flexquant_rl")}
    assert {name.split(".")[0] for name in new} - {"flexquant_rl"} <= {"safetensors", "numpy", *sys.stdlib_module_names}
    parts = {name.split(".")[1] for name in ours if "." in name}
    assert parts == {"engine", "kernels"}
    # Policies, their signals, their files; no model, no decoder, no native library.
    assert not [name for name in ours if name.startswith(("flexquant_rl.engine.decoding", "flexquant_rl.engine.model"))]
    assert {name.rpartition(".")[2] for name in ours if name.startswith("flexquant_rl.kernels.")} == {
        "bitplane",
        "signal_constants",
    }
