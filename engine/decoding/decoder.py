"""What a decoder is: few verbs, bit-widths as an argument of each, and what a pass puts out.

A decoder continues R rows, independent sequences that may be at different positions and run at different widths in the
same call. It remembers keys and values and never a bit-width. Two implementations stand behind this seam: `session.py`
(Hugging Face's modules, any architecture) and `lean.py` (native, for Llama-like models on a CPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.linear import REFERENCE_WIDTH
from flexquant_rl.engine.model import ForwardResult, NestedCausalLM, Unit


@dataclass(frozen=True)
class StepOutput:
    """What a pass puts out at one token of each row.

    Attributes:
        logits: `[R, vocab]` float32.
        residual_update: `[R, U]` float32, ‖Δh‖/‖h‖ of the unit's layer; 0 for the head.
        crest: `[R, U]` float32, max|h|/rms(h) of the layer's input; 0 for the head.
    """

    logits: Tensor
    residual_update: Tensor
    crest: Tensor


@dataclass(frozen=True)
class ExtendOutput:
    """What a pass puts out at each of the M tokens that it appends to every row.

    Attributes:
        logits: `[R, M, vocab]` float32.
        residual_update: `[R, M, U]` float32, as in `StepOutput`.
        crest: `[R, M, U]` float32, as in `StepOutput`.
    """

    logits: Tensor
    residual_update: Tensor
    crest: Tensor

    @staticmethod
    def of_pass(model: NestedCausalLM, result: ForwardResult) -> ExtendOutput:
        """What a pass of a model put out at its kept tokens, the layers' statistics spread over the units."""
        assert result.residual_update is not None and result.crest is not None, "the pass collected statistics"
        return ExtendOutput(result.logits, model.per_unit(result.residual_update), model.per_unit(result.crest))

    def at(self, index: int) -> StepOutput:
        """The output at one of the tokens; -1 is the last."""
        return StepOutput(self.logits[:, index], self.residual_update[:, index], self.crest[:, index])


class DecoderModel(Protocol):
    """The facts about a model that the environment needs."""

    @property
    def units(self) -> tuple[Unit, ...]:
        """What a policy controls."""

    @property
    def bit_widths(self) -> tuple[int, ...]:
        """Stored widths, ascending."""

    @property
    def num_units(self) -> int:
        """U."""

    @property
    def vocab_size(self) -> int:
        """Size of the output distribution."""

    @property
    def max_context(self) -> int:
        """Tokens a row can hold."""

    @property
    def fingerprint(self) -> str:
        """Identity of the nested weights."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""

    @property
    def has_reference(self) -> bool:
        """Whether width 0 can be asked for."""

    def embedding_matrix(self) -> Tensor:
        """`[vocab, d]`."""

    def mean_bit_width(self, bit_widths: Tensor) -> Tensor:
        """Parameter-weighted mean of `[..., U]`."""


class Decoder(Protocol):
    """R rows of tokens and the verbs that move them; anything with these methods can be decoded with."""

    @property
    def model(self) -> DecoderModel:
        """The model behind the decoder."""

    @property
    def lengths(self) -> Tensor:
        """`[R]` int64 tokens held per row."""

    @property
    def max_length(self) -> int:
        """Tokens that a row can hold."""

    def prefill(
        self, prompt_ids: Tensor, *, rows: Tensor | None = None, bit_widths: Tensor | None = None
    ) -> StepOutput:
        """Restarts rows, each with a prompt of the same length. If the pass fails, these rows are empty.

        Args:
            prompt_ids: `[R', T]` int64.
            rows: `[R']` int64 rows to restart; default all.
            bit_widths: `[U]`; default the largest stored width everywhere.

        Raises:
            InputError: If the prompt is empty, longer than a row or no int64 tokens of the vocabulary, if a row is
                named twice or not at all, or if a width is not stored.
        """

    def extend(self, token_ids: Tensor, bit_widths: Tensor, *, rows: Tensor | None = None) -> ExtendOutput:
        """Appends M tokens to rows in one pass. If the pass fails, these rows are as they were.

        Args:
            token_ids: `[R', M]` int64.
            bit_widths: `[U]` or `[R', U]` int64; 0 reads the unquantised weights.
            rows: `[R']` int64 rows to extend; default all.

        Raises:
            InputError: As `prefill`, M = 0 included, or if a row has no room for M tokens.
        """

    def step(self, token_ids: Tensor, bit_widths: Tensor, *, rows: Tensor | None = None) -> StepOutput:
        """Appends one token `[R']` to each of the rows: `extend` by one."""

    def truncate(self, lengths: Tensor) -> None:
        """Forgets the last tokens of every row: `[R]` int64 tokens that stay, none more than are held.

        Extending afterwards gives the same as if the forgotten tokens had never been there.

        Raises:
            InputError: If the lengths are no int64, one is negative, or a row holds fewer tokens than it is cut to.
        """

    def score(self, token_ids: Tensor, bit_widths: Tensor | None = None, *, first: int = 0) -> Tensor:
        """Teacher-forced logits of whole sequences, see `DecodeSession.score`."""

    def fork(self) -> Decoder:
        """An independent copy, keys and values included."""

    def close(self) -> None:
        """Frees the cache; any later call raises. Closing twice is fine."""


def greedy_tokens(logits: Tensor) -> Tensor:
    """The likeliest tokens of `[R, vocab]` logits, `[R]` int64 on the CPU."""
    if logits.device.type != "cpu":
        return first_of_largest(logits).cpu()  # a few numbers cross the bus instead of the vocabulary's
    # NumPy's argmax of 32,000 floats takes a ninth of torch's time (2.13): 50 us, 2% of a step of 100 million weights.
    return torch.from_numpy(logits.cpu().numpy().argmax(-1))


def first_of_largest(logits: Tensor) -> Tensor:
    """The first of the largest of `[R, vocab]`, `[R]` int64, as on the CPU: a device's argmax may give any of them."""
    vocab_size = logits.shape[-1]
    places = torch.arange(vocab_size, device=logits.device)
    is_largest = logits == logits.amax(-1, keepdim=True)
    return torch.where(is_largest, places, vocab_size - 1).amin(-1)


def check_max_length(max_length: int | None, model: NestedCausalLM) -> int:
    """Returns how many tokens a row shall hold, the model's context by default; InputError if that is exceeded."""
    max_length = model.max_context if max_length is None else max_length
    if max_length < 1:
        raise InputError(f"max_length={max_length} must be at least 1; leave it out for the model's context")
    if max_length > model.max_context:
        raise InputError(
            f"{max_length} tokens (prompt and continuation) were asked for, but the model's context holds "
            f"{model.max_context}{model.context_note}; shorten the prompt or the continuation"
        )
    return max_length


def check_room(num_tokens: int, held: int, max_length: int) -> None:
    """Raises InputError if a row that holds `held` tokens has no room for more."""
    if held + num_tokens > max_length:
        raise InputError(
            f"{held + num_tokens} tokens do not fit into a row of {max_length}; shorten the prompt or the continuation"
        )


def check_tokens(decoder: Decoder, token_ids: Tensor, rows: Tensor | None, *, is_prompt: bool = False) -> None:
    """The check behind `prefill`, `extend` and `step` of every decoder, all but the widths.

    Args:
        decoder: What is to read the tokens.
        token_ids: `[R', M]` as given.
        rows: `[R']` as given.
        is_prompt: Whether the rows are restarted.

    Raises:
        InputError: Unless there is a token or more for each of R' different rows of the decoder, all tokens are of the
            vocabulary, and there is room for them.
    """
    held = decoder.lengths
    check_ids("token ids", token_ids, "[R, M]", 2)
    if rows is not None:
        check_ids("rows", rows, "[R]", 1)
        listed = rows.tolist()
        if not listed or len(set(listed)) < len(listed) or not 0 <= min(listed) <= max(listed) < len(held):
            raise InputError(f"rows={listed}: name one or more of the rows 0 to {len(held) - 1}, each of them once")
        held = held[rows.to(held.device)]
    if len(token_ids) != len(held):
        raise InputError(f"{len(token_ids)} sequences were given for {len(held)} rows; give one for each")
    num_tokens = token_ids.shape[1]
    if num_tokens == 0:
        what = "the prompt is empty" if is_prompt else "there is nothing to extend by"
        raise InputError(f"{what}; at least one token is needed")
    check_vocabulary(token_ids, decoder.model.vocab_size)
    check_room(num_tokens, 0 if is_prompt else int(held.max()), decoder.max_length)


def check_ids(name: str, given: Tensor, shape: str, dim: int) -> None:
    """Raises InputError unless something is an int64 tensor with so many dimensions."""
    if not isinstance(given, Tensor):
        raise InputError(f"{name}: a {type(given).__name__} was given; give a tensor {shape} of int64")
    if given.dtype != torch.int64 or given.dim() != dim:
        raise InputError(f"{name}: {given.dtype} {list(given.shape)} was given; give a tensor {shape} of int64")


def check_vocabulary(token_ids: Tensor, vocab_size: int) -> None:
    """Raises InputError if one of the tokens `[...]`, at least one, is outside the vocabulary."""
    lowest, highest = (int(end) for end in token_ids.aminmax())
    if lowest < 0 or highest >= vocab_size:
        raise InputError(
            f"token {lowest if lowest < 0 else highest} is outside the vocabulary of {vocab_size}; encode the text "
            "with the model's own tokenizer"
        )


def check_width_shape(bit_widths: Tensor, num_rows: int, num_tokens: int | None = None) -> None:
    """Raises InputError unless widths are int64 and one vector for all rows, or one for each.

    Args:
        bit_widths: `[U]`, `[R', U]`, or `[R', M, U]` where each token may have its own.
        num_rows: R'.
        num_tokens: M, where each token may have its own.
    """
    leading = bit_widths.shape[:-1]
    allowed = [(), (num_rows,)] if num_tokens is None else [(), (num_rows,), (num_rows, num_tokens)]
    if bit_widths.dtype != torch.int64 or not bit_widths.dim() or leading not in allowed:
        raise InputError(
            f"bit-widths are {bit_widths.dtype} {list(bit_widths.shape)}; give int64, one for each unit: [U], or "
            f"[{num_rows}, U] for {num_rows} rows"
        )


def check_truncation(lengths: Tensor, held: Tensor) -> None:
    """Raises InputError unless rows that hold `held` tokens `[R]` can be cut to `lengths`, `[R]` int64."""
    check_ids("lengths", lengths, "[R]", 1)
    if lengths.shape != held.shape or bool(((lengths < 0) | (lengths > held)).any()):
        raise InputError(
            f"rows of {held.tolist()} tokens cannot be cut to {lengths.tolist()}; give each row a length from 0 to "
            "what it holds"
        )


def check_bit_widths(bit_widths: Tensor, stored: Sequence[int], num_units: int) -> None:
    """Raises InputError if a width vector has the wrong length, another type, or a width that is not stored."""
    if bit_widths.dtype != torch.int64:
        raise InputError(f"bit-widths are {bit_widths.dtype}; give torch.int64")
    if bit_widths.shape[-1] != num_units:
        raise InputError(f"{bit_widths.shape[-1]} bit-widths were given, but the model has {num_units} units")
    allowed = torch.zeros(9, dtype=torch.bool)
    allowed[[REFERENCE_WIDTH, *stored]] = True
    flat = bit_widths.flatten().cpu()
    wrong = flat[(flat < 0) | (flat > 8) | ~allowed[flat.clamp(0, 8)]]
    if len(wrong):
        raise InputError(
            f"bit-width {int(wrong[0])} is not stored; this model holds {', '.join(map(str, stored))}: "
            "choose one of them or quantise again with --bit-widths"
        )
