"""The application: routes, guard, web page, OpenAPI document."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.staticfiles import StaticFiles

import jackpot
from jackpot.config import JobSpec
from jackpot.control_plane.api import intake, job_routes, observe, operations, problems
from jackpot.control_plane.api.guard import Guard
from jackpot.control_plane.backend import Backend

_PROBLEM_CODES = (400, 401, 403, 404, 409, 413, 415, 421, 422, 429, 503)
_EXAMPLE = {
    "name": "demo",
    "policy": {"model": "builtin:complement/policy"},
    "actor": {"model": "builtin:complement/actor"},
    "task": {"name": "complement"},
    "sampling": {"group_size": 8, "max_tokens": 16},
    "learner": {"steps": 20, "groups_per_batch": 16, "lr": 1.5e-3, "actor_lr": 3e-3},
    "evaluation": {"every": 10, "prompts": 64},
}


def create_app(backend: Backend) -> FastAPI:
    """The application around a backend, which the caller opens and closes."""

    app = FastAPI(
        title="Jackpot",
        version=jackpot.__version__,
        summary="Submit training jobs, and follow them.",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        responses={code: {"model": problems.Problem, "description": "A problem"} for code in _PROBLEM_CODES},
    )
    app.state.backend = backend
    problems.install(app)
    for router in (job_routes.router, observe.router, operations.router):
        app.include_router(router)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    app.add_middleware(Guard, settings=backend.settings, tokens=backend.tokens, metrics=backend.metrics)
    web = Path(str(resources.files("jackpot.control_plane").joinpath("web")))
    app.mount("/", StaticFiles(directory=web, html=True), name="web")
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    job = JobSpec.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = document["components"]["schemas"]
    schemas |= job.pop("$defs", {}) | {"JobSpec": job}
    body = {"schema": {"$ref": "#/components/schemas/JobSpec"}, "examples": {"demo": {"value": _EXAMPLE}}}
    content = dict.fromkeys((intake.JSON_TYPES[0], intake.YAML_TYPES[0]), body)
    document["paths"]["/v1/jobs"]["post"]["requestBody"] = {"required": True, "content": content}
    for path in document["paths"].values():
        for operation in path.values():
            for code, answer in operation["responses"].items():
                if int(code) >= 400:
                    answer["content"] = {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    app.openapi_schema = document
    return document
