"""Deployment: a prompt and a policy in, tokens out, one at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flexquant_rl.engine.control.controller import make_controller
from flexquant_rl.engine.control.policy import BitWidthPolicy
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.decoding.choice import DecoderName, open_session
from flexquant_rl.engine.decoding.decoder import greedy_tokens
from flexquant_rl.engine.decoding.graph_decode import GraphDecoder, why_not_graph
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM

_CONTEXT_TOKENS = 8
"""Tokens that are decoded again with each new one."""


@dataclass(frozen=True)
class GeneratedToken:
    """One token of the continuation.

    Attributes:
        token_id: The token.
        bit_widths: `[U]` int64 of the step whose output it was sampled from; the largest width for the first token.
        latency_ms: Wall clock of that step, policy included; of the prefill for the first token. On a GPU the mean over
            the few steps that are read at once.
    """

    token_id: int
    bit_widths: Tensor
    latency_ms: float


class StreamedText:
    """The text of tokens as they come.

    Decoding tokens one by one loses the space before a word in many vocabularies, and characters that are spread over
    tokens; so each is decoded together with those before it, and text appears once it is whole.

    Args:
        tokenizer: Of the model.
        prompt_ids: What the tokens continue.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._shown = len(self._ids)

    def add(self, token_id: int) -> str:
        """What the token adds to the text: nothing if it is a special one or leaves a character incomplete."""
        self._ids.append(token_id)
        before, text = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._ids = self._ids[max(0, self._shown - _CONTEXT_TOKENS) :]
        self._shown = len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def generate(
    model: NestedCausalLM,
    policy: BitWidthPolicy,
    profile: Profile,
    prompt_ids: Tensor,
    *,
    max_new_tokens: int,
    kl_weight: float,
    temperature: float = 0.0,
    seed: int = 0,
    decoder: DecoderName = "auto",
    num_threads: int | None = None,
    graph: GraphDecoder | None = None,
) -> Iterator[GeneratedToken]:
    """Continues a prompt, choosing the widths of every step with a policy.

    Args:
        model: The model.
        policy: The policy.
        profile: The one that the policy was trained with.
        prompt_ids: `[T]` int64, read at the largest width.
        max_new_tokens: Tokens at most; EOS ends earlier.
        kl_weight: The dial.
        temperature: 0 is greedy.
        seed: Of the sampling.
        decoder: As for `open_session`. On a CUDA device the lean one is `GraphDecoder`, which reads tokens a few at a
            time; "auto" takes it where it can run model and policy.
        num_threads: As for `open_session`; not with `GraphDecoder`, which has none.
        graph: A `GraphDecoder` of this model and policy to decode with; default: one is made where it is taken, and
            lost. Keep one for several prompts: compiling, fusing and capturing take their time.

    Raises:
        InputError: If the prompt is empty or does not fit the context with its continuation, or a number is out of
            its domain.
        ValueError: If `graph` is of another model or policy.
    """
    _check_request(prompt_ids, max_new_tokens, temperature)
    max_length = len(prompt_ids) + max_new_tokens
    if graph is None and _takes_graph(model, policy, decoder):
        graph = GraphDecoder(model, policy, profile, max_length=max_length)
    if graph is not None:
        _check_graph(graph, model, policy, num_threads)
        yield from _generate_by_graph(
            graph, prompt_ids, max_new_tokens, kl_weight=kl_weight, temperature=temperature, seed=seed
        )
        return
    opened = open_session(model, max_length=max_length, decoder=decoder, num_threads=num_threads)
    with closing(opened) as session:
        controller = make_controller(model, policy, profile)
        generator = torch.Generator().manual_seed(seed)
        eos = model.tokenizer.eos_token_id
        widths = torch.full((model.num_units,), max(model.bit_widths))
        began = time.perf_counter()
        output = session.prefill(prompt_ids[None])
        for index in range(max_new_tokens):
            token = _choose(output.logits, temperature, generator)
            yield GeneratedToken(int(token), widths, (time.perf_counter() - began) * 1e3)
            if int(token) == eos or index == max_new_tokens - 1:
                break
            began = time.perf_counter()
            if index == 0:
                controller.reset(output, token, kl_weight)
            else:
                controller.update(output, widths, token)
            widths = controller.bit_widths()
            output = session.step(token, widths)


def _check_request(prompt_ids: Tensor, max_new_tokens: int, temperature: float) -> None:
    if not len(prompt_ids):
        raise InputError("the prompt is empty; give at least one token of text")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1; ask for a token or more")
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature={temperature:g} must be finite and not negative; 0 is greedy")


def _check_graph(graph: GraphDecoder, model: NestedCausalLM, policy: BitWidthPolicy, num_threads: int | None) -> None:
    if graph.model is not model or graph.policy is not policy:
        raise ValueError("graph is of another model or policy; pass a GraphDecoder made with these two")
    if num_threads is not None:
        raise InputError(f"threads={num_threads}: the captured graph of a GPU has no threads; leave the option out")


def _takes_graph(model: NestedCausalLM, policy: BitWidthPolicy, decoder: DecoderName) -> bool:
    """Whether the GPU's lean decoder runs; InputError if it was asked for by name there and cannot."""
    if decoder == "hf":
        return False
    reason = why_not_graph(model, policy)
    if reason is not None and decoder == "lean" and model.device.type == "cuda":
        raise InputError(f"the lean decoder of the GPU cannot run this ({reason}); use decoder='hf'")
    return reason is None


def _generate_by_graph(
    decoder: GraphDecoder, prompt_ids: Tensor, max_new_tokens: int, *, kl_weight: float, temperature: float, seed: int
) -> Iterator[GeneratedToken]:
    eos = decoder.model.tokenizer.eos_token_id
    # Compiling is no part of the first token's latency.
    decoder.loop.prepare(len(prompt_ids), len(prompt_ids) + max_new_tokens)
    began = time.perf_counter()
    decoder.start(prompt_ids, max_new_tokens, kl_weight=kl_weight, temperature=temperature, seed=seed)
    for index, batch in enumerate(decoder.stream(max_new_tokens)):
        latency_ms = batch.step_ms if index else (time.perf_counter() - began) * 1e3
        for token_id, bit_widths in zip(batch.token_ids, batch.bit_widths, strict=True):
            yield GeneratedToken(token_id, bit_widths, latency_ms)
            if token_id == eos:
                return


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """The next token, `[1]` int64 on the CPU."""
    if temperature == 0:
        return greedy_tokens(logits)
    return torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=generator)[:, 0]
