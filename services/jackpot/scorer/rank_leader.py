"""The scorer's ranks: rank 0 has the bus, the RPCs and the news of weights; what it is asked to do, all ranks do."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from jackpot.bus.payload_format import decode_group, encode_group
from jackpot.compute.ranks.group import RankLostError, Ranks
from jackpot.compute.ranks.orders import Dismissed, Order, Orders, next_order
from jackpot.config import JobSpec
from jackpot.errors import JackpotError, WeightError, WeightMissingError
from jackpot.scorer.engine import Scorer
from jackpot.scorer.target import HeldPolicy, PendingWeights, State, TargetPolicy
from jackpot.scoring.group_scorer import GroupScorer
from jackpot.trajectory import Group, ScoredGroup

LOG = logging.getLogger(__name__)


class LeadPolicy:
    """Rank 0's policy: a :class:`PolicyModel` that tells the other ranks what to do, and lets its own part do the same.

    Args:
        part: the policy as this rank holds it.
        ranks: all of them.
        orders: what tells the others.
    """

    def __init__(self, part: HeldPolicy, ranks: Ranks, orders: Orders) -> None:
        self.model = part.model
        self._part = part
        self._ranks = ranks
        self._orders = orders

    def read(self, directory: Path) -> State:
        """Have every rank read its part of a version, beside the passes under way.

        Raises:
            WeightError: one of them could not.
        """
        with self._orders.give("read", path=str(directory)):
            pass
        state: State = {}
        problem: Exception | None = None
        try:
            state = self._part.read(directory)
        except (WeightError, FileNotFoundError) as error:
            problem = error
        with self._orders.give("have_read"):
            all_read = self._ranks.agree(problem is None)
        if problem is not None:
            raise problem
        if not all_read:
            raise WeightMissingError(f"{directory} could not be read by every rank; their log says why.")
        return state

    def apply(self, pending: PendingWeights) -> None:
        """As :meth:`PolicyModel.apply`, on all ranks."""
        path = str(pending.directory)
        with self._orders.give("apply", version=pending.version, obrs_lambda=pending.obrs_lambda, path=path):
            self._part.apply(pending)


class LeadScorer:
    """Rank 0's scorer: tells the other ranks to score, and lets its own part do the same.

    Args:
        part: scores on this rank.
        max_bytes: of a group on its way to the others, before compression.
        orders: what tells the others.
    """

    def __init__(self, part: GroupScorer, max_bytes: int, orders: Orders) -> None:
        self._part = part
        self._max_bytes = max_bytes
        self._orders = orders

    def score_groups(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Score groups with all ranks. Errors as :meth:`GroupScorer.score_groups`, and

        Raises:
            RankLostError: a rank is gone; or this one failed amid the others' passes, and they wait for it.
        """
        self._part.check(groups)
        encoded = [encode_group(group, max_bytes=self._max_bytes) for group in groups]
        with self._orders.give("score", b"".join(encoded), sizes=[len(group_bytes) for group_bytes in encoded]):
            try:
                return self._part.score_groups(groups)
            except (RuntimeError, ValueError, IndexError) as error:
                raise RankLostError(f"scoring failed amid a pass, the ranks start again: {error}") from error


class Follower:
    """Another rank's part of scoring.

    Args:
        job: the job as resolved.
        target: its part of the target policy.
        scorer: scores with it.
        ranks: all of them.
        num_held: versions of the policy that stay in memory: as many as on rank 0, and so the same.
    """

    def __init__(self, job: JobSpec, target: TargetPolicy, scorer: Scorer, ranks: Ranks, num_held: int) -> None:
        self._max_bytes = job.bus.max_payload_bytes
        self._target = target
        self._scorer = scorer
        self._ranks = ranks
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reading")
        self._reading: tuple[Path, Future[State]] | None = None
        self._num_held = num_held
        self._states: OrderedDict[Path, State] = OrderedDict()

    def run(self) -> int:
        """Do as rank 0 says until it says stop; the exit code that it gives.

        Raises:
            RankLostError: rank 0 or another is gone.
        """
        try:
            while True:
                self._carry_out(next_order(self._ranks))
        except Dismissed as dismissed:
            return dismissed.exit_code
        finally:
            self._reader.shutdown(wait=False, cancel_futures=True)

    def _carry_out(self, order: Order) -> None:
        match order.do:
            case "score":
                self._score(order)
            case "read":
                directory = Path(order.details["path"])
                self._reading = directory, self._reader.submit(self._target.read, directory)
            case "have_read":
                self._ranks.agree(self._keep_what_was_read())
            case "apply":
                version, obrs_lambda = order.details["version"], order.details["obrs_lambda"]
                directory = Path(order.details["path"])
                self._states.move_to_end(directory)
                self._target.apply(PendingWeights(version, obrs_lambda, directory, self._states[directory], 0.0))
            case _:
                raise order.refuse()

    def _score(self, order: Order) -> None:
        groups, start = [], 0
        for size in order.details["sizes"]:
            groups.append(decode_group(order.content[start : start + size], max_bytes=self._max_bytes))
            start += size
        try:
            self._scorer.score_groups(groups)
        except RankLostError:
            raise
        except JackpotError as error:
            LOG.info("rank 0 says what becomes of this: %s", error)  # it found the same, at the same place

    def _keep_what_was_read(self) -> bool:
        """Whether a version could be read; it is kept then, in place of the least recently used."""
        assert self._reading is not None
        directory, reading = self._reading
        try:
            self._states[directory] = reading.result()
        except (WeightError, FileNotFoundError) as error:
            LOG.warning("policy weights cannot be read: %s", error)
            return False
        self._states.move_to_end(directory)
        if len(self._states) > self._num_held:
            self._states.popitem(last=False)
        return True
