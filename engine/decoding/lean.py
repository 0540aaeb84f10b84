"""The lean decoder: one native call per token for Llama, Mistral, Qwen2 and Qwen3 on the CPU.

It reads the same stored weights as the Hugging Face model that it was made from, but none of that model's code runs at
a step. In mode "float32" it gives that model's numbers to 1e-4; the default, "int8", rounds activations too.
`DecodeSession` remains the reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexquant_rl.engine.decoding.decoder import (
    ExtendOutput,
    StepOutput,
    check_bit_widths,
    check_max_length,
    check_room,
    check_tokens,
    check_truncation,
    check_width_shape,
)
from flexquant_rl.engine.decoding.llama_parts import decoder_weights, why_other_numbers
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.decoding.weight_block import gather_weights
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.kernels.native import MAX_TOKENS, Isa, Mode, choose_isa, load_library
from flexquant_rl.kernels.native_decoder import LayerCache, NativeDecoder


def why_not_lean(model: NestedCausalLM) -> str | None:
    """Returns why a model cannot be decoded by `LeanDecoder`, in a few words, or None if it can.

    Raises:
        InputError: If `FQ_CPU_ISA` names a body that this machine cannot run.
    """
    reason = why_other_numbers(model.tree)
    if reason is not None:
        return reason
    if model.device.type != "cpu":
        return f"the model is on {model.device}, the native kernels are for the CPU"
    if load_library() is None:
        return "the native kernels could not be built"
    try:
        choose_isa(None)
    except ValueError as error:  # a body that this machine lacks was asked for by name
        raise InputError(str(error)) from error
    return None


class LeanDecoder:
    """A model described to the native kernels; sessions share it.

    Args:
        model: A Llama, Mistral, Qwen2 or Qwen3 model on the CPU.
        max_length: Tokens that a sequence can hold; default: the model's context.
        num_threads: Threads of a step at most. 1 is the fastest below about 100 million weights.
        mode: "int8" (activations rounded to int8, one scale per 32 inputs) or "float32".
        isa: Body of the kernels; default: `FQ_CPU_ISA`, else the fastest.

    Raises:
        InputError: If the model is of another kind, `max_length` exceeds its context, or there is no native library.
    """

    def __init__(
        self,
        model: NestedCausalLM,
        *,
        max_length: int | None = None,
        num_threads: int = 1,
        mode: Mode = "int8",
        isa: Isa | None = None,
    ) -> None:
        reason = why_not_lean(model)
        if reason is not None:
            raise InputError(f"the lean decoder cannot run this model ({reason}); use decoder='hf'")
        max_length = check_max_length(max_length, model)
        gather_weights(model)
        self.model = model
        self.native = NativeDecoder(decoder_weights(model, max_length), num_threads=num_threads, mode=mode, isa=isa)

    @property
    def max_length(self) -> int:
        """Tokens that a sequence can hold."""
        return self.native.max_length


@dataclass
class _Row:
    """The state of one sequence."""

    cache: LayerCache
    length: int = 0
    prompt_ids: Tensor | None = None
    """`[T]` the tokens that its first places hold, and `[U]` the widths at which they were read, while they stand."""
    prompt_widths: Tensor | None = None

    def num_shared(self, prompt_ids: Tensor, bit_widths: Tensor) -> int:
        """How many tokens of a prompt the row has read already, but for the last, whose output is asked for."""
        if self.prompt_ids is None or self.prompt_widths is None or not torch.equal(self.prompt_widths, bit_widths):
            return 0
        count = max(0, min(len(self.prompt_ids), len(prompt_ids) - 1))
        differs = (self.prompt_ids[:count] != prompt_ids[:count]).nonzero()
        return int(differs[0]) if len(differs) else count

    def cut(self, length: int) -> None:
        """Forgets what is behind the first `length` tokens."""
        self.length = length
        if self.prompt_ids is not None:
            self.prompt_ids = self.prompt_ids[:length]


class LeanSession:
    """Decodes rows with a `LeanDecoder`, one after the other; implements `Decoder`.

    Sessions of one decoder may run in several threads: a call waits for the one before it.

    Args:
        decoder: The model.
        num_rows: R, sequences in the batch.
    """

    def __init__(self, decoder: LeanDecoder, *, num_rows: int = 1) -> None:
        self._decoder = decoder
        self._rows: list[_Row] | None = [_Row(decoder.native.new_cache()) for _ in range(num_rows)]

    @property
    def model(self) -> NestedCausalLM:
        """The model behind the session."""
        return self._decoder.model

    @property
    def lengths(self) -> Tensor:
        """`[R]` int64 tokens held per row."""
        return torch.tensor([row.length for row in self._open()])

    @property
    def max_length(self) -> int:
        """Tokens that a row can hold."""
        return self._decoder.max_length

    def prefill(
        self, prompt_ids: Tensor, *, rows: Tensor | None = None, bit_widths: Tensor | None = None
    ) -> StepOutput:
        """See `Decoder.prefill`; a prompt is read 16 tokens at a time.

        What a row has read of it already, as the beginning of its last prompt and at the same widths, is not read
        again: a token's keys and values are the same bits in a pass of any size.
        """
        if bit_widths is None:
            bit_widths = self._largest_widths()
        check_tokens(self, prompt_ids, rows, is_prompt=True)
        check_width_shape(bit_widths, 1)
        chosen = self._choose(rows)
        check_bit_widths(bit_widths, self.model.bit_widths, self.model.num_units)
        widths = bit_widths.flatten()
        try:
            return _stacked(
                [self._read_prompt(row, ids, widths) for row, ids in zip(chosen, prompt_ids, strict=True)]
            ).at(0)
        except BaseException:
            for row in chosen:
                row.cut(0)  # not half a prompt
            raise

    def extend(self, token_ids: Tensor, bit_widths: Tensor, *, rows: Tensor | None = None) -> ExtendOutput:
        """See `Decoder.extend`."""
        check_tokens(self, token_ids, rows)
        num_rows, num_tokens = token_ids.shape
        check_width_shape(bit_widths, num_rows)
        chosen = self._choose(rows)
        lengths = [row.length for row in chosen]
        widths = bit_widths.expand(num_rows, -1) if bit_widths.dim() == 1 else bit_widths
        try:
            return _stacked([self._read(*part, num_tokens) for part in zip(chosen, token_ids, widths, strict=True)])
        except BaseException:
            for row, length in zip(chosen, lengths, strict=True):
                row.length = length
            raise

    def step(self, token_ids: Tensor, bit_widths: Tensor, *, rows: Tensor | None = None) -> StepOutput:
        """See `Decoder.step`."""
        held = self._open()
        is_vector = bit_widths.dim() == 1
        if rows is not None or len(held) != 1 or len(token_ids) != 1 or not (is_vector or bit_widths.shape[:1] == (1,)):
            return self.extend(token_ids[..., None], bit_widths, rows=rows).at(0)
        # One row, the case that is served: slicing and stacking tensors would take a twentieth of a small model's step.
        check_room(1, held[0].length, self._decoder.max_length)
        return StepOutput(*self._call(held[0], token_ids, bit_widths if is_vector else bit_widths[0], 1))

    def truncate(self, lengths: Tensor) -> None:
        """See `Decoder.truncate`."""
        check_truncation(lengths, self.lengths)
        for row, length in zip(self._open(), lengths.tolist(), strict=True):
            row.cut(length)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the only row's prompt that it still holds."""
        (row,) = self._open()
        return 0 if row.prompt_ids is None else len(row.prompt_ids)

    def num_shared(self, prompt_ids: Tensor) -> int:
        """How many tokens of a prompt `[T]` `prefill` would find read in the only row."""
        (row,) = self._open()
        return row.num_shared(prompt_ids, self._largest_widths())

    def beginning(self, num_tokens: int) -> LeanSession:
        """A session with a copy of what the only row has read of its prompt, up to so many tokens."""
        (row,) = self._open()
        twin = LeanSession(self._decoder, num_rows=0)
        twin._rows = [replace(row, cache=row.cache.copy(num_tokens))]
        twin._rows[0].cut(num_tokens)
        return twin

    @property
    def num_bytes(self) -> int:
        """Bytes that are reserved for keys and values."""
        return sum(row.cache.blocks.nbytes for row in self._open())

    def score(self, token_ids: Tensor, bit_widths: Tensor | None = None, *, first: int = 0) -> Tensor:
        """Teacher-forced logits of whole sequences: `DecodeSession.score`, in parallel over dense matrices."""
        scorer = DecodeSession(self.model, max_length=1)
        return scorer.score(token_ids, bit_widths, first=first)

    def fork(self) -> LeanSession:
        """An independent copy of the session, keys and values included."""
        twin = LeanSession(self._decoder, num_rows=0)
        twin._rows = [replace(row, cache=row.cache.copy(row.length)) for row in self._open()]
        return twin

    def close(self) -> None:
        """Frees the cache; any later call raises. Closing twice is fine."""
        self._rows = None

    def _open(self) -> list[_Row]:
        if self._rows is None:
            raise RuntimeError("this LeanSession is closed")
        return self._rows

    def _choose(self, rows: Tensor | None) -> list[_Row]:
        held = self._open()
        return held if rows is None else [held[index] for index in rows.tolist()]

    def _largest_widths(self) -> Tensor:
        return torch.full((self.model.num_units,), max(self.model.bit_widths))

    def _read_prompt(self, row: _Row, prompt_ids: Tensor, bit_widths: Tensor) -> ExtendOutput:
        """Restarts a row with a prompt `[T]`; the output at its last token."""
        row.cut(row.num_shared(prompt_ids, bit_widths))
        output = self._read(row, prompt_ids[row.length :], bit_widths, 1)
        row.prompt_ids, row.prompt_widths = prompt_ids.clone(), bit_widths.clone()
        return output

    def _read(self, row: _Row, token_ids: Tensor, bit_widths: Tensor, keep: int) -> ExtendOutput:
        """Appends tokens `[T]` to a row at `[U]` widths; the output at the last `keep` of them, `[1, keep, ...]`."""
        kept, first = [], len(token_ids) - keep
        for chunk in token_ids.split(MAX_TOKENS):
            first -= len(chunk)
            # The call puts out one token's at least.
            result = self._call(row, chunk, bit_widths, min(max(-first, 1), len(chunk)))
            if first < 0:
                kept.append(result)
        parts = kept[0] if len(kept) == 1 else [torch.cat(part) for part in zip(*kept, strict=True)]
        return ExtendOutput(*(part[None] for part in parts))

    def _call(self, row: _Row, token_ids: Tensor, bit_widths: Tensor, num_logits: int) -> tuple[Tensor, Tensor, Tensor]:
        try:
            result = self._decoder.native(row.cache, token_ids, row.length, bit_widths, num_logits=num_logits)
        except ValueError:
            # The native call refuses what is wrong without saying which: find out, at leisure.
            check_tokens(self, token_ids[None], torch.tensor([0]), is_prompt=True)
            check_width_shape(bit_widths, 1)
            check_bit_widths(bit_widths, self.model.bit_widths, self.model.num_units)
            if not self.model.has_reference and bool((bit_widths == 0).any()):
                raise InputError(
                    "the unquantised weights were asked for (width 0), but this model holds nested weights only; "
                    "compare against its largest width, or load the original model"
                ) from None
            raise
        row.length += len(token_ids)
        return result


def _stacked(rows: list[ExtendOutput]) -> ExtendOutput:
    """The outputs of single rows as those of one batch."""
    if len(rows) == 1:
        return rows[0]
    columns = zip(*((row.logits, row.residual_update, row.crest) for row in rows), strict=True)
    return ExtendOutput(*(torch.cat(column) for column in columns))
