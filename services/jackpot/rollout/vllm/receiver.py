"""The replica's side of the learner's broadcasts: joins the group, receives while sampling, and applies the version.

Same lifecycle as from the store: the whole payload first, then pause (``keep``) → start → update → finish → resume.
After a failure the engine keeps its version and leaves the group; the store has the new version as well.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from jackpot.errors import DeadlineError, EngineError, WeightCorruptError, WeightMissingError
from jackpot.rollout.engine import TensorLayout
from jackpot.storage.weight_probe import WeightProbe

LOG = logging.getLogger(__name__)

_POLL_SECONDS = 0.005


class VllmReceiver:
    """Implements :class:`jackpot.rollout.engine.WeightReceiver`.

    Args:
        llm: the engine.
        swapping: held while weights change.
        take_up: applies a version that every worker has in memory, given its number, source and probe.
        held: the version held.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        swapping: asyncio.Lock,
        take_up: Callable[[int, str, WeightProbe | None], Awaitable[None]],
        held: Callable[[], int],
    ) -> None:
        self.session = ""
        self._llm = llm
        self._swapping = swapping
        self._take_up = take_up
        self._held = held
        self._announced: tuple[str, int, TensorLayout] | None = None
        self._busy = asyncio.Lock()
        # Workers of one model communicate while they sample; two NCCL groups in use at once can deadlock.
        parallel = llm.vllm_config.parallel_config
        self._pauses = parallel.world_size * parallel.data_parallel_size > 1

    async def join(self, session: str, info: Mapping[str, Any], timeout_seconds: float) -> None:
        """See :class:`WeightReceiver`."""
        async with self._busy:
            self.session, self._announced = "", None
            work = self._llm.collective_rpc("join_group", args=(dict(info), timeout_seconds))
            await self._until_done(work, "joining the learner's group", timeout_seconds)
            self.session = session
            LOG.info("joined the learner's broadcast group", extra={"session": session})

    async def start(self, session: str, version: int, layout: TensorLayout) -> None:
        """See :class:`WeightReceiver`."""
        self._require(session)
        layout = [(name, dtype, list(shape)) for name, dtype, shape in layout]
        for state, message in await self._llm.collective_rpc("check_layout", args=(layout,)):
            if state != "ready":
                raise WeightCorruptError(f"version {version} is refused before it is sent: {message}")
        self._announced = (session, version, layout)

    async def update(self, session: str, version: int, timeout_seconds: float) -> None:
        """See :class:`WeightReceiver`."""
        layout = self._require_announced(session, version)
        async with self._busy:
            if self._pauses:
                await self._llm.pause_generation(mode="keep", clear_cache=False)
            try:
                work = self._llm.collective_rpc("receive_broadcast", args=(_source(session, version), layout))
                await self._until_done(work, f"version {version} from the learner", timeout_seconds)
            finally:
                if self._pauses:
                    await self._llm.resume_generation()

    async def finish(self, session: str, version: int, probe: WeightProbe | None = None) -> int:
        """See :class:`WeightReceiver`."""
        self._require_announced(session, version)
        self._announced = None
        async with self._swapping:
            if version > self._held():
                try:
                    # The engine must not stay paused when the caller goes away.
                    work = self._take_up(version, _source(session, version), probe)
                    await asyncio.shield(asyncio.ensure_future(work))
                except EngineDeadError as error:
                    raise EngineError(f"vLLM's engine process has died ({error}).") from error
        return self._held()

    async def _until_done(self, begin: Awaitable[Any], awaited: str, timeout_seconds: float) -> None:
        """Start work in the workers' threads and wait for it; on a failure they leave the group."""
        done = False
        try:
            async with asyncio.timeout(timeout_seconds):
                await begin
                done = await self._poll(awaited)
        except TimeoutError:
            raise DeadlineError(awaited, timeout_seconds, "The store has the version, too.") from None
        except EngineDeadError as error:
            raise EngineError(f"vLLM's engine process has died ({error}).") from error
        finally:
            if not done:
                self.session, self._announced = "", None
                if not self._llm.errored:
                    await asyncio.shield(asyncio.ensure_future(self._llm.collective_rpc("leave_group")))

    async def _poll(self, awaited: str) -> bool:
        while True:
            outcomes = [tuple(outcome) for outcome in await self._llm.collective_rpc("weights_read", args=("learner",))]
            failures = [message for state, message in outcomes if state not in ("reading", "ready")]
            if failures:
                raise EngineError(f"{awaited} failed: {failures[0]}")
            if all(state == "ready" for state, _ in outcomes):
                return True
            await asyncio.sleep(_POLL_SECONDS)

    def _require(self, session: str) -> None:
        if not session or session != self.session:
            raise WeightMissingError(
                f"this replica is in broadcast group {self.session or 'none'!r}, not in {session!r}. Join it first."
            )

    def _require_announced(self, session: str, version: int) -> TensorLayout:
        self._require(session)
        if self._announced is None or self._announced[:2] != (session, version):
            raise WeightMissingError(f"version {version} was not announced to this replica. Start it first.")
        return self._announced[2]


def _source(session: str, version: int) -> str:
    return f"broadcast {session} of version {version}"
