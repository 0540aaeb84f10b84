"""The command `python train.py`: reads options, then loads what training needs."""

from __future__ import annotations

import os
import sys

# Torch's OpenMP threads spin while they wait. Without a limit that costs 8 ms per operation on a busy machine, and
# without any spinning a third of the speed on an idle one. libgomp reads this once, when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from flexquant_rl.agents.commands.options import TrainOptions
from flexquant_rl.agents.commands.parsing import parse
from flexquant_rl.agents.commands.process import ENDINGS, command, run_command

DESCRIPTION = f"""Trains a precision controller: a model and text in, a policy out.

    python train.py                          # embedded model, about 6 minutes
    python train.py --model DIR --text FILE  # any causal LM, any text
    python train.py --resume RUN             # after Ctrl-C or a crash

{ENDINGS}"""


def main() -> int:
    """The command `fq-train` and `python train.py`."""
    return command(lambda: run_command("train", parse(TrainOptions, "train.py", DESCRIPTION, sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(main())
