"""The lean decoder of the GPU: a prompt in, tokens out, one captured graph per token and no waiting in between.

The prompt is read by the Hugging Face model on the same device, whose keys and values become the first entries of the
cache; from there `DecodeLoop` runs by itself. The host asks for a few steps at a time and reads their tokens while the
next ones run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexquant_rl.engine.control.decision import Policy
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.decoding.decoder import check_max_length
from flexquant_rl.engine.decoding.graph_choice import why_not_kernels
from flexquant_rl.engine.decoding.graph_loop import FIRST_BUCKET, DecodeLoop
from flexquant_rl.engine.decoding.graph_prompt import read_prompt
from flexquant_rl.engine.decoding.graph_weights import step_weights
from flexquant_rl.engine.decoding.graph_widths import width_source
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.kernels import launching
from flexquant_rl.kernels.activations import ActivationMode

STEPS_PER_READ = 8
"""Steps between two looks at the tokens: an end-of-text token is noticed this late, or twice as late, at no cost."""


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of consecutive steps.

    Attributes:
        token_ids: The tokens.
        bit_widths: `[n, U]` int64 on the CPU, of the steps that chose them.
        step_ms: Mean milliseconds of a step, by the device's clock.
    """

    token_ids: list[int]
    bit_widths: Tensor
    step_ms: float


class GraphDecoder:
    """A model and a policy on the GPU; decodes one sequence at a time, any number one after the other.

    Graphs are captured when a sequence first needs them and kept, so a decoder that is kept too captures nothing twice.
    Without a CUDA device the same steps run under Triton's interpreter, for tests.

    Attributes:
        model: The model.
        policy: The policy.
        loop: What runs on the device.

    Args:
        model: A Llama, Mistral, Qwen2 or Qwen3 model. Its weights are fused in place, see `fuse_weights`.
        policy: A learned policy or a static allocation.
        profile: The one that the policy was trained with.
        max_length: Tokens that a sequence can hold; default: the model's context. A sliding window bounds it, so that
            no key ever leaves the window.
        mode: How activations are held: "int8", or "float" as a reference.
        cache_dtype: Type of keys and values.
        first_bucket: Size of the smallest cache.

    Raises:
        InputError: If model or policy cannot be run, or `max_length` exceeds the context.
    """

    def __init__(
        self,
        model: NestedCausalLM,
        policy: Policy,
        profile: Profile,
        *,
        max_length: int | None = None,
        mode: ActivationMode = "int8",
        cache_dtype: torch.dtype = torch.float16,
        first_bucket: int = FIRST_BUCKET,
    ) -> None:
        reason = why_not_kernels(model)
        if reason is not None:
            raise InputError(f"the lean decoder of the GPU cannot run this model ({reason}); use decoder='hf'")
        launching.require_triton(model.device)
        self.model = model
        self.policy = policy
        self._num_started = 0
        self.loop = DecodeLoop(
            step_weights(model, check_max_length(max_length, model)),
            width_source(model, policy, profile),
            mode=mode,
            cache_dtype=cache_dtype,
            first_bucket=first_bucket,
        )

    def start(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int,
        *,
        kl_weight: float,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Reads a prompt at the largest width and chooses the first token.

        Args:
            prompt_ids: `[T]` int64.
            max_new_tokens: Tokens at most, the first one included.
            kl_weight: The dial.
            temperature: 0 is greedy.
            seed: Seed of the sampling.

        Raises:
            InputError: If the prompt is empty or does not fit together with its continuation.
        """
        if not len(prompt_ids):
            raise InputError("the prompt is empty; give at least one token of text")
        num_tokens = len(prompt_ids) + max_new_tokens - 1  # nobody reads the last one
        if num_tokens > self.loop.weights.max_length:
            raise InputError(
                f"{num_tokens} tokens do not fit into a row of {self.loop.weights.max_length}; shorten the prompt or "
                "the continuation"
            )
        self._num_started += 1
        self.loop.prepare(len(prompt_ids), num_tokens)
        largest = max(self.model.bit_widths)
        prompt = read_prompt(self.model, prompt_ids[None], torch.full((self.model.num_units,), largest))
        self.loop.begin(
            prompt.keys_and_values,
            prompt.logits,
            torch.cat([prompt.residual_update, prompt.crest]),
            largest_width=largest,
            kl_weight=kl_weight,
            temperature=temperature,
            seed=seed,
        )

    def stream(self, max_new_tokens: int) -> Iterator[TokenBatch]:
        """Tokens after `start`, the first one too, a few at a time; abandon it to stop.

        Up to two batches of steps run ahead of what has been yielded.

        Args:
            max_new_tokens: As given to `start`.

        Raises:
            RuntimeError: If another sequence has been started since this one.
        """
        sequence = self._num_started
        reader = LogReader(self.loop, max_new_tokens)
        pending = [reader.request(0, 1)]
        next_entry = 1
        while pending:
            if sequence != self._num_started:
                raise RuntimeError("another sequence was started on this GraphDecoder, which ended this one")
            while next_entry < max_new_tokens and len(pending) < 2:
                count = min(STEPS_PER_READ, max_new_tokens - next_entry)
                began = reader.mark()
                self.loop.advance(count)
                pending.append(reader.request(next_entry, count, began))
                next_entry += count
            yield pending.pop(0).wait()


@dataclass(frozen=True)
class _Mark:
    """A moment in the device's queue; without a CUDA device a moment of the host."""

    event: torch.cuda.Event | None
    seconds: float


class LogReader:
    """Copies entries of the device's logs to the host while the device works on.

    Args:
        loop: Whose logs.
        num_entries: Entries that will be asked for at most; default: all of them.
    """

    def __init__(self, loop: DecodeLoop, num_entries: int | None = None) -> None:
        self._book = loop.book
        self._is_cuda = loop.book.token_log.device.type == "cuda"
        self._tokens, self._widths = (
            torch.empty(log[:num_entries].shape, dtype=log.dtype, pin_memory=self._is_cuda)
            for log in (loop.book.token_log, loop.book.width_log)
        )

    def mark(self) -> _Mark:
        """The moment after everything that has been asked of the device."""
        if not self._is_cuda:
            return _Mark(None, time.perf_counter())
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return _Mark(event, 0.0)

    def request(self, first: int, count: int, began: _Mark | None = None) -> _Request:
        """Asks for entries `first` to `first + count - 1`, whose steps have been launched since `began`."""
        ended = self.mark()
        entries = slice(first, first + count)
        self._tokens[entries].copy_(self._book.token_log[entries], non_blocking=True)
        self._widths[entries].copy_(self._book.width_log[entries], non_blocking=True)
        return _Request(self._tokens[entries], self._widths[entries], began or ended, ended, self.mark())


@dataclass(frozen=True)
class _Request:
    """Entries on their way to the host."""

    tokens: Tensor
    widths: Tensor
    began: _Mark
    ended: _Mark
    arrived: _Mark

    def wait(self) -> TokenBatch:
        """Waits until they have arrived."""
        if self.arrived.event is None or self.began.event is None or self.ended.event is None:
            elapsed_ms = (self.ended.seconds - self.began.seconds) * 1e3
        else:
            self.arrived.event.synchronize()
            elapsed_ms = self.began.event.elapsed_time(self.ended.event)
        return TokenBatch(self.tokens.tolist(), self.widths.long(), elapsed_ms / len(self.tokens))
