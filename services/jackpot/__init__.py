"""Jackpot: reinforcement learning with rollouts from a cheaper model than the one being trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jackpot.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``jackpot.Client`` and ``jackpot.AsyncClient``, loaded when first used: services need no HTTP client."""
    if name in ("AsyncClient", "Client"):
        from jackpot import client

        return getattr(client, name)
    raise AttributeError(f"module 'jackpot' has no attribute {name!r}")
