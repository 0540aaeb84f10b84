"""Documents whose Python blocks run as they are written, one after the other, beside an exported policy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from flexquant_rl.engine.control.artefact import save_policy
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.policy import DialPoint, LearnedPolicy, PolicyCard, PrecisionNet
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.model import NestedCausalLM

DOCS = Path(__file__).resolve().parent.parent / "docs"
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


def run_blocks(
    document: Path, directory: Path, replaced: dict[str, str] | None = None
) -> tuple[dict[str, Any], list[list[str]]]:
    """Runs the blocks of a document in a directory.

    Args:
        document: The document.
        directory: The working directory of the blocks.
        replaced: What stands for a name of the reader's own, e.g. of a model, by that name.

    Returns:
        The names that the blocks have left, and what each block has printed.
    """
    text = document.read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": document.stem}
    printed: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setitem(names, "print", lambda *parts, **_: printed[-1].append(" ".join(map(str, parts))))
        for match in BLOCK.finditer(text):
            first = text.count("\n", 0, match.start(1))
            printed.append([])
            block = match[1]
            for name, value in (replaced or {}).items():
                block = block.replace(name, value)
            # Empty lines in front: an error then names the line of the document.
            exec(compile("\n" * first + block, str(document), "exec"), names)
    return names, printed
