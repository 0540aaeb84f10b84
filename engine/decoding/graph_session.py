"""The lean decoder of the GPU as rows of tokens and the verbs that move them, so that rounds of drafts run on it.

A step and a pass over several tokens are replays of captured graphs. What comes after a pass (policy, choice of tokens,
acceptance of drafts) is the host's, which reads the pass's logits; `graph_decode.py` has the loop that needs no host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexquant_rl.engine.decoding.decoder import (
    ExtendOutput,
    StepOutput,
    check_bit_widths,
    check_max_length,
    check_tokens,
    check_truncation,
    check_width_shape,
)
from flexquant_rl.engine.decoding.graph_choice import why_not_kernels
from flexquant_rl.engine.decoding.graph_loop import FIRST_BUCKET, buckets_between
from flexquant_rl.engine.decoding.graph_prompt import read_prompt
from flexquant_rl.engine.decoding.graph_rows import GraphPasses, GraphRows, on_host
from flexquant_rl.engine.decoding.graph_weights import step_weights
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.linear import REFERENCE_WIDTH
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.kernels import launching
from flexquant_rl.kernels.activations import ActivationMode


class GraphModel:
    """A model described to the GPU's kernels, with the graphs of its passes; sessions share it.

    Attributes:
        model: The model.
        passes: What runs on the device.

    Args:
        model: A Llama, Mistral, Qwen2 or Qwen3 model. Its weights are fused in place, see `fuse_weights`.
        max_length: Tokens that a row can hold; default: the model's context.
        mode: How activations are held: "int8", or "float" as a reference.
        cache_dtype: Type of keys and values.
        first_bucket: Size of the smallest cache.
        captures: Whether passes are captured; default: on a CUDA device.

    Raises:
        InputError: If the model cannot be run, or `max_length` exceeds its context.
    """

    def __init__(
        self,
        model: NestedCausalLM,
        *,
        max_length: int | None = None,
        mode: ActivationMode = "int8",
        cache_dtype: torch.dtype = torch.float16,
        first_bucket: int = FIRST_BUCKET,
        captures: bool | None = None,
    ) -> None:
        reason = why_not_kernels(model)
        if reason is not None:
            raise InputError(f"the lean decoder of the GPU cannot run this model ({reason}); use decoder='hf'")
        launching.require_triton(model.device)
        self.model = model
        self.passes = GraphPasses(
            step_weights(model, check_max_length(max_length, model)),
            mode=mode,
            cache_dtype=cache_dtype,
            first_bucket=first_bucket,
            captures=captures,
        )

    @property
    def max_length(self) -> int:
        """Tokens that a row can hold."""
        return self.passes.weights.max_length


class GraphSession:
    """Decodes rows with a `GraphModel`, one after the other; implements `Decoder`.

    Sessions of one model may run in several threads: a pass waits for the one before it. A closed session leaves its
    caches, and the graphs that are bound to them, to the next one.

    Args:
        model: The model.
        num_rows: R, sequences in the batch.
    """

    def __init__(self, model: GraphModel, *, num_rows: int = 1) -> None:
        self._graph_model = model
        self._rows: GraphRows | None = model.passes.take(num_rows)
        # The device counts too; the host's own numbers spare it the wait.
        self._lengths = [0] * num_rows
        self._sizes = [model.passes.sizes[0]] * num_rows

    @property
    def model(self) -> NestedCausalLM:
        """The model behind the session."""
        return self._graph_model.model

    @property
    def lengths(self) -> Tensor:
        """`[R]` int64 tokens held per row, on the CPU."""
        self._open()
        return torch.tensor(self._lengths)

    @property
    def max_length(self) -> int:
        """Tokens that a row can hold."""
        return self._graph_model.max_length

    def prepare(self, first: int, last: int) -> None:
        """Makes the buckets of a sequence that grows from `first` to `last` tokens, and captures their passes.

        Compiles kernels where that has not happened yet, so it may take a while. Without it each pass is captured when
        it is first asked for.
        """
        held, passes = self._open(), self._graph_model.passes
        for size in buckets_between(passes.sizes, first, last):
            for num_tokens in passes.pass_sizes:
                passes.prepare(held, size, num_tokens)

    def prefill(
        self, prompt_ids: Tensor, *, rows: Tensor | None = None, bit_widths: Tensor | None = None
    ) -> StepOutput:
        """See `Decoder.prefill`; Hugging Face's modules read the prompts."""
        if bit_widths is None:
            bit_widths = torch.full((self.model.num_units,), max(self.model.bit_widths))
        check_tokens(self, prompt_ids, rows, is_prompt=True)
        check_width_shape(bit_widths, 1)
        widths = self._checked_widths(bit_widths, 1)[0]
        held, passes, chosen = self._open(), self._graph_model.passes, self._choose(rows)
        for row in chosen:
            self._lengths[row] = 0
        self._count_on_device()
        prompt = read_prompt(self.model, prompt_ids, widths)
        num_tokens = prompt_ids.shape[1]
        size = passes.bucket_size(num_tokens)
        cache = passes.bucket(held, size)
        for layer, pair in enumerate(prompt.keys_and_values):
            for which, tensor in enumerate(pair):
                for index, row in enumerate(chosen):
                    cache[which, layer, row, :, :num_tokens] = tensor[index]
        for row in chosen:
            self._lengths[row], self._sizes[row] = num_tokens, size
        self._count_on_device()
        return StepOutput(prompt.logits, self.model.per_unit(prompt.residual_update), self.model.per_unit(prompt.crest))

    def extend(self, token_ids: Tensor, bit_widths: Tensor, *, rows: Tensor | None = None) -> ExtendOutput:
        """See `Decoder.extend`; a pass holds 16 tokens, and ends where the row leaves its bucket."""
        check_tokens(self, token_ids, rows)
        num_rows = len(token_ids)
        check_width_shape(bit_widths, num_rows)
        widths = self._checked_widths(bit_widths, num_rows)
        self._open()
        before = list(self._lengths)
        try:
            parts = zip(self._choose(rows), token_ids.tolist(), widths, strict=True)
            outputs = [self._read(*part) for part in parts]
        except BaseException:
            self._lengths = before
            self._count_on_device()
            raise
        columns = zip(*((part.logits, part.residual_update, part.crest) for part in outputs), strict=True)
        return outputs[0] if num_rows == 1 else ExtendOutput(*(torch.cat(column) for column in columns))

    def step(self, token_ids: Tensor, bit_widths: Tensor, *, rows: Tensor | None = None) -> StepOutput:
        """See `Decoder.step`."""
        return self.extend(token_ids[..., None], bit_widths, rows=rows).at(0)

    def truncate(self, lengths: Tensor) -> None:
        """See `Decoder.truncate`: what is beyond a row's length is never read, and overwritten before it counts."""
        check_truncation(lengths, self.lengths)
        self._lengths = lengths.tolist()
        self._count_on_device()

    def score(self, token_ids: Tensor, bit_widths: Tensor | None = None, *, first: int = 0) -> Tensor:
        """Teacher-forced logits of whole sequences: `DecodeSession.score`, in parallel over dense matrices."""
        return DecodeSession(self.model, max_length=1).score(token_ids, bit_widths, first=first)

    def fork(self) -> GraphSession:
        """An independent copy of the session, keys and values included."""
        held, passes = self._open(), self._graph_model.passes
        twin = GraphSession(self._graph_model, num_rows=len(self._lengths))
        own = twin._open()
        for row, (length, size) in enumerate(zip(self._lengths, self._sizes, strict=True)):
            passes.bucket(own, size)[:, :, row, :, :length] = passes.bucket(held, size)[:, :, row, :, :length]
        twin._lengths, twin._sizes = list(self._lengths), list(self._sizes)
        twin._count_on_device()
        return twin

    def close(self) -> None:
        """Gives the cache back; any later call raises. Closing twice is fine."""
        if self._rows is not None:
            self._graph_model.passes.give_back(self._rows)
        self._rows = None

    def _open(self) -> GraphRows:
        if self._rows is None:
            raise RuntimeError("this GraphSession is closed")
        return self._rows

    def _choose(self, rows: Tensor | None) -> list[int]:
        return list(range(len(self._lengths))) if rows is None else rows.tolist()

    def _count_on_device(self) -> None:
        """Tells the device the lengths of all rows."""
        counted = self._open().lengths
        counted.copy_(on_host(self._lengths, counted.device), non_blocking=True)

    def _checked_widths(self, bit_widths: Tensor, num_rows: int) -> Tensor:
        """Checks widths and broadcasts them to `[num_rows, U]`, on the CPU."""
        check_bit_widths(bit_widths, self.model.bit_widths, self.model.num_units)
        if bool((bit_widths == REFERENCE_WIDTH).any()):
            raise InputError(
                "the unquantised weights were asked for (width 0), but the captured graphs of a GPU read nested "
                "weights; use decoder='hf'"
            )
        return bit_widths.cpu().expand(num_rows, -1)

    def _read(self, row: int, token_ids: list[int], bit_widths: Tensor) -> ExtendOutput:
        """Appends tokens to a row, in as many passes as it takes."""
        held, passes, found = self._open(), self._graph_model.passes, []
        while token_ids:
            length = self._lengths[row]
            size = self._move(row, length)
            count = min(len(token_ids), size - length, passes.pass_sizes[-1])
            found.append(passes.read(held, row, size, token_ids[:count], bit_widths))
            self._lengths[row] = length + count
            token_ids = token_ids[count:]
        logits, statistics = found[0] if len(found) == 1 else (torch.cat(part) for part in zip(*found, strict=True))
        update, crest = statistics[None, :, :, :-1].unbind(2)
        return ExtendOutput(logits[None], self.model.per_unit(update), self.model.per_unit(crest))

    def _move(self, row: int, length: int) -> int:
        """Puts a row into the bucket that its next token belongs to, larger or smaller; returns the size."""
        held, passes = self._open(), self._graph_model.passes
        size, before = passes.bucket_size(length + 1), self._sizes[row]
        if size != before:
            target, source = passes.bucket(held, size), passes.bucket(held, before)
            target[:, :, row, :, :length] = source[:, :, row, :, :length]
            self._sizes[row] = size
        return size
