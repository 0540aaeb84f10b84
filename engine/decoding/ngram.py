"""Drafts from the text so far: what followed the last tokens when they stood there before.

This is prompt lookup decoding (Saxena 2023). It pays where a text repeats itself, as code that is edited does.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

# A pair of tokens is found often and continued wrongly often; longer runs are asked first.
_SIZES = (4, 3, 2)


class NgramIndex:
    """The places of all runs of a few tokens in a text that grows.

    Args:
        token_ids: The text so far.
    """

    def __init__(self, token_ids: Iterable[int]) -> None:
        self._text: list[int] = []
        # Where the latest run ended. The run at the very end of the text is not entered yet: it would find itself.
        self._ends: dict[tuple[int, ...], int] = {}
        for token_id in token_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """Appends a token."""
        end = len(self._text)
        for size in _SIZES:
            if size <= end:
                self._ends[tuple(self._text[end - size :])] = end
        self._text.append(token_id)

    def continuation(self, most: int, ends: Container[int] = ()) -> list[int]:
        """What followed the longest run that ends the text where it stood last, perhaps nothing.

        Args:
            most: Tokens at most.
            ends: Nothing follows any of these.
        """
        for size in _SIZES:
            if size <= len(self._text):
                end = self._ends.get(tuple(self._text[-size:]))
                if end is not None:
                    found = self._text[end : end + most]
                    last = next((place for place, token_id in enumerate(found, 1) if token_id in ends), most)
                    return found[:last]
        return []
