"""Fused kernels for the token-level arithmetic of PPO.

``ppo_kernels.NAME`` is a function on PyTorch tensors, of :mod:`ppo_kernels.functional`;
:mod:`ppo_kernels.numpy` has the same on NumPy arrays, and needs no PyTorch. The two are imported
when they are first asked for. :mod:`ppo_kernels.adapters` puts the functions in the place of those
of TRL, verl and OpenRLHF.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .functional import (
        ESTIMATORS,
        AdvantagesOutput,
        CorrectionOutput,
        GaeOutput,
        LinearOutput,
        LinearPpoLossOutput,
        PreferenceOutput,
        correction,
        full_kl,
        gae,
        gdpo_advantages,
        linear_logprobs,
        linear_ppo_loss,
        logprobs_and_entropy,
        masked_moments,
        masked_whiten,
        outcome_advantages,
        ppo_loss,
        preference_loss,
        reward_model_loss,
        selective_log_softmax,
        targets_from_tokens,
        token_kl,
    )

__all__ = [
    "ESTIMATORS",
    "AdvantagesOutput",
    "CorrectionOutput",
    "GaeOutput",
    "LinearOutput",
    "LinearPpoLossOutput",
    "PreferenceOutput",
    "TokenBaselineOutput",
    "correction",
    "full_kl",
    "gae",
    "gdpo_advantages",
    "library_version",
    "linear_logprobs",
    "linear_ppo_loss",
    "logprobs_and_entropy",
    "masked_moments",
    "masked_whiten",
    "named_correction",
    "named_loss",
    "num_threads",
    "optimal_token_baseline",
    "outcome_advantages",
    "ppo_loss",
    "preference_loss",
    "reward_model_loss",
    "selective_log_softmax",
    "targets_from_tokens",
    "token_kl",
]
# Those on tensors, most of which are those on arrays too.
_LIBRARY = ("library_version", "named_correction", "named_loss", "num_threads")
_FUNCTIONS = [name for name in __all__ if name not in _LIBRARY]


def library_version() -> str:
    """The version of the compiled library."""
    from ._lib import version_string

    return version_string().decode()


def named_correction(name: str) -> dict[str, Any]:
    """Options of :func:`correction` that make it the one of a name, with bounds that are usual:
    ``correction(old_logp, rollout_logp, mask, **named_correction("icepop"))``.

    Args:
        name: ``tis`` (a token's weight, 2 at most), ``sequence_tis`` (its row's), ``icepop``
            (tokens outside 0.5 .. 5 have weight 0), ``sequence_mask`` (TRL's default: rows above 3
            do) or ``geometric_mask`` (NeMo's ``seq-mask-tis``: rows whose mean is outside
            0.999 .. 1.002 are rejected).

    Returns:
        Those that differ from the defaults, by name, to be changed at will.
    """
    from . import _lists

    return _lists.CORRECTION.options.named(name)


def named_loss(name: str) -> dict[str, Any]:
    """Options of :func:`ppo_loss` that make it the loss of a name, as its paper or the systems that
    have it do: ``ppo_loss(logp, old_logp, advantages, mask, **named_loss("gspo"))``.

    Args:
        name: ``ppo``, ``dapo``, ``grpo``, ``dr_grpo``, ``bnpo``, ``luspo``, ``rloo``, ``gspo``,
            ``gspo_token``, ``gmpo``, ``cispo``, ``dppo``, ``sapo``, ``vespo``, ``reinforce`` or
            ``gpg``.

    Returns:
        Those that differ from the defaults, by name, to be changed at will. The KL term is off in
        all of them; ``kl_coef`` turns it on.
    """
    from . import _lists

    return _lists.PPO_LOSS.options.named(name)


def num_threads() -> int:
    """How many threads a call on the CPU works with: torch's own, and as many as
    ``torch.get_num_threads()``, once the functions on tensors have been imported; before that those
    of a pool."""
    from . import _lib

    return _lib.num_threads()


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'ppo_kernels' has no attribute {name!r}")
    from . import functional

    globals().update({name: getattr(functional, name) for name in _FUNCTIONS})
    return globals()[name]
