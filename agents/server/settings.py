"""What an operator sets: address, limits and the key; from options of the command, else from the environment."""

from __future__ import annotations

import ipaddress
from typing import Any

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from flexquant_rl.engine.errors import InputError

PREFIX = "FQ_SERVE_"


class Settings(BaseSettings):
    """Settings of a server; each may stand in the environment, e.g. `FQ_SERVE_API_KEY`.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        api_key: What clients must send as bearer token; None asks for none.
        slots: Requests that run at a time, each with keys and values of its own.
        queue: Requests that may wait for a slot.
        max_length: Tokens that a request may hold, prompt included; None is the model's context.
        max_new_tokens: Tokens that a request may ask for.
        max_body_bytes: Bytes of a request's body.
        body_timeout_s: Seconds in which a body must be there.
        drain_s: Seconds that running requests get to end once the server is told to stop.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore")

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_key: SecretStr | None = None
    slots: int = Field(4, ge=1, le=256)
    queue: int = Field(64, ge=1, le=100_000)
    max_length: int | None = Field(None, ge=2)
    max_new_tokens: int = Field(1024, ge=1)
    max_body_bytes: int = Field(1 << 20, ge=1024, le=1 << 30)
    body_timeout_s: float = Field(30.0, gt=0, le=3600, allow_inf_nan=False)
    drain_s: float = Field(20.0, ge=0, le=3600, allow_inf_nan=False)

    @field_validator("api_key")
    @classmethod
    def _usable_key(cls, key: SecretStr | None) -> SecretStr | None:
        """A key that is empty would protect nothing, and headers carry visible ASCII alone."""
        value = None if key is None else key.get_secret_value()
        if value is not None and not (value and value.isascii() and value.isprintable() and " " not in value):
            raise ValueError("must be visible ASCII characters, at least one")
        return key

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def read_settings(given: dict[str, Any]) -> Settings:
    """The settings of a command's options; what is None comes from the environment, or is the default.

    Raises:
        InputError: If a value is out of its domain.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(map(str, problem["loc"]))
        value = "" if name == "api_key" else f"={problem['input']}"
        raise InputError(
            f"{name}{value}: {problem['msg']}; change the option or the variable {PREFIX}{name.upper()}"
        ) from error
