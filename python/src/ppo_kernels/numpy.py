"""The ops on NumPy arrays, on the CPU, without PyTorch: results only, no gradients but the loss's.

The functions are those of :mod:`ppo_kernels.functional`, where their arguments are described, with
arrays for tensors. Logits are float32, float16, or bfloat16 of ``ml_dtypes``, and anything else is
converted to float32; so are arrays with a number a token. Contiguous, aligned arrays of the right
dtype are used as they are, others are copied. Results are new float32 arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _header, _lib, _lists
from ._lib import Pass
from ._lists import FLAGS, Argument

__all__ = [
    "GaeOutput",
    "full_kl",
    "gae",
    "logprobs_and_entropy",
    "masked_moments",
    "masked_whiten",
    "ppo_loss",
    "selective_log_softmax",
    "token_kl",
]

Floats = NDArray[np.float32]

_PLAIN = ("C_CONTIGUOUS", "ALIGNED", "ENSUREARRAY")  # what the library takes; else a copy is made


def _call(function: Pass, *values: NDArray | int | None) -> None:
    """Calls the library with values in the order of the pass, arrays by their addresses."""
    status = function.cpu(function.arguments(*map(_address, values)))
    if status:
        _lib.fail(status)


def _address(value: NDArray | int | None) -> int:
    return value.ctypes.data if isinstance(value, np.ndarray) else value or 0


def _check_shape(op: str, name: str, array: NDArray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{op}: `{name}` has shape {list(array.shape)}, expected {list(shape)}")


def _flags(mask: ArrayLike) -> NDArray:
    mask = np.asarray(mask)
    return np.require(mask if mask.dtype.itemsize == 1 else mask != 0, None, _PLAIN)


def _checked(
    op: str, inputs: Iterable[Argument], given: Mapping[str, Any], shape: tuple[int, ...]
) -> list[NDArray | None]:
    """An op's inputs of those given, as the library takes them, for tokens of a shape."""
    checked = []
    for name, _, kind, per_row in inputs:
        array = given[name]
        if array is not None:
            array = _flags(array) if kind == FLAGS else np.require(array, np.float32, _PLAIN)
            _check_shape(op, name, array, shape[:-1] if per_row else shape)
        checked.append(array)
    return checked


def _sizes(op: str, name: str, array: ArrayLike) -> tuple[int, int]:
    """How many rows of tokens, and tokens in each."""
    shape = np.shape(array)
    if not shape:
        raise ValueError(f"{op}: `{name}` has shape [], expected [..., seq_len]")
    return int(np.prod(shape[:-1])), shape[-1]


def _logits(op: str, name: str, logits: ArrayLike) -> tuple[NDArray, int]:
    logits = np.asarray(logits)
    if logits.dtype.name not in _lib.LOGITS or not logits.dtype.isnative:
        logits = logits.astype(np.float32)
    logits = np.require(logits, None, _PLAIN)
    if logits.ndim == 0:
        raise ValueError(f"{op}: `{name}` has shape [], expected [..., vocab]")
    return logits, _lib.LOGITS[logits.dtype.name]


def _logprobs(op: str, with_entropy: bool, *arguments: Any) -> tuple[Floats, Floats | None]:
    logits, index, temperature, row_mask, ignore_index = arguments
    logits, logits_type = _logits(op, "logits", logits)
    *rows, vocab = logits.shape
    index = np.asarray(index)
    _check_shape(op, "index", index, tuple(rows))
    index = np.require(index, np.uint32 if index.dtype.name == "uint32" else np.int64, _PLAIN)
    if row_mask is not None:
        mask = _flags(row_mask)
        _check_shape(op, "row_mask", mask, tuple(rows))
        ignore_index = np.iinfo(np.int64).min if ignore_index is None else ignore_index
        index = np.where(mask, index.astype(np.int64), ignore_index)
    logp = np.empty(rows, np.float32)
    entropy = np.empty(rows, np.float32) if with_entropy else None
    inputs = (index.size, vocab, logits_type, _lib.TARGETS[index.dtype.name], logits, index)
    options = _lists.logprob_options.address(temperature, ignore_index)
    _call(_lists.logprob_forward, *inputs, None, None, entropy, options, logp)
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
    arguments = (logits, index, temperature, row_mask, ignore_index)
    return _logprobs("selective_log_softmax", False, *arguments)[0]


def logprobs_and_entropy(
    logits: ArrayLike,
    index: ArrayLike,
    temperature: float = 1.0,
    row_mask: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
) -> tuple[Floats, Floats]:
    """The same, and the entropy of each row's distribution: ``[...]`` each."""
    arguments = (logits, index, temperature, row_mask, ignore_index)
    return _logprobs("logprobs_and_entropy", True, *arguments)


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
    given, shape = locals(), np.shape(logp)
    inputs = _checked("token_kl", _lists.TOKEN_KL, given, shape)
    kl = np.empty(shape, np.float32)
    options = _lists.token_kl_options.among(given)
    _call(_lists.token_kl_forward, kl.size, *inputs, options, kl)
    return kl


def full_kl(
    logits: ArrayLike,
    ref_logits: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    direction: str = "forward",
    temperature: float = 1.0,
) -> Floats:
    """Exact KL between rows of logits ``[..., vocab]``: ``[...]``."""
    op, options = "full_kl", _lists.full_kl_options.among(locals())
    logits, logits_type = _logits(op, "logits", logits)
    ref_logits, _ = _logits(op, "ref_logits", np.asarray(ref_logits, dtype=logits.dtype))
    _check_shape(op, "ref_logits", ref_logits, logits.shape)
    *rows, vocab = logits.shape
    mask = _checked(op, _lists.FULL_KL[2:], locals(), logits.shape)
    stats = np.empty((_header.KL_FULL_STATS, *rows), np.float32)
    inputs = (stats[0].size, vocab, logits_type, logits, ref_logits, *mask)
    _call(_lists.full_kl_forward, *inputs, options, stats)
    return stats[0].copy()


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
    score_clip: float | None = None,
    score_order: str = "scale_then_clip",
    has_eos: ArrayLike | None = None,
    missing_eos: str = "keep",
    missing_eos_value: float = 0.0,
    dones: ArrayLike | None = None,
    bootstrap: ArrayLike | None = None,
    mask_mode: str = "carry",
    whiten: bool = False,
    return_rewards: bool = False,
) -> GaeOutput:
    """Rewards, advantages and returns of ``[..., seq_len]``; of scores, has_eos and bootstrap there
    is one a row, ``[...]``."""
    given, shape = locals(), np.shape(values)
    sizes = _sizes("gae", "values", values)
    inputs = _checked("gae", _lists.GAE, given, shape)
    outputs = GaeOutput(
        np.empty(shape, np.float32),
        np.empty(shape, np.float32),
        np.empty(shape, np.float32) if return_rewards else None,
        np.empty(3, np.float64),
    )
    _call(_lists.gae, *sizes, *inputs, _lists.gae_options.among(given), *outputs)
    if whiten:
        whitened = masked_whiten(outputs.advantages, mask, moments=outputs.moments)
        return outputs._replace(advantages=whitened)
    return outputs


def masked_moments(values: ArrayLike, mask: ArrayLike | None = None) -> NDArray[np.float64]:
    """Count, mean and sum of squared deviations of the unmasked values: ``[3]``."""
    inputs = _checked("masked_moments", _lists.WHITEN, locals(), np.shape(values))
    moments = np.empty(3, np.float64)
    _call(_lists.whiten_moments, inputs[0].size, *inputs, moments)
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
    op, options = "masked_whiten", _lists.whiten_options.among(locals())
    inputs = _checked(op, _lists.WHITEN, locals(), np.shape(values))
    moments = masked_moments(*inputs) if moments is None else moments
    moments = np.require(moments, np.float64, _PLAIN)
    _check_shape(op, "moments", moments, (3,))
    whitened = np.empty(inputs[0].shape, np.float32)
    _call(_lists.whiten_forward, whitened.size, *inputs, moments, options, whitened)
    return whitened


def ppo_loss(
    logp: ArrayLike,
    old_logp: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    values: ArrayLike | None = None,
    old_values: ArrayLike | None = None,
    returns: ArrayLike | None = None,
    entropy: ArrayLike | None = None,
    ref_logp: ArrayLike | None = None,
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
) -> tuple[float, dict[str, float], dict[str, Floats]]:
    """The PPO loss of ``[..., seq_len]``; its statistics; and its gradients with respect to
    ``logp``, and to ``values`` and ``entropy`` where they are given."""
    given, shape = locals(), np.shape(logp)
    sizes = _sizes("ppo_loss", "logp", logp)
    inputs = _checked("ppo_loss", _lists.PPO_LOSS, given, shape)
    names = [name for name in _lists.PPO_LOSS_GRADIENTS if given[name] is not None]
    gradients = {name: np.empty(shape, np.float32) for name in names}
    stats = np.empty(len(_lib.STATS), np.float64)
    results = (stats, None, *map(gradients.get, _lists.PPO_LOSS_GRADIENTS))
    _call(_lists.ppo_loss, *sizes, *inputs, _lists.ppo_loss_options.among(given), *results)
    named = dict(zip(_lib.STATS, stats.tolist()))
    return named["loss"], named, gradients
