"""Answers as OpenAI's clients read them: whole ones, and the chunks of a stream in the order that clients rely on."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from flexquant_rl.agents.server.served import Ask, Served
from flexquant_rl.engine.control.log_probs import TokenLogProbs
from flexquant_rl.engine.control.request import GeneratedToken
from flexquant_rl.engine.token_bytes import token_bytes

_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop"}


class Choice:
    """One text of an answer as it comes.

    Args:
        index: Its place among the choices.
        ask: What it is to be.
        served: What makes it.
    """

    def __init__(self, index: int, ask: Ask, served: Served) -> None:
        self.index = index
        self.ask = ask
        self._served = served
        self._text_length = 0
        self.scores: list[TokenLogProbs] = []
        self.tokens: list[GeneratedToken] = []

    def add(self, event: TokenLogProbs | GeneratedToken) -> None:
        """Takes what comes next."""
        if isinstance(event, GeneratedToken):
            self.tokens.append(event)
        else:
            self.scores.append(event)

    @property
    def text(self) -> str:
        """What was generated so far."""
        return "".join(token.text for token in self.tokens)

    @property
    def finish_reason(self) -> str:
        """Why it ended; where nothing was to be generated, the limit was reached at once."""
        reason = self.tokens[-1].finish_reason if self.tokens else None
        return "length" if reason is None else _REASONS[reason]

    def widths(self, tokens: Sequence[GeneratedToken]) -> dict[str, Any]:
        """What our extension says of some tokens, a number for each."""
        mean = self._served.queue.mean_width
        return {
            "texts": [token.text for token in tokens],
            "bit_widths": [round(mean(token.bit_widths), 3) for token in tokens],
            "accepted_drafts": [token.is_draft for token in tokens],
            "latency_ms": [round(token.latency_ms, 3) for token in tokens],
        }

    def facts(self) -> dict[str, Any]:
        """What our extension says of the whole text."""
        counts = self.tokens[-1].draft_counts if self.tokens else None
        facts = dict(self.ask.widths)
        if counts is not None:
            facts |= {
                "num_found": counts.num_found,
                "num_found_accepted": counts.num_found_accepted,
                "acceptance_by_position": counts.acceptance_by_position,
                "tokens_per_pass": counts.tokens_per_pass,
            }
        return facts

    def completion_logprobs(self, found: Sequence[TokenLogProbs | None]) -> dict[str, Any]:
        """Log-probabilities as completions have them; None stands for a prompt's first token."""
        tokens, values, tops, offsets = [], [], [], []
        for place, one in enumerate(found):
            token_id = int(self.ask.job.request.prompt_ids[place]) if one is None else one.token_id
            text = self._decoded(token_id)
            tokens.append(text)
            values.append(None if one is None else one.log_prob_nats)
            named = None if one is None else {text: one.log_prob_nats}
            if one is not None and named is not None:
                for other, value in one.likeliest:
                    named.setdefault(self._decoded(other), value)
            tops.append(named)
            offsets.append(self._text_length)
            # A special token is none of the text.
            self._text_length += len(self._decoded(token_id, skip_special_tokens=True))
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def chat_logprobs(self, found: Sequence[TokenLogProbs | None]) -> dict[str, Any]:
        """Log-probabilities as chats have them."""
        content = []
        for one in found:
            if one is not None:
                others = [self._entry(token_id, value) for token_id, value in one.likeliest]
                content.append({**self._entry(one.token_id, one.log_prob_nats), "top_logprobs": others})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, value: float) -> dict[str, Any]:
        own = token_bytes(self._served.found.model.token_text, token_id)
        return {"token": self._decoded(token_id), "logprob": value, "bytes": list(own)}

    def _decoded(self, token_id: int, *, skip_special_tokens: bool = False) -> str:
        tokenizer = self._served.found.model.token_text
        return str(tokenizer.decode([token_id], skip_special_tokens=skip_special_tokens))


class Answer:
    """What both kinds of answer share: one id, one time, one model in all of it.

    Args:
        served: What makes it.
        asks: Its choices.
    """

    prefix: str
    object_name: str
    chunk_name: str

    def __init__(self, served: Served, asks: Sequence[Ask]) -> None:
        self._served = served
        self.choices = [Choice(index, ask, served) for index, ask in enumerate(asks)]
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed."""
        choices = []
        for choice in self.choices:
            log_probs: list[TokenLogProbs | None] = [token.log_probs for token in choice.tokens]
            entry = self._content(choice, log_probs)
            entry |= {"index": choice.index, "finish_reason": choice.finish_reason}
            choices.append(entry | {"flexquant": choice.widths(choice.tokens) | choice.facts()})
        return self._object(self.object_name, choices) | {"usage": self.usage()}

    def opening(self) -> Iterator[dict[str, Any]]:
        """The chunks before the first token of any choice."""
        return iter(())

    def chunk(self, choice: Choice, token: GeneratedToken) -> dict[str, Any]:
        """The chunk of a token."""
        entry = self._delta(choice, token) | {"index": choice.index, "finish_reason": None}
        return self._object(self.chunk_name, [entry | {"flexquant": choice.widths([token])}])

    def closing(self, choice: Choice) -> dict[str, Any]:
        """The chunk that says why a choice ended."""
        entry = self._nothing() | {"index": choice.index, "finish_reason": choice.finish_reason}
        return self._object(self.chunk_name, [entry | {"flexquant": choice.facts()}])

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk that has the numbers of tokens alone."""
        return self._object(self.chunk_name, []) | {"usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Numbers of tokens; choices of one prompt count it once."""
        prompts = {id(choice.ask.job.request.prompt_ids): choice.ask.job.request.prompt_ids for choice in self.choices}
        read = sum(map(len, prompts.values()))
        made = sum(len(choice.tokens) for choice in self.choices)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    def _object(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": name,
            "created": self._created,
            "model": self._served.name,
            "choices": choices,
        }

    def _content(self, choice: Choice, log_probs: list[TokenLogProbs | None]) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, choice: Choice, token: GeneratedToken) -> dict[str, Any]:
        raise NotImplementedError

    def _nothing(self) -> dict[str, Any]:
        raise NotImplementedError


class CompletionAnswer(Answer):
    """The answer of `/v1/completions`; with `echo` the prompt comes first."""

    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, served: Served, asks: Sequence[Ask], *, echo: bool, has_log_probs: bool) -> None:
        super().__init__(served, asks)
        self._echo = echo
        self._has_log_probs = has_log_probs

    def echo_chunk(self, choice: Choice) -> dict[str, Any] | None:
        """The chunk of the prompt, once it has been judged."""
        if not self._echo:
            return None
        found = self._judged(choice)
        entry = {"text": choice.ask.prompt, "index": choice.index, "finish_reason": None}
        return self._object(self.chunk_name, [entry | {"logprobs": self._said(choice, found)}])

    def _judged(self, choice: Choice) -> list[TokenLogProbs | None]:
        return [None, *choice.scores]

    def _said(self, choice: Choice, found: Sequence[TokenLogProbs | None]) -> dict[str, Any] | None:
        return choice.completion_logprobs(found) if self._has_log_probs else None

    def _content(self, choice: Choice, log_probs: list[TokenLogProbs | None]) -> dict[str, Any]:
        if not self._echo:
            return {"text": choice.text, "logprobs": self._said(choice, log_probs)}
        return {
            "text": choice.ask.prompt + choice.text,
            "logprobs": self._said(choice, [*self._judged(choice), *log_probs]),
        }

    def _delta(self, choice: Choice, token: GeneratedToken) -> dict[str, Any]:
        return {"text": token.text, "logprobs": self._said(choice, [token.log_probs])}

    def _nothing(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}


class ChatAnswer(Answer):
    """The answer of `/v1/chat/completions`; in a stream each choice begins with its role."""

    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, served: Served, asks: Sequence[Ask], *, has_log_probs: bool) -> None:
        super().__init__(served, asks)
        self._has_log_probs = has_log_probs

    def opening(self) -> Iterator[dict[str, Any]]:
        """The roles."""
        for choice in self.choices:
            delta = {"role": "assistant", "content": ""}
            entry = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield self._object(self.chunk_name, [entry])

    def _said(self, choice: Choice, found: Sequence[TokenLogProbs | None]) -> dict[str, Any] | None:
        return choice.chat_logprobs(found) if self._has_log_probs else None

    def _content(self, choice: Choice, log_probs: list[TokenLogProbs | None]) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"message": message, "logprobs": self._said(choice, log_probs)}

    def _delta(self, choice: Choice, token: GeneratedToken) -> dict[str, Any]:
        return {"delta": {"content": token.text}, "logprobs": self._said(choice, [token.log_probs])}

    def _nothing(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}
