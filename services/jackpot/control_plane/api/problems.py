"""RFC 9457 problem documents: what went wrong, where, and what to do about it."""

from __future__ import annotations

import http
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from jackpot.config import InvalidJobError
from jackpot.errors import (
    BusError,
    ConfigError,
    DeadlineError,
    IdempotencyError,
    JackpotError,
    JobNotFoundError,
    JobStateError,
    ObjectUnavailableError,
)
from jackpot.telemetry.logs import redact_url

LOG = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
_SHOWN_CHARACTERS = 200


class FieldProblem(BaseModel):
    """One setting that cannot work."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    field: str
    """Which setting: a path in the job file, or a parameter of the request."""
    problem: str
    """What is wrong with it."""
    remedy: str
    """What to do about it."""
    value: str | None = None
    """What it was set to, shortened."""


class Problem(BaseModel):
    """RFC 9457."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: str
    """Which kind of problem; stable, for programs."""
    title: str
    """The kind in words."""
    status: int = Field(ge=400, le=599)
    """The HTTP status."""
    detail: str
    """What happened this time, and what to do about it."""
    instance: str | None = None
    """The path that was asked for."""
    errors: list[FieldProblem] | None = None
    """Every setting that cannot work."""


class ProblemError(Exception):
    """Answers the request with a problem document."""

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        errors: Sequence[FieldProblem] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.detail = detail
        self.errors = list(errors)
        self.headers = dict(headers or {})

    def response(self, instance: str | None = None) -> Response:
        """The document."""
        problem = Problem(
            type=f"urn:jackpot:problem:{self.kind}",
            title=self.kind.replace("-", " ").capitalize(),
            status=self.status,
            detail=redact_url(self.detail),
            instance=instance,
            errors=self.errors or None,
        )
        # In ASCII: what the client sent may hold characters that UTF-8 cannot.
        content = json.dumps(problem.model_dump(exclude_none=True)).encode("ascii")
        return Response(content, self.status, self.headers, MEDIA_TYPE)


def field_problem(error: ConfigError) -> FieldProblem:
    """A setting's error as part of a problem document."""
    value = None if error.value is None else redact_url(str(error.value))[:_SHOWN_CHARACTERS]
    return FieldProblem(field=error.field, problem=error.problem, remedy=error.remedy, value=value)


def problem_of(error: JackpotError) -> ProblemError:
    """The problem document of one of our errors."""
    if isinstance(error, InvalidJobError):
        detail = f"{len(error.problems)} setting(s) of the job cannot work; see errors."
        return ProblemError(422, "invalid-job", detail, errors=[field_problem(problem) for problem in error.problems])
    if isinstance(error, ConfigError):
        return ProblemError(422, "invalid-setting", str(error), errors=[field_problem(error)])
    if isinstance(error, JobNotFoundError):
        return ProblemError(404, "not-found", f"{error}. See GET /v1/jobs for what there is.")
    if isinstance(error, JobStateError):
        return ProblemError(409, "wrong-state", str(error))
    if isinstance(error, IdempotencyError):
        return ProblemError(422, "idempotency-key-reused", str(error))
    if isinstance(error, BusError | DeadlineError):
        LOG.error("a request could not be answered: %s", error)
        detail = "The job store does not answer. Try again in a moment; nothing has changed."
        return ProblemError(503, "store-unavailable", detail, headers={"Retry-After": "2"})
    if isinstance(error, ObjectUnavailableError):
        LOG.error("a request could not be answered: %s", error)
        return ProblemError(503, "store-unavailable", f"{error}. Try again.", headers={"Retry-After": "10"})
    LOG.error("a request failed: %s", error)
    return ProblemError(500, "internal-error", str(error))


def install(app: FastAPI) -> None:
    """Answer every error with a problem document."""

    @app.exception_handler(ProblemError)
    async def _problem(request: Request, error: ProblemError) -> Response:
        return error.response(request.url.path)

    @app.exception_handler(JackpotError)
    async def _ours(request: Request, error: JackpotError) -> Response:
        return problem_of(error).response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def _request(request: Request, error: RequestValidationError) -> Response:
        fields = [_parameter_problem(detail) for detail in error.errors()]
        detail = f"{len(fields)} parameter(s) of the request cannot work; see errors."
        return ProblemError(422, "invalid-parameter", detail, errors=fields).response(request.url.path)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        kind = http.HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
        detail = f"{request.method} {request.url.path}: {error.detail}. The API is described at /openapi.json."
        return ProblemError(error.status_code, kind, detail, headers=error.headers).response(request.url.path)

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> Response:
        detail = "An unexpected error; the server's log tells more."
        return ProblemError(500, "internal-error", detail).response(request.url.path)


def _parameter_problem(detail: Mapping[str, Any]) -> FieldProblem:
    where, *names = [str(part) for part in detail["loc"]]
    field = ".".join(names) or where
    remedy = f"Correct the {where} parameter; /openapi.json says what is accepted."
    value = None if detail["type"] == "missing" else str(detail.get("input"))[:_SHOWN_CHARACTERS]
    return FieldProblem(field=field, problem=str(detail["msg"]), remedy=remedy, value=value)
