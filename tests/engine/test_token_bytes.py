"""The bytes of tokens: those of a text are its bytes, also where a character is spread over several tokens."""

from __future__ import annotations

from pathlib import Path

from flexquant_rl.engine.embedded import resolve_model
from flexquant_rl.engine.loading import load_tokenizer
from flexquant_rl.engine.token_bytes import token_bytes
from flexquant_rl.engine.token_text import TokenText

TEXT = "def naïve(): return '😀 漢字'  # \ufffd\n"


class OfBytes:
    """A tokenizer that knows no character of several bytes, and writes bytes as Llama 2 does."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return f"<0x{token_id:02X}>"


def test_bytes_of_fallback_tokens() -> None:
    tokenizer = OfBytes()
    assert "\ufffd" in tokenizer.decode([TEXT.encode()[7]])
    assert b"".join(token_bytes(tokenizer, byte) for byte in TEXT.encode()) == TEXT.encode()


def test_bytes_of_a_byte_level_tokenizer() -> None:
    """As `tokenizers` reads it and as transformers does."""
    tokenizer = load_tokenizer(Path(resolve_model(None)), "llama")
    assert isinstance(tokenizer, TokenText)
    _, *ids = tokenizer.encode(TEXT)  # but for the token that begins texts
    assert any("\ufffd" in tokenizer.decode([token_id]) for token_id in ids), "no character is in parts here"
    for one in (tokenizer, tokenizer.full()):
        assert b"".join(token_bytes(one, token_id) for token_id in ids) == TEXT.encode()
