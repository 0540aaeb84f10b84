"""An installation that serves and does not train: nothing that training needs is imported, and each command says so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_runner import ROOT, Finished

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
# One process runs everything, for imports take longer than all of it; what is hidden, no command can have imported.
# Of each command code, stdout and stderr are printed in a line; the code below prints its own.
RUN = """
import json
from cli_runner import run
from flexquant_rl.cli import main

for arguments in json.loads(sys.argv[1]):
    finished = run(main, *arguments)
    print(json.dumps([finished.code, finished.out, finished.err]))
"""
IN_CODE = f"""
from pathlib import Path
import torch
import flexquant_rl
import flexquant_rl.agents.server.routes
from transformers import AutoModelForCausalLM
from flexquant_rl import attach_policy, generate, load_model, load_policy
from flexquant_rl.engine.checkpoint import save_checkpoint
from flexquant_rl.engine.control.artefact import save_policy
from flexquant_rl.engine.control.policy import PolicyCard, StaticPolicy
from flexquant_rl.engine.control.profile import Profile, unmeasured_profile

source, model, out = sys.argv[2:]
nested = load_model(source, keep_reference=False)
save_checkpoint(nested, Path(model))
widths = torch.full((nested.num_units,), 4)
policy = StaticPolicy("fixed:4", widths, PolicyCard.of_model(nested, {{}}))
save_policy(policy, unmeasured_profile(nested), Path(out))
policy, profile = load_policy(out), Profile.load(f"{{out}}/profile.json")
tokens = [token.token_id for token in generate(nested, policy, profile, "abc", max_new_tokens=5, decoder="hf")]
hf = AutoModelForCausalLM.from_pretrained(model)
attach_policy(hf, out)
prompt = torch.tensor([nested.token_text.encode("abc")])
text = hf.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1]:].tolist()
print(tokens == text, *sorted(name for name in {HIDDEN!r} if name in sys.modules))
"""
REFUSED = (("train",), ("evaluate", "default"))


@dataclass(frozen=True)
class Ran:
    """What the process left: each command's outcome, what the code printed, and the directory it was started in."""

    refused: dict[str, Finished]
    quantized: Finished
    exported: Finished
    inspected: tuple[Finished, ...]
    generated: tuple[Finished, ...]
    in_code: str
    cwd: Path


@pytest.fixture(scope="module")
def ran(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Runs commands and code in a process without the packages that train."""
    folder, cwd = tmp_path_factory.mktemp("serving"), tmp_path_factory.mktemp("current")
    model, out = folder / "nested", folder / "policy"
    asked = ("--prompt", "abc", "--max-new-tokens", 6)
    commands = [
        *REFUSED,
        ("quantize", tiny_model_dir, model),
        ("export", "fixed:4", out, "--model", model),
        ("inspect", model),
        ("inspect", out),
        *(("generate", model, "--policy", policy, *asked) for policy in (out, "draft:3,length=2")),
    ]
    arguments = (json.dumps(commands, default=str), tiny_model_dir, folder / "code-nested", folder / "code-policy")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + RUN + IN_CODE, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *lines, in_code = done.stdout.splitlines()
    train, evaluate, quantized, exported, *rest = (Finished(*json.loads(line)) for line in lines)
    inspected, generated = rest[:2], rest[2:]
    refused = {"train": train, "evaluate": evaluate}
    return Ran(refused, quantized, exported, tuple(inspected), tuple(generated), in_code, cwd)


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


def test_the_other_file_has_what_the_extra_has(repo_root: Path) -> None:
    text = (repo_root / "requirements-server.txt").read_text(encoding="utf-8").splitlines()
    extras = tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    first, *serving = [line for line in text if line and not line.startswith("#")]
    assert first == "-r requirements-serving.txt"
    assert requirements(serving) == requirements(extras["serve"])


def test_the_documents_name_the_files(repo_root: Path) -> None:
    words = (repo_root / "docs" / "serving.md").read_text(encoding="utf-8")
    for name in ("requirements-serving.txt", "requirements-server.txt"):
        assert f"pip install -r {name}" in words


@pytest.mark.slow
def test_a_policy_is_exported_loaded_and_generates(ran: Ran) -> None:
    assert ran.quantized.code == 0, ran.quantized.err
    assert ran.exported.code == 0, ran.exported.err
    assert [found.result["kind"] for found in ran.inspected] == ["nested checkpoint", "static policy"]
    assert len(ran.generated) == 2
    for made in ran.generated:
        assert made.result["num_tokens"] == 6


@pytest.mark.slow
def test_a_policy_works_in_code_and_in_huggingface(ran: Ran) -> None:
    assert ran.in_code == "True"


@pytest.mark.slow
@pytest.mark.parametrize("command", [arguments[0] for arguments in REFUSED])
def test_what_needs_more_says_what(command: str, ran: Ran) -> None:
    assert re.fullmatch(
        rf"fq {command} needs the package \w+, which an installation that only serves leaves out; "
        r"pip install flexquant-rl, with its dependencies",
        ran.refused[command].error,
    )
    assert not list(ran.cwd.iterdir())


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
