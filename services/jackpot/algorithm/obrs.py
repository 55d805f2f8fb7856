"""Optimal budgeted rejection sampling of single tokens: acceptance, mask, Z (paper §3, §4.1, §4.4; Algorithm 1).

A token is accepted with probability a(x) = min(1, p_t(x) / (λ p_inf(x))). Accepted tokens are distributed as
p'_inf = min(p_inf, p_t/λ) / Z with Z = Σ_x min(p_inf(x), p_t(x)/λ), which is estimated from the most probable tokens of
both models. At each position an estimator gives ``head``, the sum over the tokens it sees, exact or nearly so, and
``tail``, the most that all other tokens can add. A scalar of the whole batch turns both into Z: κ multiplies the head
(the paper's bias correction), or τ is the share of the tail to add, which keeps Z a probability.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from jackpot.algorithm.corrections.jackpot import NormalizerName
from jackpot.trajectory import seeded_as


def acceptance_probs(target_logprobs: Tensor, actor_logprobs: Tensor, obrs_lambda: float) -> Tensor:
    """a(x) = min(1, p_t(x) / (λ p_inf(x))); paper §3.

    Args:
        target_logprobs: log p_t of the sampled tokens, any shape, in nats.
        actor_logprobs: log p_inf of the same tokens, same shape.
        obrs_lambda: λ > 0; larger rejects more and aligns more.

    Returns:
        Probabilities in [0, 1], same shape, without gradient. Not finite only where an input is not.
    """
    log_ratio = target_logprobs.detach() - actor_logprobs.detach()
    return torch.clamp(log_ratio - math.log(obrs_lambda), max=0.0).exp()


def acceptance_uniforms(job_seed: int, trajectory_id: str, num_tokens: int) -> Tensor:
    """The uniform numbers in [0, 1) that decide a trajectory's acceptance: [num_tokens] float64.

    They depend on the seed and on slot, epoch, prompt, attempt and index of the trajectory. A trajectory therefore gets
    the same mask on any worker, at every delivery, and in any job with that seed. The numbers of the first n tokens do
    not depend on how many follow.
    """
    key = blake2b(
        f"{job_seed}\0{seeded_as(trajectory_id)}".encode(), digest_size=16, person=b"obrs-acceptance"
    ).digest()
    # A bit generator's raw stream is stable across numpy versions; the output of Generator need not be.
    raw = np.random.Philox(key=np.frombuffer(key, dtype="<u8")).random_raw(num_tokens)
    return torch.from_numpy((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def acceptance_mask(acceptance_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Mask ~ Bernoulli(a): True where the token is accepted; bool, same shape. a = 1 always accepts, 0 never."""
    return uniforms.to(acceptance_probs.device) < acceptance_probs.detach()


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Candidates:
    """The known tokens at N positions: S, the actor's k most probable ones, and the target's m most probable ones. T is
    the part of the latter outside S. Ids are distinct within a row; a token in both lists counts once."""

    actor_ids: Tensor  # [N, k] int64
    actor_logprobs: Tensor  # [N, k] log p_inf on S
    target_logprobs_on_actor: Tensor  # [N, k] log p_t on S
    target_ids: Tensor  # [N, m] int64
    target_logprobs: Tensor  # [N, m] log p_t on the target's m tokens
    actor_logprobs_on_target: Tensor | None = None  # [N, m] log p_inf there, from the actor's forward pass


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class NormalizerParts:
    """The ingredients of Z at N positions, float32. head ≤ Z ≤ head + tail for ``tail``, ``union_tail``, ``full``."""

    head: Tensor  # [N]
    tail: Tensor  # [N], U; zero for union_kappa and full
    mass: Tensor  # [N], target probability of the known tokens


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Normalizer:
    """Z of each token and the batch scalar behind it."""

    value: Tensor  # [N]
    scalar: float  # τ as applied, or κ; 1 for full
    raw_scalar: float  # τ before it was clipped to [0, 1]


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """Per-position sums over S and T that the estimators share; [N] each."""

    head: Tensor  # Σ_S min(p_inf, p_t/λ)
    actor_rest: Tensor  # 1 − Σ_S p_inf
    target_mass: Tensor  # Σ_{S∪T} p_t
    outside: Tensor  # [N, m] bool, whether a token of the target's m is in T
    scaled_target: Tensor  # [N, m], p_t/λ on T, 0 elsewhere
    least_actor: Tensor  # [N, 1], q_min, the smallest returned actor probability


def estimate_normalizer(name: NormalizerName, candidates: Candidates, obrs_lambda: float) -> NormalizerParts:
    """The estimate by the estimator ``name``. For ``none``, whose weights omit Z, that of ``tail`` is recorded.

    Raises:
        ValueError: ``full``, which needs the whole vocabulary instead of candidates: see :func:`full_normalizer`.
    """
    match name:
        case "tail" | "none":
            return tail_normalizer(candidates, obrs_lambda)
        case "union_tail":
            return union_tail_normalizer(candidates, obrs_lambda)
        case "union_kappa":
            return union_kappa_normalizer(candidates, obrs_lambda)
        case "full":
            raise ValueError("the full normalizer is computed from whole rows of the vocabulary: full_normalizer")


def tail_normalizer(candidates: Candidates, obrs_lambda: float) -> NormalizerParts:
    """Head Σ_S min(p_inf, p_t/λ), exact; tail U = min(1 − Σ_S p_inf, B). Beyond the paper; needs no actor forward.

    B = Σ_T min(q_min, p_t/λ) + (1 − Σ_{S∪T} p_t)/λ: outside S no actor probability exceeds q_min, and outside S ∪ T at
    most the target's remaining mass can be accepted.
    """
    sums = _sums(candidates, obrs_lambda)
    seen = torch.minimum(sums.least_actor, sums.scaled_target).sum(-1)
    bound = seen + _rest(sums.target_mass) / obrs_lambda
    return _parts(sums.head, torch.minimum(sums.actor_rest, bound), sums.target_mass)


def union_tail_normalizer(candidates: Candidates, obrs_lambda: float) -> NormalizerParts:
    """As :func:`tail_normalizer`, with S ∪ T instead of S and exact p_inf on it.

    Raises:
        ValueError: ``actor_logprobs_on_target`` is missing.
    """
    if candidates.actor_logprobs_on_target is None:
        raise ValueError("union_tail needs the actor's log-probabilities on the target's candidates")
    sums = _sums(candidates, obrs_lambda)
    actor = candidates.actor_logprobs_on_target.float().exp().masked_fill(~sums.outside, 0.0)
    head = sums.head + torch.minimum(actor, sums.scaled_target).sum(-1)
    actor_rest = (sums.actor_rest - actor.sum(-1)).clamp(min=0.0)
    return _parts(head, torch.minimum(actor_rest, _rest(sums.target_mass) / obrs_lambda), sums.target_mass)


def union_kappa_normalizer(candidates: Candidates, obrs_lambda: float) -> NormalizerParts:
    """Z_approx = Σ_{S∪T} min(p_inf, p_t/λ), to be multiplied by κ; paper §4.4.

    Without the actor's forward pass, p_inf on T is unknown and replaced by a bound: no token outside S is more probable
    than q_min, and together they have at most the actor's remaining mass. Z_approx may then exceed Z.
    """
    sums = _sums(candidates, obrs_lambda)
    if candidates.actor_logprobs_on_target is None:
        seen = torch.minimum(sums.least_actor, sums.scaled_target).sum(-1)
        head = sums.head + torch.minimum(sums.actor_rest, seen)
    else:
        actor = candidates.actor_logprobs_on_target.float().exp()
        head = sums.head + torch.minimum(actor, sums.scaled_target).sum(-1)
    return _parts(head, torch.zeros_like(head), sums.target_mass)


def full_normalizer(target_logprobs: Tensor, actor_logprobs: Tensor, obrs_lambda: float) -> NormalizerParts:
    """Z = Σ_x min(p_inf(x), p_t(x)/λ) over the whole vocabulary; paper §3. Rows of both models, [N, vocab]."""
    head = torch.minimum(actor_logprobs, target_logprobs - math.log(obrs_lambda)).exp_().sum(-1)
    return _parts(head, torch.zeros_like(head), torch.ones_like(head))


def mean_acceptance(acceptance_probs: Tensor) -> float:
    """The batch's acceptance rate: mean a(x) over sampled tokens, [tokens]; 0 for no tokens.

    It has the mean of counting accepted tokens (paper §4.4), with less variance.
    """
    return _mean(acceptance_probs)


def calibrate_tau(head: Tensor, tail: Tensor, acceptance: float) -> float:
    """τ = (acceptance − mean head) / mean tail, not clipped; 0 if there is no tail to calibrate. [N] each."""
    mean_tail = _mean(tail)
    return (acceptance - _mean(head)) / mean_tail if mean_tail > 0 else 0.0


def calibrate_kappa(head: Tensor, acceptance: float) -> float:
    """κ = acceptance / mean Z_approx; paper §4.4. 1 if Z_approx is zero everywhere, since Z is zero then too. [N]."""
    mean_head = _mean(head)
    return acceptance / mean_head if mean_head > 0 else 1.0


def normalizer_from(head: Tensor, tail: Tensor, name: NormalizerName, acceptance: float) -> Normalizer:
    """Z of each token from the ingredients of a whole batch.

    Args:
        head: [N], from :class:`NormalizerParts`.
        tail: [N], from the same.
        name: the estimator that made them.
        acceptance: the batch's acceptance rate, see :func:`mean_acceptance`.
    """
    return normalizer_with(head, tail, name, calibrate(head, tail, name, acceptance))


def calibrate(head: Tensor, tail: Tensor, name: NormalizerName, acceptance: float) -> float:
    """The batch scalar, κ or τ, before τ is clipped; 1 for ``full``. Arguments as for :func:`normalizer_from`."""
    if name == "full":
        return 1.0
    return calibrate_kappa(head, acceptance) if name == "union_kappa" else calibrate_tau(head, tail, acceptance)


def normalizer_with(head: Tensor, tail: Tensor, name: NormalizerName, raw_scalar: float) -> Normalizer:
    """Z of each of these tokens, [N], from the scalar of their batch."""
    if name == "full":
        return Normalizer(value=head, scalar=raw_scalar, raw_scalar=raw_scalar)
    if name == "union_kappa":
        return Normalizer(value=raw_scalar * head, scalar=raw_scalar, raw_scalar=raw_scalar)
    tau = min(max(raw_scalar, 0.0), 1.0)
    return Normalizer(value=head + tau * tail, scalar=tau, raw_scalar=raw_scalar)


def _sums(candidates: Candidates, obrs_lambda: float) -> _Sums:
    actor = candidates.actor_logprobs.detach().float().exp()
    target_on_actor = candidates.target_logprobs_on_actor.detach().float().exp()
    outside = ~_contained(candidates.target_ids, candidates.actor_ids)
    target = candidates.target_logprobs.detach().float().exp().masked_fill(~outside, 0.0)
    return _Sums(
        head=torch.minimum(actor, target_on_actor / obrs_lambda).sum(-1),
        actor_rest=_rest(actor.sum(-1)),
        target_mass=target_on_actor.sum(-1) + target.sum(-1),
        outside=outside,
        scaled_target=target / obrs_lambda,
        least_actor=actor.amin(-1, keepdim=True),
    )


def _contained(ids: Tensor, among: Tensor) -> Tensor:
    """Whether each of ``ids`` [N, m] is in the same row of ``among`` [N, k]. Sorts, because k may be a thousand."""
    ordered = among.long().sort(-1).values
    place = torch.searchsorted(ordered, ids.long().contiguous()).clamp(max=among.shape[-1] - 1)
    return ordered.gather(-1, place) == ids


def _mean(values: Tensor) -> float:
    return values.detach().double().mean().item() if values.numel() else 0.0


def _rest(mass: Tensor) -> Tensor:
    """1 − mass, at least 0: only rounding of log-probabilities (sent as float16) can make it negative."""
    return (1.0 - mass).clamp(min=0.0)


def _parts(head: Tensor, tail: Tensor, mass: Tensor) -> NormalizerParts:
    # Sums of probabilities: only the same rounding can take them above 1.
    return NormalizerParts(head=head.clamp(max=1.0), tail=tail, mass=mass.clamp(max=1.0))
