"""The command `python train.py`: reads options, then loads what training needs."""

from __future__ import annotations

import os
import sys

# Torch's OpenMP threads spin while they wait. Without a limit that costs 8 ms per operation on a busy machine, and
# without any spinning a third of the speed on an idle one. libgomp reads this once, when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from flexquant_rl.agents.commands.options import TrainOptions
from flexquant_rl.agents.commands.parsing import parse
from flexquant_rl.agents.commands.process import command

DESCRIPTION = """Trains a precision controller: a model and text in, a policy out.

    python train.py                          # embedded model, a few minutes
    python train.py --model DIR --text FILE  # any causal LM, any text
    python train.py --resume RUN             # after Ctrl-C or a crash

The last line of stdout is one JSON object.

Exit: 0 done, 1 failure, 2 bad input, 130 Ctrl-C, 141 closed pipe, 143 SIGTERM."""


def _train(options: TrainOptions) -> None:
    from flexquant_rl.agents.commands.train import train  # here, not above: --help must not wait for torch

    train(options)


def main() -> int:
    """The command `fq-train` and `python train.py`."""
    return command(lambda: _train(parse(TrainOptions, "train.py", DESCRIPTION, sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(main())
