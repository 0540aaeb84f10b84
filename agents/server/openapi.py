"""What `/openapi.json` says of answers: the kinds of content, and errors in the shape that they have here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

_REFUSALS = {
    400: "A field is wrong, does not fit the context or asks for too much.",
    401: "The API key is missing or wrong.",
    404: "Another model is named.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is no application/json.",
    421: "The host's name is not this machine's.",
    429: "The queue is full; Retry-After says when to come again.",
    500: "A fault of the server's.",
    503: "The server stops.",
}
_MADE_BY_FASTAPI = ("HTTPValidationError", "ValidationError")


class ErrorFacts(BaseModel):
    """What is wrong, in one line."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """An error as OpenAI's clients read it."""

    error: ErrorFacts


Responses = dict[int | str, dict[str, Any]]


def refusals(*statuses: int) -> Responses:
    """The answers of a route that refuses with these statuses."""
    return {status: {"model": ErrorBody, "description": _REFUSALS[status]} for status in statuses}


def generated() -> Responses:
    """The answers of a route that generates: whole or streamed, or refused in any way."""
    content: dict[str, Any] = {"application/json": {}, "text/event-stream": {}}
    return {
        200: {"description": "The answer, or with `stream` its events.", "content": content},
        **refusals(*_REFUSALS),
    }


def text_of(content_type: str) -> Responses:
    """The answers of a route of plain text."""
    kind = content_type.partition(";")[0]
    return {200: {"description": "Text.", "content": {kind: {"schema": {"type": "string"}}}}, **refusals(401, 421)}


def describe_errors(app: FastAPI) -> None:
    """Takes out of a schema what FastAPI says of bodies that do not fit: here they get 400, not 422."""
    made = app.openapi

    def described() -> dict[str, Any]:
        schema = made()  # kept by the application, so what is taken out once is gone
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in _MADE_BY_FASTAPI:
            schema["components"]["schemas"].pop(name, None)
        return schema

    app.openapi = described  # type: ignore[method-assign]  # as FastAPI's documentation has it
