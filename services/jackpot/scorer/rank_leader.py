"""The scorer's ranks: rank 0 handles the bus, the RPCs and weight updates, and leads all ranks through the work."""

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
    """Rank 0's policy: a :class:`PolicyModel` that directs the other ranks and has this rank's part do the same.

    Args:
        part: this rank's part of the policy.
        ranks: all ranks.
        orders: sends instructions to the others.
    """

    def __init__(self, part: HeldPolicy, ranks: Ranks, orders: Orders) -> None:
        self.model = part.model
        self._part = part
        self._ranks = ranks
        self._orders = orders

    def read(self, directory: Path) -> State:
        """Have every rank read its part of a version, concurrently with running passes.

        Raises:
            WeightError: a rank could not read it.
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

    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """As :meth:`PolicyModel.probe`, a pass of all ranks."""
        with self._orders.give("probe", token_ids=list(token_ids)):
            return self._part.probe(token_ids)


class LeadScorer:
    """Rank 0's scorer: has the other ranks score, and scores this rank's part.

    Args:
        part: scores on this rank.
        max_bytes: largest group to send to the others, before compression.
        orders: sends instructions to the others.
    """

    def __init__(self, part: GroupScorer, max_bytes: int, orders: Orders) -> None:
        self._part = part
        self._max_bytes = max_bytes
        self._orders = orders

    def score_groups(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Score groups with all ranks. Errors as :meth:`GroupScorer.score_groups`, and:

        Raises:
            RankLostError: a rank has died, or this rank failed during the others' passes, and they wait for it.
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
        target: this rank's part of the target policy.
        scorer: scores with it.
        ranks: all ranks.
        num_held: versions of the policy kept in memory: as many as on rank 0, and therefore the same ones.
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
        """Follow rank 0's instructions until it says stop; returns the exit code that it sends.

        Raises:
            RankLostError: rank 0 or another rank has died.
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
            case "probe":
                self._target.probe(order.details["token_ids"])
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
            LOG.info("rank 0 says what becomes of this: %s", error)  # it met the same error at the same point

    def _keep_what_was_read(self) -> bool:
        """Whether a version could be read. If so, it replaces the least recently used one in memory."""
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
