"""Decoding with drafts that the same weights verify: the tokens of a width at the price of fewer passes.

A round: steps at the controller's widths read the newest token and propose the next one, which waits. One pass at the
verifying width then reads everything that waits, and the drafts that it would have chosen itself stay, with one token
more. A pass over several tokens gives the same bits as one step for each (`LeanSession`), so greedy text is that of the
verifying width, token for token. docs/verified.md has the whole story.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flexquant_rl.engine.control.controller import Controller
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.drafts import DraftRecord, copied_drafts
from flexquant_rl.engine.control.request import GeneratedToken, Request, RunningRequest
from flexquant_rl.engine.control.verification import Verification
from flexquant_rl.engine.decoding.acceptance import DraftSampler
from flexquant_rl.engine.decoding.decoder import Decoder, DecoderModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from flexquant_rl.engine.token_text import TokenText


@dataclass(frozen=True)
class _Drafts:
    """What waits: tokens, and what each was drawn from; None for one that was certain."""

    token_ids: list[int]
    probs: list[Tensor | None]


class VerifiedRunner:
    """Decodes one sequence in rounds of drafts and a verification.

    Args:
        decoder: Holds one row.
        controller: Chooses the widths of drafts; sees drafts as they come, and after a round only what stayed.
        verification: How rounds go.
        record: Is told how drafts fare; default: one of its own.

    Attributes:
        record: That record.

    Raises:
        InputError: If the verification is none for this model.
    """

    def __init__(
        self,
        decoder: Decoder,
        controller: Controller,
        verification: Verification,
        record: DraftRecord | None = None,
    ) -> None:
        model = decoder.model
        verification.check(model.bit_widths)
        self.decoder = decoder
        self.record = DraftRecord() if record is None else record
        self._controller = controller
        self._verification = verification
        self._widths = torch.full((model.num_units,), verification.bit_width)
        self._eos = model.eos_token_ids
        self._sampler = DraftSampler()
        self._text: list[int] = []  # prompt and settled tokens, the last of which is to be read next

    def start(
        self, prompt_ids: Tensor, kl_weight: float, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> int:
        """Reads a prompt `[T]` at the largest width and chooses the first token.

        Args:
            prompt_ids: The prompt.
            kl_weight: The dial of the controller.
            temperature: 0 is greedy.
            top_p: As for `DraftSampler`.
            seed: As for `DraftSampler`.
        """
        output = self.decoder.prefill(prompt_ids[None])
        self._sampler = DraftSampler(temperature, top_p, seed)
        first, _ = self._sampler.draft(output.logits[0])
        self._text = [*prompt_ids.tolist(), first]
        self._controller.reset(output, torch.tensor([first]), torch.tensor([kl_weight], dtype=torch.float32))
        return first

    def advance(self, max_tokens: int) -> list[int]:
        """One round.

        Args:
            max_tokens: Tokens that are wanted at most, at least 1.

        Returns:
            The tokens that are settled now, 1 to `max_tokens` of them.
        """
        held = self.decoder.lengths.clone()  # some decoders hand out what they count with
        room = self.decoder.max_length - int(held) - 1
        mark = self._controller.mark()
        drafts = self._draft(min(self._verification.max_drafts, max_tokens - 1, room))
        self._controller.rollback(mark)
        self.decoder.truncate(held)
        read = [self._text[-1], *drafts.token_ids]
        output = self.decoder.extend(torch.tensor([read]), self._widths)
        accepted = self._sampler.accept(drafts.token_ids, drafts.probs, output.logits[0])
        num_read = accepted.num_accepted + 1
        self.decoder.truncate(held + num_read)
        settled = [*drafts.token_ids[: accepted.num_accepted], accepted.next_token_id]
        for index, token_id in enumerate(settled):
            self._controller.update(output.at(index), self._widths[None], torch.tensor([token_id]))
        self._text += settled
        self.record.add(len(drafts.token_ids), accepted.num_accepted)
        return settled

    def generate(
        self,
        request: Request,
        tokenizer: PreTrainedTokenizerBase | TokenText | None = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[GeneratedToken]:
        """Continues a prompt.

        Args:
            request: What to generate.
            tokenizer: Gives the tokens' text; needed for stop strings.
            cancel: Once it is set, the request ends with its next token.

        Yields:
            The tokens, those of a round together; each has an equal share of the round's time. What a round settles
            behind the end of the text is dropped.

        Raises:
            InputError: As `PolicyRunner.generate`.
        """
        model = self.decoder.model
        request.check(self.decoder.max_length, model.vocab_size)
        running = RunningRequest(0, request, tokenizer, model.eos_token_ids, cancel)
        if request.eos_token_ids is not None:
            self._eos = request.eos_token_ids
        began = time.perf_counter()
        first = self.start(
            request.prompt_ids,
            request.kl_weight,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
        )
        top = torch.full((model.num_units,), max(model.bit_widths))
        yield running.add(first, top, (time.perf_counter() - began) * 1e3)
        wanted = request.max_new_tokens - 1
        while not running.is_finished:
            began = time.perf_counter()
            settled = self.advance(wanted)
            wanted -= len(settled)
            elapsed_ms = (time.perf_counter() - began) * 1e3
            for index, token_id in enumerate(settled):
                is_draft = index + 1 < len(settled)
                yield running.add(token_id, self._widths, elapsed_ms / len(settled), is_draft=is_draft)
                if running.is_finished:
                    return

    def _draft(self, max_drafts: int) -> _Drafts:
        """Drafts up to a number of tokens: copied ones where the text repeats itself, else steps at few bits."""
        if self._verification.copy_drafts:
            copied = copied_drafts(np.asarray(self._text, dtype=np.int64), max_drafts)
            if copied:
                return _Drafts(copied, [None] * len(copied))
        drafts = _Drafts([], [])
        for _ in range(max_drafts):
            newest = drafts.token_ids[-1] if drafts.token_ids else self._text[-1]
            decision = self._controller.decide()
            output = self.decoder.step(torch.tensor([newest]), decision.bit_widths)
            self.record.num_draft_steps += 1
            token_id, probs = self._sampler.draft(output.logits[0])
            drafts.token_ids.append(token_id)
            drafts.probs.append(probs)
            if token_id in self._eos or self._is_doubtful(output.logits[0]):
                break
            self._controller.update(output, decision.bit_widths, torch.tensor([token_id]))
        return drafts

    def _is_doubtful(self, logits: Tensor) -> bool:
        """Whether the last draft is so unlikely that the round ends with it."""
        least = self._verification.min_confidence
        return least > 0 and float((logits.max() - logits.logsumexp(-1)).exp()) < least


def settled_policy(verification: Verification, model: DecoderModel) -> StaticAllocation:
    """What comes out of rounds: the text of this policy."""
    width = verification.bit_width
    return StaticAllocation(f"fixed:{width}", torch.full((model.num_units,), width))
