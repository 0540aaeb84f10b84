"""The bodies of requests: OpenAI's fields, ours, and what becomes of fields that are not supported."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

MOST_CHOICES = 16
"""Choices of one request at most."""
MOST_LIKELIEST = 20
"""Likeliest tokens that are named at a place at most."""

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_TokenIds = Annotated[list[int], Field(min_length=1)]
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields that would change the answer, and the values that would not; others are refused."""


def _only_neutral(name: str) -> Any:
    """A field of `_NEUTRAL`, with the values that are taken in the schema."""
    taken: dict[str, Any] = {"enum": [None, *_NEUTRAL[name]], "description": "Not supported: it may ask for nothing."}
    return Field(None, json_schema_extra=taken)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """What a stream has besides the text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # none is added in any case


class Body(_Strict):
    """What both kinds of request share.

    `speed`, `kl_weight`, `verify_width` and `full_width` are ours; the official client sends them from `extra_body`.
    The fields of the last two groups are other servers': those in `_NEUTRAL` must not ask for anything, the rest would
    change no answer and is not looked at.
    """

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0)
    temperature: _Finite | None = Field(None, ge=0, le=100)
    top_p: _Finite | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    stop: (
        Annotated[str, Field(min_length=1, max_length=1000)]
        | list[Annotated[str, Field(min_length=1, max_length=1000)]]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    speed: _Finite | None = Field(None, gt=0, description="Modelled speedup to aim for, where the policy has a dial.")
    kl_weight: _Finite | None = Field(None, gt=0, description="The dial itself: the price of a nat of output KL.")
    verify_width: int | None = Field(None, ge=1, le=8, description="With drafts: the width that the output equals.")
    full_width: bool | None = Field(None, description="Every token at the largest width, whatever the policy.")

    frequency_penalty: Any = _only_neutral("frequency_penalty")
    logit_bias: Any = _only_neutral("logit_bias")
    presence_penalty: Any = _only_neutral("presence_penalty")

    metadata: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    user: Any = None

    @field_validator(*_NEUTRAL, check_fields=False)
    @classmethod
    def _asks_for_nothing(cls, value: Any, info: ValidationInfo) -> Any:
        neutral = _NEUTRAL[str(info.field_name)]
        if value is not None and value not in neutral:
            raise ValueError("this server does not support the field, and it would change the answer; leave it out")
        return value

    @field_validator("stop")
    @classmethod
    def _few_stop_strings(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > MOST_CHOICES:
            raise ValueError(f"at most {MOST_CHOICES} stop strings")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Body:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; set stream, or leave it out")
        if self.full_width and not (self.speed is self.kl_weight is self.verify_width is None):
            raise ValueError("full_width leaves nothing to set; leave out speed, kl_weight and verify_width")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end the text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def num_texts(self) -> int:
        """Texts that are asked for."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionBody(Body):
    """`POST /v1/completions`."""

    prompt: (
        str | _TokenIds | Annotated[list[str], Field(min_length=1)] | Annotated[list[_TokenIds], Field(min_length=1)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LIKELIEST)

    best_of: Any = _only_neutral("best_of")
    suffix: Any = _only_neutral("suffix")

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _some_prompt(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        """Says what is wrong once, not once for each form that a prompt may have."""
        try:
            return check(value)
        except ValidationError:
            raise ValueError("give text, tokens, or a list of either, none of them empty") from None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All prompts, text or tokens."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        return [prompt] if isinstance(prompt[0], int) else prompt

    @property
    def num_texts(self) -> int:
        """Each prompt as often as choices are wanted."""
        return len(self.prompts) * (self.n or 1)


class TextPart(_Strict):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A message of a chat; what clients send back of an answer of ours is understood too, as long as it is empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    refusal: None = None
    tool_calls: None = None

    @field_validator("content", mode="before")
    @classmethod
    def _some_content(cls, value: Any) -> Any:
        """Says what is wrong once, not once for each form that content may have."""
        if not isinstance(value, str | list):
            raise ValueError("give text, or a list of parts of type text")
        return value

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Body):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LIKELIEST)

    audio: Any = _only_neutral("audio")
    function_call: Any = _only_neutral("function_call")
    functions: Any = _only_neutral("functions")
    modalities: Any = _only_neutral("modalities")
    parallel_tool_calls: Any = None
    prediction: Any = _only_neutral("prediction")
    reasoning_effort: Any = _only_neutral("reasoning_effort")
    response_format: Any = _only_neutral("response_format")
    tool_choice: Any = _only_neutral("tool_choice")
    tools: Any = _only_neutral("tools")
    verbosity: Any = _only_neutral("verbosity")
    web_search_options: Any = _only_neutral("web_search_options")

    @model_validator(mode="after")
    def _consistent_chat(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs; set it to true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same limit; give one of them")
        return self
