"""Exit codes, one line on stderr, and a last line that is JSON."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from flexquant_rl.agents.commands.process import BAD_INPUT, DONE, INTERRUPTED, TERMINATED, command, print_result
from flexquant_rl.engine import files
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import write_json, write_tensors


def raising(error: BaseException) -> int:
    def run() -> None:
        raise error

    return command(run)


def test_success_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(lambda: None) == DONE == 0
    assert capsys.readouterr() == ("", "")


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(InputError("width=9 is not stored; use 8")) == BAD_INPUT == 2
    assert capsys.readouterr() == ("", "error: width=9 is not stored; use 8\n")
    assert raising(InputError("first\n  second")) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(KeyboardInterrupt()) == INTERRUPTED == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("interrupted")
    assert captured.err.count("\n") == 1
    assert raising(KeyboardInterrupt("continue with: --resume RUN")) == 130
    assert "continue with: --resume RUN" in capsys.readouterr().err


def test_termination_is_an_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    """What was begun is cleaned up, how to go on is said, and the handler of before is put back."""
    cleaned = []

    def run() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as interruption:
            raise KeyboardInterrupt("continue with: --resume RUN") from interruption
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    assert command(run) == TERMINATED == 143
    assert cleaned == [True]
    assert capsys.readouterr() == ("", "terminated; continue with: --resume RUN\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_commands_run_in_any_thread(capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(command(lambda: None)))
    thread.start()
    thread.join()
    assert codes == [DONE]


def test_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/checkpoint.safetensors")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "run/checkpoint.safetensors" in err
    assert "No space left" in err
    assert "free some space" in err
    assert err.count("\n") == 1


def test_full_disk_as_safetensors_reports_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"the last good one")
    assert command(lambda: write_tensors(path, {"a": torch.zeros(1)})) == 2
    err = capsys.readouterr().err
    assert "free some space" in err
    assert err.count("\n") == 1
    assert path.read_bytes() == b"the last good one"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_stdout_device(tmp_path: Path) -> None:
    """A real ENOSPC from the kernel, not one made up."""
    code = (
        "import sys; from flexquant_rl.agents.commands.process import command, print_result; "
        "sys.exit(command(lambda: print_result({'a': 1})))"
    )
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 2
    assert "No space left on device; free some space" in result.stderr


def test_bugs_keep_their_traceback() -> None:
    for error in (ValueError("a bug"), RuntimeError("parity"), OSError(errno.EIO, "broken disk"), AssertionError()):
        with pytest.raises(type(error)):
            raising(error)


def test_unwritable_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert command(lambda: write_json(tmp_path / "file" / "config.json", {})) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_result_is_the_last_line_and_strict_json(capsys: pytest.CaptureFixture[str]) -> None:
    print("a table")
    print_result(
        {"nan": math.nan, "rows": [{"kl": math.inf, "x": 1.5}, (-math.inf, 2)], "s": "NaN", "n": None, "b": True}
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    parsed = json.loads(lines[-1], parse_constant=refuse)
    assert parsed == {"nan": None, "rows": [{"kl": None, "x": 1.5}, [None, 2]], "s": "NaN", "n": None, "b": True}


def test_a_reader_that_has_seen_enough() -> None:
    """As in `fq generate ... | head -1`."""
    source = """
    import sys
    from flexquant_rl.agents.commands.process import command

    def body():
        for _ in range(100_000):
            print("a line of output")

    sys.exit(command(body))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert (process.wait(timeout=60), errors) == (141, b"")
