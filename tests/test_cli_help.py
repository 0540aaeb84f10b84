"""Help and usage errors: at once, without torch, within 80 columns."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from cli_runner import ROOT

from flexquant_rl import __version__, cli

SLOW = {"torch", "transformers", "gymnasium", "stable_baselines3", "numpy", "triton", "matplotlib"}
_BENCHES = ("gemv", "decode", "drafts", "policy", "env")
COMMANDS = [(), *((name,) for name in cli.COMMANDS), *(("bench", name) for name in _BENCHES)]
# Prints what slow packages were imported by the time that a command ends, behind what it printed itself.
WATCH = f"""
import atexit, runpy, sys
atexit.register(lambda: print("imported:", *sorted({SLOW!r} & {{name.split(".")[0] for name in sys.modules}})))
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


def start(script: str, *arguments: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": str(columns), "NO_COLOR": "1"}
    command = [sys.executable, "-c", WATCH, str(ROOT / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def shown(finished: subprocess.CompletedProcess[str]) -> str:
    """What a command printed, once it is certain that nothing slow was imported for it."""
    text, _, imported = finished.stdout.rpartition("imported:")
    assert imported.split() == []
    return text


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_help(arguments: tuple[str, ...]) -> None:
    finished = start("cli.py", *arguments, "--help")
    assert finished.returncode == 0, finished.stderr
    text = shown(finished)
    usage, _, rest = text.partition("\n")
    assert usage.startswith(" ".join(("usage: fq", *arguments)))
    assert max(map(len, rest.splitlines())) <= 80
    # tyro wraps none: the names of all commands, and two that are just too short for [OPTIONS].
    assert len(usage) <= 80 or arguments in ((), ("bench", "policy"), ("export",))
    assert not re.search(r"default: (None|)\)", text)
    assert "{None}" not in text


def test_help_of_train_py() -> None:
    text = shown(start("train.py", "--help"))
    assert "python train.py --resume RUN" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("columns", [1, 7, 8, 39])
def test_narrow_terminal(columns: int) -> None:
    finished = start("cli.py", "generate", "--help", columns=columns)
    assert finished.returncode == 0, finished.stderr
    assert "--prompt" in finished.stdout


def test_arguments_are_named_and_choices_listed() -> None:
    text = shown(start("cli.py", "generate", "--help"))
    for wanted in ("MODEL", "--policy POLICY", "--prompt-file FILE", "{auto,lean,hf}", "{cpu,cuda}"):
        assert wanted in text
    quantize = shown(start("cli.py", "quantize", "--help"))
    for wanted in ("MODEL", "OUT", "--method {rtn,gptq}", "--group-size {32,64,128}", "--calibration FILES"):
        assert wanted in quantize


def test_version() -> None:
    assert shown(start("cli.py", "--version")) == f"fq {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "subcommand"),
        (("surprise",), "surprise"),
        (("generate",), "MODEL"),
        (("generate", "default", "--polcy", "fixed:4"), "--polcy"),
        (("quantize", "default", "out", "--group-size", "48"), "48"),
        (("evaluate", "default", "--device", "tpu"), "tpu"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], said: str) -> None:
    finished = start("cli.py", *arguments)
    assert finished.returncode == 2
    assert shown(finished) == ""
    assert said in finished.stderr
    assert "see the above" not in finished.stderr.lower()
