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

import contextlib
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
        self._undo = contextlib.ExitStack()

    def function(self, owner: ModuleType | type, *names: str) -> Callable[[Callable], Callable]:
        """Decorates what takes the place of functions of a module, or methods of a class, those of
        them that the package's version has. Theirs is called where it returns ``NotImplemented``.
        """

        def replace(ours: Callable) -> Callable:
            for name in names:
                theirs = getattr(owner, name, None)
                if theirs is not None:
                    both = _before(theirs, ours)
                    self._swap(owner, theirs, both)
                    self._undo.callback(self._swap, owner, both, theirs)
            return ours

        return replace

    def _swap(self, owner: ModuleType | type, old: Callable, new: Callable) -> None:
        """There, in every loaded module of the package, and in registries such as verl's."""
        named = list(sys.modules.items())
        modules = [module for name, module in named if name.split(".")[0] == self._package]
        for holder in (owner, *modules):
            for attribute, value in list(vars(holder).items()):
                if value is old:
                    setattr(holder, attribute, new)
                elif type(value) is dict:
                    value.update({key: new for key, entry in value.items() if entry is old})

    def undo(self) -> None:
        """Puts the package's own functions back."""
        self._undo.close()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _before(theirs: Callable, ours: Callable) -> Callable:
    @functools.wraps(theirs)
    def both(*args: Any, **kwargs: Any) -> Any:
        result = ours(*args, **kwargs)
        return theirs(*args, **kwargs) if result is NotImplemented else result

    return both


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _supported(*tensors: Tensor) -> bool:
    """Whether tensors are of the dtypes and on the devices that the kernels are for."""
    return all(tensor.dtype in _DTYPES and (tensor.is_cpu or tensor.is_cuda) for tensor in tensors)


def _entropy(logits: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    if not _supported(logits):
        return NotImplemented
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return functional.logprobs_and_entropy(logits, index)[1]


def patch_trl() -> Patch:
    """TRL's ``selective_log_softmax``, ``entropy_from_logits`` and, where it has it,
    ``selective_log_softmax_and_entropy``, of ``trl.trainer.utils``."""
    utils = importlib.import_module("trl.trainer.utils")
    patch = Patch("trl")
    patch.function(utils, "entropy_from_logits")(_entropy)

    @patch.function(utils, "selective_log_softmax")
    def logprobs(logits: Tensor, index: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _supported(logits) and (index.dim() < logits.dim() or not (args[1:] or kwargs)):
            return functional.selective_log_softmax(logits, index, *args, **kwargs)
        return NotImplemented

    @patch.function(utils, "selective_log_softmax_and_entropy")
    def logprobs_and_entropy(
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not _supported(logits) or index.dim() == logits.dim():
            return NotImplemented
        logp, entropy = functional.logprobs_and_entropy(logits, index, temperature, row_mask)
        return logp, entropy if entropy_requires_grad else entropy.detach()

    return patch


_VERL_KL = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}  # its other names
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
    patch = Patch("verl")
    entropies = ("entropy_from_logits", "entropy_from_logits_with_chunking")
    patch.function(torch_functional, *entropies)(_entropy)

    @patch.function(torch_functional, "logprobs_from_logits", "logprobs_from_logits_v2")
    def logprobs(logits: Tensor, labels: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        if not _supported(logits):
            return NotImplemented
        return functional.selective_log_softmax(logits, labels)

    @patch.function(torch_functional, "masked_whiten")
    def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        if not _supported(values):
            return NotImplemented
        return functional.masked_whiten(values, mask, shift_mean)

    @patch.function(core_algos, "compute_gae_advantage_return")
    def gae(
        token_level_rewards: Tensor,
        values: Tensor,
        response_mask: Tensor,
        gamma: float | Tensor,
        lam: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        if not _supported(token_level_rewards, values):
            return NotImplemented
        options = {"gamma": float(gamma), "lam": float(lam), "whiten": True}
        return functional.gae(values, token_level_rewards, response_mask, **options)[:2]

    @patch.function(core_algos, "kl_penalty")
    def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
        name = kl_penalty.removesuffix("+")
        estimator = _VERL_KL.get(name, name)
        if estimator not in ("k1", "abs", "k2", "k3") or not _supported(logprob, ref_logprob):
            return NotImplemented
        clamps = {"log_ratio_clamp": 20.0, "output_clamp": 10.0} if estimator == "k3" else {}
        kl = functional.token_kl(logprob, ref_logprob, estimator=estimator, **clamps)
        if not kl_penalty.endswith("+") or estimator == "k2":
            return kl
        gradient = functional.token_kl(logprob, ref_logprob, estimator="k2")
        return gradient - gradient.detach() + kl.detach()

    @patch.function(core_algos, "compute_policy_loss_vanilla")
    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        if (
            loss_agg_mode not in _VERL_AGGREGATION
            or config is None
            or rollout_is_weights is not None
            or not _supported(old_log_prob, log_prob, advantages)
            or not response_mask.any()  # no mean, but a loss where the batch's total is known
        ):
            return NotImplemented
        aggregation, total = _VERL_AGGREGATION[loss_agg_mode]
        batch = config.global_batch_info
        ranks, total = batch.get("dp_size", 1), batch.get(total)
        if total is None and ranks > 1:
            return NotImplemented
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
        theirs = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
        return loss, dict(zip(theirs, torch.stack([stats[name] for name in names]).tolist()))

    return patch


def patch_openrlhf() -> Patch:
    """OpenRLHF's ``log_probs_from_logits``, ``compute_entropy`` and ``compute_approx_kl`` of
    ``openrlhf.models.utils``, ``PolicyLoss`` of ``openrlhf.models.loss`` where it is PPO's without
    corrections, and ``get_advantages_and_returns`` of the experience maker, if that can be
    imported."""
    utils = importlib.import_module("openrlhf.models.utils")
    losses = importlib.import_module("openrlhf.models.loss")
    patch = Patch("openrlhf")
    patch.function(utils, "compute_entropy")(_entropy)

    @patch.function(utils, "log_probs_from_logits")
    def logprobs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        if not _supported(logits):
            return NotImplemented
        return functional.selective_log_softmax(logits, labels, temperature)

    approx_kl_signature = inspect.signature(getattr(utils, "compute_approx_kl", lambda: None))

    @patch.function(utils, "compute_approx_kl")
    def approx_kl(*args: Any, **kwargs: Any) -> Tensor:
        given = approx_kl_signature.bind(*args, **kwargs).arguments
        logp, ref_logp = given["log_probs"], given["log_probs_base"]
        estimator = given.get("kl_estimator", "k1")
        known = estimator in ("k1", "k2", "k3") and not given.get("unbiased_gradient")
        if not known or not _supported(logp, ref_logp):
            return NotImplemented
        return functional.token_kl(logp, ref_logp, estimator=estimator, output_clamp=10.0)

    @patch.function(losses.PolicyLoss, "forward")
    def policy_loss(
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
            or not _supported(*tensors)
            or (action_mask is not None and not action_mask.any())
        ):
            return NotImplemented
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

    def advantages_and_returns(
        self: Any,
        values: Tensor,
        rewards: Tensor,
        action_mask: Tensor | None,
        gamma: float,
        lambd: float,
    ) -> tuple[Tensor, Tensor]:
        if not _supported(values, rewards):
            return NotImplemented
        options = {"gamma": gamma, "lam": lambd, "mask_mode": "multiply"}
        return functional.gae(values, rewards, action_mask, **options)[:2]

    try:
        maker = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker")
    except ImportError:  # it wants ray, which is there where experience is made
        return patch
    for owner in vars(maker).values():
        if isinstance(owner, type) and "get_advantages_and_returns" in vars(owner):
            patch.function(owner, "get_advantages_and_returns")(advantages_and_returns)
    return patch
