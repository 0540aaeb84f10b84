"""The one loop over tokens: a decision, a pass at its widths, the next token, the signals.

The environment, the evaluation, generation and timing all go through `PolicyRunner.step`; they differ in who decides
(a controller or an action), in what the next token is (sampled or a given text) and in what they make of the output.
A policy that drafts generates through `Rounds`; a step is the special case that verifies every token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexquant_rl.engine.control.controller import Controller, DraftController, StaticController
from flexquant_rl.engine.control.cost import clock_ms
from flexquant_rl.engine.control.decision import Decision
from flexquant_rl.engine.control.dial import check_kl_weight
from flexquant_rl.engine.control.draft_limits import check_ngram_drafts
from flexquant_rl.engine.control.log_probs import TokenLogProbs, check_num_likeliest, token_log_probs
from flexquant_rl.engine.control.request import GeneratedToken, Request, RunningRequest
from flexquant_rl.engine.control.rounds import Rounds
from flexquant_rl.engine.decoding.decoder import Decoder, StepOutput, check_vocabulary
from flexquant_rl.engine.decoding.next_token import Greedy, NextTokens, Replay, Sampler
from flexquant_rl.engine.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from flexquant_rl.engine.token_text import TokenText

_PASS_TOKENS = 16  # no decoder's pass takes fewer


@dataclass(frozen=True)
class TokenStep:
    """One step of R' rows.

    Attributes:
        token_ids: `[R']` int64, the tokens that were read.
        decision: How they were read.
        output: What the pass put out.
        next_token_ids: `[R']` int64, what the next step reads.
        pass_ms: Wall-clock milliseconds of the pass alone; None unless the runner was told to time it.
    """

    token_ids: Tensor
    decision: Decision
    output: StepOutput
    next_token_ids: Tensor
    pass_ms: float | None


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is under a policy.

    Attributes:
        log_prob_nats: Sum of the log-probabilities of its tokens.
        is_greedy: Whether each of them was the likeliest one.
    """

    log_prob_nats: float
    is_greedy: bool


def check_pairs(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], kl_weight: float, max_length: int, vocab_size: int
) -> None:
    """Checks what `loglikelihood` is asked, before anything runs.

    Args:
        pairs: Token ids of (context, continuation).
        kl_weight: The dial.
        max_length: Tokens that a row can hold.
        vocab_size: Tokens of the vocabulary.

    Raises:
        InputError: If a context or continuation is empty or has a token outside the vocabulary, if both together do
            not fit into a row, or if the dial is not positive and finite.
    """
    check_kl_weight(kl_weight)
    for context, continuation in pairs:
        if not context or not continuation:
            raise InputError("a context or continuation is empty; give at least one token of each")
        check_vocabulary(torch.tensor([*context, *continuation]), vocab_size)
        if len(context) + len(continuation) - 1 > max_length:  # nobody reads the last token
            raise InputError(
                f"{len(context)} and {len(continuation)} tokens do not fit into a row of {max_length}; shorten the "
                "context"
            )


class PolicyRunner:
    """Runs a decoder's rows under a controller.

    Args:
        decoder: Holds R rows.
        controller: Decides for R rows.
        next_tokens: Chooses what each step reads next; default: the likeliest token.
        timed: Whether to time every pass, with the device's queue drained before and after.
        first_token_ids: `[R]` int64, what the first step reads where the rows hold prompts and nobody calls `begin`.
        ngram_drafts: As for `Rounds`; with a controller that does not draft there is nothing to look up.

    Raises:
        InputError: If `ngram_drafts` is negative or more than a round can hold.
    """

    def __init__(
        self,
        decoder: Decoder,
        controller: Controller,
        next_tokens: NextTokens | None = None,
        *,
        timed: bool = False,
        first_token_ids: Tensor | None = None,
        ngram_drafts: int | None = None,
    ) -> None:
        if ngram_drafts is not None:
            check_ngram_drafts(ngram_drafts)
        self.decoder = decoder
        self.controller = controller
        self.next_tokens: NextTokens = next_tokens or Greedy()
        self._timed = timed
        self._ngram_drafts = ngram_drafts
        nothing = torch.zeros(len(decoder.lengths), dtype=torch.int64)
        self._upcoming = nothing if first_token_ids is None else first_token_ids

    @property
    def upcoming_token_ids(self) -> Tensor:
        """`[R]` int64: the tokens that the next step reads."""
        return self._upcoming

    def start(self, prompt_ids: Tensor, kl_weight: Tensor, rows: Tensor | None = None) -> StepOutput:
        """Restarts rows with prompts, which are read at the largest width.

        Args:
            prompt_ids: `[R', T]` int64.
            kl_weight: `[R']` the dials.
            rows: `[R']` int64; default all.

        Returns:
            What the prompts' last tokens put out; `upcoming_token_ids` holds what was chosen from it.
        """
        output = self.decoder.prefill(prompt_ids, rows=rows)
        self.begin(output, kl_weight, rows)
        return output

    def begin(self, output: StepOutput, kl_weight: Tensor, rows: Tensor | None = None) -> None:
        """Starts rows that hold prompts already, as those of a forked decoder do.

        Args:
            output: What the prompts' last tokens put out, `[R', ...]`.
            kl_weight: `[R']` the dials.
            rows: `[R']` int64; default all.
        """
        upcoming = self.next_tokens(output.logits, rows)
        self._remember(upcoming, rows)
        self.controller.reset(output, upcoming, kl_weight, rows)

    def step(self, decision: Decision | None = None, rows: Tensor | None = None) -> TokenStep:
        """Moves rows on by one token.

        Args:
            decision: How to read it; default: as the controller decides.
            rows: `[R']` int64; default all.
        """
        if decision is None:
            decision = self.controller.decide(rows)
        token_ids = self._upcoming if rows is None else self._upcoming[rows]
        output, pass_ms = self._read(token_ids, decision.bit_widths, rows)
        upcoming = self.next_tokens(output.logits, rows)
        self.controller.update(output, decision.bit_widths, upcoming, rows)
        self._remember(upcoming, rows)
        return TokenStep(token_ids, decision, output, upcoming, pass_ms)

    def generate(
        self,
        requests: Sequence[Request],
        tokenizer: PreTrainedTokenizerBase | TokenText | None = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[GeneratedToken]:
        """Continues prompts of any lengths, as many at a time as there are rows; a row that ends takes the next one.

        Args:
            requests: What to generate.
            tokenizer: Gives the tokens' text; needed for stop strings.
            cancel: Once it is set, each request ends with its next token.

        Yields:
            The tokens as they come; those of one request in order. The last one of each says why it ended.

        Raises:
            InputError: If a request has no prompt of the vocabulary, a number out of its domain or no room in a row.
        """
        model = self.decoder.model
        for request in requests:
            request.check(self.decoder.max_length, model.vocab_size)
        sampler = Sampler(len(self._upcoming))
        self.next_tokens = sampler
        rounds = None
        if isinstance(self.controller, DraftController):
            rounds = Rounds(self.decoder, self.controller, sampler, ngram_drafts=self._ngram_drafts)
        waiting = list(enumerate(requests))[::-1]
        running: dict[int, RunningRequest] = {}
        while waiting or running:
            for row in range(len(self._upcoming)):
                if row not in running and waiting:
                    index, request = waiting.pop()
                    running[row] = RunningRequest(index, request, tokenizer, model.eos_token_ids, cancel)
                    yield self._first_token(row, request, running[row], sampler)
                    if rounds is not None:
                        rounds.begin(
                            row,
                            request.prompt_ids.tolist(),
                            int(self._upcoming[row]),
                            eos_token_ids=running[row].eos_token_ids,
                        )
            running = {row: request for row, request in running.items() if not request.is_finished}
            if rounds is not None:
                for row in sorted(running):
                    yield from self._round_step(row, running[row], rounds)
            elif running:
                yield from self._next_tokens_of(running)

    def _first_token(self, row: int, request: Request, running: RunningRequest, sampler: Sampler) -> GeneratedToken:
        began = time.perf_counter()
        sampler.start(row, temperature=request.temperature, top_p=request.top_p, seed=request.seed)
        output = self.start(
            request.prompt_ids[None], torch.tensor([request.kl_weight], dtype=torch.float32), torch.tensor([row])
        )
        model = self.decoder.model
        widths = torch.full((model.num_units,), max(model.bit_widths))
        elapsed_ms = (time.perf_counter() - began) * 1e3
        return running.add(int(self._upcoming[row]), widths, elapsed_ms, output.logits[0])

    def _next_tokens_of(self, running: dict[int, RunningRequest]) -> Iterator[GeneratedToken]:
        began = time.perf_counter()
        rows = sorted(running)
        step = self.step(rows=None if len(rows) == len(self._upcoming) else torch.tensor(rows))
        elapsed_ms = (time.perf_counter() - began) * 1e3
        columns = (step.next_token_ids.tolist(), step.decision.bit_widths, step.output.logits)
        for row, token_id, widths, logits in zip(rows, *columns, strict=True):
            yield running[row].add(token_id, widths, elapsed_ms, logits)

    def _round_step(self, row: int, running: RunningRequest, rounds: Rounds) -> Iterator[GeneratedToken]:
        """A step of one row of rounds: a verify step yields what it settles, as far as the request goes."""
        settled = rounds.step(row, running.num_wanted)
        if settled is None:
            return
        share_ms = settled.round_ms / len(settled.token_ids)
        for place, token_id in enumerate(settled.token_ids):
            # The last one is what the pass gained.
            is_draft = place + 1 < len(settled.token_ids)
            token = running.add(token_id, settled.bit_widths, share_ms, settled.logits[place], is_draft=is_draft)
            if running.is_finished:  # what follows is dropped, but it took its time
                if is_draft:
                    rounds.counts(row).drop(len(settled.token_ids) - place - 1)
                rest_ms = share_ms * (len(settled.token_ids) - place)
                yield replace(token, latency_ms=rest_ms, draft_counts=rounds.counts(row))
                return
            yield token

    def loglikelihood(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], kl_weight: float) -> list[Likelihood]:
        """How likely continuations are when the policy reads them, token by token.

        A context is read at the largest width, as every prompt; the policy decides from the continuation's first token
        on. Pairs of different lengths share passes.

        Args:
            pairs: Token ids of (context, continuation), neither empty.
            kl_weight: The dial.

        Raises:
            InputError: As `check_pairs`.
        """
        check_pairs(pairs, kl_weight, self.decoder.max_length, self.decoder.model.vocab_size)
        found: dict[int, Likelihood] = {}
        for ended in self.likelihood_steps(pairs, kl_weight):
            found |= ended
        return [found[index] for index in range(len(pairs))]

    def likelihood_steps(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], kl_weight: float
    ) -> Iterator[dict[int, Likelihood]]:
        """`loglikelihood` of pairs that `check_pairs` has let pass, a context or a step at a time.

        Yields:
            The likelihoods that are complete now, by the index of their pair; most often none.
        """
        if len(self._upcoming) == 1:
            yield from self._likelihoods_by_context(pairs, kl_weight)
            return
        # Continuations of like length end together, so that few passes run with few rows.
        order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index][1]))
        num_rows = len(self._upcoming)
        for begin in range(0, len(order), num_rows):
            chosen = order[begin : begin + num_rows]
            found = yield from self._likelihoods([pairs[index] for index in chosen], kl_weight)
            yield dict(zip(chosen, found, strict=True))

    def judge_text(self, token_ids: Tensor, kl_weight: float, num_likeliest: int) -> Iterator[TokenLogProbs]:
        """How likely each token of a text is when the policy reads it token by token, as `loglikelihood` does.

        Args:
            token_ids: `[T]` int64, at least 1; the first one is read at the largest width, and nothing judges it.
            kl_weight: The dial.
            num_likeliest: Likeliest tokens to name at each place.

        Yields:
            What the text before it says of each token from the second one on.

        Raises:
            InputError: If the text is empty, no tokens of the vocabulary or too long, or a number is out of its domain.
        """
        vocab_size = self.decoder.model.vocab_size
        check_num_likeliest(num_likeliest, vocab_size)
        ids = token_ids.tolist()
        if len(ids) == 1:  # nothing to judge
            check_kl_weight(kl_weight)
            check_vocabulary(token_ids, vocab_size)
            return
        check_pairs([(ids[:1], ids[1:])], kl_weight, self.decoder.max_length, vocab_size)
        self.next_tokens = Replay(token_ids[None, 1:])
        output = self.start(token_ids[None, :1], torch.tensor([kl_weight], dtype=torch.float32))
        yield token_log_probs(output.logits[0], ids[1], num_likeliest)
        for token_id in ids[2:]:
            yield token_log_probs(self.step().output.logits[0], token_id, num_likeliest)

    def _likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], kl_weight: float
    ) -> Generator[dict[int, Likelihood], None, list[Likelihood]]:
        """Likelihoods of at most R pairs, longest continuation first; pauses after each context and each step."""
        longest = len(pairs[0][1])
        text = torch.zeros(len(pairs), longest, dtype=torch.int64)
        for row, (_, continuation) in enumerate(pairs):
            text[row, : len(continuation)] = torch.tensor(continuation)
        self.next_tokens = Replay(text)
        dial = torch.tensor([kl_weight], dtype=torch.float32)
        nats = torch.zeros(len(pairs), dtype=torch.float64)
        greedy = torch.ones(len(pairs), dtype=torch.bool)
        for row, (context, _) in enumerate(pairs):
            output = self.start(torch.tensor([context]), dial, torch.tensor([row]))
            self._judge(output, text[row : row + 1, 0], torch.tensor([row]), nats, greedy)
            yield {}
        lengths = torch.tensor([len(continuation) for _, continuation in pairs])
        for position in range(1, longest):
            rows = (lengths > position).nonzero()[:, 0]
            step = self.step(rows=rows)
            self._judge(step.output, text[rows, position], rows, nats, greedy)
            yield {}
        return [Likelihood(float(value), bool(is_greedy)) for value, is_greedy in zip(nats, greedy, strict=True)]

    def _likelihoods_by_context(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], kl_weight: float
    ) -> Iterator[dict[int, Likelihood]]:
        """Likelihoods in one row, which reads a context once for all its continuations; pauses as `_likelihoods`."""
        dial, row = torch.tensor([kl_weight], dtype=torch.float32), torch.tensor([0])
        read: Sequence[int] | None = None
        output, held = None, self.decoder.lengths
        for index in sorted(range(len(pairs)), key=lambda index: tuple(pairs[index][0])):
            context, text = pairs[index][0], torch.tensor([pairs[index][1]])
            self.next_tokens = Replay(text)
            if output is None or context != read:
                output = self.start(torch.tensor([context]), dial)
                read, held = context, self.decoder.lengths.clone()
                yield {}
            else:
                self.decoder.truncate(held)
                self.begin(output, dial)
            nats, greedy = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.bool)
            self._judge(output, text[:, 0], row, nats, greedy)
            for outputs in self._read_text(text):
                for token_id, found in outputs:
                    self._judge(found, token_id, row, nats, greedy)
                yield {}
            yield {index: Likelihood(float(nats), bool(greedy))}

    def _read_text(self, text: Tensor) -> Iterator[list[tuple[Tensor, StepOutput]]]:
        """Reads all but the last of `[1, T]` tokens behind a context, in passes.

        Where the widths are the same at every token, a pass takes several of them: the same function of the text.

        Yields:
            Each token `[1]` behind those of a pass, and what it follows from.
        """
        if isinstance(self.controller, (StaticController, DraftController)):
            widths = self.controller.decide().bit_widths
            for begin in range(1, text.shape[1], _PASS_TOKENS):
                following = text[:, begin : begin + _PASS_TOKENS]
                output = self.decoder.extend(text[:, begin - 1 : begin - 1 + following.shape[1]], widths)
                yield [(following[:, place], output.at(place)) for place in range(following.shape[1])]
            return
        for place in range(1, text.shape[1]):
            yield [(text[:, place], self.step().output)]

    @staticmethod
    def _judge(output: StepOutput, token_ids: Tensor, rows: Tensor, nats: Tensor, greedy: Tensor) -> None:
        """Adds what an output gives the tokens that follow it."""
        log_probs = output.logits.log_softmax(-1).cpu()
        nats[rows] += log_probs.gather(1, token_ids[:, None])[:, 0].double()
        greedy[rows] &= log_probs.argmax(-1) == token_ids

    def _read(self, token_ids: Tensor, bit_widths: Tensor, rows: Tensor | None) -> tuple[StepOutput, float | None]:
        if not self._timed:
            return self.decoder.step(token_ids, bit_widths, rows=rows), None
        outputs: list[StepOutput] = []
        elapsed_ms = clock_ms(
            lambda: outputs.append(self.decoder.step(token_ids, bit_widths, rows=rows)), self.decoder.model.device
        )
        return outputs[0], elapsed_ms

    def _remember(self, upcoming: Tensor, rows: Tensor | None) -> None:
        if rows is None:
            self._upcoming = upcoming
        else:
            self._upcoming = self._upcoming.clone()
            self._upcoming[rows] = upcoming
