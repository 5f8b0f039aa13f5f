"""Errors in the format of OpenAI's API."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error",
         504: "timeout_error"}
# A request that fails with 500 or 504 would fail again after as long; OpenAI's clients obey X-Should-Retry.
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "5"},
           500: {"X-Should-Retry": "false"}, 504: {"X-Should-Retry": "false"}}


class ApiError(Exception):
    """A response other than 200: status, one line for the user, and the parameter at fault, if any."""

    def __init__(self, status: int, message: str, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.parameter, self.code = status, message, parameter, code

    @property
    def headers(self) -> dict[str, str]:
        return HEADERS.get(self.status, {})

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        # A client may have sent half a surrogate pair, which UTF-8 cannot encode.
        message = self.message.encode("utf-8", "replace").decode("utf-8")
        return {"error": {"message": message, "type": kind, "param": self.parameter, "code": self.code}}


def of_validation(errors: list[Mapping[str, Any]]) -> ApiError:
    """Return the first validation error of a body, with the name of the parameter."""
    first = errors[0]
    parameter = getattr(first.get("ctx", {}).get("error"), "parameter", None)  # set by `Refused`; it lies below `loc`
    parts = [*first["loc"], *([parameter] if parameter else [])]
    place = ".".join(str(part) for part in parts if part != "body")[:200]
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{place}: unknown parameter; leave it out", place)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON ({first.get('ctx', {}).get('error')}, at character {place})")
    if first["type"] == "missing" and not place:
        return ApiError(400, "the body is empty; send a JSON object")
    reason = str(first["msg"]).removeprefix("Value error, ")[:500]
    return ApiError(400, f"{place}: {reason}" if place else reason, place or None)
