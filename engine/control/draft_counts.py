"""What drafts came to: how many were accepted at which place of the round, and what a verify pass settled."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DraftCounts:
    """What the rounds of a row came to.

    Attributes:
        num_tokens: Settled tokens.
        num_verify_passes: Rounds.
        num_draft_steps: Passes at draft widths.
        drafted: How many rounds had a first draft at few bits, a second one, and so on.
        accepted: How many of those were accepted.
        num_found: Drafts that were found in the text.
        num_found_accepted: How many of those were accepted.
    """

    num_tokens: int = 0
    num_verify_passes: int = 0
    num_draft_steps: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    num_found: int = 0
    num_found_accepted: int = 0
    _last_round: tuple[int, int] = (0, 0)
    _last_is_found: bool = False

    def add_round(self, num_pending: int, num_accepted: int, *, is_found: bool = False) -> None:
        """Counts a verify step, of drafts that were found in the text or made at few bits."""
        self._last_round, self._last_is_found = (num_pending, num_accepted), is_found
        self.num_verify_passes += 1
        self.num_tokens += num_accepted + 1
        if is_found:
            self.num_found += num_pending
            self.num_found_accepted += num_accepted
            return
        for counts, number in ((self.drafted, num_pending), (self.accepted, num_accepted)):
            counts.extend([0] * (num_pending - len(counts)))
            for place in range(number):
                counts[place] += 1

    def drop(self, num_tokens: int) -> None:
        """Forgets the last tokens of the last round, at least 1, and the drafts behind what is left: the text ended."""
        num_pending, num_accepted = self._last_round
        taken = num_accepted + 1 - num_tokens
        self.num_tokens -= num_tokens
        if self._last_is_found:
            self.num_found -= max(num_pending - taken, 0)
            self.num_found_accepted -= max(num_accepted - taken, 0)
            return
        for place in range(taken, num_pending):
            self.drafted[place] -= 1
            self.accepted[place] -= place < num_accepted
        while self.drafted and not self.drafted[-1]:
            self.drafted.pop()
            self.accepted.pop()

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of the drafts at few bits at each place in the round that were accepted with all before them."""
        return [accepted / drafted for accepted, drafted in zip(self.accepted, self.drafted, strict=True)]

    @property
    def tokens_per_pass(self) -> float | None:
        """Settled tokens of a verify pass; None before the first one."""
        return self.num_tokens / self.num_verify_passes if self.num_verify_passes else None
