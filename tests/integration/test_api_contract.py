"""The API against its own OpenAPI document: whatever a client sends, the server never fails and never says what it
has not announced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from server_world import TINY_JOB, Server, running_server


@pytest.fixture(scope="module")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("contract") / "data", "--rate-limit", "0") as server:
        yield server


@pytest.fixture(scope="module")
def job_id(api_server: Server) -> str:
    """A job that there is: cancelled before it starts, or while it does."""
    with api_server.client() as client:
        return client.wait(client.cancel(client.submit(TINY_JOB).id).id).id


@pytest.fixture(scope="module")
def api_schema(api_server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{api_server.url}/openapi.json")


CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
BUDGET = hypothesis.settings(
    max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)


def test_no_request_makes_the_server_fail(api_schema: Any, job_id: str, subtests: pytest.Subtests) -> None:
    for result in api_schema.get_all_operations():
        operation = result.ok()

        @BUDGET
        @hypothesis.given(case=operation.as_strategy(), known=st.booleans())
        def ask(case: Any, known: bool) -> None:
            if known and case.method == "GET" and "job_id" in (case.path_parameters or {}):
                case.path_parameters["job_id"] = job_id
            if case.path == "/v1/jobs" and case.method == "POST":
                case.query = {**(case.query or {}), "dry_run": "true"}  # a job that is valid by chance starts nothing
            case.call_and_validate(checks=CHECKS, timeout=30)

        with subtests.test(operation.label):
            ask()


def test_the_document_is_whole(api_schema: Any) -> None:
    paths = {path for path, *_ in ((operation.ok().path,) for operation in api_schema.get_all_operations())}
    assert {"/v1/jobs", "/v1/jobs/{job_id}:cancel", "/v1/jobs/{job_id}/events", "/healthz", "/v1/schema"} <= paths
