"""docs/extending.md: every Python block is written to the file that the text names, and used as the text says."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cli_runner import TINY_EPISODES, run, write_text

from flexquant_rl import cli
from flexquant_rl.agents.policies import families
from flexquant_rl.engine import embedded
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.decoding.session import DecodeSession

ROOT = Path(__file__).resolve().parent.parent


def blocks(heading: str) -> list[str]:
    """The Python blocks below a heading, in order."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^```python\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)


def load(source: str, name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Writes a block to a file and imports it under a module's full name."""
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory; modules imported from it are forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_policies", None)


def evaluated(model: Path, folder: Path, *policies: str) -> list[dict[str, float | str]]:
    """The rows that `fq evaluate` prints."""
    options = ("--text", write_text(folder / "text.txt"), *TINY_EPISODES, "--sequences", 2, "--latency", "roofline")
    rows: list[dict[str, float | str]] = run(cli.main, "evaluate", model, "--policy", *policies, *options).result[
        "rows"
    ]
    return rows


def test_a_policy_of_your_own(here: Path, tiny_model_dir: Path) -> None:
    (source,) = blocks("A policy of your own in `fq evaluate`")
    (here / "my_policies.py").write_text(source, encoding="utf-8")
    own = "my_policies:SurpriseSwitch"
    names = (own, f"{own}:limit_nats=2,high_width=8", f"{own}:-1", f"{own}:99", "fixed:4", "fixed:6")
    rows = evaluated(tiny_model_dir, here, *names)
    assert [row["policy"] for row in rows] == [own, f"{own}:2,high_width=8", f"{own}:-1", f"{own}:99", *names[4:]]
    for always, fixed in ((2, 5), (3, 4)):
        for column in ("mean_bit_width", "output_kl_nats", "perplexity", "speedup_modelled"):
            assert rows[always][column] == pytest.approx(rows[fixed][column], rel=1e-4), (
                "a threshold that every token or none is above"
            )


def test_a_new_baseline(here: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, test_source = blocks("A new baseline")
    periodic = load(source, "flexquant_rl.agents.policies.periodic", here / "periodic.py", monkeypatch)
    monkeypatch.setattr(families, "POLICIES", (*families.POLICIES, periodic.Periodic))
    tests = load(test_source, "test_periodic", here / "test_periodic.py", monkeypatch)
    own_tests = [value for name, value in vars(tests).items() if name.startswith("test_")]
    assert len(own_tests) == 3
    for test in own_tests:
        test()
    (facts,) = families.family_facts(["periodic"]).values()
    assert facts == periodic.Periodic.family
    finished = run(cli.main, "evaluate", tiny_model_dir, "--policy", "periodics:4")
    assert "did you mean periodic:4?" in finished.error
    rows = evaluated(tiny_model_dir, here, "periodic:2,high=6", "periodic:1,high=6", "fixed:6")
    assert rows[0]["mean_bit_width"] == 5
    assert rows[1]["output_kl_nats"] == pytest.approx(rows[2]["output_kl_nats"], rel=1e-4)


def test_a_new_decoder(
    here: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, use = blocks("A new decoder")
    decoder = load(source, "recomputing", here / "recomputing.py", monkeypatch)
    model = load_model(str(tiny_model_dir))
    ours, reference = decoder.RecomputingDecoder(model, num_rows=2), DecodeSession(model, num_rows=2)
    ids = torch.randint(97, 123, (2, 9), generator=torch.Generator().manual_seed(0))
    widths = torch.tensor([[4, 3, 6], [8, 5, 3]])
    for each in (ours, reference):
        each.prefill(ids[:, :4])
        each.extend(ids[:, 4:7], widths)
        each.truncate(torch.tensor([5, 6]))
    last = ours.fork().extend(ids[:, 7:], widths), reference.extend(ids[:, 7:], widths)
    torch.testing.assert_close(last[0].logits, last[1].logits, atol=1e-4, rtol=1e-5)
    assert ours.lengths.tolist() == [5, 6]
    monkeypatch.setattr(embedded, "embedded_model_path", lambda: tiny_model_dir)
    exec(compile(use, "extending.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.endswith("\n")
