"""The benchmark harness counts what it says it counts. Clocks tick by hand; no time is asserted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexquant_rl.engine.benches import clocks, machine
from flexquant_rl.engine.benches.ceilings import copy_provider, memory_ring
from flexquant_rl.engine.benches.clocks import CudaClock, CudaGraphClock, HostClock, host_clock
from flexquant_rl.engine.benches.harness import (
    COPY,
    READ,
    BenchRefusedError,
    Provider,
    add_ratios,
    add_tokens_per_s,
    calls,
    interleave,
    quartiles,
    rows,
    run_bench,
    run_tests,
    table,
)
from flexquant_rl.engine.benches.machine import gpu_facts, machine_facts
from flexquant_rl.engine.benches.random_weights import random_weight


def ticking() -> HostClock:
    """A clock that shows 0, 1, 2, ... seconds."""
    ticks = itertools.count()
    return HostClock("ticks", lambda: float(next(ticks)))


def nothing() -> None:
    """A call that does nothing."""


class TestRounds:
    def test_rounds_are_interleaved_and_the_first_does_not_count(self) -> None:
        order: list[str] = []
        ticks = itertools.count()

        def provider(name: str) -> Provider:
            def turn() -> list[float]:
                order.append(name)
                return [next(ticks)]

            return Provider(name, turn)

        providers = [provider(name) for name in "ABC"]
        interleave(providers, 3)
        assert "".join(order) == "ABC" + "ABC" + "CBA" + "ABC"
        assert [item.times_s for item in providers] == [[3, 8, 9], [4, 7, 10], [5, 6, 11]]

    def test_calls_walk_the_ring_on_and_on(self) -> None:
        seen: list[int] = []
        turn = calls(ticking(), [lambda i=i: seen.append(i) for i in range(3)], per_turn=2)
        assert list(turn()) == [1, 1]
        list(turn())
        assert seen == [0, 1, 2, 0]

    def test_progress_counts_rounds(self) -> None:
        seen: list[Sequence[int]] = []

        def track(items: Sequence[int]) -> Sequence[int]:
            seen.append(items)
            return items

        interleave([Provider("a", calls(ticking(), [nothing]))], 4, track)
        assert [len(items) for items in seen] == [4]


class TestRows:
    def test_rows_by_hand(self) -> None:
        read = Provider(READ, list, 2000, times_s=[1e-6])
        ours = Provider("ours", list, 1000, {"bit_width": 4}, times_s=[1e-6, 2e-6, 3e-6, 4e-6, 5e-6])
        peer = Provider("peer", list, None, times_s=[6e-6])
        found = rows([read, ours, peer], {"op": "x"})
        add_ratios(found, "ours", ["peer"])
        assert found[1] == {
            **{"provider": "ours", "bit_width": 4, "op": "x", "num_samples": 5, "bytes": 1000},
            **{"p25_us": 1.5, "p50_us": 3.0, "p75_us": 4.5, "gb_per_s": 0.33, "share_of_read": 0.167},
            **{"roofline_us": 0.5, "times_faster_than": {"peer": 2.0}},
        }
        assert found[0]["share_of_read"] == 1.0
        assert found[2] == {
            **{"provider": "peer", "p25_us": 6.0, "p50_us": 6.0, "p75_us": 6.0, "num_samples": 1, "op": "x"}
        }

    def test_a_copy_is_the_ceiling_on_the_gpu(self) -> None:
        copy = Provider(COPY, list, 4000, times_s=[1e-6])
        found = rows([Provider("ours", list, 1000, times_s=[1e-6]), copy], {})
        assert [row["share_of_copy"] for row in found] == [0.25, 1.0]
        assert [row["roofline_us"] for row in found] == [0.25, 1.0]

    def test_without_a_ceiling_there_is_no_share(self) -> None:
        (row,) = rows([Provider("ours", list, 1000, times_s=[1e-6])], {})
        assert row["gb_per_s"] == 1.0
        assert not any("share" in key or "roofline" in key for key in row)

    def test_tokens_per_second_are_not_those_of_the_ceiling(self) -> None:
        found = rows([Provider(READ, list, 1, times_s=[1.0]), Provider("ours", list, 1, times_s=[0.004])], {})
        add_tokens_per_s(found)
        assert [row.get("tokens_per_s") for row in found] == [None, 250.0]

    def test_quartiles(self) -> None:
        assert quartiles([5, 1, 4, 2, 3]) == (1.5, 3, 4.5)
        assert quartiles([7.0]) == (7, 7, 7)

    def test_table_shows_what_there_is(self) -> None:
        found = [{"provider": "a", "p50_us": 1.5}, {"provider": "longer", "p50_us": 10.0, "bit_width": 4}]
        assert table(found).splitlines() == [
            "provider  bit_width  p50_us",
            "a                       1.5",
            "longer            4    10.0",
        ]

    def test_table_leaves_out_what_all_rows_share(self) -> None:
        common = {"op": "x", "cpu": "y", "model": {"layers": 1}, "num_samples": 3, "p50_us": 1.0}
        found = [{"provider": name, **common, "vocab": vocab} for name in "ab" for vocab in (10, 20)]
        found[0]["times_faster_than"] = {"b": 2.0}
        found[0]["bytes"] = 7
        assert table(found).splitlines()[0].split() == ["provider", "vocab", "p50_us"]


class TestReport:
    def report(self, tmp_path: Path, gate: Callable[..., str]) -> dict[str, object]:
        order: list[str] = []

        def measure() -> list[dict[str, object]]:
            order.append("measured")
            return [{"provider": "a"}]

        try:
            return run_bench("x", ["t.py"], measure, path=tmp_path / "x.json", progress=order.append, gate=gate)
        finally:
            self.order = order

    def test_tests_come_first_and_every_row_has_the_facts(self, tmp_path: Path) -> None:
        def gate(files: Sequence[str], progress: Callable[[str], None]) -> str:
            progress(f"gate {files}")
            return "passed"

        result = self.report(tmp_path, gate)
        assert self.order == ["gate ['t.py']", "measured"]
        assert result["bench"] == "x"
        (row,) = result["rows"]
        assert row["provider"] == "a"
        assert row["tests"] == "passed"
        assert row.keys() >= {"cpu", "cores", "load_average", "torch", "commit", "dirty", "time"}
        assert json.loads((tmp_path / "x.json").read_text()) == result

    def test_red_writes_nothing(self, tmp_path: Path) -> None:
        def gate(files: Sequence[str], progress: Callable[[str], None]) -> str:
            raise BenchRefusedError("red")

        with pytest.raises(BenchRefusedError, match="red"):
            self.report(tmp_path, gate)
        assert self.order == []
        assert not any(tmp_path.iterdir())


class TestGate:
    @pytest.fixture
    def checkout(self, tmp_path: Path) -> Path:
        """A checkout with one test that passes and one that fails."""
        (tmp_path / "tests").mkdir()
        (tmp_path / "tests" / "test_green.py").write_text("def test(): pass\n")
        (tmp_path / "tests" / "test_red.py").write_text("def test(): assert False\n")
        return tmp_path

    def test_green(self, checkout: Path) -> None:
        lines: list[str] = []
        assert run_tests(["tests/test_green.py"], lines.append, checkout) == "passed"
        assert lines == ["testing first: tests/test_green.py"]

    @pytest.mark.parametrize("name", ["tests/test_red.py", "tests/test_missing.py"])
    def test_red_and_missing_refuse(self, checkout: Path, name: str) -> None:
        with pytest.raises(BenchRefusedError, match=f"python -m pytest tests/test_green.py {name}"):
            run_tests(["tests/test_green.py", name], lambda line: None, checkout)

    def test_outside_a_checkout(self, tmp_path: Path) -> None:
        lines: list[str] = []
        assert run_tests(["tests/test_green.py"], lines.append, tmp_path) == "not run"
        assert len(lines) == 1
        assert '"tests": "not run"' in lines[0]


class TestMachine:
    def test_facts_of_a_checkout_and_of_an_installation(self, tmp_path: Path) -> None:
        assert machine_facts()["cpu"]
        facts = machine_facts(tmp_path)
        assert facts["commit"] is None
        assert facts["dirty"] is None

    def test_results_are_no_changes_of_the_code(self, tmp_path: Path) -> None:
        def git(*arguments: str) -> None:
            options = ("-c", "user.name=x", "-c", "user.email=x@example.org")
            assert machine._git(tmp_path, *options, *arguments) is not None

        (tmp_path / "code.py").touch()
        git("init", "--quiet")
        git("add", "code.py")
        git("commit", "--quiet", "--message", "x")
        results = tmp_path / "benchmarks" / "results"
        results.mkdir(parents=True)
        (results / "new.json").touch()
        assert machine_facts(tmp_path)["dirty"] is False
        (tmp_path / "code.py").write_text("1\n")
        facts = machine_facts(tmp_path)
        assert facts["dirty"] is True
        assert facts["commit"]

    def gpu_facts(self, monkeypatch: pytest.MonkeyPatch, answer: str | None) -> dict[str, object]:
        """The facts where nvidia-smi gives this answer."""
        device = SimpleNamespace(name="NVIDIA X", uuid="1-2")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
        asked: list[tuple[str, ...]] = []

        def output_of(*command: str) -> str | None:
            asked.append(command)
            return answer

        monkeypatch.setattr(machine, "_output_of", output_of)
        facts = gpu_facts()
        assert asked[0][:2] == ("nvidia-smi", "--id=GPU-1-2"), "of several GPUs the one that is timed"
        return facts

    def test_gpu_facts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        facts = self.gpu_facts(monkeypatch, "NVIDIA X, 570.1, 700.00 W, 1980 MHz, 2619 MHz")
        del facts["triton"]
        assert facts == {
            **{"gpu": "NVIDIA X", "driver": "570.1", "power_limit": "700.00 W"},
            **{"max_sm_clock": "1980 MHz", "max_memory_clock": "2619 MHz"},
        }

    def test_gpu_facts_without_nvidia_smi(self, monkeypatch: pytest.MonkeyPatch) -> None:
        facts = self.gpu_facts(monkeypatch, None)
        assert facts["gpu"] == "NVIDIA X"
        assert facts["driver"] is None

    @pytest.mark.gpu
    def test_gpu_facts_of_this_machine(self) -> None:
        facts = machine_facts()
        assert facts["gpu"] == torch.cuda.get_device_name(0)
        assert facts.keys() >= {"driver", "power_limit", "max_sm_clock", "max_memory_clock", "triton"}


class TestHostClock:
    def test_one_thread_counts_its_own_time(self) -> None:
        assert [host_clock(number).name for number in (1, 2)] == ["thread_cpu", "wall"]

    def test_reads_before_and_after_the_call(self) -> None:
        order: list[str] = []

        def now() -> float:
            order.append("now")
            return float(len(order))

        assert HostClock("x", now).seconds(lambda: order.append("call")) == 2.0
        assert order == ["now", "call", "now"]


class FakeEvent:
    """A CUDA event that notes what is asked of it; 2 ms lie between any two."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record(self) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def elapsed_time(self, other: FakeEvent) -> float:
        return 2.0


class TestCudaClocks:
    @pytest.fixture
    def log(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """What the clocks ask of CUDA, in order; there is none."""
        log: list[str] = []
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=8))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(log))

        def capture(call: Callable[[], object]) -> SimpleNamespace:
            log.append("capture")
            return SimpleNamespace(replay=lambda: log.append(f"replay {call()}"))

        monkeypatch.setattr(clocks, "capture", capture)
        return log

    def test_events_lie_around_the_call_after_the_flush(self, log: list[str]) -> None:
        clock = CudaClock(torch.device("cpu"))
        clock._flush.fill_(1)
        assert len(clock._flush) == 16, "larger than L2"

        def call() -> None:
            log.append(f"call {int(clock._flush.sum())}")

        assert clock.seconds(call) == 0.002
        assert log == ["record", "call 0", "record", "synchronize"]

    def test_a_call_is_captured_once(self, log: list[str]) -> None:
        clock = CudaGraphClock(torch.device("cpu"))
        turn = calls(clock, [lambda: "a", lambda: "b"], per_turn=4)
        assert list(turn()) == [0.002] * 4
        assert log.count("capture") == 2
        assert [line for line in log if "replay" in line] == ["replay a", "replay b"] * 2

    @pytest.mark.gpu
    @pytest.mark.parametrize("clock_type", [CudaClock, CudaGraphClock])
    def test_on_a_gpu(self, device: torch.device, clock_type: type[CudaClock]) -> None:
        clock = clock_type(device)
        counter = torch.zeros(1, device=device)
        assert clock.seconds(lambda: counter.add_(1)) > 0
        # A graph is warmed up three times and replayed once; capturing it does not run it.
        assert int(counter) == (4 if clock_type is CudaGraphClock else 1)

    @pytest.mark.gpu
    def test_a_copy_on_a_gpu(self, device: torch.device) -> None:
        provider = copy_provider(CudaGraphClock(device), device, 1 << 20)
        interleave([provider], 2)
        assert len(provider.times_s) == 2


def test_copy_moves_the_bytes_that_it_counts() -> None:
    provider = copy_provider(ticking(), torch.device("cpu"), 1024)
    assert list(provider.turn()) == [1.0]
    assert (provider.name, provider.num_bytes) == (COPY, 2048)


def test_memory_to_read() -> None:
    chunks = memory_ring(40 << 20)
    assert [chunk.nbytes for chunk in chunks] == [16 << 20] * 2
    assert all(int(chunk[-1]) == 1 for chunk in chunks)


def test_random_weight() -> None:
    weight = random_weight(4, 256, bit_widths=(3, 8), group_size=64)
    assert weight.planes.shape == (8, 4, 8)
    assert weight.scale.shape == weight.offset.shape == (2, 4, 4)
    assert bool((weight.scale > 0).all())
