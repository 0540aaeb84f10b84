"""The extra `eval`: whether lm-evaluation-harness is installed, and how it is kept from the network."""

from __future__ import annotations

import importlib.util
import os

from huggingface_hub import constants

from flexquant_rl.engine.errors import InputError


def check_extra() -> None:
    """Raises InputError unless lm-evaluation-harness is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("tasks need lm-evaluation-harness, which is not installed; pip install 'flexquant-rl[eval]'")


def stay_offline() -> None:
    """Has the libraries of data sets read files alone; they look when they are imported.

    Models by a hub name are downloaded before: from here on nothing is.
    """
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        os.environ.setdefault(name, "1")
    constants.HF_HUB_OFFLINE = True  # which has looked already
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
