"""The C library: where it is, the types of its functions, its structs, its errors as exceptions.

It mirrors ``include/ppo_kernels.h``, which says what every function does. Addresses are integers,
or ``None`` for what is not there. A function that fails leaves a text, which :func:`fail` raises.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_double, c_int32, c_int64, c_size_t, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

# Statuses that say that an argument was wrong; all others are the library's, the machine's, or, as
# that of what is written over something else, this package's: results are memory of their own.
_SHAPE, _DTYPE, _OPTION, _TARGET, _MASK, _NULL_POINTER, _MISALIGNED = range(1, 8)

NONE = -1.0  # stands for an option that is left out

# Element types of logits and of token ids, by the names that NumPy and PyTorch give them.
LOGITS = {"float32": 0, "float16": 1, "bfloat16": 2}
TARGETS = {"int32": 0, "uint32": 0, "int64": 1}

STATS = (
    "loss",
    "policy_loss",
    "value_loss",
    "clip_fraction",
    "lower_clip_fraction",
    "value_clip_fraction",
    "approx_kl_k1",
    "approx_kl_k2",
    "approx_kl_k3",
    "ratio_mean",
    "ratio_var",
    "ratio_min",
    "ratio_max",
    "entropy_mean",
    "kl_mean",
    "advantage_mean",
    "return_mean",
    "value_mean",
    "explained_variance",
    "tokens",
)
FULL_KL_STATS = 6

_ESTIMATORS = ("k1", "abs", "k2", "k3", "k3_straight_through")
_DIRECTIONS = ("forward", "reverse")
_MASK_MODES = ("carry", "multiply")
_SCORE_PLACEMENTS = ("last", "after_last")
_SCORE_ORDERS = ("scale_then_clip", "clip_then_scale")
_MISSING_EOS = ("keep", "subtract", "replace")
_EPS_PLACEMENTS = ("variance", "std")
_AGGREGATIONS = (
    "token_mean",
    "seq_mean_token_sum",
    "seq_mean_token_mean",
    "seq_mean_token_sum_norm",
    "constant",
)
_CLIP_FRACTIONS = ("clipped_branch", "ratio_outside")


class Struct(ctypes.Structure):
    """One that begins with its own size."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(struct_size=ctypes.sizeof(self), **fields)


def _struct(name: str, **types: Any) -> type[Struct]:
    return type(name, (Struct,), {"_fields_": [("struct_size", c_size_t), *types.items()]})


LogprobOptions = _struct(
    "LogprobOptions",
    temperature=c_double,
    ignore_index=c_int64,
    has_ignore_index=c_int32,
    reserved=c_int32,
)
KlTokenOptions = _struct(
    "KlTokenOptions",
    log_ratio_clamp=c_double,
    output_clamp=c_double,
    estimator=c_int32,
    reserved=c_int32,
)
KlFullOptions = _struct("KlFullOptions", temperature=c_double, direction=c_int32, reserved=c_int32)
GaeOptions = _struct(
    "GaeOptions",
    gamma=c_double,
    lam=c_double,
    value_lam=c_double,
    kl_coef=c_double,
    score_mean=c_double,
    score_std=c_double,
    score_clip=c_double,
    missing_eos_value=c_double,
    mask_mode=c_int32,
    score_placement=c_int32,
    score_order=c_int32,
    missing_eos=c_int32,
)
GaeInputs = _struct(
    "GaeInputs",
    values=c_void_p,
    rewards=c_void_p,
    kl=c_void_p,
    scores=c_void_p,
    has_eos=c_void_p,
    mask=c_void_p,
    dones=c_void_p,
    bootstrap=c_void_p,
)
GaeOutputs = _struct(
    "GaeOutputs", advantages=c_void_p, returns=c_void_p, rewards=c_void_p, moments=c_void_p
)
WhitenOptions = _struct(
    "WhitenOptions",
    eps=c_double,
    eps_placement=c_int32,
    unbiased=c_int32,
    shift_mean=c_int32,
    reserved=c_int32,
)
PpoLossOptions = _struct(
    "PpoLossOptions",
    clip_range=c_double,
    clip_range_high=c_double,
    dual_clip=c_double,
    log_ratio_clamp=c_double,
    value_clip_range=c_double,
    value_coef=c_double,
    entropy_coef=c_double,
    kl_coef=c_double,
    kl_log_ratio_clamp=c_double,
    kl_output_clamp=c_double,
    aggregation_divisor=c_double,
    denominator=c_double,
    aggregation=c_int32,
    clip_fraction=c_int32,
    kl_estimator=c_int32,
    reserved=c_int32,
)
PpoLossInputs = _struct(
    "PpoLossInputs",
    logp=c_void_p,
    old_logp=c_void_p,
    advantages=c_void_p,
    values=c_void_p,
    old_values=c_void_p,
    returns=c_void_p,
    entropy=c_void_p,
    ref_logp=c_void_p,
    mask=c_void_p,
)
PpoLossGradients = _struct("PpoLossGradients", logp=c_void_p, values=c_void_p, entropy=c_void_p)


# --- Options: checked and made once for each set of values, then kept. ---


def _choose(op: str, option: str, value: str, choices: tuple[str, ...]) -> int:
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{op}: option `{option}` is {value!r}, expected one of {expected}")
    return choices.index(value)


def _optional(op: str, option: str, value: float | None) -> float:
    if value is None:
        return NONE
    if value == NONE:  # which must not be taken for "left out"
        raise ValueError(f"{op}: option `{option}` is {value}, expected None or 0 and above")
    return value


@lru_cache(maxsize=256)
def logprob_options(temperature: float, ignore_index: int | None) -> Struct:
    has_index = ignore_index is not None
    return LogprobOptions(
        temperature=temperature, ignore_index=ignore_index or 0, has_ignore_index=has_index
    )


@lru_cache(maxsize=256)
def kl_token_options(
    estimator: str, log_ratio_clamp: float | None, output_clamp: float | None
) -> Struct:
    op = "token_kl"
    return KlTokenOptions(
        log_ratio_clamp=_optional(op, "log_ratio_clamp", log_ratio_clamp),
        output_clamp=_optional(op, "output_clamp", output_clamp),
        estimator=_choose(op, "estimator", estimator, _ESTIMATORS),
    )


@lru_cache(maxsize=256)
def kl_full_options(direction: str, temperature: float) -> Struct:
    return KlFullOptions(
        temperature=temperature,
        direction=_choose("full_kl", "direction", direction, _DIRECTIONS),
    )


@lru_cache(maxsize=256)
def gae_options(
    gamma: float,
    lam: float,
    value_lam: float | None,
    kl_coef: float,
    score_mean: float,
    score_std: float | None,
    score_clip: float | None,
    missing_eos_value: float,
    mask_mode: str,
    score_placement: str,
    score_order: str,
    missing_eos: str,
) -> Struct:
    op = "gae"
    return GaeOptions(
        gamma=gamma,
        lam=lam,
        value_lam=_optional(op, "value_lam", value_lam),
        kl_coef=kl_coef,
        score_mean=score_mean,
        score_std=_optional(op, "score_std", score_std),
        score_clip=_optional(op, "score_clip", score_clip),
        missing_eos_value=missing_eos_value,
        mask_mode=_choose(op, "mask_mode", mask_mode, _MASK_MODES),
        score_placement=_choose(op, "score_placement", score_placement, _SCORE_PLACEMENTS),
        score_order=_choose(op, "score_order", score_order, _SCORE_ORDERS),
        missing_eos=_choose(op, "missing_eos", missing_eos, _MISSING_EOS),
    )


@lru_cache(maxsize=256)
def whiten_options(shift_mean: bool, unbiased: bool, eps: float, eps_placement: str) -> Struct:
    return WhitenOptions(
        eps=eps,
        eps_placement=_choose("masked_whiten", "eps_placement", eps_placement, _EPS_PLACEMENTS),
        unbiased=unbiased,
        shift_mean=shift_mean,
    )


@lru_cache(maxsize=256)
def ppo_loss_options(
    clip_range: float,
    clip_range_high: float | None,
    dual_clip: float | None,
    log_ratio_clamp: float | None,
    value_clip_range: float | None,
    value_coef: float,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: str,
    kl_log_ratio_clamp: float | None,
    kl_output_clamp: float | None,
    aggregation: str,
    aggregation_divisor: float | None,
    denominator: float | None,
    clip_fraction: str,
) -> Struct:
    op = "ppo_loss"
    return PpoLossOptions(
        clip_range=clip_range,
        clip_range_high=_optional(op, "clip_range_high", clip_range_high),
        dual_clip=_optional(op, "dual_clip", dual_clip),
        log_ratio_clamp=_optional(op, "log_ratio_clamp", log_ratio_clamp),
        value_clip_range=_optional(op, "value_clip_range", value_clip_range),
        value_coef=value_coef,
        entropy_coef=entropy_coef,
        kl_coef=kl_coef,
        kl_log_ratio_clamp=_optional(op, "kl_log_ratio_clamp", kl_log_ratio_clamp),
        kl_output_clamp=_optional(op, "kl_output_clamp", kl_output_clamp),
        aggregation_divisor=aggregation_divisor or 0.0,
        denominator=_optional(op, "denominator", denominator),
        aggregation=_choose(op, "aggregation", aggregation, _AGGREGATIONS),
        clip_fraction=_choose(op, "clip_fraction", clip_fraction, _CLIP_FRACTIONS),
        kl_estimator=_choose(op, "kl_estimator", kl_estimator, _ESTIMATORS),
    )


# --- Functions ---

# The arguments of each _cpu function, as the header has them: p a pointer, z a size_t, i an
# int32_t; and of those the ones that the size of the workspace of its _cuda twin depends on.
_ARGUMENTS = {
    "logprob_forward": ("pipizzppppp", "izz"),
    "logprob_backward": ("pipizzppppppp", "izz"),
    "kl_token_forward": ("pppzpp", "z"),
    "kl_token_backward": ("pppzpppp", "z"),
    "kl_full_forward": ("ppipzzpp", "izz"),
    "kl_full_backward": ("ppipzzppppp", "izz"),
    "gae": ("pzzpp", "zz"),
    "whiten_moments": ("ppzp", "z"),
    "whiten_forward": ("ppzppp", "z"),
    "whiten_backward": ("ppzpppp", "z"),
    "whiten_with_backward": ("pzpppp", "z"),
    "ppo_loss": ("pzzppp", "zzp"),
    "ppo_loss_scale": ("pzpp", "z"),
}
_TYPES = {"p": c_void_p, "z": c_size_t, "i": c_int32}


def signatures() -> dict[str, str]:
    """The arguments of every function, by its name without the prefix, a letter for each."""
    found = {}
    for name, (arguments, sizes) in _ARGUMENTS.items():
        found[f"{name}_cpu"] = arguments
        found[f"{name}_cuda"] = arguments + "pzp"  # workspace, its size, stream
        found[f"{name}_cuda_workspace_size"] = sizes + "pp"  # stream, where to write the size
    return found


def _path() -> Path:
    if given := os.environ.get("PPO_KERNELS_LIB"):
        return Path(given)
    names = ("libppo_kernels.so", "libppo_kernels.dylib", "ppo_kernels.dll")
    for name in names:
        path = Path(__file__).with_name(name)
        if path.exists():
            return path
    raise ImportError(
        "ppo_kernels: the compiled library is not in the package. Install it with "
        "`pip install ./python`, or name a library in PPO_KERNELS_LIB"
    )


class _Library:
    """The functions, without the prefix."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(_path()))
        self._library.ppok_last_error.restype = ctypes.c_char_p
        self._library.ppok_version_string.restype = ctypes.c_char_p
        for name, letters in signatures().items():
            function = self._library[f"ppok_{name}"]
            function.argtypes = [_TYPES[letter] for letter in letters]
            function.restype = c_int32
            setattr(self, name, function)

    def last_error(self) -> str:
        return self._library.ppok_last_error().decode()

    def version(self) -> str:
        return self._library.ppok_version_string().decode()


library = _Library()


def fail(status: int) -> NoReturn:
    """Raises what the thread's last call said: the argument was wrong, or something else was."""
    wrong_argument = _SHAPE <= status <= _MISALIGNED
    raise (ValueError if wrong_argument else RuntimeError)(library.last_error())
