"""Who may do what, as dependencies of the routes."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from jackpot.control_plane.api.problems import ProblemError
from jackpot.control_plane.backend import Backend
from jackpot.control_plane.jobs.records import JOB_ID_PATTERN
from jackpot.control_plane.tokens import Scope, TokenRecord

_BEARER = HTTPBearer(auto_error=False, description="A token of `jackpot token create`; not needed on a local server.")


class Requires:
    """A dependency: the request's token covers ``scope``, if the server asks for tokens at all."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    async def __call__(
        self, request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)] = None
    ) -> TokenRecord | None:
        """The request's token; None where the server needs none.

        Raises:
            ProblemError: 401 without a valid token, 403 if its scope is too small.
        """
        backend: Backend = request.app.state.backend
        if not backend.settings.token_required:
            return None
        token: TokenRecord | None = request.scope["state"]["token"]
        if token is None:
            detail = "Send a valid token: Authorization: Bearer jp_… (made by `jackpot token create`)."
            raise ProblemError(401, "unauthorized", detail, headers={"WWW-Authenticate": 'Bearer realm="jackpot"'})
        if Scope.of(token.scope) < self._scope:
            needed = self._scope.name.lower()
            detail = f"This token's scope is {token.scope}; this needs {needed}. Use another token."
            raise ProblemError(
                403, "insufficient-scope", detail, headers={"WWW-Authenticate": f'Bearer scope="{needed}"'}
            )
        return token


async def backend_of(request: Request) -> Backend:
    """The server's backend."""
    backend: Backend = request.app.state.backend
    return backend


Reader = Annotated[TokenRecord | None, Depends(Requires(Scope.READ))]
Writer = Annotated[TokenRecord | None, Depends(Requires(Scope.WRITE))]
Admin = Annotated[TokenRecord | None, Depends(Requires(Scope.ADMIN))]
Behind = Annotated[Backend, Depends(backend_of)]
JobId = Annotated[
    str, Path(pattern=JOB_ID_PATTERN, description="The job's id.", examples=["demo-1123-094051-1a2b3c4d"])
]
