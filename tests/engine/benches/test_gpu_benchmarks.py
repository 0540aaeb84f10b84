"""The benchmark files of the GPU run on the CPU at tiny sizes: Triton interpreted, the clock one of the CPU."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cli_runner import run

from flexquant_rl.engine.benches.clocks import WALL
from flexquant_rl.engine.benches.harness import Provider, rows, table
from flexquant_rl.engine.decoding import graph_pass
from flexquant_rl.kernels.gemv import Tile

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
# Sizes that Triton's interpreter gets through in a moment, and other constants of a file that are too large for it.
TINY: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "activations": ((2, 128), {}),
    "attention": ((16, 8, 2), {"HEADS": 2, "KEY_HEADS": 1}),
    "dequantize": ((4, 128), {}),
    "gemv": (("qkv", 4, 128), {"NUM_TOKENS": (1, 2), "NUM_COPIES": 1, "TILES": (Tile(4, 32, 1),)}),
    "layer_statistics": ((2, 3, 64), {}),
    "next_token": ((50, 1.0), {"NUM_UNITS": 3, "CAPACITY": 8}),
    "policy_net": ((3,), {}),
    "rms_norm": ((1, 128), {}),
    "rotary": ((2,), {"NUM_HEADS": 2, "NUM_KEY_HEADS": 1, "NUM_PLACES": 128}),
    "swiglu": ((1, 128), {}),
    "token_signals": ((50,), {"NUM_UNITS": 3}),
}

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports a file of benchmarks/ as it is found when it runs as a script."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_every_file_is_tested() -> None:
    files = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert files == {*TINY, "graph_decode", "graph_verify"}
    for name in TINY:
        assert (ROOT / "tests" / "kernels" / f"test_{name}.py").is_file(), "a kernel's tests are its gate"


@pytest.mark.parametrize("name", TINY)
def test_kernel_on_the_cpu(name: str, load: Load, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(f"bench_{name}")
    size, constants = TINY[name]
    for constant, value in constants.items():
        assert hasattr(module, constant)
        monkeypatch.setattr(module, constant, value)
    assert all(len(found) == len(size) for found in module.SIZES)
    providers: list[Provider] = load("_command").at_sizes(device, WALL, module.providers, [size])
    for provider in providers:
        provider.times_s.extend(provider.turn())
    found = rows(providers, {"op": name})
    facts = [json.dumps({"provider": provider.name} | provider.facts) for provider in providers]
    assert len({*facts}) == len(facts), "rows can be told apart"
    assert {row["provider"] for row in found} == {"triton", "torch"}
    assert all(row["num_samples"] == 1 and row["bytes"] > 0 for row in found)
    assert len(table(found).splitlines()) == len(found) + 1


def test_loops_of_graph_decode_on_the_cpu(load: Load, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":  # seconds for each product in the interpreter
        monkeypatch.setattr(graph_pass, "gemv", lambda x, weight, widths, *, out, **options: out.zero_())
    module = load("bench_graph_decode")
    shape = module.Shape(hidden=128, ffn=128, layers=1, heads=2, key_heads=1, head_dim=64, vocab=64, max_length=16)
    contestants = module.make_contestants(shape, device, context=4, steps=1)
    assert [contestant.name for contestant in contestants] == ["nested"] * 9 + ["torch"]
    static = {item.facts["widths"]: item.bytes_per_token for item in contestants}
    assert static["static 3"] < static["static 8"] < static["float16"]
    for contestant in contestants[0], contestants[-1]:
        (seconds,) = module.turn_of(contestant.loop, WALL, 4, 1)()
        assert seconds > 0
        assert contestant.loop.held == 5


def test_passes_of_graph_verify_on_the_cpu(load: Load, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(graph_pass, "gemv", lambda x, weight, widths, *, out, **options: out.zero_())
    module = load("bench_graph_verify")
    monkeypatch.setattr(module, "PASS_SIZES", (1, 2))
    monkeypatch.setattr(module, "BIT_WIDTHS", (3, 8))
    shape = load("bench_graph_decode").Shape(
        hidden=128, ffn=128, layers=1, heads=2, key_heads=1, head_dim=64, vocab=64, max_length=16
    )
    row = module.random_row(shape, device, 4)
    timed = module.providers(row, WALL, 1)
    for provider in timed:
        provider.times_s.extend(provider.turn())
    found = rows(timed, {})
    module.add_steps(found)
    assert [(entry["bit_width"], entry["num_tokens"]) for entry in found] == [(3, 1), (3, 2), (8, 1), (8, 2)]
    assert found[0]["steps"] == found[2]["steps"] == 1
    assert found[0]["bytes"] < found[2]["bytes"]
    assert int(row.held.lengths) == 4
    # What differs from single steps is not timed.
    monkeypatch.setattr(type(row), "steps", lambda self, widths: row.read(2, widths) + 1)
    with pytest.raises(module.BenchRefusedError, match="a pass over 1 tokens at 3 bits has other logits than steps"):
        module.providers(row, WALL, 1)


class TestCommand:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_without_a_gpu(self, load: Load) -> None:
        command = load("_command")
        finished = run(lambda: command.main("gemv", lambda: [], []), "--rounds", 1)
        assert finished.error.startswith("bench_gemv needs a CUDA device and this machine has none")

    def test_bad_input(self, load: Load) -> None:
        command = load("_command")
        finished = run(lambda: command.main("gemv", lambda: [], []), "--rounds", 0)
        assert finished.error == "rounds=0 must be at least 1; give --rounds 1 or more"

    def test_help_says_what_a_round_is(self, load: Load) -> None:
        command = load("_command")
        finished = run(lambda: command.main("gemv", lambda: [], []), "--help")
        assert "usage: bench_gemv.py" in finished.out
        assert "(default: 50)" in finished.out
        assert "Timed replays of every provider" in finished.out

    def test_result(self, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        command = load("_command")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        asked: list[Any] = []

        def run_bench(name: str, tests: tuple[str, ...], measure: Callable[[], Any], **options: Any) -> dict[str, Any]:
            asked.append((name, tests, options["path"]))
            return {"bench": name, "rows": measure()}

        monkeypatch.setattr(command, "run_bench", run_bench)

        def measure(options: Any, device: torch.device, track: Callable[[range], list[int]]) -> list[dict[str, Any]]:
            return [{"provider": device.type, "p50_us": number} for number in track(range(options.rounds))]

        def bench() -> int:
            command.run("x", ("t.py",), command.KernelBench, measure)
            raise AssertionError("it exits")

        result = run(bench, "--rounds", 2).result
        assert result == {"bench": "x", "rows": [{"provider": "cuda", "p50_us": number} for number in (0, 1)]}
        run(bench, "--json", tmp_path / "y.json")
        assert asked == [
            ("x", ("t.py",), path) for path in (ROOT / "benchmarks/results/gpu-x.json", tmp_path / "y.json")
        ]

    def test_refused(self, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
        command = load("_command")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

        def run_bench(*args: object, **options: object) -> None:
            raise command.BenchRefusedError("the tests fail")

        monkeypatch.setattr(command, "run_bench", run_bench)
        finished = run(lambda: command.main("gemv", lambda: [], []))
        assert (finished.code, finished.out, finished.err) == (1, "", "error: the tests fail\n")

    @pytest.mark.gpu
    def test_a_kernel_on_a_gpu(self, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        command, module = load("_command"), load("bench_rms_norm")
        bench = command.run_bench
        monkeypatch.setattr(
            command, "run_bench", lambda *args, **options: bench(*args, **options, gate=lambda *_: "not run")
        )
        options = ("--rounds", 2, "--json", tmp_path / "rows.json")
        result = run(lambda: command.main("rms_norm", module.providers, module.SIZES[:1]), *options).result
        assert [row["provider"] for row in result["rows"]] == ["copy", "triton", "torch"]
        assert all(row["clock"] == "cuda_graph" and row["share_of_copy"] > 0 for row in result["rows"])
        assert json.loads((tmp_path / "rows.json").read_text()) == result
