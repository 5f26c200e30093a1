"""Puts the functions of this package in the place of those of TRL, verl and OpenRLHF.

One call before training starts::

    import ppo_kernels.adapters
    ppo_kernels.adapters.patch_trl()     # or patch_verl(), or patch_openrlhf()

Every module of the package that has imported a function gets ours in its place, and modules that
are imported later get it as well. What is returned undoes all of that: ``patch.undo()``, or at the
end of ``with patch_trl(): ...``; ``patch.calls`` says how often each of ours was used.

Trainers whose work is done by other processes, as verl's and OpenRLHF's by Ray's, want the patch in
those: :mod:`ppo_kernels.patch` makes it wherever the environment says so.

Ours take over where they do the same: for plain tensors of float32, float16 and bfloat16 on CPU and
CUDA, of one shape where theirs would broadcast, and for the options that they have; everything else
goes on to the package's own function: other dtypes, DTensors, nested tensors, further arguments of
a later version. Differences are that log-probabilities and entropies are float32 also for
half-precision logits, that masked positions of advantages, returns and whitened values are 0, and
what :mod:`.functional` says about wrong arguments. Logits are never changed in place.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _lists, functional, named_loss

__all__ = ["Patch", "patch_openrlhf", "patch_trl", "patch_verl"]

# The versions that the tests know.
TESTED = {"trl": "1.16.0", "verl": "0.9.1", "openrlhf": "0.11.2"}


class Patch:
    """A package with some of its functions replaced, until :meth:`undo` or the end of ``with``."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._undo = contextlib.ExitStack()
        self._replaced: dict[str, Callable] = {}

    @property
    def calls(self) -> dict[str, int]:
        """How many calls of each replaced function, by its module and name, ours has answered; what
        went on to the package's own does not count."""
        return {name: both.calls[0] for name, both in self._replaced.items()}

    def function(self, owner: ModuleType | type, *names: str) -> Callable[[Callable], Callable]:
        """Decorates what takes the place of functions of a module, methods of a class, or the
        ``apply`` of a ``torch.autograd.Function``, those of them that the package's version has.
        Theirs is called where it returns ``NotImplemented``.
        """

        def replace(ours: Callable) -> Callable:
            for name in names:
                theirs = getattr(owner, name, None)
                if theirs is not None:
                    both = self._take(owner, theirs, ours)
                    self._undo.callback(self._release, owner, both)
                    within = f"{owner.__module__}." if isinstance(owner, type) else ""
                    self._replaced[f"{within}{owner.__name__}.{name}"] = both
            return ours

        return replace

    def _take(self, owner: ModuleType | type, theirs: Callable, ours: Callable) -> Callable:
        """What is in the place of a function from now on: of several patches the first one's, until
        the last is undone."""
        if theirs in _patches:
            _patches[theirs] += 1
            return theirs
        both = _before(theirs, ours)
        _patches[both] = 1
        self._swap(owner, theirs, both)
        return both

    def _release(self, owner: ModuleType | type, both: Callable) -> None:
        _patches[both] -= 1
        if not _patches[both]:
            del _patches[both]
            self._swap(owner, both, both.__wrapped__)

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


# How many patches there are of each function that is in the place of a package's own.
_patches: dict[Callable, int] = {}


def _before(theirs: Callable, ours: Callable) -> Callable:
    """Ours, or theirs where ours does not know the arguments, or does not take them; ``calls``
    counts those that it takes."""
    known = inspect.signature(ours).parameters
    if isinstance(theirs, type):
        both = _before(theirs.apply, ours)
        members = {"apply": staticmethod(both), "calls": both.calls, "__wrapped__": theirs}
        return type(theirs.__name__, (theirs,), members)
    calls = [0]

    @functools.wraps(theirs)
    def both(*args: Any, **kwargs: Any) -> Any:
        if len(args) <= len(known) and kwargs.keys() <= known.keys():
            result = ours(*args, **kwargs)
            if result is not NotImplemented:
                calls[0] += 1
                return result
        return theirs(*args, **kwargs)

    both.calls = calls
    return both


# What is done to a module of a package once it is there, by the module's name.
Part = Callable[[Patch, ModuleType], None]
PARTS: dict[str, dict[str, Part]] = {package: {} for package in TESTED}


def _part(module: str) -> Callable[[Part], Part]:
    """Decorates what replaces functions of a module, which not every version has."""

    def add(part: Part) -> Part:
        PARTS[module.split(".")[0]][module] = part
        return part

    return add


def _patched(package: str) -> Patch:
    """With every part for which there is a module."""
    importlib.import_module(package)
    patch = Patch(package)
    for name, part in PARTS[package].items():
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            # Another version, or not where experience is made.
            if error.name == "ray" or f"{name}.".startswith(f"{error.name}."):
                continue
            raise
        part(patch, module)
    check_replaced(package, patch.calls, ", ".join(PARTS[package]))
    return patch


def version_of(package: str) -> str:
    """That of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"


def check_replaced(package: str, replaced: Collection[str], where: str) -> None:
    """Raises where there was nothing to replace."""
    if not replaced:
        raise RuntimeError(
            f"{package} {version_of(package)} has no function in {where} that ppo-kernels knows; "
            f"tested with {package} {TESTED[package]}"
        )


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_IDS = (torch.int64, torch.int32)
_PLAIN = (Tensor, torch.nn.Parameter)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has its elements itself, and in strides, on a device of ours."""
    strided = type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_nested
    return strided and (tensor.is_cpu or tensor.is_cuda)


def _supported(first: Tensor, *others: Tensor, mask: Tensor | None = None) -> bool:
    """Whether tensors, and a mask if there is one, are what the kernels are for, of one shape and
    on one device."""
    if any(tensor.dtype not in _DTYPES for tensor in (first, *others)):
        return False
    tensors = (first, *others) if mask is None else (first, *others, mask)
    alike = all(each.shape == first.shape and each.device == first.device for each in tensors)
    return alike and all(map(_is_plain, tensors))


def _supported_ids(logits: Tensor, index: Tensor, row_mask: Tensor | None = None) -> bool:
    """Whether logits, and an id for each row, are what the kernels are for."""
    rows = [index] if row_mask is None else [index, row_mask]
    alike = all(each.shape == logits.shape[:-1] and each.device == logits.device for each in rows)
    return alike and index.dtype in _IDS and _supported(logits) and all(map(_is_plain, rows))


def _supported_head(
    hidden: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None = None
) -> bool:
    """Whether hidden states, an id for each, and a head are what the kernels are for. DeepSpeed's
    sharded weights are there in the passes of the packages' own functions only."""
    if not hidden.dim() or not _supported_ids(hidden, index):
        return False
    head = (weight,) if bias is None else (weight, bias)
    return all(
        each.dtype in _DTYPES
        and _is_plain(each)
        and each.device == hidden.device
        and not hasattr(each, "ds_id")
        for each in head
    )


def _entropy(logits: Tensor) -> Tensor:
    if not _supported(logits) or not logits.dim():
        return NotImplemented
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return functional.logprobs_and_entropy(logits, index)[1]


def _entropy_in_chunks(logits: Tensor, chunk_size: int = 0) -> Tensor:
    return _entropy(logits)


@_part("trl.kernels.chunked_logprob")  # since 1.15
def _head_of_trl(patch: Patch, kernels: ModuleType) -> None:
    @patch.function(kernels, "ChunkedLogProbFunction")
    def linear_logprobs(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _lists.LINEAR_OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        wanted = [name for name in outputs if name != "log_probs"]
        if (
            not _supported_head(hidden, targets, weight, bias)
            or not {*wanted} <= {*_lists.LINEAR_OUTPUTS}
            or logit_scale <= 0
            or (final_logit_softcapping is not None and final_logit_softcapping <= 0)
        ):
            return NotImplemented
        options = {"logit_scale": logit_scale, "softcap": final_logit_softcapping}
        return functional.linear_logprobs(
            hidden, weight, targets, bias, temperature, outputs=wanted, **options
        )


@_part("trl.trainer.utils")
def _utils_of_trl(patch: Patch, utils: ModuleType) -> None:
    patch.function(utils, "entropy_from_logits")(_entropy_in_chunks)

    @patch.function(utils, "selective_log_softmax")
    def logprobs(
        logits: Tensor,
        index: Tensor,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> Tensor:
        several = index.dim() == logits.dim() > 0
        one = index[..., 0] if several and index.shape[-1] else index
        if not _supported_ids(logits, one, row_mask) or (several and row_mask is not None):
            return NotImplemented
        return functional.selective_log_softmax(logits, index, temperature, row_mask)

    @patch.function(utils, "selective_log_softmax_and_entropy")
    def logprobs_and_entropy(
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not _supported_ids(logits, index, row_mask):
            return NotImplemented
        logp, entropy = functional.logprobs_and_entropy(logits, index, temperature, row_mask)
        return logp, entropy if entropy_requires_grad else entropy.detach()


def patch_trl() -> Patch:
    """TRL's ``selective_log_softmax``, ``entropy_from_logits`` and, where it has them,
    ``selective_log_softmax_and_entropy`` of ``trl.trainer.utils`` and ``ChunkedLogProbFunction`` of
    ``trl.kernels``, which is the head of its GRPO, RLOO, DPO, KTO and SFT trainers."""
    return _patched("trl")


_VERL_KL = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}  # its other names
_VERL_AGGREGATION = {
    "token-mean": ("token_mean", "batch_num_tokens"),
    "seq-mean-token-sum": ("seq_mean_token_sum", "global_batch_size"),
    "seq-mean-token-mean": ("seq_mean_token_mean", "global_batch_size"),
}


def _clip_ranges(config: Any) -> dict[str, float]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return {
        "clip_range": config.clip_ratio if low is None else low,
        "clip_range_high": config.clip_ratio if high is None else high,
    }


def _dppo(config: Any, region: str) -> dict[str, Any]:
    bounds = _clip_ranges(config)
    return {
        "surrogate": "clipped_weight",
        "clip_range": 1.0,
        "clip_range_high": config.get("clip_ratio_c", 20.0) - 1.0,
        "trust_region": region,
        "trust_region_low": bounds["clip_range"],
        "trust_region_high": bounds["clip_range_high"],
    }


def _dro(config: Any) -> dict[str, Any]:
    return {
        "surrogate": "reinforce",
        "kl_coef": config.policy_loss.dro_beta or 0.0,
        "kl_estimator": "k2",
        "kl_log_ratio_clamp": None,
        "kl_against": "old",
        "kl_weighted": True,
    }


# Options of verl's policy losses from its settings.
_VERL_LOSSES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "vanilla": lambda config: {
        **_clip_ranges(config),
        "dual_clip": config.get("clip_ratio_c", 3.0),
    },
    "dppo_tv": lambda config: _dppo(config, "total_variation"),
    "dppo_kl": lambda config: _dppo(config, "binary_kl"),
    "gspo": lambda config: {**named_loss("gspo_token"), **_clip_ranges(config)},
    "sapo": lambda config: {
        "surrogate": "soft_gate",
        "soft_gate_tau_pos": config.tau_pos,
        "soft_gate_tau_neg": config.tau_neg,
    },
    "gpg": lambda config: {"surrogate": "reinforce"},
    "dro": _dro,
    "cispo": lambda config: {"surrogate": "clipped_weight", **_clip_ranges(config)},
}
# Which statistics verl reports of each, in the order of ``_VERL_METRICS``; None is 0, and
# ``raw_kl`` the mean log-ratio before any clamp.
_VERL_METRICS = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
_VERL_STATS: dict[str, tuple[str | None, ...]] = {
    "vanilla": ("clip_fraction", "approx_kl_k1", "lower_clip_fraction"),
    "dppo_tv": ("outside_fraction", "approx_kl_k1", None),
    "dppo_kl": ("outside_fraction", "approx_kl_k1", None),
    "gspo": ("clip_fraction", "raw_kl", None),
    "sapo": (None, "approx_kl_k1", None),
    "gpg": (),
    "dro": ("raw_kl",),
    "cispo": ("clip_fraction", "approx_kl_k1", None),
}


def _verl_policy_loss(
    loss_name: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    loss_agg_mode = "seq-mean-token-mean" if loss_name == "sapo" else loss_agg_mode
    weights = () if rollout_is_weights is None else (rollout_is_weights,)
    if (
        loss_agg_mode not in _VERL_AGGREGATION
        or config is None
        or not _supported(old_log_prob, log_prob, advantages, *weights, mask=response_mask)
        or not response_mask.any()  # no mean, but a loss where the batch's total is known
        or (loss_name == "dro" and not (config.policy_loss.dro_beta or 0) > 0)
    ):
        return NotImplemented
    aggregation, total = _VERL_AGGREGATION[loss_agg_mode]
    batch = config.global_batch_info
    ranks, total = batch.get("dp_size", 1), batch.get(total)
    if total is None and ranks > 1:
        return NotImplemented
    options = {
        **_VERL_LOSSES[loss_name](config),
        "aggregation": aggregation,
        "denominator": None if total is None else float(total) / ranks,
    }
    loss, stats = functional.ppo_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        weights=rollout_is_weights,
        **options,
    )
    if loss_name.startswith("dppo") and stats["clip_fraction"] > 0:
        return NotImplemented  # it counts those of them that are inside the region
    names = _VERL_STATS[loss_name]
    if "raw_kl" in names:
        stats["raw_kl"] = functional.masked_moments(old_log_prob - log_prob, response_mask)[1]
    found = [loss.new_zeros(()) if name is None else stats[name].float() for name in names]
    metrics = _VERL_METRICS if len(names) > 1 else _VERL_METRICS[1:2]
    return loss, dict(zip(metrics, torch.stack(found).tolist() if found else ()))


def _verl_advantages(
    estimator: str, rewards: Tensor, mask: Tensor, index: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    if not _supported(rewards, mask=mask) or rewards.dim() != 2:
        return NotImplemented
    options = {**functional.ESTIMATORS[estimator], "singleton": "keep", **options}
    found = functional.outcome_advantages(rewards.sum(-1), index, mask, **options).advantages
    return found, found


@_part("verl.utils.experimental.torch_functional")
def _head_of_verl(patch: Patch, fused: ModuleType) -> None:
    @patch.function(fused, "FusedLinearForPPOFunction")
    def linear_logprobs(
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
        chunk_size: int = 512,
    ) -> tuple[Tensor, Tensor]:
        if not _supported_head(hidden_states, input_ids, vocab_weights):
            return NotImplemented
        if isinstance(temperature, Tensor):
            return NotImplemented
        given = (hidden_states, vocab_weights, input_ids, None, temperature)
        found = functional.linear_logprobs(*given, outputs=["entropy"])
        return found.logp, found.entropy


@_part("verl.utils.torch_functional")
def _utils_of_verl(patch: Patch, torch_functional: ModuleType) -> None:
    patch.function(torch_functional, "entropy_from_logits")(_entropy)
    patch.function(torch_functional, "entropy_from_logits_with_chunking")(_entropy_in_chunks)

    @patch.function(torch_functional, "logprobs_from_logits", "logprobs_from_logits_v2")
    def logprobs(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
        if not _supported_ids(logits, labels):
            return NotImplemented
        return functional.selective_log_softmax(logits, labels)

    @patch.function(torch_functional, "masked_whiten")
    def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        if not _supported(values, mask=mask):
            return NotImplemented
        return functional.masked_whiten(values, mask, shift_mean)


@_part("verl.trainer.ppo.core_algos")
def _algorithms_of_verl(patch: Patch, core_algos: ModuleType) -> None:
    @patch.function(core_algos, "compute_gae_advantage_return")
    def gae(
        token_level_rewards: Tensor,
        values: Tensor,
        response_mask: Tensor,
        gamma: float | Tensor,
        lam: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        if not _supported(values, token_level_rewards, mask=response_mask):
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

    for name in _VERL_LOSSES:
        ours = functools.partial(_verl_policy_loss, name)
        patch.function(core_algos, f"compute_policy_loss_{name}")(ours)

    @patch.function(
        core_algos, "compute_grpo_outcome_advantage", "compute_grpo_vectorized_outcome_advantage"
    )
    def grpo(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any,
        epsilon: float = 1e-6,
        norm_adv_by_std_in_grpo: bool = True,
        config: Any = None,
    ) -> tuple[Tensor, Tensor]:
        estimator = "grpo" if norm_adv_by_std_in_grpo else "dr_grpo"
        given = (token_level_rewards, response_mask, index)
        return _verl_advantages(estimator, *given, eps=epsilon)

    @patch.function(core_algos, "compute_grpo_passk_outcome_advantage")
    def pass_at_k(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any,
        epsilon: float = 1e-6,
        norm_adv_by_std_in_grpo: bool = True,
        config: Any = None,
    ) -> tuple[Tensor, Tensor]:
        if config is None:
            return NotImplemented
        scaled = (
            {"eps": epsilon} if config.get("norm_adv_by_std_in_grpo", True) else {"scale": "none"}
        )
        return _verl_advantages("pass_at_k", token_level_rewards, response_mask, index, **scaled)

    def by_group(estimator: str, singleton: str = "keep") -> Callable:
        def advantages(
            token_level_rewards: Tensor,
            response_mask: Tensor,
            index: Any,
            epsilon: float = 1e-6,
            config: Any = None,
        ) -> tuple[Tensor, Tensor]:
            given = (token_level_rewards, response_mask, index)
            return _verl_advantages(estimator, *given, singleton=singleton)

        return advantages

    patch.function(core_algos, "compute_rloo_outcome_advantage")(by_group("rloo"))
    vectorized = by_group("rloo", "zero")
    patch.function(core_algos, "compute_rloo_vectorized_outcome_advantage")(vectorized)
    patch.function(core_algos, "compute_opo_outcome_advantage")(by_group("opo"))
    patch.function(core_algos, "compute_gpg_outcome_advantage")(by_group("gpg"))

    @patch.function(core_algos, "compute_reinforce_plus_plus_baseline_outcome_advantage")
    def reinforce_plus_plus_baseline(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any,
        epsilon: float = 1e-6,
        config: Any = None,
    ) -> tuple[Tensor, Tensor]:
        given = (token_level_rewards, response_mask, index)
        found = _verl_advantages("reinforce_plus_plus_baseline", *given)
        if found is NotImplemented:
            return found
        whitened = functional.masked_whiten(found[0], response_mask)
        return whitened, whitened

    @patch.function(core_algos, "compute_reinforce_plus_plus_outcome_advantage")
    def reinforce_plus_plus(
        token_level_rewards: Tensor, response_mask: Tensor, config: Any = None
    ) -> tuple[Tensor, Tensor]:
        if config is None or not _supported(token_level_rewards, mask=response_mask):
            return NotImplemented
        values = torch.zeros_like(token_level_rewards)
        options = {"gamma": float(config.gamma), "lam": 1.0, "whiten": True}
        return functional.gae(values, token_level_rewards, response_mask, **options)[:2]


def patch_verl() -> Patch:
    """verl's ``logprobs_from_logits``, ``logprobs_from_logits_v2``, ``entropy_from_logits``,
    ``entropy_from_logits_with_chunking`` and ``masked_whiten`` of ``verl.utils.torch_functional``;
    where it has it, ``FusedLinearForPPOFunction``, the head of its models with fused kernels;
    ``kl_penalty``, the policy losses ``vanilla``, ``dppo_tv``, ``dppo_kl``, ``gspo``, ``sapo``,
    ``gpg``, ``dro`` and ``cispo``, and the advantages ``gae``, ``grpo``, ``grpo_vectorized``,
    ``grpo_passk``, ``rloo``, ``rloo_vectorized``, ``opo``, ``gpg``, ``reinforce_plus_plus`` and
    ``reinforce_plus_plus_baseline`` of ``verl.trainer.ppo.core_algos``, in its registries too."""
    return _patched("verl")


@_part("openrlhf.models.utils")
def _utils_of_openrlhf(patch: Patch, utils: ModuleType) -> None:
    patch.function(utils, "compute_entropy")(_entropy)

    @patch.function(utils, "log_probs_from_logits")
    def logprobs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        if not _supported_ids(logits, labels):
            return NotImplemented
        return functional.selective_log_softmax(logits, labels, temperature)

    @patch.function(utils, "compute_approx_kl")
    def approx_kl(
        log_probs: Tensor,
        log_probs_base: Tensor,
        log_probs_old: Tensor | str | None = None,  # in older versions the estimator is here
        kl_estimator: str = "k1",
        unbiased_gradient: bool = False,
    ) -> Tensor:
        known = kl_estimator in ("k1", "k2", "k3") and not isinstance(log_probs_old, str)
        if unbiased_gradient or not known or not _supported(log_probs, log_probs_base):
            return NotImplemented
        clamp = {"output_clamp": 10.0}
        return functional.token_kl(log_probs, log_probs_base, estimator=kl_estimator, **clamp)


def _openrlhf_correction(loss: Any) -> dict[str, Any]:
    """Options of :func:`correction` from the settings of its ``PolicyLoss``."""
    low, high = loss.is_correction_threshold
    low, bounds = low if low > 0 else None, {"log_ratio_clamp": None, "low": None, "high": None}
    if loss.is_correction_mode == "clip":
        return bounds | {"low": low, "high": high}
    metrics = {"ratio": "ratio", "binary_kl": "binary_kl", "tv": "total_variation"}
    return bounds | {
        "rejection_metric": metrics[loss.is_correction_gating],
        "rejection_level": "sequence_mean" if loss.is_correction_level == "seq" else "token",
        "rejection_low": low,
        "rejection_high": high,
    }


@_part("openrlhf.models.loss")
def _losses_of_openrlhf(patch: Patch, losses: ModuleType) -> None:
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
        by_token, by_row = self.token_level_loss, self.policy_loss_type == "gspo"
        total = batch_num_tokens if by_token else global_batch_size
        level = getattr(self, "is_correction_level", None)
        tensors = [log_probs, old_log_probs, advantages]
        tensors += [] if level == "off" else [rollout_log_probs]
        if (
            self.policy_loss_type not in ("ppo", "gspo")
            or level is None  # of a version before it
            or any(each is None for each in tensors)
            or not _supported(*tensors, mask=action_mask)
            or (action_mask is not None and not action_mask.any())
            or (level == "seq" and (action_mask is None or not action_mask.any(-1).all()))
        ):
            return NotImplemented
        # GSPO's ratio is that to the rollout where it is corrected.
        old = rollout_log_probs if by_row and level != "off" else old_log_probs
        of_rows = {"ratio": "sequence_mean", "log_ratio_clamp": None} if by_row else {}
        weights, kl, filtered = None, None, None
        if level != "off" and not by_row:
            found = functional.correction(
                old_log_probs, rollout_log_probs, action_mask, **_openrlhf_correction(self)
            )
            weights, of_rollout = found.weights, found.stats
            kl = (-of_rollout["log_ratio_sum"] / of_rollout["tokens"]).float()
            counted, of_all = of_rollout["rejected_tokens"], of_rollout["tokens"]
            if self.is_correction_mode == "clip":
                counted = of_rollout["below_tokens"] + of_rollout["above_tokens"]
            elif level == "seq":
                counted, of_all = of_rollout["rejected_rows"], len(log_probs)
            filtered = (counted / of_all).float()
        loss, stats = functional.ppo_loss(
            log_probs,
            old,
            advantages,
            action_mask,
            weights=weights,
            **of_rows,
            clip_range=self.clip_eps_low,
            clip_range_high=self.clip_eps_high,
            dual_clip=self.dual_clip,
            aggregation="token_mean" if by_token else "seq_mean_token_mean",
            denominator=None if total is None else float(total) / dp_size,
        )
        # Of the log-ratio before its clamp.
        ppo_kl = functional.masked_moments(old_log_probs - log_probs, action_mask)[1].float()
        return loss, stats["clip_fraction"], ppo_kl, kl, filtered


@_part("openrlhf.trainer.ppo_utils.experience_maker")  # it wants ray
def _experience_of_openrlhf(patch: Patch, maker: ModuleType) -> None:
    def advantages_and_returns(
        self: Any,
        values: Tensor,
        rewards: Tensor,
        action_mask: Tensor | None,
        gamma: float,
        lambd: float,
    ) -> tuple[Tensor, Tensor]:
        if not _supported(values, rewards, mask=action_mask):
            return NotImplemented
        options = {"gamma": gamma, "lam": lambd, "mask_mode": "multiply"}
        return functional.gae(values, rewards, action_mask, **options)[:2]

    for owner in vars(maker).values():
        if isinstance(owner, type) and "get_advantages_and_returns" in vars(owner):
            patch.function(owner, "get_advantages_and_returns")(advantages_and_returns)


def patch_openrlhf() -> Patch:
    """OpenRLHF's ``log_probs_from_logits``, ``compute_entropy`` and ``compute_approx_kl`` of
    ``openrlhf.models.utils``, ``PolicyLoss`` of ``openrlhf.models.loss``, and
    ``get_advantages_and_returns`` of the experience maker, if that can be imported."""
    return _patched("openrlhf")
