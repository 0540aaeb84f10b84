"""Which decoder runs a model, and on how many threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from flexquant_rl.engine.decoding.decoder import check_max_length
from flexquant_rl.engine.decoding.lean import LeanDecoder, LeanSession, why_not_lean
from flexquant_rl.engine.decoding.options import DecoderName, check_decoder_name, check_num_threads
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.model import NestedCausalLM

SessionOpener = Callable[[int], DecodeSession | LeanSession]
"""Opens a session with so many rows."""


def session_opener(
    model: NestedCausalLM,
    *,
    max_length: int | None = None,
    decoder: DecoderName = "auto",
    num_threads: int | None = None,
) -> SessionOpener:
    """Prepares a model for sessions: the lean decoder where it can run the model, else Hugging Face's modules.

    Args:
        model: The model.
        max_length: Tokens that a row can hold; default: the model's context.
        decoder: "lean" or "hf" insist on one of them.
        num_threads: Threads of a step, 1 to the number of processors; default: as `default_decoder` says. With
            Hugging Face's modules it is torch's number that is set, for the whole process.

    Raises:
        InputError: If there is no such decoder, `max_length` exceeds the context, "lean" was asked for and cannot run
            the model, or there are not as many processors.
    """
    check_decoder_name(decoder)
    if num_threads is not None:
        check_num_threads(num_threads)
    if decoder == "lean" or (decoder == "auto" and default_decoder(model)[0] == "lean"):
        lean = LeanDecoder(model, max_length=max_length, num_threads=num_threads or 1)
        return lambda num_rows: LeanSession(lean, num_rows=num_rows)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    check_max_length(max_length, model)
    return lambda num_rows: DecodeSession(model, num_rows=num_rows, max_length=max_length)


def open_session(
    model: NestedCausalLM,
    *,
    max_length: int | None = None,
    decoder: DecoderName = "auto",
    num_threads: int | None = None,
) -> DecodeSession | LeanSession:
    """Opens a session for one sequence; arguments and errors as for `session_opener`."""
    return session_opener(model, max_length=max_length, decoder=decoder, num_threads=num_threads)(1)


def default_decoder(model: NestedCausalLM, num_threads: int | None = None) -> tuple[Literal["lean", "hf"], int]:
    """The decoder that `open_session` takes unless told otherwise, and the number of threads of its steps.

    Args:
        model: The model.
        num_threads: As given to `open_session`; None is 1 for the lean decoder and torch's number for the other.
    """
    if why_not_lean(model) is None:
        return "lean", num_threads or 1
    return "hf", num_threads or torch.get_num_threads()
