"""What is served: a model, a policy and one engine; what a body asks of them becomes jobs, or is refused."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexquant_rl.agents.commands.servable import Rungs, Servable
from flexquant_rl.agents.dial_setting import dial_setting
from flexquant_rl.agents.server.errors import ApiError, invalid
from flexquant_rl.agents.server.job_queue import Job, JobQueue
from flexquant_rl.agents.server.schemas import Body, ChatBody, CompletionBody
from flexquant_rl.agents.server.settings import Settings
from flexquant_rl.engine.control.artefact import DeployedPolicy
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts
from flexquant_rl.engine.control.drafting_rules import Lookups
from flexquant_rl.engine.control.drafts import DraftPolicy
from flexquant_rl.engine.control.request import Request
from flexquant_rl.engine.control.token_policy import DialPolicy
from flexquant_rl.engine.decoding.options import DecoderName
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.serving import Engine, encode, encode_chat

_COMPLETION_TOKENS = 16  # OpenAI's default where a completion names no limit


@dataclass(frozen=True)
class Ask:
    """What one text of a body is to be.

    Attributes:
        job: What the queue runs.
        prompt: Its prompt as text, for `echo`.
        widths: What is said of the widths in the answer: policy, dial, seed.
    """

    job: Job
    prompt: str
    widths: dict[str, Any]


@dataclass
class Served:
    """A model under a policy, ready for requests of any thread.

    Attributes:
        name: The model's, as clients name it.
        found: Model, policy and profile.
        settings: Limits.
        queue: Runs the engine.
        max_length: Tokens that a request may hold.
        rungs: The ladder that `found` is the default rung of; each request may take another one.
        is_graph: Whether a captured graph generates, which has less to offer.
    """

    name: str
    found: Servable
    settings: Settings
    queue: JobQueue
    max_length: int
    rungs: Rungs | None = None
    is_graph: bool = False
    _tokenizing: threading.Lock = field(default_factory=threading.Lock)

    @staticmethod
    def start(
        name: str,
        found: Servable,
        settings: Settings,
        *,
        decoder: DecoderName = "auto",
        num_threads: int | None = None,
        ngram_drafts: int | None = None,
        rungs: Rungs | None = None,
    ) -> Served:
        """Starts an engine and its queue; arguments as for `Engine`.

        Raises:
            InputError: As `Engine`.
        """
        engine = Engine(
            found.model,
            found.policy,
            found.profile if rungs is None else rungs.profile,
            max_length=settings.max_length,
            decoder=decoder,
            num_threads=num_threads,
            ngram_drafts=ngram_drafts,
        )
        if rungs is not None and engine.is_graph:
            engine.close()
            raise InputError("a ladder has several policies and a captured graph has one; give --decoder hf")
        if found.model.token_text.chat_template:
            _ = found.model.tokenizer  # the first chat must not wait for transformers
        queue = JobQueue(engine, slots=settings.slots, size=settings.queue)
        return Served(name, found, settings, queue, engine.max_length, rungs, engine.is_graph)

    @property
    def policy_name(self) -> str:
        """The policy's name, as clients are told it."""
        return _public(self.found.policy.name)

    @property
    def has_chat(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self.found.model.token_text.chat_template)

    def facts(self) -> dict[str, Any]:
        """What a client may want to know of the model: its widths, its dial or why there is none, its limits."""
        policy, model = self.found.policy, self.found.model
        dial = self._dial()
        return {
            "policy": self.policy_name,
            "bit_widths": list(model.bit_widths),
            "dial": dial,
            "speeds_are": "modelled" if self.rungs is None else "measured",
            "why_no_dial": None if dial else _why_no_dial(self.policy_name, policy),
            "verify_width": policy.verify_width if isinstance(policy, DeployedDrafts) else None,
            "has_chat_template": self.has_chat,
            "max_length": self.max_length,
            "max_new_tokens": min(self.settings.max_new_tokens, self.max_length),
        }

    def _dial(self) -> list[dict[str, Any]]:
        """The settings that requests may ask for by their speed, each with what it gave on validation text."""
        if self.rungs is not None:
            return [
                {
                    "kl_weight": rung.kl_weight,
                    "speed": rung.speedup_measured,
                    "output_kl_nats": rung.output_kl_nats,
                    "policy": _public(rung.policy),
                    "verify_width": rung.verify_width,
                }
                for rung in self.rungs.ladder.rungs
            ]
        if not isinstance(self.found.policy, DialPolicy):
            return []
        return [
            {
                "kl_weight": point.kl_weight,
                "speed": point.speedup_modelled,
                "output_kl_nats": point.output_kl_nats,
                "mean_bit_width": point.mean_bit_width,
            }
            for point in self.found.policy.card.dial
        ]

    def check(self, body: Body) -> None:
        """Looks at what costs nothing to know, before there is room for a body.

        Raises:
            ApiError: If another model is wanted, or more texts than fit into the queue.
        """
        if body.model is not None and body.model != self.name:
            raise ApiError(
                404, f"model {body.model!r} is not served here; {self.name!r} is", "model_not_found", "model"
            )
        if body.num_texts > self.queue.capacity:
            raise invalid(
                f"{body.num_texts} texts are asked for at once, and this server holds {self.queue.capacity}; ask for "
                "fewer",
                "n",
            )

    def of_completion(self, body: CompletionBody) -> list[Ask]:
        """The texts of a completion: each prompt as often as choices are wanted.

        Raises:
            ApiError, InputError: If the body cannot be served.
        """
        wanted = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        if not wanted and not body.echo:
            raise invalid(
                "max_tokens=0 generates nothing; ask for a token, or set echo to have the prompt judged", "max_tokens"
            )
        judged = body.logprobs if body.echo else None
        texts = [self._prompt(prompt) for prompt in body.prompts]
        return self._asks(body, texts, wanted, body.logprobs, judged)

    def of_chat(self, body: ChatBody) -> list[Ask]:
        """The answers to a chat, as many as choices are wanted; without a limit they may fill the room that is left.

        Raises:
            ApiError, InputError: If the body cannot be served.
        """
        if not self.has_chat:
            raise invalid(f"{self.name} has no chat template; use /v1/completions", "messages", "no_chat_template")
        with self._tokenizing:
            ids = encode_chat(self.found.model, [message.plain() for message in body.messages])
        wanted = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        if wanted is None:
            wanted = max(1, min(self.settings.max_new_tokens, self.max_length - len(ids) + 1))
        if not wanted:
            raise invalid("max_tokens=0 generates nothing; ask for a token", "max_tokens")
        return self._asks(body, [(ids, "")], wanted, (body.top_logprobs or 0) if body.logprobs else None, None)

    def _asks(
        self, body: Body, texts: Sequence[tuple[Tensor, str]], wanted: int, likeliest: int | None, judged: int | None
    ) -> list[Ask]:
        limit = min(self.settings.max_new_tokens, self.max_length)
        if wanted > limit:
            raise invalid(
                f"max_tokens={wanted}, and this server generates {limit} at most; ask for fewer", "max_tokens"
            )
        if self.is_graph:
            self._check_graph(body, likeliest)
        policy, kl_weight = self._control(body)
        seed = secrets.randbits(32) if body.seed is None else body.seed
        temperature = 1.0 if body.temperature is None else body.temperature
        asks = []
        for ids, text in texts:
            self._check_room(len(ids), max(wanted, 1), "messages" if isinstance(body, ChatBody) else "prompt")
            for choice in range(body.n or 1):
                request = Request(
                    ids,
                    max(wanted, 1),
                    kl_weight=1.0 if kl_weight is None else kl_weight,
                    temperature=temperature,
                    top_p=1.0 if body.top_p is None else body.top_p,
                    seed=seed + choice,
                    stop=body.stop_strings,
                    log_probs=likeliest,
                )
                request.check(self.max_length, self.found.model.vocab_size)
                widths = {
                    "policy": self.policy_name if policy is None else _public(policy.name),
                    "kl_weight": kl_weight,
                    "seed": seed + choice,
                }
                asks.append(Ask(Job(request, wanted, policy, judged), text, widths))
        return asks

    def _check_room(self, num_prompt: int, num_new: int, param: str) -> None:
        """Raises ApiError if a text is longer than a request may be; nobody reads its last token."""
        if num_prompt + num_new - 1 > self.max_length:
            raise invalid(
                f"{num_prompt} tokens of prompt and {num_new} new ones are more than the {self.max_length} that this "
                "server holds; shorten the prompt or ask for fewer",
                param,
            )

    @staticmethod
    def _check_graph(body: Body, likeliest: int | None) -> None:
        """Raises ApiError on what a captured graph does not do."""
        asked = {
            "full_width": bool(body.full_width),
            "logprobs": likeliest is not None,
            "top_p": body.top_p is not None and body.top_p < 1,
        }
        for param, is_asked in asked.items():
            if is_asked:
                raise invalid(f"{param} is not to be had from this server's captured graph; leave it out", param)

    def _control(self, body: Body) -> tuple[DeployedPolicy | StaticAllocation | DraftPolicy | None, float | None]:
        """The policy in place of the engine's own, if any, and the dial, if there is one."""
        policy, model = self.found.policy, self.found.model
        if body.full_width:
            width = max(model.bit_widths)
            return StaticAllocation(f"fixed:{width}", torch.full((model.num_units,), width)), None
        if self.rungs is not None:
            if body.kl_weight is not None:
                raise invalid("kl_weight sets the dial of one policy, and there are several; give speed", "kl_weight")
            if body.speed is None and body.verify_width is None and self.found.rung is not None:
                return None, self.found.rung.kl_weight
            rung = self.rungs.ladder.chosen(body.speed, body.verify_width)
            return self.rungs.policies[rung.folder], rung.kl_weight
        self._check_dial(body)
        setting = dial_setting(policy, speed=body.speed, kl_weight=body.kl_weight)
        own = None if body.verify_width is None else self._verifying(body.verify_width)
        return own, None if setting is None else setting.kl_weight

    def _check_dial(self, body: Body) -> None:
        """Raises ApiError if a body sets a dial that there is not, without saying where the policy lies."""
        if isinstance(self.found.policy, DialPolicy):
            if body.speed is not None and not self.found.policy.card.dial:
                raise invalid(f"{self.policy_name} has no table of its dial for a speed; give kl_weight", "speed")
            return
        for param, value in (("speed", body.speed), ("kl_weight", body.kl_weight)):
            if value is not None:
                raise invalid(f"{param}={value:g} sets a dial, and {self.policy_name} has none; leave it out", param)

    def _verifying(self, width: int) -> DraftPolicy | None:
        """The drafts verified at another width; None if it is their own."""
        policy, param = self.found.policy, "verify_width"
        if not isinstance(policy, DeployedDrafts):
            raise invalid(f"verify_width={width} is for drafts, and {self.policy_name} makes none; leave it out", param)
        if width == policy.verify_width:
            return None
        if policy.facts.rule is None or policy.facts.costs is not None:
            raise invalid(
                f"verify_width={width}, but {self.policy_name} was made for {policy.verify_width}; leave it out", param
            )
        stored = self.found.model.bit_widths
        only_finds = isinstance(policy.facts.rule, Lookups)  # no width drafts
        lowest = 0.0 if only_finds else float(policy.level_bit_widths.double().mean(-1).max())
        if width not in stored or width <= lowest:
            above = "" if only_finds else f" above {lowest:g}, that of the drafts"
            raise invalid(f"verify_width={width} must be a stored width ({', '.join(map(str, stored))}){above}", param)
        verify = torch.full_like(policy.verify_bit_widths, width)
        separator = "," if ":" in policy.name else ":"
        return replace(policy, name=f"{policy.name}{separator}verify={width}", verify_bit_widths=verify)

    def _prompt(self, prompt: str | list[int]) -> tuple[Tensor, str]:
        """Tokens and text of a prompt."""
        model = self.found.model
        if isinstance(prompt, str):
            with self._tokenizing:
                ids = encode(model, prompt)
            if not len(ids):
                raise invalid("the prompt has no token; give at least a character", "prompt")
            return ids, prompt
        if not all(0 <= token_id < model.vocab_size for token_id in prompt):
            raise invalid(f"prompt has tokens that are not 0 to {model.vocab_size - 1}, the vocabulary", "prompt")
        return torch.tensor(prompt, dtype=torch.int64), str(model.token_text.decode(prompt))


def _public(name: str) -> str:
    """What clients are told of a policy: its name, or that of its directory without where it lies."""
    return Path(name).name


def _why_no_dial(name: str, policy: object) -> str:
    if isinstance(policy, DialPolicy):
        return f"The policy {name} has no table of its dial; requests may name kl_weight."
    if isinstance(policy, DeployedDrafts):
        return f"The policy {name} has no dial: it drafts, and its text is that of {policy.verify_width} bits."
    return f"The policy {name} has no dial: its widths are fixed. A trained policy has one."
