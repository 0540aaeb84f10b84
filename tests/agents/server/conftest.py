"""The embedded model, served: under drafts, and under a policy with a dial."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from document_blocks import save_random_policy

from flexquant_rl.agents.commands.servable import Servable, load_servable

if TYPE_CHECKING:
    from http_server import Running


@pytest.fixture(scope="session")
def embedded_drafts() -> Servable:
    """The embedded model under drafts."""
    return load_servable("default", "draft:3,length=3")


@pytest.fixture(scope="session")
def embedded_dial(tmp_path_factory: pytest.TempPathFactory) -> Servable:
    """The embedded model under a policy that switches, with a dial."""
    model = load_servable("default", "fixed:8").model
    directory = tmp_path_factory.mktemp("dial") / "policy"
    save_random_policy(model, directory)
    return load_servable("default", str(directory))


@pytest.fixture(scope="session")
def server(embedded_drafts: Servable) -> Iterator[Running]:
    """The embedded model under drafts, served."""
    from http_server import running

    with running(embedded_drafts) as found:
        yield found


@pytest.fixture(scope="session")
def dial_server(embedded_dial: Servable) -> Iterator[Running]:
    """The embedded model under a policy with a dial, served; it has a chat template."""
    from http_server import running

    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
    embedded_dial.model.tokenizer.chat_template = template
    with running(embedded_dial) as found:
        yield found
