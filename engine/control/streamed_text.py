"""The text of tokens as they come, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from flexquant_rl.engine.token_text import TokenText


_CONTEXT_TOKENS = 8
"""Tokens that are decoded again with each new one."""


class StreamedText:
    """Turns tokens into text one by one.

    Decoding tokens one by one loses the space before a word in many vocabularies, and characters that are spread over
    tokens. So each is decoded together with those before it, and text appears once it is whole.

    Args:
        tokenizer: Tokenizer of the model.
        prompt_ids: What the tokens continue.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | TokenText, prompt_ids: Sequence[int]) -> None:
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


class StopStrings:
    """Ends a text at the first of some strings, which may be spread over tokens.

    Args:
        stop: The strings; none of them is shown.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.is_found = False

    def add(self, text: str) -> str:
        """What of the text so far can be shown: all that no stop string can begin with any more."""
        self._held += text
        places = [place for place in map(self._held.find, self._stop) if place >= 0]
        if places:
            self.is_found = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """The rest, where the text ends without a stop string."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text are the first ones of a string."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
