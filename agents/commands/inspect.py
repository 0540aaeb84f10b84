"""`fq inspect`: what a file or directory is, of which model, and whether it is whole."""

from __future__ import annotations

from pathlib import Path

from flexquant_rl.agents.commands.options import InspectOptions
from flexquant_rl.agents.commands.process import print_result
from flexquant_rl.agents.inspection import described, inspected
from flexquant_rl.engine.embedded import resolve_model


def inspect(options: InspectOptions) -> None:
    """Prints what there is, then the same as one JSON line."""
    facts = inspected(Path(resolve_model(options.path)))
    if not options.json:
        print("\n".join(described(facts)))
    print_result(facts)
