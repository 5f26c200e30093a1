"""The ops on NumPy arrays, on the CPU, without PyTorch: results only, no gradients but the loss's.

The functions are those of :mod:`ppo_kernels.functional`, where their arguments are described, with
arrays for tensors. Logits are float32, float16, or bfloat16 of ``ml_dtypes``, and anything else is
converted to float32; so are arrays with a number a token. Contiguous, aligned arrays of the right
dtype are used as they are, others are copied. Results are new float32 arrays.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _FUNCTIONS, _header, _lib, _lists
from ._lib import Pass
from ._lists import (
    FLAGS,
    INTEGERS,
    OFFSETS,
    Op,
    check_rows,
    check_shape,
    is_per_row,
    refuse,
    rows_of,
)

# But for what is there for its gradient alone.
_OF_TENSORS = ("LinearPpoLossOutput", "linear_ppo_loss")
__all__ = [name for name in _FUNCTIONS if name not in _OF_TENSORS]

Floats = NDArray[np.float32]

_PLAIN = ("C_CONTIGUOUS", "ALIGNED", "ENSUREARRAY")  # what the library takes; else a copy is made


def _call(
    function: Pass,
    given: Mapping[str, Any] | None,
    *values: NDArray | int | None,
    **renamed: str,
) -> None:
    """Calls the library with the options given, or the defaults, and values in the order of the
    pass, arrays by their addresses. For errors an argument may be ``renamed`` once more."""
    options = 0 if given is None else function.options.among(given)
    status = function.cpu(function.arguments(options, *map(_address, values)))
    if status:
        _lib.fail(status, {**function.renamed, **renamed})


def _address(value: NDArray | int | None) -> int:
    return value.ctypes.data if isinstance(value, np.ndarray) else value or 0


def _flags(mask: ArrayLike) -> NDArray:
    mask = np.asarray(mask)
    return np.require(mask if mask.dtype.itemsize == 1 else mask != 0, None, _PLAIN)


def _checked(
    op: Op, given: Mapping[str, Any], shape: tuple[int, ...], first: int = 0
) -> list[NDArray | None]:
    """An op's inputs of those given, from the first, as the library takes them, for tokens of a
    shape."""
    rows = _rows(shape, given.get("offsets"))
    checked = []
    for name, _, kind, per_row, _ in op.inputs[first:]:
        array = given[name]
        if array is not None:
            if kind == OFFSETS:
                checked.append(_offsets(op, array))
                continue
            dtype = np.int64 if kind == INTEGERS else np.float32
            array = _flags(array) if kind == FLAGS else np.require(array, dtype, _PLAIN)
            by_row = per_row is True or given.get(per_row, False)
            check_shape(op.name, name, array.shape, rows if by_row else shape)
        checked.append(array)
    return checked


def _rows(shape: tuple[int, ...], offsets: ArrayLike | None) -> tuple[int, ...]:
    """The shape of what there is one of for a row, by that of the tokens."""
    return shape[:-1] if offsets is None else (len(offsets) - 1,)


def _offsets(op: Op, offsets: ArrayLike) -> NDArray[np.int64]:
    offsets = np.asarray(offsets)
    if offsets.dtype.kind not in "iu":
        refuse(op.name, "offsets", f"has dtype {offsets.dtype}", "int64")
    return np.require(offsets, np.int64, _PLAIN)


def _sizes(op: Op, tokens: ArrayLike, offsets: ArrayLike | None = None) -> tuple[int, int]:
    """How many rows of tokens, and tokens in each, or with offsets in all of them."""
    shape = np.shape(tokens)
    rows = rows_of(op, shape, None if offsets is None else np.shape(offsets))
    return int(np.prod(rows)), shape[-1]


def _logits(op: Op, name: str, logits: ArrayLike) -> tuple[NDArray, int]:
    logits = np.asarray(logits)
    if logits.dtype.name not in _lib.LOGITS or not logits.dtype.isnative:
        logits = logits.astype(np.float32)
    logits = np.require(logits, None, _PLAIN)
    check_rows(op.name, name, logits.shape, "vocab")
    return logits, _lib.LOGITS[logits.dtype.name]


def _index(
    op: str,
    index: ArrayLike,
    row_mask: ArrayLike | None,
    shape: tuple[int, ...],
    vocab: int,
    ignore_index: int | None,
) -> tuple[NDArray, int | None]:
    """Token ids as the library takes them, an ``ignore_index`` where the mask is 0."""
    index = np.asarray(index)
    check_shape(op, "index", index.shape, shape)
    if index.dtype.kind not in "iu":
        refuse(op, "index", f"has dtype {index.dtype}", "integers")
    if index.dtype == np.uint64 and (index > np.iinfo(np.int64).max).any():
        refuse(op, "index", f"has {index.max()}", f"0..{vocab}")
    index = np.require(index, np.uint32 if index.dtype.name == "uint32" else np.int64, _PLAIN)
    if row_mask is not None:
        mask = _flags(row_mask)
        check_shape(op, "row_mask", mask.shape, shape)
        if ignore_index is None:
            ignore_index = int(np.iinfo(np.int64).min)
        index = np.where(mask, index.astype(np.int64), ignore_index)
    return index, ignore_index


def _logprobs(op: Op, given: dict[str, Any]) -> tuple[Floats, Floats | None]:
    logits, logits_type = _logits(op, "logits", given["logits"])
    *rows, vocab = logits.shape
    index, given["ignore_index"] = _index(
        op.name, given["index"], given["row_mask"], tuple(rows), vocab, given["ignore_index"]
    )
    logp = np.empty(rows, np.float32)
    entropy = np.empty(rows, np.float32) if op is _lists.LOGPROB_ENTROPY else None
    sizes = (index.size, vocab, logits_type, _lib.TARGETS[index.dtype.name], None, None)
    _call(_lists.logprob_forward, given, *sizes, logits, index, entropy, logp)
    return logp, entropy


def selective_log_softmax(
    logits: ArrayLike,
    index: ArrayLike,
    temperature: float = 1.0,
    row_mask: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
) -> Floats:
    """Log-probabilities of chosen tokens: logits ``[..., vocab]``, index ``[...]``; ``[...]``."""
    return _logprobs(_lists.LOGPROB, locals())[0]


def logprobs_and_entropy(
    logits: ArrayLike,
    index: ArrayLike,
    temperature: float = 1.0,
    row_mask: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
) -> tuple[Floats, Floats]:
    """The same, and the entropy of each row's distribution: ``[...]`` each."""
    return _logprobs(_lists.LOGPROB_ENTROPY, locals())


class LinearOutput(NamedTuple):
    """What :func:`linear_logprobs` finds in each row; what was not asked for is None."""

    logp: Floats
    entropy: Floats | None = None
    log_sum_sq_probs: Floats | None = None
    mean_logits: Floats | None = None
    is_top1: NDArray[np.bool_] | None = None


# Logits that there are at a time, 32 MiB.
_TILE = 8 << 20


def linear_logprobs(
    hidden: ArrayLike,
    weight: ArrayLike,
    index: ArrayLike,
    bias: ArrayLike | None = None,
    temperature: float | ArrayLike = 1.0,
    row_mask: ArrayLike | None = None,
    *,
    outputs: Collection[str] = (),
    ignore_index: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> LinearOutput:
    """Log-probabilities from hidden states ``[..., hidden_size]`` and the head's weight ``[vocab,
    hidden_size]`` without the logits; index ``[...]``; ``[...]`` each. Products are NumPy's, in
    float32."""
    op = _lists.LINEAR.name
    hidden, weight = np.asarray(hidden, np.float32), np.asarray(weight, np.float32)
    _lists.check_head(hidden.shape, weight.shape)
    shape, vocab = hidden.shape[:-1], len(weight)
    index, ignore_index = _index(op, index, row_mask, shape, vocab, ignore_index)
    kept = np.ones(index.size, bool) if ignore_index is None else index.ravel() != ignore_index
    hidden, index = hidden.reshape(-1, weight.shape[1])[kept], index.ravel()[kept]
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        if value is not None:
            _lists.check_positive(op, name, value)
    divide = np.ndim(temperature) > 0
    if divide:
        temperature = np.asarray(temperature, np.float32)
        check_shape(op, "temperature", temperature.shape, shape)
        divisors, temperature = temperature.reshape(-1, 1)[kept], 1.0
        if not (np.isfinite(divisors) & (divisors > 0)).all():
            refuse(op, "temperature", "has others", "finite numbers above 0")
    if bias is not None:
        bias = np.asarray(bias, np.float32)
        check_shape(op, "bias", bias.shape, (vocab,))

    wants = _lists.wanted_of(outputs)
    entropy, squares, mean, top1 = wants
    rows, targets = index.size, _lib.TARGETS[index.dtype.name]
    given = {"temperature": temperature, "ignore_index": None}
    halved = {"temperature": temperature / 2, "ignore_index": None}
    sums, square_sums = np.empty((4, rows), np.float32), np.empty((3, rows), np.float32)
    weighted = sums[3] if entropy else None
    total, best = np.zeros(rows, np.float32), np.full(rows, -np.inf, np.float32)
    best_column = np.full(rows, -1)
    width = min(max(_TILE // max(rows, 1), 1024), vocab)
    for first in range(0, vocab, width):
        columns = slice(first, min(first + width, vocab))
        logits = hidden @ weight[columns].T
        if bias is not None:
            logits += bias[columns]
        logits *= np.float32(logit_scale)
        if softcap is not None:
            logits = np.tanh(logits / np.float32(softcap)) * np.float32(softcap)
        if divide:
            logits /= divisors
        sizes = (rows, logits.shape[1], first, vocab, _lib.LOGITS["float32"], targets, first == 0)
        _call(_lists.logprob_partial, given, *sizes, logits, index, *sums[:3], weighted)
        if squares:
            # Squares of probabilities are those at half the temperature, but for a factor.
            _call(_lists.logprob_partial, halved, *sizes, logits, index, *square_sums, None)
        if mean:
            total += logits.sum(-1)
        if top1:
            column = logits.argmax(-1)
            highest = np.take_along_axis(logits, column[:, None], -1)[:, 0]
            best_column = np.where(highest > best, column + first, best_column)
            best = np.maximum(highest, best)
    logp, log_sum, entropies = np.empty((3, rows), np.float32)
    arrays = (index, *sums[:3], weighted, logp, log_sum, entropies if entropy else None)
    _call(_lists.logprob_finish, given, rows, vocab, targets, *arrays)
    found = (
        logp,
        entropies,
        np.log1p(square_sums[1]) - 2 * log_sum if squares else None,
        total / np.float32(vocab * temperature),
        (best_column == index) & ~np.isnan(logp),
    )

    def spread(values: NDArray) -> NDArray:
        rows = np.zeros(kept.size, values.dtype)
        rows[kept] = values
        return rows.reshape(shape)

    wanted = zip(found, (True, *wants))
    return LinearOutput(*(spread(values) if want else None for values, want in wanted))


def token_kl(
    logp: ArrayLike,
    ref_logp: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    estimator: str = "k1",
    log_ratio_clamp: float | None = None,
    output_clamp: float | None = None,
) -> Floats:
    """KL estimates for each token, all ``[...]``."""
    given = locals()
    kl = np.empty(np.shape(logp), np.float32)
    inputs = _checked(_lists.TOKEN_KL, given, kl.shape)
    _call(_lists.token_kl_forward, given, kl.size, *inputs, kl)
    return kl


def full_kl(
    logits: ArrayLike,
    ref_logits: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
) -> Floats:
    """Exact KL, or another divergence, between rows of logits ``[..., vocab]``: ``[...]``."""
    op, given = _lists.FULL_KL, locals()
    logits, logits_type = _logits(op, "logits", logits)
    ref_logits, _ = _logits(op, "ref_logits", ref_logits)
    if ref_logits.dtype != logits.dtype:
        refuse(op.name, "ref_logits", f"has dtype {ref_logits.dtype}", logits.dtype)
    check_shape(op.name, "ref_logits", ref_logits.shape, logits.shape)
    *rows, vocab = logits.shape
    mask = _checked(op, given, logits.shape, first=2)
    stats = np.empty((_header.KL_FULL_STATS, *rows), np.float32)
    sizes = (stats[0].size, vocab, logits_type)
    _call(_lists.full_kl_forward, given, *sizes, stats, logits, ref_logits, *mask)
    return stats[0].copy()


def targets_from_tokens(
    tokens: ArrayLike, offsets: ArrayLike, ignore: int = -100
) -> NDArray[np.integer]:
    """For each token of a pack the next of its row, and ``ignore`` for the last."""
    tokens, op = np.asarray(tokens), _lists.TARGETS
    offsets = _offsets(op, offsets)
    rows_of(op, tokens.shape, offsets.shape)
    _lists.check_offsets(op.name, offsets, len(tokens))
    targets = np.roll(tokens, -1)
    if len(targets):
        targets[(offsets[1:] - 1) % len(targets)] = ignore
    return targets


class GaeOutput(NamedTuple):
    """What :func:`gae` returns."""

    advantages: Floats
    returns: Floats
    rewards: Floats | None
    moments: NDArray[np.float64]


def gae(
    values: ArrayLike,
    rewards: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    value_lam: float | None = None,
    kl: ArrayLike | None = None,
    kl_coef: float = 0.05,
    scores: ArrayLike | None = None,
    score_placement: str = "last",
    score_mean: float = 0.0,
    score_std: float | None = None,
    score_min: float = -inf,
    score_max: float = inf,
    score_order: str = "scale_then_clip",
    has_eos: ArrayLike | None = None,
    missing_eos: str = "keep",
    missing_eos_value: float = 0.0,
    dones: ArrayLike | None = None,
    bootstrap: ArrayLike | None = None,
    offsets: ArrayLike | None = None,
    lambda_per_row: ArrayLike | None = None,
    mask_mode: str = "carry",
    whiten: bool = False,
    return_rewards: bool = False,
) -> GaeOutput:
    """Rewards, advantages and returns of ``[..., seq_len]``; of scores, has_eos, bootstrap and
    lambda_per_row there is one a row, ``[...]``. With offsets all tokens are ``[tokens]``."""
    given, shape = locals(), np.shape(values)
    sizes = _sizes(_lists.GAE, values, offsets)
    inputs = _checked(_lists.GAE, given, shape)
    results = [np.empty(shape, np.float32) if want else None for want in (1, 1, return_rewards)]
    outputs = GaeOutput(*results, np.empty(3, np.float64))
    _call(_lists.gae, given, *sizes, *inputs, *outputs)
    if whiten:
        whitened = masked_whiten(outputs.advantages, mask, moments=outputs.moments)
        return outputs._replace(advantages=whitened)
    return outputs


class AdvantagesOutput(NamedTuple):
    """What :func:`outcome_advantages` returns."""

    advantages: Floats
    stats: dict[str, float]


def outcome_advantages(
    scores: ArrayLike,
    groups: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    group_size: int | None = None,
    lengths: ArrayLike | None = None,
    score_baselines: ArrayLike | None = None,
    offsets: ArrayLike | None = None,
    baseline: str = "group",
    scale: str = "group",
    singleton: str = "zero",
    eps: float = 1e-4,
    eps_placement: str = "std",
    unbiased: bool = True,
    score_min: float = -inf,
    score_max: float = inf,
) -> AdvantagesOutput:
    """Advantages from scores ``[...]``; with a mask ``[..., seq_len]``, or with offsets
    ``[tokens]``, those of its tokens.
    ``groups`` is of anything that can be sorted."""
    given, shape = locals(), np.shape(scores)
    given["groups"] = _numbered(groups)
    shapes = (None if array is None else np.shape(array) for array in (mask, offsets))
    of_tokens = _lists.tokens_of(shape, *shapes)
    if mask is not None:
        given["mask"] = _flags(mask)
        if baseline == "length_weighted" and lengths is None:
            kept = given["mask"] != 0
            counts = np.concatenate(([0], kept.cumsum(-1))) if offsets is not None else None
            rows = None if offsets is None else np.clip(np.asarray(offsets), 0, len(kept))
            given["lengths"] = kept.sum(-1) if rows is None else np.diff(counts[rows])
    inputs = _checked(_lists.ADVANTAGES, given, of_tokens)
    rows, stats = np.empty(shape, np.float32), np.empty(len(_lib.ADVANTAGE_STATS), np.float64)
    tokens = None if mask is None else np.empty(of_tokens, np.float32)
    sizes = (rows.size, of_tokens[-1], group_size or 0)
    _call(_lists.advantages, given, *sizes, *inputs, rows, tokens, stats)
    named = dict(zip(_lib.ADVANTAGE_STATS, stats.tolist()))
    return AdvantagesOutput(rows if tokens is None else tokens, named)


def _numbered(groups: ArrayLike | None) -> NDArray | None:
    """Integers, the same where groups are equal."""
    if groups is None or np.asarray(groups).dtype.kind in "iu":
        return groups
    _, ids = np.unique(groups, return_inverse=True)
    return ids.reshape(np.shape(groups))


class TokenBaselineOutput(NamedTuple):
    """What :func:`optimal_token_baseline` returns."""

    advantages: Floats
    returns: Floats


def optimal_token_baseline(
    rewards: ArrayLike,
    logp: ArrayLike,
    log_sum_sq_probs: ArrayLike,
    groups: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    group_size: int | None = None,
    weights: ArrayLike | None = None,
    offsets: ArrayLike | None = None,
    step: str = "column",
    lone_tail: bool = True,
    eps: float = 1e-8,
) -> TokenBaselineOutput:
    """Advantages of tokens ``[..., seq_len]``, or with offsets ``[tokens]``, of groups of rows
    ``[...]``, and returns."""
    given, shape = {**locals(), "groups": _numbered(groups)}, np.shape(rewards)
    sizes = _sizes(_lists.TOKEN_BASELINE, rewards, offsets)
    inputs = _checked(_lists.TOKEN_BASELINE, given, shape)
    outputs = TokenBaselineOutput(*(np.empty(shape, np.float32) for _ in range(2)))
    _call(_lists.optimal_token_baseline, given, *sizes, group_size or 0, *inputs, *outputs)
    return outputs


ESTIMATORS = _lists.ESTIMATORS


def gdpo_advantages(
    rewards: ArrayLike,
    weights: Sequence[float] | None = None,
    groups: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    group_size: int | None = None,
    over: str = "rows",
    singleton: str = "zero",
    eps: float = 1e-4,
) -> Floats:
    """GDPO: advantages from rewards ``[K, ...]``, of which each is normalised by itself."""
    rewards = np.asarray(rewards, np.float32)
    weights = [1.0] * len(rewards) if weights is None else weights
    _lists.check_gdpo(rewards.shape, len(weights), over, mask is not None)
    given = {"group_size": group_size, "singleton": singleton, "eps": eps}
    total = np.zeros(rewards.shape[1:], np.float32)
    for scores, weight in zip(rewards, weights):
        total = total + outcome_advantages(scores, groups, **given).advantages * np.float32(weight)
    missing = np.isnan(rewards).all(0)
    if over == "tokens":
        tokens = outcome_advantages(total, None, mask, **ESTIMATORS["remax"]).advantages
        return masked_whiten(tokens, (np.asarray(mask) != 0) & ~missing[..., None])
    total, over_batch = np.where(missing, np.nan, total), {"baseline": "batch", "scale": "batch"}
    return outcome_advantages(total, None, mask, eps=eps, **over_batch).advantages


def masked_moments(values: ArrayLike, mask: ArrayLike | None = None) -> NDArray[np.float64]:
    """Count, mean and sum of squared deviations of the unmasked values: ``[3]``."""
    inputs = _checked(_lists.MASKED_MOMENTS, locals(), np.shape(values))
    moments = np.empty(3, np.float64)
    _call(_lists.whiten_moments, None, inputs[0].size, *inputs, moments)
    return moments


def masked_whiten(
    values: ArrayLike,
    mask: ArrayLike | None = None,
    shift_mean: bool = True,
    *,
    unbiased: bool = True,
    eps: float = 1e-8,
    eps_placement: str = "variance",
    moments: NDArray[np.float64] | None = None,
) -> Floats:
    """(values - mean) / sqrt(var + eps) over the unmasked values, all ``[...]``."""
    op, given = _lists.MASKED_WHITEN, locals()
    inputs = _checked(op, given, np.shape(values))
    counted = "moments"
    if moments is None:
        moments, counted = masked_moments(*inputs), "values" if mask is None else "mask"
    moments = np.require(moments, np.float64, _PLAIN)
    check_shape(op.name, "moments", moments.shape, (3,))
    whitened = np.empty(inputs[0].shape, np.float32)
    values = (whitened.size, *inputs, moments, whitened)
    _call(_lists.whiten_forward, given, *values, moments=counted)
    return whitened


class CorrectionOutput(NamedTuple):
    """What :func:`correction` returns."""

    weights: Floats
    kept: NDArray[np.bool_]
    stats: dict[str, float]


def correction(
    old_logp: ArrayLike,
    rollout_logp: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    offsets: ArrayLike | None = None,
    level: str = "token",
    log_ratio_clamp: float | None = 20.0,
    low: float | None = None,
    high: float | None = 2.0,
    outside: str = "truncate",
    normalise: bool = False,
    rejection_metric: str = "none",
    rejection_level: str = "token",
    rejection_low: float | None = None,
    rejection_high: float | None = None,
    second_rejection_metric: str = "none",
    second_rejection_level: str = "token",
    second_rejection_low: float | None = None,
    second_rejection_high: float | None = None,
) -> CorrectionOutput:
    """Importance weights of ``[..., seq_len]``, or with offsets of ``[tokens]``; the mask without
    what is rejected; statistics."""
    given, shape = locals(), np.shape(old_logp)
    _lists.check_rollout(rollout_logp)
    sizes = _sizes(_lists.CORRECTION, old_logp, offsets)
    inputs = _checked(_lists.CORRECTION, given, shape)
    weights, kept = np.empty(shape, np.float32), np.empty(shape, np.bool_)
    stats = np.empty(len(_lib.CORRECTION_STATS), np.float64)
    _call(_lists.correction, given, *sizes, *inputs, weights, kept, stats)
    return CorrectionOutput(weights, kept, dict(zip(_lib.CORRECTION_STATS, stats.tolist())))


def ppo_loss(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    values: ArrayLike | None = None,
    old_values: ArrayLike | None = None,
    returns: ArrayLike | None = None,
    entropy: ArrayLike | None = None,
    ref_logp: ArrayLike | None = None,
    rollout_logp: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    offsets: ArrayLike | None = None,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    value_clip_range: float | None = 0.2,
    value_coef: float = 0.1,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_log_ratio_clamp: float | None = 20.0,
    kl_output_clamp: float | None = None,
    aggregation: str = "token_mean",
    aggregation_divisor: float | None = None,
    denominator: float | None = None,
    clip_fraction: str = "clipped_branch",
    surrogate: str = "clip",
    ratio: str = "token",
    ratio_gradient: str = "spread",
    ratio_cap: float | None = None,
    soft_gate_tau_pos: float = 1.0,
    soft_gate_tau_neg: float = 1.05,
    gamma_k_pos: float = 2.0,
    gamma_lambda_pos: float = 3.0,
    gamma_k_neg: float = 3.0,
    gamma_lambda_neg: float = 2.0,
    trust_region: str = "none",
    trust_region_low: float = 0.2,
    trust_region_high: float = 0.2,
    trust_region_sides: str = "by_advantage",
    off_policy_threshold: float | None = None,
    kl_against: str = "reference",
    kl_gradient: str = "own",
    kl_ratio: str = "none",
    kl_ratio_cap: float | None = None,
    kl_weighted: bool = False,
    entropy_own_mean: bool = False,
    row_extremes: bool = False,
) -> tuple[float, dict[str, float], dict[str, Floats]]:
    """The PPO loss of ``[..., seq_len]``, or with offsets of ``[tokens]``; its statistics; and its
    gradients with respect to ``logp``, and to ``values`` and ``entropy`` where they are given."""
    shape = np.shape(logp)
    old_logp = logp if old_logp is None else old_logp
    given = locals()
    sizes = _sizes(_lists.PPO_LOSS, logp, offsets)
    rows = _rows(shape, offsets)
    for argument in _lists.PPO_LOSS.inputs:
        if option := argument.per_row:
            numbers = given[argument.name]
            given[option] = numbers is not None and is_per_row(np.shape(numbers), rows, shape)
            if given[option]:
                given[argument.name] = np.reshape(numbers, rows)
    inputs = _checked(_lists.PPO_LOSS, given, shape)
    names = [name for name in _lists.PPO_LOSS_GRADIENTS if given[name] is not None]
    gradients = {name: np.empty(shape, np.float32) for name in names}
    stats = np.empty(len(_lib.STATS), np.float64)
    results = (stats, None, *map(gradients.get, _lists.PPO_LOSS_GRADIENTS))
    _call(_lists.ppo_loss, given, *sizes, *inputs, *results)
    named = dict(zip(_lib.STATS, stats.tolist()))
    return named["loss"], named, gradients


class PreferenceOutput(NamedTuple):
    """What :func:`preference_loss` returns."""

    loss: float
    losses: Floats
    rewards: Floats
    stats: dict[str, float]
    grad_logp: Floats


def preference_loss(
    logp: ArrayLike,
    ref_logp: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    average_log_prob: bool = False,
    gamma: float = 0.0,
    alpha: float = 0.0,
    discopop_tau: float = 0.05,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    sft_coef: float = 0.0,
    denominator: float | None = None,
    sft_denominator: float | None = None,
    lengths: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    margin: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    offsets: ArrayLike | None = None,
    kl: float | None = None,
) -> PreferenceOutput:
    """The preference loss of ``[rows, seq_len]``, or with offsets of ``[tokens]``, or of sums
    ``[rows]``, the chosen responses first, with its gradient with respect to ``logp``."""
    given = locals()
    logp = np.asarray(logp)
    found = _lists.responses(logp.shape, None if offsets is None else np.shape(offsets))
    (rows, seq_len), shape = found
    if mask is not None and logp.ndim == 1 and offsets is None:
        given["mask"] = np.asarray(mask)[:, None]
    given["ref_sums"] = None
    of_rows = offsets is None or np.shape(ref_logp) != logp.shape
    if ref_logp is not None and np.ndim(ref_logp) == 1 and of_rows:
        given["ref_logp"], given["ref_sums"] = None, ref_logp
    if labels is not None:
        labels = np.asarray(labels)
        given["labels"] = 2 - 2 * (labels == 0) - (labels == 1)
        given["labels"] = given["labels"].astype(np.uint8)
    given["kl"] = None if kl is None else np.reshape(kl, 1)
    units = _lists.units_of(rows, [given[name] for name in _lists.PREFERENCE.options.kinds])
    inputs = _checked(_lists.PREFERENCE_LOGP, given, logp.shape)
    inputs += _checked(_lists.PREFERENCE_ROWS, given, shape)
    inputs += _checked(_lists.PREFERENCE_UNITS, given, (units,))
    inputs += _checked(_lists.PREFERENCE_KL, given, (1,))
    inputs += _checked(_lists.PREFERENCE_OFFSETS, given, shape)
    stats = np.empty(len(_lib.PREFERENCE_STATS), np.float64)
    arrays = [np.empty(size, np.float32) for size in (units, rows, logp.shape)]
    _call(_lists.preference_loss, given, rows, seq_len, *inputs, stats, None, *arrays)
    named = dict(zip(_lib.PREFERENCE_STATS, stats.tolist()))
    losses, rewards, grad_logp = arrays
    return PreferenceOutput(named["loss"], losses, rewards, named, grad_logp)


def reward_model_loss(
    chosen: ArrayLike,
    rejected: ArrayLike,
    margin: ArrayLike | None = None,
    *,
    weights: ArrayLike | None = None,
    center_coef: float = 0.0,
    denominator: float | None = None,
) -> tuple[float, dict[str, float], dict[str, Floats]]:
    """The reward model's loss of ``[pairs]``; its statistics; and its gradients with respect to
    ``chosen`` and ``rejected``."""
    op, given = _lists.REWARD_MODEL, locals()
    check_shape(op.name, "rejected", np.shape(rejected), np.shape(chosen))
    given["rewards"] = rewards = np.stack((chosen, rejected)).astype(np.float32)
    _lists.check_rewards(rewards.shape)
    pairs = rewards.shape[1]
    inputs = _checked(_lists.REWARD_MODEL_PAIRS, given, (pairs,))
    stats, grad = np.empty(len(_lib.PREFERENCE_STATS), np.float64), np.empty_like(rewards)
    _call(_lists.reward_model_loss, given, pairs, rewards, *inputs, stats, None, None, grad)
    named = dict(zip(_lib.PREFERENCE_STATS, stats.tolist()))
    return named["loss"], named, dict(zip(("chosen", "rejected"), grad))
