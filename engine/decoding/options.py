"""What a caller may ask of a decoder: its name, and how many threads. Imports nothing that is slow."""

from __future__ import annotations

import os
from typing import Literal, get_args

from flexquant_rl.engine.errors import InputError

DecoderName = Literal["auto", "lean", "hf"]
"""`auto` is the lean decoder where it can run the model, else Hugging Face's modules."""


def check_decoder_name(decoder: str) -> None:
    """Raises InputError on a name that no decoder has."""
    if decoder not in get_args(DecoderName):
        raise InputError(f"decoder={decoder!r} is unknown; use one of {', '.join(get_args(DecoderName))}")


def check_num_threads(num_threads: int) -> None:
    """Raises InputError unless there is a processor for each thread; more would wait for each other."""
    has_affinity = hasattr(os, "sched_getaffinity")
    num_processors = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    if not 1 <= num_threads <= num_processors:
        raise InputError(
            f"threads={num_threads} must be within 1..{num_processors}, the processors of this machine; "
            "give e.g. --threads 1"
        )
