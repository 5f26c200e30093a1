"""The ops on NumPy arrays, on the CPU, without PyTorch: results only, no gradients but the loss's.

The functions are those of :mod:`ppo_kernels.functional`, where their arguments are described, with
arrays for tensors. Logits are float32, float16, or bfloat16 of ``ml_dtypes``, and anything else is
converted to float32; so are arrays with a number a token. Contiguous, aligned arrays of the right
dtype are used as they are, others are copied. Results are new float32 arrays.
"""

from __future__ import annotations

from ctypes import byref
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _lib
from ._lib import library

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


def _call(function: str, *arguments: Any) -> None:
    status = getattr(library, function + "_cpu")(*arguments)
    if status:
        _lib.fail(status)


def _pointer(array: NDArray | None) -> int | None:
    return None if array is None else array.ctypes.data


def _check_shape(op: str, name: str, array: NDArray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{op}: `{name}` has shape {list(array.shape)}, expected {list(shape)}")


def _f32(op: str, name: str, array: ArrayLike | None, shape: tuple[int, ...]) -> Floats | None:
    if array is None:
        return None
    array = np.require(array, np.float32, _PLAIN)
    _check_shape(op, name, array, shape)
    return array


def _mask(op: str, name: str, mask: ArrayLike | None, shape: tuple[int, ...]) -> NDArray | None:
    if mask is None:
        return None
    mask = np.asarray(mask)
    if mask.dtype.itemsize != 1:
        mask = mask != 0
    mask = np.require(mask, None, _PLAIN)
    _check_shape(op, name, mask, shape)
    return mask


def _logits(op: str, name: str, logits: ArrayLike) -> tuple[NDArray, int]:
    logits = np.asarray(logits)
    if logits.dtype.name not in _lib.LOGITS or not logits.dtype.isnative:
        logits = logits.astype(np.float32)
    logits = np.require(logits, None, _PLAIN)
    if logits.ndim == 0:
        raise ValueError(f"{op}: `{name}` has shape [], expected [..., vocab]")
    return logits, _lib.LOGITS[logits.dtype.name]


def _logprobs(
    op: str,
    logits: ArrayLike,
    index: ArrayLike,
    temperature: float,
    row_mask: ArrayLike | None,
    ignore_index: int | None,
    with_entropy: bool,
) -> tuple[Floats, Floats | None]:
    logits, logits_type = _logits(op, "logits", logits)
    *rows, vocab = logits.shape
    index = np.asarray(index)
    _check_shape(op, "index", index, tuple(rows))
    index = np.require(index, np.uint32 if index.dtype.name == "uint32" else np.int64, _PLAIN)
    mask = _mask(op, "row_mask", row_mask, tuple(rows))
    if mask is not None:
        ignore_index = np.iinfo(np.int64).min if ignore_index is None else ignore_index
        index = np.where(mask, index.astype(np.int64), ignore_index)
    logp = np.empty(rows, np.float32)
    entropy = np.empty(rows, np.float32) if with_entropy else None
    _call(
        "logprob_forward",
        _pointer(logits),
        logits_type,
        _pointer(index),
        _lib.TARGETS[index.dtype.name],
        index.size,
        vocab,
        byref(_lib.logprob_options(temperature, ignore_index)),
        _pointer(logp),
        _pointer(entropy),
        None,
        None,
    )
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
    op = "selective_log_softmax"
    return _logprobs(op, logits, index, temperature, row_mask, ignore_index, False)[0]


def logprobs_and_entropy(
    logits: ArrayLike,
    index: ArrayLike,
    temperature: float = 1.0,
    row_mask: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
) -> tuple[Floats, Floats]:
    """The same, and the entropy of each row's distribution: ``[...]`` each."""
    op = "logprobs_and_entropy"
    return _logprobs(op, logits, index, temperature, row_mask, ignore_index, True)


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
    op, shape = "token_kl", np.shape(logp)
    logp, ref_logp = _f32(op, "logp", logp, shape), _f32(op, "ref_logp", ref_logp, shape)
    mask = _mask(op, "mask", mask, shape)
    options = byref(_lib.kl_token_options(estimator, log_ratio_clamp, output_clamp))
    kl = np.empty(shape, np.float32)
    inputs = (_pointer(logp), _pointer(ref_logp), _pointer(mask))
    _call("kl_token_forward", *inputs, kl.size, options, _pointer(kl))
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
    op = "full_kl"
    logits, logits_type = _logits(op, "logits", logits)
    ref_logits, _ = _logits(op, "ref_logits", np.asarray(ref_logits, dtype=logits.dtype))
    _check_shape(op, "ref_logits", ref_logits, logits.shape)
    *rows, vocab = logits.shape
    mask = _mask(op, "mask", mask, tuple(rows))
    stats = np.empty((_lib.FULL_KL_STATS, *rows), np.float32)
    _call(
        "kl_full_forward",
        _pointer(logits),
        _pointer(ref_logits),
        logits_type,
        _pointer(mask),
        stats[0].size,
        vocab,
        byref(_lib.kl_full_options(direction, temperature)),
        _pointer(stats),
    )
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
    op, shape = "gae", np.shape(values)
    if not shape:
        raise ValueError(f"{op}: `values` has shape [], expected [..., seq_len]")
    rows = shape[:-1]
    inputs = {
        "values": _f32(op, "values", values, shape),
        "rewards": _f32(op, "rewards", rewards, shape),
        "kl": _f32(op, "kl", kl, shape),
        "scores": _f32(op, "scores", scores, rows),
        "has_eos": _mask(op, "has_eos", has_eos, rows),
        "mask": _mask(op, "mask", mask, shape),
        "dones": _mask(op, "dones", dones, shape),
        "bootstrap": _f32(op, "bootstrap", bootstrap, rows),
    }
    options = _lib.gae_options(
        gamma,
        lam,
        value_lam,
        kl_coef,
        score_mean,
        score_std,
        score_clip,
        missing_eos_value,
        mask_mode,
        score_placement,
        score_order,
        missing_eos,
    )
    outputs = GaeOutput(
        np.empty(shape, np.float32),
        np.empty(shape, np.float32),
        np.empty(shape, np.float32) if return_rewards else None,
        np.empty(3, np.float64),
    )
    outputs_of_c = _lib.GaeOutputs(**{k: _pointer(v) for k, v in outputs._asdict().items()})
    _call(
        "gae",
        byref(_lib.GaeInputs(**{name: _pointer(array) for name, array in inputs.items()})),
        int(np.prod(rows)),
        shape[-1],
        byref(options),
        byref(outputs_of_c),
    )
    if whiten:
        whitened = masked_whiten(outputs.advantages, inputs["mask"], moments=outputs.moments)
        return outputs._replace(advantages=whitened)
    return outputs


def masked_moments(values: ArrayLike, mask: ArrayLike | None = None) -> NDArray[np.float64]:
    """Count, mean and sum of squared deviations of the unmasked values: ``[3]``."""
    op, shape = "masked_moments", np.shape(values)
    values, mask = _f32(op, "values", values, shape), _mask(op, "mask", mask, shape)
    moments = np.empty(3, np.float64)
    _call("whiten_moments", _pointer(values), _pointer(mask), values.size, _pointer(moments))
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
    op, shape = "masked_whiten", np.shape(values)
    values, mask = _f32(op, "values", values, shape), _mask(op, "mask", mask, shape)
    moments = masked_moments(values, mask) if moments is None else moments
    moments = np.require(moments, np.float64, _PLAIN)
    _check_shape(op, "moments", moments, (3,))
    whitened = np.empty(shape, np.float32)
    _call(
        "whiten_forward",
        _pointer(values),
        _pointer(mask),
        values.size,
        byref(_lib.whiten_options(shift_mean, unbiased, eps, eps_placement)),
        _pointer(moments),
        _pointer(whitened),
    )
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
    op, shape = "ppo_loss", np.shape(logp)
    if not shape:
        raise ValueError(f"{op}: `logp` has shape [], expected [..., seq_len]")
    numbers = {
        "logp": logp,
        "old_logp": old_logp,
        "advantages": advantages,
        "values": values,
        "old_values": old_values,
        "returns": returns,
        "entropy": entropy,
        "ref_logp": ref_logp,
    }
    inputs = {name: _f32(op, name, array, shape) for name, array in numbers.items()}
    inputs["mask"] = _mask(op, "mask", mask, shape)
    options = _lib.ppo_loss_options(
        clip_range,
        clip_range_high,
        dual_clip,
        log_ratio_clamp,
        value_clip_range,
        value_coef,
        entropy_coef,
        kl_coef,
        kl_estimator,
        kl_log_ratio_clamp,
        kl_output_clamp,
        aggregation,
        aggregation_divisor,
        denominator,
        clip_fraction,
    )
    names = [name for name in ("logp", "values", "entropy") if inputs[name] is not None]
    gradients = {name: np.empty(shape, np.float32) for name in names}
    stats = np.empty(len(_lib.STATS), np.float64)
    gradients_of_c = _lib.PpoLossGradients(**{k: _pointer(v) for k, v in gradients.items()})
    _call(
        "ppo_loss",
        byref(_lib.PpoLossInputs(**{name: _pointer(array) for name, array in inputs.items()})),
        int(np.prod(shape[:-1])),
        shape[-1],
        byref(options),
        _pointer(stats),
        byref(gradients_of_c),
    )
    named = dict(zip(_lib.STATS, stats.tolist()))
    return named["loss"], named, gradients
