"""The README's four commands, in small form: from the embedded model's directory to a server that answers.

The block is taken from the README word for word; `DIR`, `NESTED`, ... are real names in an empty directory. What makes
it small is said in `SMALL` and `small_sizes`, and nowhere else.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import IO

import pytest
from cli_runner import Finished, run, spawn
from small_runs import TINY_RECORDING, leave_out_the_clock

from flexquant_rl import cli
from flexquant_rl.agents.runs import verified_ppo
from flexquant_rl.engine.embedded import embedded_model_path
from flexquant_rl.fq_env import calibration_text
from flexquant_rl.fq_env.stdlib_text import stdlib_text

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^## From a model to a served controller\n.*?^```bash\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)

SMALL: dict[str, tuple[object, ...]] = {
    # Fitted scales, but neither fitted codes nor tuning: they take minutes.
    "quantize": ("--method", "rtn", "--tune-steps", 0),
    # 96 recorded tokens, one seed of 64 env steps.
    "train": (*TINY_RECORDING, "--seeds", 1),
    "export": (),
    # A port that is free.
    "serve": ("--port", 0),
}
"""What is appended to each command."""


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 windows of calibration text instead of 64, 20 steps of cloning, no clock over whole texts, no picture."""
    monkeypatch.setattr(calibration_text, "_MOMENT_WINDOWS", 4)
    monkeypatch.setattr(verified_ppo, "_CLONE_STEPS", 20)
    leave_out_the_clock(monkeypatch)


def four_commands() -> list[list[str]]:
    """The words of each command of the block, `fq` left out."""
    found = BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found is not None, "the README has no block of four commands"
    lines = [shlex.split(line, comments=True) for line in found[1].splitlines()]
    assert all(words[0] == "fq" for words in lines)
    return [words[1:] for words in lines]


def test_they_are_four_and_hand_on_what_they_make() -> None:
    quantize, train, export, serve = four_commands()
    assert [command[0] for command in (quantize, train, export, serve)] == list(SMALL)
    nested, run_dir, policy = quantize[2], train[train.index("--run") + 1], export[2]
    assert train[train.index("--model") + 1] == nested
    assert export[1] == run_dir
    assert serve[1:] == [nested, "--policy", policy]


def lines_of(stream: IO[str]) -> Queue[str]:
    """The lines of a process' stream, as they come."""
    lines: Queue[str] = Queue()
    Thread(target=lambda: [lines.put(line) for line in stream], daemon=True).start()
    return lines


@pytest.mark.slow
@pytest.mark.usefixtures("small_sizes")
def test_from_a_directory_to_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openai = pytest.importorskip("openai", reason="needs the package `openai`")
    pytest.importorskip("fastapi", reason="needs the extra `serve`")
    monkeypatch.chdir(tmp_path)
    Path("DIR").symlink_to(embedded_model_path(), target_is_directory=True)
    Path("corpus.txt").write_text("\n\n".join(stdlib_text("policy-train").values())[:150_000], encoding="utf-8")
    *making, serve = four_commands()
    for command in making:
        done = run(cli.main, *command, *SMALL[command[0]])
        assert done.result, done.err
    process = spawn("cli.py", *serve, *SMALL["serve"], cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    said = lines_of(process.stderr)
    try:
        line = said.get(timeout=120)
        started = re.fullmatch(r"serving NESTED under (\S+) on (http://127\.0\.0\.1:\d+)\n", line)
        assert started is not None, line
        client = openai.OpenAI(base_url=f"{started[2]}/v1", api_key="none", max_retries=0)
        answer = client.completions.create(model="NESTED", prompt="def main():", max_tokens=8, temperature=0)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        out = process.stdout.read()
    except Empty:
        pytest.fail("the server said nothing within two minutes")
    finally:
        process.kill()
        process.wait()
    assert answer.usage.completion_tokens == len(answer.choices[0].flexquant["bit_widths"]) == 8
    result = Finished(process.returncode, out, "").result
    assert result["model"] == "NESTED"
    assert result["policy"] == started[1] == "POLICY"
    # What every process of the four has handed on: the model that the policy was trained for.
    card, config = (json.loads(Path(name).read_text()) for name in ("POLICY/policy.json", "RUN/config.json"))
    assert card["config"] == config["config"]
    assert config["config"]["model"] == "NESTED"
