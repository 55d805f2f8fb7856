"""Rank 0 leads, and the others follow: every collective begins with an order from rank 0. An order is JSON and,
optionally, bytes."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from jackpot.compute.ranks.group import RankLostError, Ranks
from jackpot.errors import JackpotError

LOG = logging.getLogger(__name__)

_WAIT = "wait"  # nothing to do: rank 0 is alive
_STOP = "stop"


@dataclass(frozen=True, slots=True)
class Order:
    """An order of rank 0."""

    do: str
    details: dict[str, Any]
    content: bytes = b""

    def refuse(self) -> JackpotError:
        """The error of a rank that does not know the order."""
        return JackpotError(f"rank 0 asks for {self.do!r}, which this rank does not know; install one version")


class Orders:
    """Rank 0's side. Thread-safe: orders are carried out one at a time, in the same sequence on every rank.

    Args:
        ranks: all of them.
        timeout_seconds: after which a rank without an order considers rank 0 lost.
    """

    def __init__(self, ranks: Ranks, timeout_seconds: float) -> None:
        self._ranks = ranks
        self._interval = timeout_seconds / 4
        self._turn = threading.Lock()
        self._dismissed = threading.Event()
        threading.Thread(target=self._keep_in_touch, name="ranks", daemon=True).start()

    @contextmanager
    def give(self, do: str, content: bytes | None = None, **details: Any) -> Iterator[None]:
        """Send the others an order, and do this rank's part of it inside the ``with``.

        Raises:
            RankLostError: a rank is gone or hangs.
        """
        with self._turn:
            device = self._ranks.device
            if device is not None and device.type == "cuda":
                torch.cuda.set_device(device)  # belongs to the calling thread
            order = {"do": do, "details": details, "has_content": content is not None}
            self._ranks.broadcast(json.dumps(order).encode())
            if content is not None:
                self._ranks.broadcast(content)
            yield

    def dismiss(self, exit_code: int) -> None:
        """Dismiss the other ranks with their exit code; a no-op the second time, and if a rank is gone."""
        if self._dismissed.is_set():
            return
        self._dismissed.set()
        try:
            with self.give(_STOP, exit_code=exit_code):
                pass
        except RankLostError as error:
            LOG.warning("%s", error)

    def _keep_in_touch(self) -> None:
        """While idle, show the others well before their deadline that this rank is alive."""
        while not self._dismissed.wait(self._interval):
            try:
                with self.give(_WAIT):
                    pass
            except RankLostError:
                return  # torchrun has noticed it as well, and ends this process


class Dismissed(Exception):
    """Rank 0 no longer needs this rank."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


def next_order(ranks: Ranks) -> Order:
    """The next order of rank 0, on another rank.

    Raises:
        Dismissed: there are no more.
        RankLostError: rank 0 is gone or hangs.
    """
    while True:
        message = json.loads(ranks.broadcast())
        content = ranks.broadcast() if message["has_content"] else b""
        order = Order(message["do"], message["details"], content)
        if order.do == _STOP:
            raise Dismissed(int(order.details["exit_code"]))
        if order.do != _WAIT:
            return order
