"""Every Python block of docs/serving.md runs as it is written, one after the other, beside an exported policy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from flexquant_rl import load_model
from flexquant_rl.engine.control.artefact import save_policy
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.policy import DialPoint, LearnedPolicy, PolicyCard, PrecisionNet
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.model import NestedCausalLM

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "serving.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def save_random_policy(model: NestedCausalLM, out: Path) -> None:
    """Writes what `fq export` writes, for a network that nobody has trained but that switches."""
    generator = torch.Generator().manual_seed(0)
    schema = SignalSchema(model.num_units, model.bit_widths)
    net = PrecisionNet(schema)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    sensitivity = torch.rand(model.num_units, len(model.bit_widths), generator=generator)
    cost = roofline_cost(model)
    profile = Profile(cost, sensitivity, model.bit_widths, model.fingerprint, num_tokens=1, reference="8-bit")
    dial = (DialPoint(5.0, 2.0, 0.05, 4.0), DialPoint(20.0, 1.5, 0.01, 5.2))
    names = tuple(unit.name for unit in model.units)
    save_policy(LearnedPolicy(net, PolicyCard(schema, model.fingerprint, names, dial)), profile, out)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[list[str]]]:
    """The names that the blocks have left, and what each block has printed."""
    directory = tmp_path_factory.mktemp("serving")
    save_random_policy(load_model(keep_reference=False), directory / "policy")
    text = DOCUMENT.read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "serving"}
    printed: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setitem(names, "print", lambda *parts, **_: printed[-1].append(" ".join(map(str, parts))))
        for match in BLOCK.finditer(text):
            first = text.count("\n", 0, match.start(1))
            printed.append([])
            # Empty lines in front: an error then names the line of the document.
            exec(compile("\n" * first + match[1], str(DOCUMENT), "exec"), names)
    return names, printed


def test_the_first_block_streams_text_in_ten_lines(ran: tuple[dict[str, Any], list[list[str]]]) -> None:
    block = BLOCK.search(DOCUMENT.read_text(encoding="utf-8"))
    assert block is not None
    assert block[1].count("\n") <= 10
    _, printed = ran
    assert len("".join(printed[0])) > 10


def test_requests_of_threads_get_what_they_get_alone(ran: tuple[dict[str, Any], list[list[str]]]) -> None:
    names, _ = ran
    engine = names["Engine"](names["model"], names["policy"], names["profile"], max_length=256)
    alone = ["".join(token.text for token in engine.generate(request)) for request in names["requests"]]
    assert names["texts"] == alone
    assert len({*alone}) == len(names["prompts"])


def test_the_other_blocks_do_what_they_say(ran: tuple[dict[str, Any], list[list[str]]]) -> None:
    names, printed = ran
    _, dials, fixed, _, sampled, cancelled, likelihoods = printed
    assert dials == ["5: 2.00x, 0.0500 nats", "20: 1.50x, 0.0100 nats"]
    assert names["dial"] == 20.0
    assert len("".join(fixed)) > 10
    assert sampled[-1] in ("eos", "stop", "length")
    assert cancelled == ["4 cancelled"]
    assert [line.partition(" nats, greedy: ")[2] in ("True", "False") for line in likelihoods] == [True, True]
