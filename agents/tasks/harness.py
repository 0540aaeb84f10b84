"""A model under a policy as lm-evaluation-harness asks for it: `--model flexquant`, widths switching at every token.

Needs the extra `eval`. Nothing is read in one parallel pass where the policy would have switched: continuations are
scored token by token, at the widths at which they would be decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from flexquant_rl.agents.commands.servable import Servable, load_servable
from flexquant_rl.agents.progress import track
from flexquant_rl.agents.tasks.extra import check_extra
from flexquant_rl.agents.tasks.reference import FULL_PRECISION, ReferenceEngine
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.request import GeneratedToken, Request
from flexquant_rl.engine.control.runner import Likelihood
from flexquant_rl.engine.decoding.options import DecoderName
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.serving import Engine

try:
    from lm_eval.api.model import TemplateLM
except ModuleNotFoundError:  # without the extra the module can be imported, and its class says what is missing
    TemplateLM = object

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MODEL_NAME = "flexquant"
"""What `lm-eval run --model` calls it."""
_MAX_LENGTH = 2048
_MAX_NEW_TOKENS = 256
_NUM_ROWS = 8


class Answering(Protocol):
    """What generates and scores: an `Engine`, or full precision."""

    model: NestedCausalLM

    def generate(self, request: Request) -> Iterator[GeneratedToken]:
        """The tokens of a continuation."""

    def loglikelihood(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, kl_weight: float, num_rows: int = 8
    ) -> list[Likelihood]:
        """Likelihoods of continuations."""

    def close(self) -> None:
        """Frees what it holds."""


class FlexQuantLM(TemplateLM):  # type: ignore[misc]
    """A model under a policy, for tasks of lm-evaluation-harness.

    Every argument may be text, as `--model_args model=DIR,policy=draft:3` gives it.

    Args:
        model: As commands name it.
        policy: As `fq generate --policy` takes it, or `full`: the unquantised weights.
        speed: The dial, as for `fq generate`.
        kl_weight: The dial itself.
        profile: With a policy by name: profile of the model.
        threads: Threads of a step.
        decoder: As for `Engine`.
        max_length: Tokens of prompt and continuation at most; longer prompts lose their beginning. The model's context
            where that is shorter.
        max_gen_toks: Tokens that are generated where a task does not say.
        batch_size: Continuations that are scored together; `auto` is 8.
        device: Where the model runs.
        max_batch_size: Taken because the harness gives it; not looked at.

    Raises:
        InputError: If the extra `eval` is missing, or as `load_servable`.
    """

    def __init__(
        self,
        model: str = "default",
        policy: str = "fixed:8",
        *,
        speed: float | str | None = None,
        kl_weight: float | str | None = None,
        profile: str | None = None,
        threads: int | str | None = None,
        decoder: DecoderName = "auto",
        max_length: int | str = _MAX_LENGTH,
        max_gen_toks: int | str = _MAX_NEW_TOKENS,
        batch_size: int | str = _NUM_ROWS,
        device: str = "cpu",
        max_batch_size: int | None = None,
    ) -> None:
        check_extra()
        num_threads = None if threads is None else int(threads)
        if policy == FULL_PRECISION:
            engine: Answering = ReferenceEngine(load_model(model).to(device))
            dial = None
        else:
            found = load_servable(
                model,
                policy,
                profile=None if profile is None else Path(profile),
                threads=num_threads,
                speed=_number(speed),
            )
            dial = found.setting(speed=_number(speed), kl_weight=_number(kl_weight))
            found = Servable(found.model.to(device), found.policy, found.profile)
            engine = engine_of(found, max_length=int(max_length), num_threads=num_threads, decoder=decoder)
        self._begin(
            engine,
            kl_weight=1.0 if dial is None else dial.kl_weight,
            max_length=int(max_length),
            max_new_tokens=int(max_gen_toks),
            num_rows=_NUM_ROWS if str(batch_size).startswith("auto") else int(batch_size),
        )

    @classmethod
    def around(
        cls, engine: Answering, *, kl_weight: float = 1.0, max_length: int = _MAX_LENGTH, num_rows: int = _NUM_ROWS
    ) -> FlexQuantLM:
        """The same around what is loaded already."""
        check_extra()
        made = cls.__new__(cls)
        made._begin(engine, kl_weight, max_length, _MAX_NEW_TOKENS, num_rows)
        return made

    def _begin(self, engine: Answering, kl_weight: float, max_length: int, max_new_tokens: int, num_rows: int) -> None:
        super().__init__()
        self._engine = engine
        self._kl_weight = kl_weight
        self._num_rows = num_rows
        self.max_length = min(max_length, engine.model.max_context)
        self.max_gen_toks = min(max_new_tokens, self.max_length // 2)
        self.tokenizer = engine.model.tokenizer
        self._device = engine.model.device

    @property
    def eot_token_id(self) -> int:
        """The first token that ends a text.

        Raises:
            InputError: If the model has none.
        """
        if not self._engine.model.eos_token_ids:
            raise InputError("the model has no end-of-text token, which tasks need; give a model with one")
        return int(self._engine.model.eos_token_ids[0])

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the token that begins texts, or else ends them."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer, where requests are kept."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text, up to where the model's answer begins."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text; a text that begins with the first token already, as chats do, gets no second one."""
        begins = self.tokenizer.bos_token is not None and string.startswith(self.tokenizer.bos_token)
        special = not begins if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.tokenizer(string, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As `TemplateLM`, which shows no bar of its own beside ours."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitting(context, continuation) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = []
        for begin in track(range(0, len(pairs), self._num_rows), "continuations, several at a time"):
            scored = self._engine.loglikelihood(
                pairs[begin : begin + self._num_rows], kl_weight=self._kl_weight, num_rows=self._num_rows
            )
            found += [(likelihood.log_prob_nats, likelihood.is_greedy) for likelihood in scored]
        for (names, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", names, answer)
        return found

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """A context without the beginning that does not fit; its last token stays.

        Raises:
            InputError: If the continuation alone does not fit. Where it does not, the harness' own model of Hugging
                Face asserts that it does.
        """
        room = self.max_length + 1 - len(continuation)  # nobody reads the last token
        if room < 1:
            raise InputError(
                f"a continuation of {len(continuation)} tokens does not fit into {self.max_length}; leave the task "
                "out, or give a model with a longer context"
            )
        return context[-room:], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts in windows that do not overlap, each token read at the policy's widths."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        found = []
        for (string,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(string, add_special_tokens=False), self.prefix_token_id, self.max_length, 1
            )
            pairs = [(("", ""), *make_disjoint_window(window)) for window in windows]
            scored = self._loglikelihood_tokens(pairs)
            found.append(sum(nats for nats, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The texts that follow contexts, up to a stop string, the end of text or the limit."""
        from lm_eval.models.utils import normalize_gen_kwargs

        texts = []
        for request in track(requests, "texts"):
            context, given = request.args
            wanted = normalize_gen_kwargs(given, default_max_gen_toks=self.max_gen_toks)
            count = min(int(wanted["max_gen_toks"]), self.max_length - 1)
            prompt = self.tok_encode(context)[-(self.max_length + 1 - count) :] or [self.prefix_token_id]
            asked = Request(
                torch.tensor(prompt),
                count,
                kl_weight=self._kl_weight,
                temperature=float(wanted.get("temperature", 0.0)),
                top_p=float(wanted.get("top_p", 1.0)),
                stop=tuple(text for text in wanted["until"] if text),
            )
            texts.append("".join(token.text for token in self._engine.generate(asked)))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts


def engine_of(
    found: Servable, *, max_length: int = _MAX_LENGTH, num_threads: int | None = None, decoder: DecoderName = "auto"
) -> Engine:
    """An engine whose requests hold at most `max_length` tokens, fewer where the model's context is shorter."""
    length = min(max_length, found.model.max_context)
    return Engine(found.model, found.policy, found.profile, max_length=length, num_threads=num_threads, decoder=decoder)


def _number(value: float | str | None) -> float | None:
    return None if value is None else float(value)


if TemplateLM is not object:
    from lm_eval.api.registry import register_model

    register_model(MODEL_NAME)(FlexQuantLM)
