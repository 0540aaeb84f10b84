"""Every reader of files, given files that were damaged at random: it reads them or says one line, and writes nothing.

Twenty seconds, always the same, by default. FQ_FUZZ_SECONDS=600 goes on with new damage for so long, split evenly, and
prints how many files were read.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mistakes import Inputs
from toy_traces import random_traces
from transformers import AutoTokenizer

from flexquant_rl.agents.config import TrainConfig, check_config
from flexquant_rl.agents.export import load_exported
from flexquant_rl.agents.runs.run import RUN_VERSION, load_run
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.traces import read_traces, start_recording, write_embedding, write_sequence
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import file_sha256, read_tensors, write_tensors
from flexquant_rl.fq_env.prompts import file_documents
from flexquant_rl.fq_env.trace_table import TraceTable

SECONDS = float(os.environ.get("FQ_FUZZ_SECONDS", 0))

WORDS = [None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 0.5, -0.0, 1e300, float("nan"), float("inf"), "", "8"]
WORDS += ["default", "../../outside.txt", "/etc/passwd", "x" * 3000, "\ud800", "\0", [], {}, [[]], [3, 9], {"a": []}]
CHAT = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": None}]}
ROWS = [{"text": "words of a row"}, CHAT, {"data": {"text": ["a", "b"]}}, "bare", 4, None, {"conversations": [{}]}]


@dataclass(frozen=True)
class Target:
    """A good folder, how it is read, and how many damaged copies of it are read without FQ_FUZZ_SECONDS."""

    folder: Path
    read: Callable[[Path], object]
    examples: int


def texts(folder: Path) -> Path:
    (folder / "plain.txt").write_text("some words and more \u20ac\n\n" * 50, encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return folder


def run_directory(folder: Path) -> Path:
    config = TrainConfig(model="somewhere", text=("a.txt",), profile="profile.json", threads=2)
    (folder / "config.json").write_text(
        json.dumps({"version": RUN_VERSION, "config": asdict(config)}), encoding="utf-8"
    )
    return folder


def front(folder: Path) -> Path:
    tensors = {"kl_weight": torch.rand(4), "bit_widths": torch.full((4, 3), 4), "output_kl_nats": torch.rand(4)}
    write_tensors(folder / "front.safetensors", tensors, {"profile_sha256": "0" * 64})
    return folder


def recording(folder: Path) -> Path:
    traces = random_traces(np.random.default_rng(0), num_sequences=3)
    start_recording(folder, traces.plan)
    for index, trace in enumerate(traces.sequences):
        write_sequence(folder, traces.plan, index, trace)
    write_embedding(folder, traces.plan, traces.embedding_ids, traces.embedding)
    return folder


def read_recording(folder: Path) -> None:
    traces = read_traces(folder)
    table = TraceTable(traces, range(len(traces.sequences)))
    assert np.isfinite(table.settled_signals).all()
    assert np.isfinite(table.draft_signals).all()
    assert np.isfinite(table.embedding).all()


def read_run(folder: Path) -> None:
    check_config(load_run(folder))


@pytest.fixture(scope="module")
def targets(shared: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    model = load_model(str(shared.nested))
    tokenizer = AutoTokenizer.from_pretrained(shared.model)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    folder = tmp_path_factory.mktemp("whole")

    def made(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    def read_texts(path: Path) -> None:
        for name in ("plain.txt", "rows.jsonl"):
            for field in (None, "text"):
                if name != "plain.txt" or field is None:
                    try:
                        file_documents([path / name], tokenizer=tokenizer, text_field=field)
                    except InputError as error:
                        one_line(error)

    def read_policy(path: Path) -> None:
        exported = load_exported(path)
        exported.card.check_model(model.fingerprint, path)
        exported.profile.check(model)
        exported.policy(torch.zeros(1, exported.card.schema.dim))
        exported.card.setting_for_speed(1.5)

    shutil.copy(shared.policy / "profile.json", made("profile"))
    return {
        "text": Target(texts(made("text")), read_texts, 250),
        "run": Target(run_directory(made("run")), read_run, 300),
        "profile": Target(folder / "profile", lambda path: Profile.load(path / "profile.json").check(model), 200),
        "policy": Target(shared.policy, read_policy, 200),
        "front": Target(front(made("front")), lambda path: read_tensors(path / "front.safetensors", fix="x"), 100),
        "recording": Target(recording(made("recording")), read_recording, 200),
        "checkpoint": Target(shared.nested, lambda path: load_model(str(path)), 40),
    }


def one_line(error: InputError) -> None:
    message = str(error)
    assert message
    assert len(message.splitlines()) == 1, message
    assert len(message) < 2000, message


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def confuse(data: st.DataObject, path: Path) -> None:
    """Puts a value of another kind somewhere into a JSON file (or a line of one), or takes one away."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.suffix == ".jsonl" else [path.read_text()]
    number = data.draw(st.integers(0, len(lines) - 1), label="line")
    try:
        value = json.loads(lines[number])
    except ValueError:  # damaged before, or the empty line at the end
        return
    chosen = data.draw(st.sampled_from(places(value)), label="place")
    word: Any = data.draw(st.sampled_from(WORDS) | st.integers() | st.floats() | st.text(max_size=9), label="value")
    for _ in range(data.draw(st.sampled_from([0, 0, 0, 1, 2, 800]), label="depth")):
        word = [word]
    if not chosen:
        value = word
    else:
        holder = value
        for key in chosen[:-1]:
            holder = holder[key]
        kind = data.draw(st.sampled_from(["replace", "replace", "remove", "add"]), label="kind")
        if kind == "remove":
            del holder[chosen[-1]]
        elif kind == "add" and isinstance(holder, dict):
            holder["added"] = word
        else:
            holder[chosen[-1]] = word
    lines[number] = json.dumps(value)
    path.write_text("\n".join(lines), encoding="utf-8")


def damage_bytes(data: st.DataObject, path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, max(len(content) - 1, 0)), label="byte")
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat", "empty", "deep"]), label="kind")
    if kind == "flip" and content:
        content[place] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    elif kind == "cut":
        del content[place:]
    elif kind == "insert":
        content[place:place] = data.draw(st.binary(min_size=1, max_size=20), label="inserted")
    elif kind == "repeat":
        content[place:place] = content[: data.draw(st.integers(0, 200), label="count")]
    elif kind == "empty":
        content.clear()
    elif kind == "deep":
        content[:] = b"[" * 100_000
    path.write_bytes(content)


def replace_file(data: st.DataObject, path: Path, outside: Path) -> None:
    kind = data.draw(st.sampled_from(["gone", "folder", "outside", "loop", "nowhere"]), label="kind")
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.symlink_to({"outside": outside, "loop": path, "nowhere": outside / "nowhere"}[kind])


def mend_hashes(folder: Path) -> None:
    """Makes hashes right again, so that what is behind their check is reached."""
    card, manifest = folder / "policy.json", folder / "manifest.json"
    for path, entries in ((card, None), (manifest, "files")):
        if not path.is_file() or path.is_symlink():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            hashes = value if entries is None else value[entries]
            if entries is None:
                hashes["weights_sha256"] = file_sha256(folder / "policy.safetensors")
                hashes["profile_sha256"] = file_sha256(folder / "profile.json")
            else:
                hashes |= {name: file_sha256(folder / name) for name in [*hashes] if (folder / name).is_file()}
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue
        path.write_text(json.dumps(value), encoding="utf-8")


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every path below a folder with what changes when it is written."""
    stats = {path.relative_to(folder).as_posix(): path.lstat() for path in sorted(folder.rglob("*"))}
    return {name: (stat.st_mode, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def fuzz(target: Target, root: Path, number: int, examples: int) -> int:
    """Reads damaged copies; returns how many."""
    outside = root / "outside.txt"
    outside.write_text("a secret", encoding="utf-8")
    count = 0

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=[*HealthCheck],
    )
    @given(data=st.data())
    def read_damaged(data: st.DataObject) -> None:
        nonlocal count
        folder = root / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(target.folder, folder)
        for _ in range(data.draw(st.integers(1, 2), label="faults")):
            path = folder / data.draw(st.sampled_from(sorted(file.name for file in target.folder.iterdir())))
            if not path.is_file() or path.is_symlink():
                continue
            kinds = ["bytes", "file"] + ["json"] * 4 * (path.suffix in (".json", ".jsonl"))
            kind = data.draw(st.sampled_from(kinds), label="fault")
            if kind == "bytes":
                damage_bytes(data, path)
            elif kind == "file":
                replace_file(data, path, outside)
            else:
                try:
                    confuse(data, path)
                except (UnicodeDecodeError, RecursionError):  # damaged before
                    continue
        if data.draw(st.booleans(), label="mended"):
            mend_hashes(folder)
        before = state(root)
        count += 1
        try:
            target.read(folder)
        except InputError as error:
            one_line(error)
        assert state(root) == before

    read_damaged()
    return count


@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("ignore")  # transformers has much to say of its own files
@pytest.mark.parametrize("name", ["text", "run", "profile", "policy", "front", "recording", "checkpoint"])
def test_damaged_files(name: str, targets: dict[str, Target], tmp_path: Path) -> None:
    target, began, number, count = targets[name], time.monotonic(), 0, 0
    until = began + SECONDS / len(targets)
    if not SECONDS:
        assert fuzz(target, tmp_path, 0, target.examples) >= target.examples // 2
        return
    while time.monotonic() < until:
        number += 1
        count += fuzz(target, tmp_path, number, 40)
    seconds = time.monotonic() - began
    print(f"\n{name}: {count} damaged files in {seconds:.0f} s, {count / seconds:.0f} each second")
