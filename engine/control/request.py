"""One request to continue a prompt: what is asked for, the tokens it gets, and why it ends."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from flexquant_rl.engine.control.dial import check_kl_weight
from flexquant_rl.engine.control.draft_counts import DraftCounts
from flexquant_rl.engine.control.log_probs import TokenLogProbs, check_num_likeliest, token_log_probs
from flexquant_rl.engine.control.streamed_text import StopStrings, StreamedText
from flexquant_rl.engine.decoding.decoder import check_ids, check_vocabulary
from flexquant_rl.engine.decoding.sampling_bounds import check_sampling, check_seed
from flexquant_rl.engine.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from flexquant_rl.engine.token_text import TokenText

FinishReason = Literal["eos", "stop", "length", "cancelled"]


@dataclass(frozen=True, eq=False)
class Request:
    """What to continue, and how far.

    Attributes:
        prompt_ids: `[T]` int64, read at the largest width.
        max_new_tokens: Tokens at most.
        kl_weight: The dial.
        temperature: 0 is greedy.
        top_p: Only the likeliest tokens whose probabilities reach this sum are sampled.
        seed: Seed of the sampling.
        eos_token_ids: Each of these ends the text; default: those of the model.
        stop: Each of these strings ends the text and is not part of it.
        cancel: Once it is set, the next token is the last one.
        log_probs: Tokens come with their log-probability and those of so many likeliest ones; None computes none.
    """

    prompt_ids: Tensor
    max_new_tokens: int
    kl_weight: float = 1.0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    eos_token_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    cancel: threading.Event = field(default_factory=threading.Event)
    log_probs: int | None = None

    @property
    def num_held(self) -> int:
        """Tokens that a row holds in the end: nobody reads the last one."""
        return len(self.prompt_ids) + self.max_new_tokens - 1

    def check(self, max_length: int, vocab_size: int) -> None:
        """Raises InputError unless a row of `max_length` tokens of a vocabulary can serve the request."""
        check_ids("prompt_ids", self.prompt_ids, "[T]", 1)
        if not len(self.prompt_ids):
            raise InputError("the prompt is empty; give at least one token of text")
        check_vocabulary(self.prompt_ids, vocab_size)
        if type(self.max_new_tokens) is not int:
            raise InputError(f"max_new_tokens={self.max_new_tokens!r} must be a whole number; give e.g. 64")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens} must be at least 1; ask for a token or more")
        check_kl_weight(self.kl_weight)
        check_sampling(self.temperature, self.top_p)
        check_seed(self.seed)
        check_num_likeliest(self.log_probs, vocab_size)
        if isinstance(self.stop, str) or not all(isinstance(text, str) for text in self.stop):
            raise InputError(f"stop={self.stop!r} must be a tuple of strings; give e.g. ({str(self.stop)!r},)")
        if "" in self.stop:
            raise InputError("a stop string is empty, which every text begins with; leave it out")
        if self.num_held > max_length:
            raise InputError(
                f"{len(self.prompt_ids)} tokens of prompt and {self.max_new_tokens} new ones do not fit into a row of "
                f"{max_length}; shorten the prompt or the continuation"
            )


@dataclass(frozen=True)
class GeneratedToken:
    """One token of a continuation.

    Attributes:
        request: Index of the request that it belongs to.
        token_id: The token.
        text: What it adds to the text, once that is whole and cannot be part of a stop string; "" without a tokenizer.
        bit_widths: `[U]` int64 of the step whose output it was chosen from; the largest width for the first token.
        latency_ms: Wall clock of that step, policy included; of the prompt for the first token. The mean over tokens
            that come at once: the few steps that are read together on a GPU, what a verify step settles.
        finish_reason: Why the request ends with this token; None if it goes on.
        draft_counts: With the last token of a request that was decoded with drafts: what they came to.
        is_draft: Whether it was drafted, and accepted by the step that `bit_widths` are of.
        log_probs: How likely it was, where the request asks for that.
    """

    request: int
    token_id: int
    text: str
    bit_widths: Tensor
    latency_ms: float
    finish_reason: FinishReason | None = None
    draft_counts: DraftCounts | None = None
    is_draft: bool = False
    log_probs: TokenLogProbs | None = None


class RunningRequest:
    """Follows one request from token to token.

    Args:
        index: Index of the request, as its tokens carry it.
        request: What is asked for.
        tokenizer: Turns tokens into text; None leaves the text out.
        eos_token_ids: The model's own, for a request that names none.
        cancel: Ends the request too once it is set. The request's own event is the caller's, who may use it again.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        tokenizer: PreTrainedTokenizerBase | TokenText | None,
        eos_token_ids: tuple[int, ...],
        cancel: threading.Event | None = None,
    ) -> None:
        if request.stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer; pass the model's")
        self._index = index
        self._cancels = [request.cancel] if cancel is None else [request.cancel, cancel]
        self._request = request
        self._text = None if tokenizer is None else StreamedText(tokenizer, request.prompt_ids.tolist())
        self._stop = StopStrings(request.stop)
        self.eos_token_ids = eos_token_ids if request.eos_token_ids is None else request.eos_token_ids
        self._num_tokens = 0
        self.is_finished = False

    @property
    def num_wanted(self) -> int:
        """Tokens that it takes at most from now on."""
        return self._request.max_new_tokens - self._num_tokens

    def add(
        self,
        token_id: int,
        bit_widths: Tensor,
        latency_ms: float,
        logits: Tensor | None = None,
        *,
        is_draft: bool = False,
    ) -> GeneratedToken:
        """Takes the next token, chosen from `[vocab]` logits where these are known, and says what it adds."""
        self._num_tokens += 1
        is_eos = token_id in self.eos_token_ids
        text = "" if self._text is None or is_eos else self._stop.add(self._text.add(token_id))
        reason: FinishReason | None = None
        if is_eos:
            reason = "eos"
        elif self._stop.is_found:
            reason = "stop"
        elif self._num_tokens == self._request.max_new_tokens:
            reason = "length"
        elif any(cancel.is_set() for cancel in self._cancels):
            reason = "cancelled"
        if reason is not None:
            self.is_finished = True
            text += self._stop.finish()
        wanted = self._request.log_probs
        log_probs = None if wanted is None or logits is None else token_log_probs(logits, token_id, wanted)
        return GeneratedToken(
            self._index, token_id, text, bit_widths, latency_ms, reason, is_draft=is_draft, log_probs=log_probs
        )
