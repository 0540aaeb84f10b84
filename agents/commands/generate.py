"""`fq generate`: a prompt continued on the terminal, token by token."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from flexquant_rl.agents.commands.drafts import asked_policy, check_draft_options, draft_results, warn_of_threads
from flexquant_rl.agents.commands.options import GenerateOptions
from flexquant_rl.agents.commands.process import print_result
from flexquant_rl.agents.commands.servable import Servable, load_servable
from flexquant_rl.agents.config import check_device
from flexquant_rl.agents.progress import say
from flexquant_rl.engine.bits_display import coloured, has_colours, legend, numbers
from flexquant_rl.engine.control.decision import Policy
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts
from flexquant_rl.engine.control.drafts import DraftPolicy
from flexquant_rl.engine.control.policy import DialPoint
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.request import GeneratedToken
from flexquant_rl.engine.decoding.options import check_num_threads
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.serving import encode, encode_chat
from flexquant_rl.engine.serving import generate as generate_tokens


def generate(options: GenerateOptions) -> None:
    """Prints the text as it comes, then one JSON line."""
    check_device(options.device)
    if options.threads is not None:
        check_num_threads(options.threads)
    prompt = _prompt(options)
    found = load_servable(
        options.model,
        asked_policy(options),
        profile=options.profile,
        text=options.text,
        threads=options.threads,
        device=options.device,
        speed=options.speed,
        verify_width=options.verify_width,
    )
    check_draft_options(found.policy, options)
    setting = _setting(found, options)
    model = found.model.to(options.device)
    warn_of_threads([found.policy], model, options)
    is_chat = not options.raw and bool(model.token_text.chat_template)
    prompt_ids = _chat_ids(model, prompt) if is_chat else encode(model, prompt)

    def stream(policy: Policy | DraftPolicy, max_new_tokens: int) -> Iterator[GeneratedToken]:
        return generate_tokens(
            model,
            policy,
            found.profile,
            prompt_ids,
            max_new_tokens=max_new_tokens,
            kl_weight=1.0 if setting is None else setting.kl_weight,  # only a policy with a dial looks at it
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            decoder=options.decoder,
            num_threads=options.threads,
            ngram_drafts=options.ngram_drafts if policy is found.policy else None,
        )

    printed = _Printed(model)
    printed.follow(stream(found.policy, options.max_new_tokens), show_bits=options.show_bits)
    if options.quiet:
        return
    drafted: dict[str, object] = {}
    if isinstance(found.policy, DeployedDrafts):
        drafted = draft_results(found.policy, printed.tokens, stream, is_greedy=not options.temperature)
    print_result(
        {
            "num_tokens": len(printed.tokens),
            "finish_reason": printed.tokens[-1].finish_reason,
            **printed.times(found.profile),
            **drafted,
            # The first token is of the prompt, at the largest width.
            "mean_bit_width": statistics.fmean(printed.mean_bit_widths),
            "speed_asked": options.speed,
            "kl_weight": None if setting is None else setting.kl_weight,
            "rung": None if found.rung is None else asdict(found.rung),
            "chat_template": is_chat,
        }
    )


def _prompt(options: GenerateOptions) -> str:
    """The prompt as given, from standard input or from a file."""
    if (options.prompt is None) == (options.prompt_file is None):
        given = "both --prompt and --prompt-file" if options.prompt is not None else "no prompt"
        raise InputError(f"{given}; give --prompt TEXT, --prompt - for standard input, or --prompt-file FILE")
    if options.prompt_file is None and options.prompt != "-":
        assert options.prompt is not None
        return options.prompt
    where = "standard input" if options.prompt_file is None else str(options.prompt_file)
    try:
        raw = sys.stdin.buffer.read() if options.prompt_file is None else options.prompt_file.read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start} is not UTF-8; save the text as UTF-8") from error
    except OSError as error:
        raise InputError(f"{where} cannot be read ({error.strerror}); give the name of a text file") from error


def _chat_ids(model: NestedCausalLM, prompt: str) -> Tensor:
    """A prompt as the user's message."""
    try:
        return encode_chat(model, [{"role": "user", "content": prompt}])
    except InputError as error:
        raise InputError(f"{error}: --raw") from error


def _setting(found: Servable, options: GenerateOptions) -> DialPoint | None:
    """The setting of the dial; says what to expect where a speed was asked for, or of a rung."""
    speed = options.speed
    point = found.setting(speed=speed, kl_weight=options.kl_weight, names=("--speed", "--kl-weight"))
    if found.rung is not None:
        say(found.rung.words())
    elif point is not None and speed is not None:
        say(
            f"speed {speed:g} asked: dial at KL weight {point.kl_weight:.4g}; expected {point.speedup_modelled:.2f}x "
            f"modelled, output KL {point.output_kl_nats:.2e} nats, {point.mean_bit_width:.2f} bits (validation text)"
        )
    return point


@dataclass
class _Printed:
    """What has been printed of a continuation."""

    model: NestedCausalLM
    tokens: list[GeneratedToken] = field(default_factory=list)
    mean_bit_widths: list[float] = field(default_factory=list)

    def follow(self, stream: Iterable[GeneratedToken], *, show_bits: bool) -> None:
        """Prints tokens as they come, on request with their widths."""
        colours = show_bits and has_colours(sys.stdout)
        for token in stream:
            self.tokens.append(token)
            mean = float(self.model.mean_bit_width(token.bit_widths))
            self.mean_bit_widths.append(mean)
            piece = coloured(token.text, mean, self.model.bit_widths) if colours else token.text
            print(piece, end="", flush=True)
        print()
        if show_bits:
            print(legend(self.model.bit_widths) if colours else numbers(self.mean_bit_widths))

    def times(self, profile: Profile) -> dict[str, object]:
        """The clock's numbers, and the speedup that the profile models for the chosen widths, of single steps alone."""
        steps_ms = [token.latency_ms for token in self.tokens[1:]]  # the first token's is the time of the prompt
        is_drafted = bool(self.tokens) and self.tokens[-1].draft_counts is not None
        chosen = torch.stack([token.bit_widths for token in self.tokens[1:]]) if steps_ms and not is_drafted else None
        full_ms = float(profile.cost.latency_ms(profile.cost.full_width()))
        return {
            "prompt_seconds": self.tokens[0].latency_ms / 1e3,
            "tokens_per_s": len(steps_ms) / sum(steps_ms) * 1e3 if steps_ms else None,
            "speedup_modelled": (
                None if chosen is None else full_ms * len(chosen) / float(profile.cost.latency_ms(chosen.cpu()).sum())
            ),
            "latency_source": profile.cost.source,
        }
