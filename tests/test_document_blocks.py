"""Every fenced block of the README and of docs/ is run, or at least parsed by the program that it is for.

The tables below say which. A block that is in none of them is a failure, so a new one is met here first.

- `bash`: each line is run in this process, in small form, on a tiny model, after the lines before it and with the files
  that the document supposes. Lines in `ONLY_PARSED`, and those of other programs, are parsed.
- `python`: `PYTHON` names the test that runs the blocks of a document.
- `pycon`: tests/test_docs.py compares what they print.
- `text`: formulas and output, no code.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from cli_runner import TINY_EPISODES, TINY_RUN, run, write_sentences
from document_shell import ROOT, check_parses, command_lines, fences, options_of
from small_runs import TINY_DRAFTS, TINY_LEARNING, TINY_RECORDING, leave_out_the_clock, make_drafts_short, make_quick

from flexquant_rl import cli
from flexquant_rl.engine import embedded
from flexquant_rl.engine.errors import InputError
from flexquant_rl.fq_env import calibration_text, prompts
from flexquant_rl.fq_env.shared import forget_shared
from flexquant_rl.fq_env.stdlib_text import StdlibSplit

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

PYTHON = {
    # document: blocks, tests that run them
    "README.md": (1, ("tests/fq_env/test_documents.py",)),
    "docs/environment.md": (4, ("tests/fq_env/test_documents.py",)),
    "docs/export.md": (1, ("tests/test_policy_docs.py",)),
    "docs/extending.md": (6, ("tests/test_extending.py", "tests/fq_env/test_documents.py")),
    "docs/huggingface.md": (2, ("tests/test_huggingface_docs.py",)),
    "docs/server.md": (3, ("tests/test_server_docs.py",)),
    "docs/serving.md": (7, ("tests/test_serving_docs.py",)),
    "docs/tasks.md": (1, ("tests/agents/tasks/test_harness.py",)),
    "docs/verified-training.md": (1, ("tests/test_policy_docs.py",)),
    "docs/verified.md": (2, ("tests/test_verified_docs.py",)),
}

ONLY_PARSED = {
    # beginning or part of a command: why it is not run
    "fq serve": "ends with a signal; tests/test_four_commands.py starts one, and asks it",
    "fq sweep": "needs the extra `ray`; tests/test_sweep_ray.py runs it",
    "fq tasks": "needs the extra `eval`; tests/test_cli_tasks.py runs it",
    "--peers": "needs the extra `bench`; tests/agents/analysis/test_peers.py runs it",
    "--device cuda": "needs a GPU",
    "--baselines random entropy schedule": "tunes six families, for a minute; tests/test_train_cli.py trains",
}

SMALL: dict[str, tuple[object, ...]] = {
    # command of ours: what is appended to it
    "analyse": ("--windows", 2, "--window-tokens", 24),
    "combine": (*TINY_EPISODES, "--sequences", 2, "--dials", 1),
    "evaluate": (*TINY_EPISODES, "--sequences", 2, "--dials", 1),
    "export": (),
    "generate": ("--max-new-tokens", 4),
    "inspect": (),
    "profile": ("--steps", 10),
    "quantize": (),
    "record": ("--tokens", 96, "--depth", 2, "--prompt-tokens", 8, "--max-new-tokens", 12, "--widths", 3, 5),
    "train": (),
}

SMALL_IF: dict[tuple[str, str], tuple[object, ...]] = {
    # the same, where the line has this word
    ("analyse", "stories.txt"): ("--strategies", "rtn"),
    ("analyse", "other.txt"): ("--strategies", "rtn"),
    ("analyse", "gptq-tuned"): ("--strategies", "rtn", "gptq", "--tune-steps", 1),
    ("analyse", "CHECKPOINT"): ("--strategies",),
    ("generate", "--speed"): ("--speed", 1),  # what an untrained policy of a tiny model reaches
    ("quantize", "--calibration"): ("--tune-steps", 1),
    # A baseline that is not tuned, one budget, neither oracle nor long texts.
    ("train", "lossy"): (
        *(*TINY_RUN, "--seeds", 1, "--latency", "roofline", "--baselines", "untrained"),
        *("--time-budgets", 0.6, "--oracle-samples", 0, "--long-tokens", 0),
    ),
    ("train", "verified"): (*TINY_RECORDING, "--seeds", 1),
    ("train", "--traces"): (*TINY_LEARNING, "--seeds", 1),
}

MADE_BY = {"quantize": 3, "export": 3, "combine": 3, "record": 3}
"""Commands that make a new directory, and which of their words names it."""

VERIFIED = {"docs/verified.md", "docs/verified-training.md"}
"""Documents whose RUN is one of `--task verified`."""


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def reason_to_parse(words: Sequence[str]) -> str | None:
    """Why a line is parsed and not run; None where it is run."""
    if words[0] != "fq" and list(words[:2]) != ["python", "train.py"]:
        return "not one of our commands"
    if list(words[:2]) == ["fq", "bench"]:
        return "measures speed"
    line = f"{shlex.join(words)} "
    return next((why for part, why in ONLY_PARSED.items() if f"{part} " in line), None)


def small(name: str, words: Sequence[str]) -> list[str]:
    """A command's words with what makes it small behind them."""
    appended = [*SMALL[name]]
    if {"--resume", "--from-rows"} & {*words}:  # as it was started, or measured
        return [*words]
    asked = {*words}
    if name == "train" and "verified" not in asked:
        asked |= {"lossy"}
    elif "--traces" in asked:  # a recording that is there has its sizes
        asked -= {"verified"}
    for (command, word), more in SMALL_IF.items():
        if command == name and word in asked:
            appended += more
    return [*words, *map(str, appended)]


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """The tiny model and a part of the text are the defaults, and what takes long is cut short."""
    forget_shared()
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        make_drafts_short(patch)
        leave_out_the_clock(patch)
        patch.setattr(calibration_text, "_MOMENT_WINDOWS", 4)
        patch.setattr(calibration_text, "_HELD_OUT_WINDOWS", 1)
        yield
    forget_shared()


@pytest.fixture(scope="module")
def world(quick: None, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents suppose: a model, a nested one, text, a run of each task, an exported policy."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        use_small_defaults(patch, tiny_model_dir, write_sentences(folder / "text.txt", 400))
        (folder / "MODEL").symlink_to(tiny_model_dir, target_is_directory=True)
        model = ("--model", "MODEL", "--text", "text.txt")
        for command in (
            ("quantize", "MODEL", "NESTED"),
            small("train", ("train", *map(str, model), "--run", "lossy")),
            small("train", ("train", *map(str, model), "--run", "drafts", *map(str, TINY_DRAFTS[:2]))),
            ("export", "lossy", "POLICY"),
        ):
            done = run(cli.main, *command)
            assert done.code == 0, done.err
    return folder


def use_small_defaults(patch: pytest.MonkeyPatch, model: Path, text: Path) -> None:
    """Makes `default` the tiny model, and the standard library a short text."""

    def some_text(split: StdlibSplit) -> dict[str, str]:
        return {"some": text.read_text(encoding="utf-8")}

    patch.setattr(embedded, "embedded_model_path", lambda: model)
    patch.setattr(prompts, "stdlib_text", some_text)


def supply(document: str, world: Path, folder: Path) -> None:
    """Puts the files into a folder that a document supposes, by the names that it gives them."""
    run_dir = "drafts" if document in VERIFIED else "lossy"
    supposed = {"MODEL": "MODEL", "SMOLLM2": "MODEL", "NESTED": "NESTED", "CHECKPOINT": "NESTED", "RUN": run_dir}
    supposed |= {"LOSSY_RUN": "lossy", "traces": "drafts/traces"}
    if document in ("README.md", "docs/quickstart.md"):  # elsewhere a DIR is written
        supposed["DIR"] = "MODEL"
    if document == "docs/kernels.md":
        supposed["OUT"] = "POLICY"
    for name, source in supposed.items():
        (folder / name).symlink_to(world / source, target_is_directory=True)
    text = (ROOT / document).read_text(encoding="utf-8")
    for name in ("text", "corpus", "other", "book", "code", "stories", "wiki", "tinystories", "wikitext2"):
        if f"{name}.txt" in text or name == "text":  # that of the runs
            shutil.copy(world / "text.txt", folder / f"{name}.txt")
    for name in ("code", "chat"):
        if f"{name}.jsonl" in text:  # a document a line
            pieces = (world / "text.txt").read_text(encoding="utf-8").split("\n\n")
            rows = (json.dumps({"text": piece}) for piece in pieces if piece.strip())
            (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "prompt.txt").write_text("the cat", encoding="utf-8")
    if document == "docs/extending.md":
        source = next(fence.text for fence in fences(ROOT / document) if fence.language == "python")
        (folder / "my_policies.py").write_text(source, encoding="utf-8")


def make_room(words: Sequence[str]) -> None:
    """Removes what stands where a command makes something new: the lines of a block may be alternatives."""
    named = [words[MADE_BY[words[1]]]] if words[1] in MADE_BY else []
    named += [after for option, after in pairwise(words) if option == "--run"]
    for path in map(Path, named):
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)


SHELL = [document for document in DOCUMENTS if any(fence.language == "bash" for fence in fences(document))]


@pytest.mark.parametrize("document", SHELL, ids=name_of)
def test_shell_blocks_run_or_parse(
    document: Path, world: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [words for fence in fences(document) if fence.language == "bash" for words in command_lines(fence.text)]
    assert lines
    for words in lines:
        check_parses(words)
    if all(map(reason_to_parse, lines)):
        return
    supply(name_of(document), world, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    use_small_defaults(monkeypatch, tiny_model_dir, world / "text.txt")
    for words in lines:
        if reason_to_parse(words) is None:
            found = options_of(words)
            assert found is not None
            arguments = small(found[0], words[1:] if words[0] == "fq" else ["train", *words[2:]])
            make_room(["fq", *arguments])
            done = run(cli.main, *arguments)
            assert done.code == 0, f"{name_of(document)}: fq {shlex.join(arguments)}\n{done.err}"


def test_every_block_is_of_a_kind_that_is_run_or_parsed() -> None:
    kinds = {(name_of(document), fence.language) for document in DOCUMENTS for fence in fences(document)}
    assert {kind for _, kind in kinds} == {"bash", "python", "pycon", "text"}
    assert {document for document, kind in kinds if kind == "bash"} == {*map(name_of, SHELL)}
    compared = (ROOT / "tests" / "test_docs.py").read_text(encoding="utf-8")
    assert "```pycon" in compared


def test_python_blocks_are_run_by_the_tests_that_are_named() -> None:
    found = {
        name_of(document): [fence.language for fence in fences(document)].count("python") for document in DOCUMENTS
    }
    assert {name: count for name, count in found.items() if count} == {
        name: count for name, (count, _) in PYTHON.items()
    }
    for name, (_, tests) in PYTHON.items():
        for test in tests:
            assert f'"{Path(name).name}"' in (ROOT / test).read_text(encoding="utf-8"), f"{test} does not read {name}"


def test_every_reason_to_parse_is_met() -> None:
    """A reason for a line that no document has any more goes."""
    lines = [
        words
        for document in SHELL
        for fence in fences(document)
        if fence.language == "bash"
        for words in command_lines(fence.text)
    ]
    met = {reason_to_parse(words) for words in lines}
    assert {*ONLY_PARSED.values()} <= met
    ran = [words for words in lines if reason_to_parse(words) is None]
    assert len(ran) > len(lines) / 2, "most lines should be run"


@pytest.mark.parametrize(
    "line",
    [
        "fq evaluate default --polcy fixed:4",
        "fq quantise MODEL OUT",
        "fq train --seeds 0",
        "python train.py --task losy",
        "make demmo",
        "pip install 'flexquant-rl[severe]'",
        "pip install -r requirements-none.txt",
        "pytest tests/test_none.py",
        "pytest tests/test_docs.py -k no_such_test",
        "python benchmarks/none.py",
        "curl example.org",
    ],
)
def test_a_line_that_does_not_parse_is_found(line: str) -> None:
    (words,) = command_lines(f"{line}  # comment")
    with pytest.raises((AssertionError, InputError)):
        check_parses(words)


def test_lines_are_read_as_a_shell_reads_them() -> None:
    block = "A=b fq inspect X \\\n  --json   # says\n\n# nothing\nfq serve 'a b'\n"
    assert command_lines(block) == [["fq", "inspect", "X", "--json"], ["fq", "serve", "a b"]]
