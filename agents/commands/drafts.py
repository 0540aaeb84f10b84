"""The drafts of `fq generate`: which policy makes them, what they came to, what the same text costs without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from flexquant_rl.agents.commands.options import GenerateOptions, ServeOptions
from flexquant_rl.agents.commands.servable import check_exists
from flexquant_rl.agents.export import exports_drafts
from flexquant_rl.agents.policies.drafts import Drafts, parse_drafts
from flexquant_rl.agents.policies.names import policy_name
from flexquant_rl.agents.progress import say
from flexquant_rl.engine.control.artefact import DeployedPolicy
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts, may_draft
from flexquant_rl.engine.control.draft_limits import check_ngram_drafts
from flexquant_rl.engine.control.drafting_rules import Lookups
from flexquant_rl.engine.control.ladder import is_ladder
from flexquant_rl.engine.control.request import GeneratedToken
from flexquant_rl.engine.decoding.choice import default_decoder
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.field_types import is_whole_number
from flexquant_rl.engine.model import NestedCausalLM

# Four drafts cost less than two steps of the largest width; Hugging Face's confidence.
_DEFAULT = Drafts(3, length=4, confidence=0.4)
_MOST_PLAIN_STEPS = 64


def asked_policy(options: GenerateOptions | ServeOptions) -> str:
    """The name or directory of the policy that the options ask for, the verify width filled in.

    Raises:
        InputError: If no policy is named, if options of drafts are given to another policy, or if the verify width or
            what is looked up is named twice, or the width is not above that of the drafts.
    """
    if options.ngram_drafts is not None:
        check_ngram_drafts(options.ngram_drafts, "--ngram-drafts")
    width = options.verify_width
    if options.policy is None and width is None:
        raise InputError("no policy is named; give --policy DIR or NAME, or --verify-width 8 for drafts without loss")
    drafts = _DEFAULT if options.policy is None else _drafts_by_name(options.policy)
    if drafts is not None and options.ngram_drafts is not None and "ngrams=" in str(options.policy):
        raise InputError(
            f"--ngram-drafts {options.ngram_drafts} and {options.policy} name two numbers; give one of them"
        )
    if drafts is None:
        assert options.policy is not None
        if exports_drafts(Path(options.policy)) or is_ladder(Path(options.policy)):
            return options.policy
        for option, value in (("verify-width", width), ("ngram-drafts", options.ngram_drafts or None)):
            if value is not None:
                check_exists(options.policy)
                raise _no_drafts(option, value, options.policy)
        return options.policy
    if width is None:
        return policy_name(drafts)
    if drafts.verify not in (0, width):
        raise InputError(f"--verify-width {width} and {options.policy} name two widths; give one of them")
    if width < 1:
        raise InputError(f"--verify-width {width} is no width; choose a stored one, e.g. 8")
    return policy_name(replace(drafts, verify=width))


def _drafts_by_name(policy: str) -> Drafts | None:
    return None if Path(policy).is_dir() else parse_drafts(policy)


def check_draft_options(policy: DeployedPolicy, options: GenerateOptions | ServeOptions) -> None:
    """Raises InputError if drafts from a directory are asked for another width than they were made for, or for none."""
    width = options.verify_width
    if options.ngram_drafts and not may_draft(policy):
        raise _no_drafts("ngram-drafts", options.ngram_drafts, policy.name)
    if isinstance(policy, DeployedDrafts) and width is not None and policy.verify_width != width:
        raise InputError(
            f"--verify-width {width}, but {policy.name} verifies at {policy.verify_width}; leave the option out, or "
            f"train for it with --task verified --verified.verify-width {width}"
        )


def timed_threads(policy: DeployedDrafts) -> int | None:
    """Threads of a step by whose times a policy was trained or tuned to draft; None where nobody knows, or none count.

    Its card has the options of its run: no number is one thread, where the run recorded by the lean decoder itself.
    """
    config, costs = policy.card.config, policy.facts.costs
    if costs is None or costs.source != "measured" or config.get("device") != "cpu":
        return None
    if not may_draft(policy) or isinstance(policy.facts.rule, Lookups):  # whatever steps cost, they do the same
        return None
    threads = config.get("threads", 0)
    if threads is None and config.get("traces") is None:
        return 1
    return threads if is_whole_number(threads) and threads > 0 else None


def warn_of_threads(
    policies: Iterable[DeployedPolicy], model: NestedCausalLM, options: GenerateOptions | ServeOptions
) -> None:
    """Says, once, that a policy drafts by the times of another number of threads than it runs with, if one does."""
    if model.device.type != "cpu" or options.decoder == "hf" or default_decoder(model)[0] != "lean":
        return
    here = options.threads or 1
    for policy in policies:
        timed = timed_threads(policy) if isinstance(policy, DeployedDrafts) else None
        if timed not in (None, here):
            say(
                f"{policy.name} drafts by the times of --threads {timed} and runs with {here}, where other rounds may "
                f"be faster; give --threads {timed}, or train one with --threads {here}"
            )
            return


def _no_drafts(option: str, value: int, policy: str) -> InputError:
    return InputError(f"--{option} {value} is for drafts, and {policy} makes none; try draft:3")


def draft_results(
    policy: DeployedDrafts,
    tokens: Sequence[GeneratedToken],
    generate: Callable[[StaticAllocation, int], Iterator[GeneratedToken]],
    *,
    is_greedy: bool,
) -> dict[str, object]:
    """What the drafts came to, and the time of the same text's beginning decoded without them, here and now.

    Args:
        policy: Made the drafts.
        tokens: What was generated.
        generate: Continues the same prompt by a policy, so many tokens at most.
        is_greedy: Whether the same tokens must come.
    """
    if policy.never_drafts:
        say(f"this policy never drafts: its text is decoded at {policy.verify_width} bits, token by token")
        return {}
    counts = tokens[-1].draft_counts
    if counts is None or counts.tokens_per_pass is None:  # the first token, which is of the prompt, was the last
        return {}
    plain = list(generate(StaticAllocation("plain", policy.verify_bit_widths), min(len(tokens), _MOST_PLAIN_STEPS + 1)))
    compared = tokens[: len(plain)]
    plain_ms, draft_ms = (sum(token.latency_ms for token in run[1:]) for run in (plain, compared))
    same = [token.token_id for token in plain] == [token.token_id for token in compared]
    width = policy.verify_width
    found = f"found in the text and accepted: {counts.num_found_accepted} of {counts.num_found}; "
    found = found if counts.num_found else ""
    accepted = " ".join(f"{share:.2f}" for share in counts.acceptance_by_position) or "none"
    say(
        f"{found}drafts accepted by position: {accepted}; {counts.tokens_per_pass:.2f} tokens per verify pass; "
        f"{plain_ms / draft_ms:.2f}x measured over {width} bits without drafts (once, not in turns)"
    )
    return {
        "verify_width": width,
        "acceptance_by_position": counts.acceptance_by_position,
        "num_found": counts.num_found,
        "num_found_accepted": counts.num_found_accepted,
        "tokens_per_pass": counts.tokens_per_pass,
        "num_verify_passes": counts.num_verify_passes,
        "num_draft_steps": counts.num_draft_steps,
        "speedup_measured": plain_ms / draft_ms,
        "plain_tokens_per_s": (len(plain) - 1) / plain_ms * 1e3,
        "same_as_plain": same if is_greedy else None,
    }
