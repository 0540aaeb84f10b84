"""The bytes of one token: a character may be spread over several tokens, and then no token of it has a text."""

from __future__ import annotations

import re
from typing import Protocol

_REPLACEMENT = "\ufffd"
"""What a decoder puts where bytes are no whole character."""
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte as tokenizers write it that know characters: those of Llama 2 and of Mistral."""


class _Tokenizer(Protocol):
    def decode(self, ids: list[int], /) -> object:
        """The text of tokens."""

    def convert_ids_to_tokens(self, ids: int, /) -> object:
        """How the vocabulary writes a token."""


def token_bytes(tokenizer: _Tokenizer, token_id: int) -> bytes:
    """The bytes that a token stands for, in UTF-8 where they are whole characters.

    Args:
        tokenizer: Of `tokenizers` or of transformers.
        token_id: The token.
    """
    text = str(tokenizer.decode([token_id]))
    if _REPLACEMENT not in text:
        return text.encode()
    written = str(tokenizer.convert_ids_to_tokens(token_id))
    if fallback := _FALLBACK.fullmatch(written):
        return bytes.fromhex(fallback[1])
    if all(character in _BYTE_OF for character in written):
        return bytes(_BYTE_OF[character] for character in written)
    return text.encode()


def _byte_of() -> dict[str, int]:
    """The alphabet of byte-level tokenizers, as GPT-2 has it: visible Latin-1 is itself, the others follow U+0100."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_of()
