"""Puts the functions of this package in the place of those of TRL, verl and OpenRLHF.

One call before training starts::

    import ppo_kernels.adapters
    ppo_kernels.adapters.patch_trl()     # or patch_verl(), or patch_openrlhf()

Every module of the package that has imported a function gets ours in its place, and modules that
are imported later get it as well. What is returned undoes all of that: ``patch.undo()``, or at the
end of ``with patch_trl(): ...``.

Ours take over where they do the same: for float32, float16 and bfloat16 tensors on CPU and CUDA,
and the options that they have; everything else goes on to the package's own function. Differences
are that log-probabilities and entropies are float32 also for half-precision logits, that masked
positions of advantages, returns and whitened values are 0, and what :mod:`.functional` says about
wrong arguments. Logits are never changed in place.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import functional

__all__ = ["Patch", "patch_openrlhf", "patch_trl", "patch_verl"]


class Patch:
    """A package with some of its functions replaced, until :meth:`undo` or the end of ``with``."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._replaced: list[tuple[Callable, Callable]] = []
        self._methods: list[tuple[type, str, Callable]] = []

    def function(self, module: ModuleType, name: str, make: Callable[[Callable], Callable]) -> None:
        """Replaces a function by what ``make`` makes of it, if the package's version has it."""
        theirs = getattr(module, name, None)
        if theirs is not None:
            ours = functools.wraps(theirs)(make(theirs))
            self._replaced.append((theirs, ours))
            self._swap(theirs, ours)

    def method(self, owner: type, name: str, make: Callable[[Callable], Callable]) -> None:
        theirs = getattr(owner, name, None)
        if theirs is not None:
            self._methods.append((owner, name, theirs))
            setattr(owner, name, functools.wraps(theirs)(make(theirs)))

    def _swap(self, old: Callable, new: Callable) -> None:
        """In every loaded module of the package, and in registries such as verl's."""
        for name, module in list(sys.modules.items()):
            if name != self._package and not name.startswith(self._package + "."):
                continue
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)
                elif type(value) is dict:
                    value.update({key: new for key, entry in value.items() if entry is old})

    def undo(self) -> None:
        """Puts the package's own functions back."""
        while self._replaced:
            theirs, ours = self._replaced.pop()
            self._swap(ours, theirs)
        while self._methods:
            setattr(*self._methods.pop())

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _ours(*tensors: Tensor) -> bool:
    """Whether tensors are of the dtypes and on the devices that the kernels are for."""
    return all(tensor.dtype in _DTYPES and (tensor.is_cpu or tensor.is_cuda) for tensor in tensors)


def _entropy(logits: Tensor) -> Tensor:
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return functional.logprobs_and_entropy(logits, index)[1]


def patch_trl() -> Patch:
    """TRL's ``selective_log_softmax``, ``entropy_from_logits`` and, where it has it,
    ``selective_log_softmax_and_entropy``, of ``trl.trainer.utils``."""
    utils = importlib.import_module("trl.trainer.utils")

    def selective_log_softmax(theirs: Callable) -> Callable:
        def ours(logits: Tensor, index: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if _ours(logits) and (index.dim() < logits.dim() or not (args[1:] or kwargs)):
                return functional.selective_log_softmax(logits, index, *args, **kwargs)
            return theirs(logits, index, *args, **kwargs)

        return ours

    def entropy_from_logits(theirs: Callable) -> Callable:
        def ours(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return _entropy(logits) if _ours(logits) else theirs(logits, *args, **kwargs)

        return ours

    def selective_log_softmax_and_entropy(theirs: Callable) -> Callable:
        def ours(
            logits: Tensor,
            index: Tensor,
            entropy_requires_grad: bool = True,
            temperature: float = 1.0,
            row_mask: Tensor | None = None,
        ) -> tuple[Tensor, Tensor]:
            if not _ours(logits) or index.dim() == logits.dim():
                return theirs(logits, index, entropy_requires_grad, temperature, row_mask)
            logp, entropy = functional.logprobs_and_entropy(logits, index, temperature, row_mask)
            return logp, entropy if entropy_requires_grad else entropy.detach()

        return ours

    patch = Patch("trl")
    patch.function(utils, "selective_log_softmax", selective_log_softmax)
    patch.function(utils, "entropy_from_logits", entropy_from_logits)
    patch.function(utils, "selective_log_softmax_and_entropy", selective_log_softmax_and_entropy)
    return patch


_VERL_KL = {
    "kl": "k1",
    "k1": "k1",
    "abs": "abs",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
}
_VERL_AGGREGATION = {
    "token-mean": ("token_mean", "batch_num_tokens"),
    "seq-mean-token-sum": ("seq_mean_token_sum", "global_batch_size"),
    "seq-mean-token-mean": ("seq_mean_token_mean", "global_batch_size"),
}


def patch_verl() -> Patch:
    """verl's ``logprobs_from_logits``, ``logprobs_from_logits_v2``, ``entropy_from_logits``,
    ``entropy_from_logits_with_chunking`` and ``masked_whiten`` of ``verl.utils.torch_functional``;
    ``compute_gae_advantage_return``, ``kl_penalty`` and ``compute_policy_loss_vanilla`` of
    ``verl.trainer.ppo.core_algos``, in its registries too."""
    torch_functional = importlib.import_module("verl.utils.torch_functional")
    core_algos = importlib.import_module("verl.trainer.ppo.core_algos")

    def logprobs(theirs: Callable) -> Callable:
        def ours(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if _ours(logits):
                return functional.selective_log_softmax(logits, labels)
            return theirs(logits, labels, *args, **kwargs)

        return ours

    def entropy(theirs: Callable) -> Callable:
        def ours(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return _entropy(logits) if _ours(logits) else theirs(logits, *args, **kwargs)

        return ours

    def masked_whiten(theirs: Callable) -> Callable:
        def ours(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
            function = functional.masked_whiten if _ours(values) else theirs
            return function(values, mask, shift_mean)

        return ours

    def gae(theirs: Callable) -> Callable:
        def ours(
            token_level_rewards: Tensor,
            values: Tensor,
            response_mask: Tensor,
            gamma: float | Tensor,
            lam: float | Tensor,
        ) -> tuple[Tensor, Tensor]:
            if not _ours(token_level_rewards, values):
                return theirs(token_level_rewards, values, response_mask, gamma, lam)
            gamma, lam = float(gamma), float(lam)
            return functional.gae(
                values, token_level_rewards, response_mask, gamma=gamma, lam=lam, whiten=True
            )[:2]

        return ours

    def kl_penalty(theirs: Callable) -> Callable:
        def ours(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
            straight_through = kl_penalty.endswith("+")
            estimator = _VERL_KL.get(kl_penalty.removesuffix("+"))
            if estimator is None or not _ours(logprob, ref_logprob):
                return theirs(logprob, ref_logprob, kl_penalty)
            clamps = {"log_ratio_clamp": 20.0, "output_clamp": 10.0} if estimator == "k3" else {}
            kl = functional.token_kl(logprob, ref_logprob, estimator=estimator, **clamps)
            if not straight_through or estimator == "k2":
                return kl
            gradient = functional.token_kl(logprob, ref_logprob, estimator="k2")
            return gradient - gradient.detach() + kl.detach()

        return ours

    def policy_loss(theirs: Callable) -> Callable:
        def ours(
            old_log_prob: Tensor,
            log_prob: Tensor,
            advantages: Tensor,
            response_mask: Tensor,
            loss_agg_mode: str = "token-mean",
            config: Any = None,
            rollout_is_weights: Tensor | None = None,
        ) -> tuple[Tensor, dict[str, Any]]:
            arguments = (old_log_prob, log_prob, advantages, response_mask)
            if (
                loss_agg_mode not in _VERL_AGGREGATION
                or config is None
                or rollout_is_weights is not None
                or not _ours(old_log_prob, log_prob, advantages)
                or not response_mask.any()  # no mean, but a loss where the batch's total is known
            ):
                return theirs(*arguments, loss_agg_mode, config, rollout_is_weights)
            aggregation, total = _VERL_AGGREGATION[loss_agg_mode]
            batch = config.global_batch_info
            ranks, total = batch.get("dp_size", 1), batch.get(total)
            if total is None and ranks > 1:
                return theirs(*arguments, loss_agg_mode, config, rollout_is_weights)
            low, high = config.clip_ratio_low, config.clip_ratio_high
            loss, stats = functional.ppo_loss(
                log_prob,
                old_log_prob,
                advantages,
                response_mask,
                clip_range=config.clip_ratio if low is None else low,
                clip_range_high=config.clip_ratio if high is None else high,
                dual_clip=config.get("clip_ratio_c", 3.0),
                aggregation=aggregation,
                denominator=None if total is None else float(total) / ranks,
            )
            names = ("clip_fraction", "approx_kl_k1", "lower_clip_fraction")
            clipped, kl, lower = torch.stack([stats[name] for name in names]).tolist()
            return loss, {
                "actor/pg_clipfrac": clipped,
                "actor/ppo_kl": kl,
                "actor/pg_clipfrac_lower": lower,
            }

        return ours

    patch = Patch("verl")
    patch.function(torch_functional, "logprobs_from_logits", logprobs)
    patch.function(torch_functional, "logprobs_from_logits_v2", logprobs)
    patch.function(torch_functional, "entropy_from_logits", entropy)
    patch.function(torch_functional, "entropy_from_logits_with_chunking", entropy)
    patch.function(torch_functional, "masked_whiten", masked_whiten)
    patch.function(core_algos, "compute_gae_advantage_return", gae)
    patch.function(core_algos, "kl_penalty", kl_penalty)
    patch.function(core_algos, "compute_policy_loss_vanilla", policy_loss)
    return patch


def patch_openrlhf() -> Patch:
    """OpenRLHF's ``log_probs_from_logits``, ``compute_entropy`` and ``compute_approx_kl`` of
    ``openrlhf.models.utils``, ``PolicyLoss`` of ``openrlhf.models.loss`` where it is PPO's without
    corrections, and ``get_advantages_and_returns`` of the experience maker, if that can be
    imported."""
    utils = importlib.import_module("openrlhf.models.utils")
    losses = importlib.import_module("openrlhf.models.loss")

    def log_probs(theirs: Callable) -> Callable:
        def ours(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
            function = functional.selective_log_softmax if _ours(logits) else theirs
            return function(logits, labels, temperature)

        return ours

    def entropy(theirs: Callable) -> Callable:
        def ours(logits: Tensor) -> Tensor:
            return _entropy(logits) if _ours(logits) else theirs(logits)

        return ours

    def approx_kl(theirs: Callable) -> Callable:
        signature = inspect.signature(theirs)

        def ours(*args: Any, **kwargs: Any) -> Tensor:
            given = signature.bind(*args, **kwargs).arguments
            logp, ref_logp = given["log_probs"], given["log_probs_base"]
            estimator = given.get("kl_estimator", "k1")
            known = estimator in ("k1", "k2", "k3") and not given.get("unbiased_gradient")
            if not known or not _ours(logp, ref_logp):
                return theirs(*args, **kwargs)
            return functional.token_kl(logp, ref_logp, estimator=estimator, output_clamp=10.0)

        return ours

    def policy_loss(theirs: Callable) -> Callable:
        def ours(
            self: Any,
            log_probs: Tensor,
            old_log_probs: Tensor,
            advantages: Tensor,
            action_mask: Tensor | None = None,
            rollout_log_probs: Tensor | None = None,
            dp_size: int = 1,
            batch_num_tokens: float | None = None,
            global_batch_size: float | None = None,
        ) -> tuple[Tensor | None, ...]:
            by_token = self.token_level_loss
            total = batch_num_tokens if by_token else global_batch_size
            tensors = (log_probs, old_log_probs, advantages)
            if (
                self.policy_loss_type != "ppo"
                or getattr(self, "is_correction_level", None) != "off"
                or not _ours(*tensors)
                or (action_mask is not None and not action_mask.any())
            ):
                rest = (rollout_log_probs, dp_size, batch_num_tokens, global_batch_size)
                return theirs(self, *tensors, action_mask, *rest)
            loss, stats = functional.ppo_loss(
                *tensors,
                action_mask,
                clip_range=self.clip_eps_low,
                clip_range_high=self.clip_eps_high,
                dual_clip=self.dual_clip,
                aggregation="token_mean" if by_token else "seq_mean_token_mean",
                denominator=None if total is None else float(total) / dp_size,
            )
            return loss, stats["clip_fraction"], stats["approx_kl_k1"], None, None

        return ours

    def advantages_and_returns(theirs: Callable) -> Callable:
        def ours(
            self: Any,
            values: Tensor,
            rewards: Tensor,
            action_mask: Tensor | None,
            gamma: float,
            lambd: float,
        ) -> tuple[Tensor, Tensor]:
            if not _ours(values, rewards):
                return theirs(self, values, rewards, action_mask, gamma, lambd)
            return functional.gae(
                values, rewards, action_mask, gamma=gamma, lam=lambd, mask_mode="multiply"
            )[:2]

        return ours

    patch = Patch("openrlhf")
    patch.function(utils, "log_probs_from_logits", log_probs)
    patch.function(utils, "compute_entropy", entropy)
    patch.function(utils, "compute_approx_kl", approx_kl)
    patch.method(losses.PolicyLoss, "forward", policy_loss)
    try:
        maker = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker")
    except ImportError:  # it wants ray, which is there where experience is made
        return patch
    for owner in vars(maker).values():
        if isinstance(owner, type) and "get_advantages_and_returns" in vars(owner):
            patch.method(owner, "get_advantages_and_returns", advantages_and_returns)
    return patch
