"""Serving: a model under a policy, asked by any number of threads.

An `Engine` describes the model to its decoder once. Every request has rows of its own and holds the engine's lock for
one turn: a whole prompt, a step, or a round of drafts. So requests take turns and none sees another's state.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from flexquant_rl.engine.control.controller import make_controller
from flexquant_rl.engine.control.decision import Policy, StaticAllocation
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts, may_draft
from flexquant_rl.engine.control.draft_limits import check_ngram_drafts
from flexquant_rl.engine.control.drafts import DraftPolicy
from flexquant_rl.engine.control.log_probs import TokenLogProbs
from flexquant_rl.engine.control.policy import StaticPolicy
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.request import GeneratedToken, Request, RunningRequest
from flexquant_rl.engine.control.runner import Likelihood, PolicyRunner, check_pairs
from flexquant_rl.engine.control.served_drafts import ServedDrafts
from flexquant_rl.engine.control.token_policy import DialPolicy
from flexquant_rl.engine.decoding.choice import default_decoder, session_opener
from flexquant_rl.engine.decoding.decoder import Decoder, check_bit_widths, check_max_length
from flexquant_rl.engine.decoding.graph_turn import CLOSED, GraphTurn
from flexquant_rl.engine.decoding.idle_sessions import IdleSessions
from flexquant_rl.engine.decoding.lean import LeanSession
from flexquant_rl.engine.decoding.options import DecoderName, check_decoder_name
from flexquant_rl.engine.errors import InputError, first_line
from flexquant_rl.engine.model import NestedCausalLM

if TYPE_CHECKING:  # it needs Triton, which takes a quarter of a second, and a CPU needs none of it
    from flexquant_rl.engine.decoding.graph_decode import GraphDecoder

T = TypeVar("T")


class Engine:
    """A model, a policy, one decoder and a lock.

    Args:
        model: The model.
        policy: Decides the widths of every token of every request, and whether it is a draft.
        profile: The profile that the policy was trained with.
        max_length: Tokens that a request may hold, prompt included; default: the model's context.
        decoder: As for `open_session`. On a CUDA device the lean one is `GraphDecoder`, which reads tokens a few at a
            time and serves one request after the other, or `GraphSession` where the policy drafts; "auto" takes it
            where it can run model and policy.
        num_threads: Threads of a step, as for `open_session`; not with the captured graphs, which have none.
        graph: A `GraphDecoder` of this model and policy that exists already; default: one is made where it is taken.
        ngram_drafts: With a policy that drafts: drafts at most that are found in the text so far; default: what the
            policy was made with.

    Raises:
        InputError: If `max_length` exceeds the context, if decoder or threads cannot be had, or if `ngram_drafts` are
            given to a policy that does not draft, or are more than a round can hold.
        ValueError: If `graph` is of another model or policy.
    """

    def __init__(
        self,
        model: NestedCausalLM,
        policy: Policy | DraftPolicy,
        profile: Profile,
        *,
        max_length: int | None = None,
        decoder: DecoderName = "auto",
        num_threads: int | None = None,
        graph: GraphDecoder | None = None,
        ngram_drafts: int | None = None,
    ) -> None:
        self.model = model
        self.policy = policy
        self.profile = profile
        self._lock = threading.Lock()
        self._closed = threading.Event()  # the engine's own: the requests' events are their callers'
        self._turn = GraphTurn(self._closed)
        self._max_length = check_max_length(max_length, model)
        check_decoder_name(decoder)
        check_policy(policy, model)
        self._ngram_drafts = _checked_ngram_drafts(ngram_drafts, policy)
        takes_graph = graph is None and _takes_graph(model, policy, decoder)
        if (takes_graph or graph is not None) and num_threads is not None:
            raise InputError(f"threads={num_threads}: the captured graph of a GPU has no threads; leave the option out")
        if takes_graph and not isinstance(policy, DraftPolicy):
            from flexquant_rl.engine.decoding.graph_decode import GraphDecoder

            graph = GraphDecoder(model, policy, profile, max_length=self._max_length)
        if graph is not None and (graph.model is not model or graph.policy is not policy):
            raise ValueError("graph is of another model or policy; pass a GraphDecoder made with these two")
        self._graph = graph
        self._open: Callable[[int], Decoder] | None
        self._drafts_on_graph = takes_graph and isinstance(policy, DraftPolicy)
        if self._drafts_on_graph:
            self._open = _graph_sessions(model, self._max_length)
        else:
            # Likelihoods go step by step, which a graph's loop does not.
            name: DecoderName = decoder if graph is None else "hf"
            self._open = session_opener(model, max_length=max_length, decoder=name, num_threads=num_threads)
        takes_lean = not takes_graph and graph is None and decoder != "hf"
        is_lean = takes_lean and default_decoder(model)[0] == "lean"
        self._idle = IdleSessions() if is_lean else None

    @property
    def max_length(self) -> int:
        """Tokens that a request may hold, prompt included."""
        return self._max_length

    @property
    def is_graph(self) -> bool:
        """Whether a captured graph generates, which serves one request at a time."""
        return self._graph is not None

    def generate(self, request: Request, policy: Policy | DraftPolicy | None = None) -> Iterator[GeneratedToken]:
        """Continues a prompt. Any thread may call this at any time; abandon the iterator to stop.

        Args:
            request: What to continue, and how far.
            policy: Decides this request in place of the engine's own, by the same profile; not with a captured graph.

        Yields:
            The tokens as they come; the last one says why it ended. There is none if the request is cancelled while it
            waits for a captured graph.

        Raises:
            InputError: If the prompt is empty, no int64 tokens of the vocabulary or does not fit with its
                continuation, a number is out of its domain, or a captured graph lacks what is asked for.
            RuntimeError: If the engine is closed, or this thread has left another request of a captured graph
                unfinished.
        """
        self._check_open()
        graph = self._graph
        if graph is not None:
            if policy is not None and policy is not self.policy:
                raise InputError(f"policy {policy.name!r} is not the captured graph's own; use decoder='hf' to choose")
            yield from self._generate_by_graph(graph, request)
            return
        if policy is not None:
            check_policy(policy, self.model)
        request.check(self._max_length, self.model.vocab_size)
        with self._runner(1, request.prompt_ids, policy) as runner:
            if self._drafts_on_graph:
                with self._lock:
                    _prepare(runner.decoder, request)
            yield from self._in_turns(runner.generate([request], self.model.token_text, self._closed))

    def judge_text(
        self, token_ids: Tensor, *, kl_weight: float, num_likeliest: int = 0, policy: Policy | DraftPolicy | None = None
    ) -> Iterator[TokenLogProbs]:
        """`PolicyRunner.judge_text` of one text; any thread may call this at any time.

        Args:
            token_ids: `[T]` int64.
            kl_weight: The dial.
            num_likeliest: Likeliest tokens to name at each place.
            policy: As for `generate`, but with a captured graph too.

        Yields:
            What the text before it says of each token from the second one on.

        Raises:
            InputError: As `PolicyRunner.judge_text`.
            RuntimeError: If the engine is closed, also on the way.
        """
        self._check_open()
        if policy is not None:
            check_policy(policy, self.model)
        with self._runner(1, policy=policy) as runner:
            for found in self._in_turns(runner.judge_text(token_ids, kl_weight, num_likeliest)):
                yield found
                self._check_open()

    def loglikelihood(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, kl_weight: float, num_rows: int = 8
    ) -> list[Likelihood]:
        """`PolicyRunner.loglikelihood` of (context, continuation) pairs, `num_rows` of them in a pass.

        Raises:
            InputError: As `PolicyRunner.loglikelihood`, or if `num_rows` is less than 1.
            RuntimeError: If the engine is closed, also on the way.
        """
        self._check_open()
        if num_rows < 1:
            raise InputError(f"num_rows={num_rows} must be at least 1; the default is 8")
        check_pairs(pairs, kl_weight, self._max_length, self.model.vocab_size)
        if not pairs:
            return []
        # The lean decoder reads rows one after the other: one row, which reads a context once, does less.
        num_rows = 1 if self._idle is not None else min(num_rows, len(pairs))
        first_read = min(tuple(context) for context, _ in pairs)
        found: dict[int, Likelihood] = {}
        with self._runner(num_rows, torch.tensor(first_read)) as runner:
            for ended in self._in_turns(runner.likelihood_steps(pairs, kl_weight)):
                found |= ended
                self._check_open()
        return [found[index] for index in range(len(pairs))]

    def close(self) -> None:
        """Cancels what is running and takes no more requests. Closing twice is fine."""
        self._closed.set()
        with self._lock:
            self._open = self._graph = None
            if self._idle is not None:
                self._idle.close()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RuntimeError(CLOSED)

    @contextmanager
    def _runner(
        self, num_rows: int, prompt_ids: Tensor | None = None, policy: Policy | DraftPolicy | None = None
    ) -> Iterator[PolicyRunner]:
        """Rows of a request's own. Where there is a prompt, the row may have read the beginning of it already."""
        idle = None if prompt_ids is None or num_rows > 1 else self._idle
        with self._lock:
            if self._open is None:
                raise RuntimeError(CLOSED)
            controller = make_controller(self.model, policy or self.policy, self.profile, num_rows=num_rows)
            found = None if idle is None or prompt_ids is None else idle.take(prompt_ids)
            decoder: Decoder = self._open(num_rows) if found is None else found
        try:
            yield PolicyRunner(decoder, controller, ngram_drafts=self._ngram_drafts)
        finally:
            # Without the lock: this runs wherever an abandoned iterator is collected.
            if idle is None:
                decoder.close()
            else:
                assert isinstance(decoder, LeanSession)
                idle.give_back(decoder)

    def _in_turns(self, results: Iterator[T]) -> Iterator[T]:
        """Holds the lock while a result is made, and not while the caller looks at it."""
        while True:
            with self._lock:
                result = next(results, None)
            if result is None:
                return
            yield result

    def _generate_by_graph(self, graph: GraphDecoder, request: Request) -> Iterator[GeneratedToken]:
        request.check(graph.loop.weights.max_length, self.model.vocab_size)
        if request.log_probs is not None:
            raise InputError(f"log_probs={request.log_probs}: the captured graph gives none; use decoder='hf'")
        if request.top_p < 1:
            raise InputError(f"top_p={request.top_p:g}: the captured graph samples from all tokens; use decoder='hf'")
        running = RunningRequest(0, request, self.model.token_text, self.model.eos_token_ids, self._closed)
        prompt_ids, count = request.prompt_ids, request.max_new_tokens
        with self._turn.taken(request.cancel) as is_mine:
            if not is_mine:
                return
            # Compiling is no part of the first token's latency.
            graph.loop.prepare(len(prompt_ids), request.num_held)
            began = time.perf_counter()
            graph.start(
                prompt_ids, count, kl_weight=request.kl_weight, temperature=request.temperature, seed=request.seed
            )
            for index, batch in enumerate(graph.stream(count)):
                latency_ms = batch.step_ms if index else (time.perf_counter() - began) * 1e3
                for token_id, bit_widths in zip(batch.token_ids, batch.bit_widths, strict=True):
                    yield running.add(token_id, bit_widths, latency_ms)
                    self._turn.resumed()
                    if running.is_finished:
                        return


def generate(
    model: NestedCausalLM,
    policy: Policy | DraftPolicy,
    profile: Profile,
    prompt: str | Tensor,
    *,
    max_new_tokens: int,
    kl_weight: float = 1.0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    decoder: DecoderName = "auto",
    num_threads: int | None = None,
    graph: GraphDecoder | None = None,
    ngram_drafts: int | None = None,
) -> Iterator[GeneratedToken]:
    """Continues one prompt with an engine of its own; keep an `Engine` for several.

    Args:
        model: The model.
        policy: The policy.
        profile: The profile that the policy was trained with.
        prompt: Text, or `[T]` int64 token ids; read at the largest width.
        max_new_tokens: Tokens at most; each of the model's EOS tokens ends earlier.
        kl_weight: The dial.
        temperature: 0 is greedy.
        top_p: Only the likeliest tokens whose probabilities reach this sum are sampled.
        seed: Seed of the sampling.
        stop: Each of these strings ends the text, or the one that is given.
        decoder: As for `Engine`.
        num_threads: As for `Engine`.
        graph: As for `Engine`. Keep one for several prompts: compiling, fusing and capturing take their time.
        ngram_drafts: As for `Engine`.

    Raises:
        InputError: If the prompt is empty or does not fit the context with its continuation, or a number is out of
            its domain.
        ValueError: If `graph` is of another model or policy.
    """
    prompt_ids = encode(model, prompt) if isinstance(prompt, str) else prompt
    request = Request(
        prompt_ids,
        max_new_tokens,
        kl_weight=kl_weight,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )
    request.check(model.max_context, model.vocab_size)
    engine = Engine(
        model,
        policy,
        profile,
        max_length=request.num_held,
        decoder=decoder,
        num_threads=num_threads,
        graph=graph,
        ngram_drafts=ngram_drafts,
    )
    with closing(engine):
        yield from engine.generate(request)


def check_policy(policy: Policy | DraftPolicy, model: NestedCausalLM) -> None:
    """Raises InputError if a policy is one of another model, or has fixed widths that this model has not."""
    if isinstance(policy, DialPolicy | StaticPolicy | DeployedDrafts):
        policy.card.check_model(model.fingerprint, Path(policy.name))
    if isinstance(policy, StaticAllocation):
        check_bit_widths(policy.bit_widths, model.bit_widths, model.num_units)
    if isinstance(policy, DraftPolicy):
        check_bit_widths(policy.verify_bit_widths, model.bit_widths, model.num_units)
    if isinstance(policy, ServedDrafts):
        check_bit_widths(policy.level_bit_widths, model.bit_widths, model.num_units)


def encode(model: NestedCausalLM, text: str) -> Tensor:
    """The tokens of a prompt, `[T]` int64, special ones included.

    Raises:
        InputError: If it is not text, as bytes of a command line that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the prompt is not UTF-8 text ({text[error.start : error.end]!a} at character {error.start}); convert it"
        ) from error
    return torch.tensor(model.token_text.encode(text), dtype=torch.int64)


def encode_chat(model: NestedCausalLM, messages: Sequence[Mapping[str, str]]) -> Tensor:
    """The tokens of a chat in the model's chat template, up to where the next answer begins, `[T]` int64.

    Args:
        model: The model.
        messages: Each with `role` and `content`, in order.

    Raises:
        InputError: If the tokenizer has no chat template, or it refuses the messages.
    """
    if not model.token_text.chat_template:
        raise InputError("the model's tokenizer has no chat template; give the prompt as plain text")
    try:
        ids = model.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
    except Exception as error:  # a template is a program of the model's author, and raises what it likes
        raise InputError(
            f"the model's chat template refuses the messages ({first_line(error)}); change them, or give plain text"
        ) from error
    assert isinstance(ids, Tensor)
    return ids[0].long()


def _checked_ngram_drafts(ngram_drafts: int | None, policy: Policy | DraftPolicy) -> int | None:
    if ngram_drafts is not None:
        check_ngram_drafts(ngram_drafts)
    if ngram_drafts and not may_draft(policy):
        raise InputError(f"ngram_drafts={ngram_drafts}, but policy {policy.name!r} does not draft; name one that does")
    return ngram_drafts


def _graph_sessions(model: NestedCausalLM, max_length: int) -> Callable[[int], Decoder]:
    """Opens sessions of captured passes, so many rows each, which share the model and their graphs."""
    from flexquant_rl.engine.decoding.graph_session import GraphModel, GraphSession

    graph_model = GraphModel(model, max_length=max_length)
    return lambda num_rows: GraphSession(graph_model, num_rows=num_rows)


def _prepare(session: Decoder, request: Request) -> None:
    """Captures what a request may need: compiling is no part of a token's latency."""
    from flexquant_rl.engine.decoding.graph_session import GraphSession

    assert isinstance(session, GraphSession), "a policy that drafts runs on captured passes here"
    session.prepare(len(request.prompt_ids), request.num_held)


def _takes_graph(model: NestedCausalLM, policy: Policy | DraftPolicy, decoder: DecoderName) -> bool:
    """Whether the GPU's lean decoder runs; InputError if it was asked for by name there and cannot."""
    if decoder == "hf" or model.device.type != "cuda":
        return False
    from flexquant_rl.engine.decoding.graph_choice import why_not_graph

    reason = why_not_graph(model, policy)
    if reason is not None and decoder == "lean":
        raise InputError(f"the lean decoder of the GPU cannot run this ({reason}); use decoder='hf'")
    return reason is None
