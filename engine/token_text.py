"""The text of tokens as serving needs it, read with the `tokenizers` library alone.

transformers takes a second to import, and for a plain tokenizer.json it adds nothing to what happens here. `read_text`
takes only directories of which that is known; transformers reads the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from flexquant_rl.engine.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MODEL_TYPES = ("llama", "qwen3")  # for others transformers has classes of its own, whatever they name
_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")  # two names of the class that reads tokenizer.json as it is
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_WITHOUT_EFFECT = {"backend", "is_local", "local_files_only", "model_max_length"}
_TEMPLATE_FILE = "chat_template.jinja"
_OTHER_FILES = (
    *("added_tokens.json", "special_tokens_map.json", "tekken.json", "*.model", "*.tiktoken"),
    *("chat_template.json", "additional_chat_templates"),
)
"""Other ways to store what two files say here."""
_MAX_VOCABULARY = 100_000
"""transformers examines larger ones for a fault of some models of Mistral."""


class TokenText:
    """A tokenizer of which nothing is needed but tokens from text and text from tokens.

    Args:
        tokenizer: What tokenizer.json holds.
        config: The entries of tokenizer_config.json, the chat template among them.
    """

    def __init__(self, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._config = config
        eos_token = config.get("eos_token")
        self.eos_token_id: int | None = None if eos_token is None else tokenizer.token_to_id(eos_token)
        self.chat_template: str | None = config.get("chat_template")

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, special ones included."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        """How the vocabulary writes a token; None where there is no such one."""
        written: str | None = self._tokenizer.id_to_token(token_id)
        return written

    def get_vocab(self) -> dict[str, int]:
        """All tokens, with their ids."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        return vocabulary

    def full(self) -> PreTrainedTokenizerBase:
        """Transformers' tokenizer of the same files."""
        from transformers import PreTrainedTokenizerFast

        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(tokenizer_object=self._tokenizer, **self._config)
        return tokenizer


def read_text(directory: Path, model_type: Any) -> TokenText | None:
    """The tokenizer in the directory of a model of a type, or None where transformers must read it."""
    if model_type not in _MODEL_TYPES or any(True for pattern in _OTHER_FILES for _ in directory.glob(pattern)):
        return None
    try:
        config = read_json(directory / "tokenizer_config.json")
        stored = read_json(directory / "tokenizer.json")
        special = {token["content"] for token in stored["added_tokens"] if token["special"]}
        is_plain = (
            config.pop("tokenizer_class", None) in _CLASSES
            and config.keys() <= {*_SPECIAL, *_WITHOUT_EFFECT}
            and all(config.get(name) is None or config[name] in special for name in _SPECIAL)
            and stored["truncation"] is None
            and stored["padding"] is None
            and stored["post_processor"] is not None
        )
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json")) if is_plain else None
        if (directory / _TEMPLATE_FILE).is_file():
            config["chat_template"] = (directory / _TEMPLATE_FILE).read_text(encoding="utf-8")
    except Exception:  # the library raises bare exceptions; transformers says what is wrong
        return None
    if tokenizer is None or tokenizer.get_vocab_size() > _MAX_VOCABULARY:
        return None
    return TokenText(tokenizer, config)
