"""What clients are told when something is refused or fails: OpenAI's shape of an error, and never a stack trace."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from flexquant_rl.engine.errors import InputError

CLIENT_GONE = 499
"""Status of an answer that nobody reads any more, as nginx logs it."""
_RETRY_AFTER_S = 1
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A refusal.

    Args:
        status: HTTP status.
        message: One line that says what is wrong and what to do.
        code: A word for programs.
        param: The field of the body that is meant.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = str(InputError(message))  # one line, visible characters
        self.code = code
        self.param = None if param is None else str(InputError(param))

    def body(self) -> dict[str, Any]:
        """The object that is sent."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer; with 429 and 503 it says when to come again."""
        headers = {"Retry-After": str(_RETRY_AFTER_S)} if self.status in (429, 503) else {}
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that cannot be served as it stands."""
    return ApiError(400, message, code, param)


def internal_error() -> ApiError:
    """A failure of ours; the server's own log has what happened."""
    return ApiError(500, "the server failed at this request; its log says why", "internal_error")


def add_handlers(app: FastAPI) -> None:
    """Answers whatever a route raises in this shape."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(InputError)
    async def bad_input(request: Request, error: InputError) -> JSONResponse:
        return invalid(str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def bad_body(request: Request, error: RequestValidationError) -> JSONResponse:
        return _of_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def bad_request(request: Request, error: HTTPException) -> JSONResponse:
        path = f"{request.method} {request.url.path}"
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        answer = ApiError(error.status_code, f"{path}: {error.detail}", code).response()
        for name, value in (error.headers or {}).items():
            answer.headers[name] = value
        return answer

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return internal_error().response()


def _of_validation(problems: Sequence[Any]) -> ApiError:
    """The first thing that is wrong with a body."""
    problem = problems[0]
    kind = str(problem["type"])
    place = [str(part) for part in problem["loc"] if part != "body"]
    if kind == "json_invalid":
        return invalid(f"the body is not JSON ({problem['ctx']['error']})", code="invalid_json")
    param = ".".join(place) or None
    if kind == "extra_forbidden":
        return invalid(f"unknown field {param}; leave it out", param, "unknown_field")
    message = str(problem["msg"]).removeprefix("Value error, ")
    return invalid(f"{param or 'the body'}: {message}", param)
