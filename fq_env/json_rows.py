"""What a row of a `.jsonl` file says as text: its chats, else all its strings; or the one field that is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flexquant_rl.engine.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHARE_GPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")
_SHOWN_FIELDS = 8
_MESSAGE_FIELDS = (("role", "content"), ("from", "value"))

Message = dict[str, str]
"""`role` and `content`, as chat templates take them."""


def row_text(row: Any, where: str, *, text_field: str | None, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The text of a row; "" where it holds none.

    A row that holds chats (lists of `role` and `content`, or of `from` and `value`, at any depth) is these chats; of
    any other row every string counts, at any depth. Lone surrogates, which JSON escapes can spell and text cannot hold,
    become U+FFFD.

    Args:
        row: A value as `json.loads` gives it.
        where: File and line, as errors begin.
        text_field: Name of the field that is the text, `outer.inner` for one inside another; None for all of them.
        tokenizer: Its chat template renders chats; without one they become lines of role and text.

    Raises:
        InputError: If the named field is missing or holds no text, or a chat cannot be rendered.
    """
    value = row if text_field is None else _field(row, text_field, where)
    texts, chats = list[str](), list[list[Any]]()
    for item in _texts_and_chats(value):
        if isinstance(item, str):
            texts.append(item)
        else:
            chats.append(item)
    if chats:
        system = row.get("system") if isinstance(row, dict) else None
        text = "\n\n".join(_rendered(_with_system(chat, system), where, tokenizer) for chat in chats)
    elif text_field is not None and not texts and value is not None:
        raise InputError(f"{where}: field {text_field!r} holds no text ({str(value)[:40]}); name one that does")
    else:
        text = "\n".join(texts)
    return _LONE_SURROGATES.sub("\ufffd", text)


def field_names(row: Any) -> str:
    """The fields of a row, those inside others as `outer.inner`, for an error to name."""
    if not isinstance(row, dict):
        return "none"
    names = []
    for name, value in row.items():
        names += [f"{name}.{inner}" for inner in value] if isinstance(value, dict) else [str(name)]
    shown = [repr(name[:40]) for name in names[:_SHOWN_FIELDS]]
    return (", ".join(shown) or "none") + (", ..." if len(names) > _SHOWN_FIELDS else "")


def _field(row: Any, text_field: str, where: str) -> Any:
    value = row
    if isinstance(row, dict) and text_field in row:  # a name may hold a dot itself
        return row[text_field]
    for name in text_field.split("."):
        if not isinstance(value, dict) or name not in value:
            raise InputError(f"{where} has no field {text_field!r}; its fields are {field_names(row)}")
        value = value[name]
    return value


def _texts_and_chats(value: Any) -> Iterator[str | list[Any]]:
    """The strings and the chats in a value, in their order, however deep; a loop, because rows may nest deeply."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str) or _is_chat(item):
            yield item
        elif isinstance(item, dict):
            waiting += reversed(item.values())
        elif isinstance(item, list):
            waiting += reversed(item)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    for role, content in _MESSAGE_FIELDS:
        if isinstance(value.get(role), str) and (content in value or "tool_calls" in value):
            return True
    return False


def _with_system(chat: list[Any], system: Any) -> list[Any]:
    """ShareGPT keeps what the model is told beside the conversation."""
    if not isinstance(system, str) or any("system" in (message.get("role"), message.get("from")) for message in chat):
        return chat
    return [{"role": "system", "content": system}, *chat]


def _rendered(chat: list[Any], where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    messages = [_message(message, where) for message in chat]
    if getattr(tokenizer, "chat_template", None) is None:
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    assert tokenizer is not None
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program of the model's, which may fail in any way
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{where}: the model's chat template refuses this chat ({reason}); change the row or leave it out"
        ) from error
    # Every window begins with the token that many templates begin with.
    return str(text).removeprefix(tokenizer.bos_token or "")


def _message(message: dict[str, Any], where: str) -> Message:
    role, content = next((message[r], message.get(c)) for r, c in _MESSAGE_FIELDS if isinstance(message.get(r), str))
    return {"role": _SHARE_GPT_ROLES.get(role, role), "content": _content(content, where)}


def _content(content: Any, where: str) -> str:
    """A message's text: a string, or the parts that it consists of; null where it only calls a tool."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = list[str]()
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type", "no type") if isinstance(part, dict) else type(part).__name__
            raise InputError(f"{where}: a message holds {str(kind)[:40]}, which is no text; leave the row out")
        texts.append(text)
    return "\n".join(texts)
