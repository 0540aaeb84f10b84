"""`fq serve`: a model under a policy behind HTTP, as OpenAI's clients know it, with a page to try it."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

from flexquant_rl.agents.commands.drafts import asked_policy, check_draft_options, warn_of_threads
from flexquant_rl.agents.commands.options import ServeOptions
from flexquant_rl.agents.commands.process import print_result
from flexquant_rl.agents.commands.servable import load_rungs, load_servable
from flexquant_rl.agents.config import check_device
from flexquant_rl.agents.progress import say
from flexquant_rl.engine.decoding.options import check_num_threads
from flexquant_rl.engine.embedded import DEFAULT_MODEL, EMBEDDED_MODEL_NAME
from flexquant_rl.engine.errors import InputError

_PACKAGES = ("fastapi", "uvicorn", "sse_starlette", "pydantic_settings", "prometheus_client")
_DEFAULT_POLICY = "fixed:8"
"""The largest width, which every nested model has."""


def serve(options: ServeOptions) -> None:
    """Serves until SIGTERM or Ctrl-C, then prints one JSON line."""
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(
            f"fq serve needs the extra `serve` ({', '.join(missing)} not found); pip install 'flexquant-rl[serve]', or "
            "on a machine that only serves -r requirements-server.txt"
        )
    from flexquant_rl.agents.server.routes import create_app
    from flexquant_rl.agents.server.running import Stopping, address, bind
    from flexquant_rl.agents.server.running import serve as serve_app
    from flexquant_rl.agents.server.served import Served
    from flexquant_rl.agents.server.settings import read_settings

    check_device(options.device)
    if options.threads is not None:
        check_num_threads(options.threads)
    names = ("host", "port", "slots", "queue", "max_length", "max_new_tokens", "drain_s")
    settings = read_settings({name: getattr(options, name) for name in names})
    is_named = options.policy is not None or options.verify_width is not None or bool(options.ngram_drafts)
    policy = asked_policy(options) if is_named else _DEFAULT_POLICY
    listening = bind(settings.host, settings.port)  # before the model is loaded: an address that is taken shows at once
    with listening:
        found = load_servable(
            options.model,
            policy,
            profile=options.profile,
            text=options.text,
            threads=options.threads,
            device=options.device,
            verify_width=options.verify_width,
        )
        check_draft_options(found.policy, options)
        rungs = load_rungs(policy, found.model.fingerprint, found)
        found.model.to(options.device)
        warn_of_threads([found.policy] if rungs is None else rungs.policies.values(), found.model, options)
        served = Served.start(
            _name(options.model),
            found,
            settings,
            decoder=options.decoder,
            num_threads=options.threads,
            ngram_drafts=options.ngram_drafts,
            rungs=rungs,
        )
        if not settings.is_loopback and settings.api_key is None:
            say(f"warning: {settings.host} is reachable from other machines, and FQ_SERVE_API_KEY sets no key")

        def ready(stopping: Stopping) -> None:
            say(f"serving {served.name} under {served.policy_name} on {address(listening)}")

        asyncio.run(serve_app(create_app(served), served, listening, ready, signals=True))
    print_result({"model": served.name, "policy": served.policy_name, **served.queue.metrics.totals()})


def _name(model: str) -> str:
    """What clients call the model: the last part of a path or of a hub's name."""
    return EMBEDDED_MODEL_NAME if model == DEFAULT_MODEL else Path(model).resolve().name
