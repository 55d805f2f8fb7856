"""Rank 0 leads, the others follow: every collective begins with its order to them. An order is JSON and, where it has
content, bytes."""

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

_WAIT = "wait"  # nothing to do: rank 0 is there
_STOP = "stop"


@dataclass(frozen=True, slots=True)
class Order:
    """What rank 0 wants done."""

    do: str
    details: dict[str, Any]
    content: bytes = b""

    def refuse(self) -> JackpotError:
        """What to raise by a rank that does not know the order."""
        return JackpotError(f"rank 0 asks for {self.do!r}, which this rank does not know; install one version")


class Orders:
    """Rank 0's side. Safe to be used by several threads: one order is carried out at a time, in the same order on every
    rank.

    Args:
        ranks: all of them.
        timeout_seconds: after which a rank that hears nothing gives rank 0 up.
    """

    def __init__(self, ranks: Ranks, timeout_seconds: float) -> None:
        self._ranks = ranks
        self._interval = timeout_seconds / 4
        self._turn = threading.Lock()
        self._dismissed = threading.Event()
        threading.Thread(target=self._keep_in_touch, name="ranks", daemon=True).start()

    @contextmanager
    def give(self, do: str, content: bytes | None = None, **details: Any) -> Iterator[None]:
        """Tell the others what to do, and do this rank's part of it inside the ``with``.

        Raises:
            RankLostError: a rank is gone or hangs.
        """
        with self._turn:
            device = self._ranks.device
            if device is not None and device.type == "cuda":
                torch.cuda.set_device(device)  # which is the calling thread's own
            order = {"do": do, "details": details, "has_content": content is not None}
            self._ranks.broadcast(json.dumps(order).encode())
            if content is not None:
                self._ranks.broadcast(content)
            yield

    def dismiss(self, exit_code: int) -> None:
        """Send the other ranks home, with their exit code; a no-op the second time and when a rank is gone."""
        if self._dismissed.is_set():
            return
        self._dismissed.set()
        try:
            with self.give(_STOP, exit_code=exit_code):
                pass
        except RankLostError as error:
            LOG.warning("%s", error)

    def _keep_in_touch(self) -> None:
        """While there is nothing to do, show the others well before their deadline that this rank is there."""
        while not self._dismissed.wait(self._interval):
            try:
                with self.give(_WAIT):
                    pass
            except RankLostError:
                return  # torchrun has seen it as well, and ends this process


class Dismissed(Exception):
    """Rank 0 needs this rank no more."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


def next_order(ranks: Ranks) -> Order:
    """What rank 0 wants done next, on another rank.

    Raises:
        Dismissed: nothing any more.
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
