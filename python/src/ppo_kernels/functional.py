"""The ops on PyTorch tensors, CPU and CUDA, with gradients.

What holds for all of them:

- Logits are float32, float16 or bfloat16; what is computed from them is float32, and their gradient
  has their own dtype. Sums are kept in float32.
- Tensors with a number a token (log-probabilities, values, advantages, ...) are float32; float16
  and bfloat16 are converted, and their gradients converted back.
- Masks are bool or uint8, ``True`` for what counts; other dtypes are compared with 0. What is
  masked may hold anything, NaN included: it counts for nothing, and results there are 0.
- Contiguous tensors are used as they are, and so are logits whose leading slices are contiguous,
  such as ``logits[:, :-1]``; others are copied first.
- CUDA kernels run on the current stream, without waiting for the device.
- On the CPU the threads are torch's own, as many as ``torch.set_num_threads`` or
  ``OMP_NUM_THREADS`` says; where torch has no OpenMP, those of a pool, as many as
  ``RAYON_NUM_THREADS`` or ``OMP_NUM_THREADS`` says. :func:`ppo_kernels.num_threads` tells. In the
  child of a fork, and where the system has no threads to give, the caller's thread does all the
  work, to the same bits.
- The same inputs give the same bits.
- A wrong argument is a ``ValueError`` that names it; anything else that fails a ``RuntimeError``.
- An option that is a number may be a tensor of no dimensions on the CPU, as a constant.
- They work under ``torch.compile(fullgraph=True)``, which does not compile anew for every value of
  an option that is a number. Gradients of gradients, forward mode and the gradients of
  ``torch.func`` are refused.

The project's docs/options.md and the header of the C library say more about each option.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from itertools import count
from math import inf, nan
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import _FUNCTIONS, _lib, _linear, _lists, _ops

__all__ = [*_FUNCTIONS]

# A tensor is one of no dimensions, on the CPU.
Number = float | Tensor
Estimator = Literal["k1", "abs", "k2", "k3", "k3_straight_through"]
Aggregation = Literal[
    "token_mean",
    "seq_mean_token_sum",
    "seq_mean_token_mean",
    "seq_mean_token_sum_norm",
    "constant",
    "batch_mean_token_sum",
    "batch_mean_token_mean",
    "seq_mean_token_sum_norm_rows",
]
Divergence = Literal["forward", "reverse", "jsd", "skew_forward", "skew_reverse", "total_variation"]
Surrogate = Literal["clip", "log_clip", "reinforce", "clipped_weight", "gamma_weight", "soft_gate"]
TrustRegion = Literal["none", "total_variation", "binary_kl", "ratio"]
RejectionMetric = Literal[
    "none", "ratio", "k2", "k3", "reverse_k3", "binary_kl", "binary_kl_max", "total_variation"
]
RejectionLevel = Literal["token", "sequence_mean", "sequence_sum", "sequence_max"]

PreferenceLoss = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "sigmoid_norm",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "aot",
    "aot_unpaired",
    "simpo",
    "cpo",
    "orpo",
    "alphapo",
    "kto",
]

_HALVES = (torch.float16, torch.bfloat16)
_SKIPPED = torch.iinfo(torch.int64).min  # a token id that nobody means


def _per_token(tensor: Tensor | None) -> Tensor | None:
    return tensor.float() if tensor is not None and tensor.dtype in _HALVES else tensor


def _mask(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dtype in _ops.BYTES else mask != 0


def _ids(ids: Tensor | None) -> Tensor | None:
    return ids.long() if ids is not None and ids.dtype in (torch.int32, torch.int16) else ids


_KINDS = {_lists.FLAGS: _mask, _lists.INTEGERS: _ids, _lists.OFFSETS: _ids}


def _taken(op: _lists.Op, *tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors in the dtypes that an op takes."""
    return [_KINDS.get(given.kind, _per_token)(x) for given, x in zip(op.inputs, tensors)]


def _skip(
    op: str, logits: Tensor, index: Tensor, row_mask: Tensor | None, ignore_index: int | None
) -> tuple[Tensor, int | None]:
    """The index with an ``ignore_index`` where the mask is 0."""
    if row_mask is None:
        return index, ignore_index
    _ops.check_logprob(op, logits, index)
    return _skipped_index(op, index, row_mask, ignore_index)


def _skipped_index(
    op: str,
    index: Tensor,
    row_mask: Tensor | None,
    ignore_index: int | None,
    name: str = "row_mask",
) -> tuple[Tensor, int | None]:
    if row_mask is None:
        return index, ignore_index
    _ops.check_ids(op, index)
    _lists.check_shape(op, name, row_mask.shape, index.shape)
    _ops.check_device(op, name, row_mask, index.device)
    ignore_index = _SKIPPED if ignore_index is None else ignore_index
    return index.long().masked_fill(row_mask == 0, ignore_index), ignore_index


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    temperature: Number = 1.0,
    row_mask: Tensor | None = None,
    *,
    ignore_index: int | None = None,
) -> Tensor:
    """Log-probabilities of chosen tokens: ``log_softmax(logits / temperature)`` at ``index``.

    The logits are read once, and nothing of their size is made but their gradient.

    Args:
        logits: ``[..., vocab]``, float32, float16 or bfloat16. Differentiable.
        index: token ids, int64 or int32: ``[...]`` for one a row, or ``[..., K]`` for several.
            On the CPU an id outside of the vocabulary is an error. On CUDA what it would give is
            NaN, and so is the gradient of its row.
        temperature: divides the logits.
        row_mask: ``[...]``; rows where it is 0 are not read and give 0. Only with one id a row.
        ignore_index: rows with this id are not read and give 0. Only with one id a row.

    Returns:
        The log-probabilities in nats, float32, of the shape of ``index``. A row of logits with NaN
        or +inf, or of -inf only, gives NaN in that row and in no other.
    """
    if index.dim() == logits.dim():
        if row_mask is not None or ignore_index is not None:
            raise ValueError(
                "selective_log_softmax: `row_mask` and `ignore_index` go with one token a row, not"
                f" with `index` of shape {list(index.shape)}"
            )
        return _ops.call(_ops.logprobs, logits, index, temperature)[0]
    if row_mask is not None:
        op = "selective_log_softmax"
        index, ignore_index = _skip(op, logits, index, row_mask, ignore_index)
    if isinstance(temperature, Tensor):
        return _ops.call(_ops.logprob, logits, index, temperature, ignore_index)[0]
    # Without `call`, which would be felt in a small one.
    return _ops.logprob(logits, index, temperature, ignore_index)[0]


def logprobs_and_entropy(
    logits: Tensor,
    index: Tensor,
    temperature: Number = 1.0,
    row_mask: Tensor | None = None,
    *,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`selective_log_softmax` of one token a row, and the entropy of each row's distribution,
    from one pass over the logits.

    Args:
        logits: ``[..., vocab]``, float32, float16 or bfloat16. Differentiable.
        index: token ids ``[...]``, int64 or int32.
        temperature: divides the logits.
        row_mask: ``[...]``; rows where it is 0 are not read and give 0.
        ignore_index: rows with this id are not read and give 0.

    Returns:
        Log-probabilities and entropies in nats, float32, ``[...]`` each.
    """
    op = "logprobs_and_entropy"
    index, ignore_index = _skip(op, logits, index, row_mask, ignore_index)
    return _ops.call(_ops.logprob_entropy, logits, index, temperature, ignore_index)[:2]


class LinearOutput(NamedTuple):
    """What :func:`linear_logprobs` finds in each row; what was not asked for is None."""

    logp: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    temperature: Number = 1.0,
    row_mask: Tensor | None = None,
    *,
    outputs: Collection[str] = (),
    ignore_index: int | None = None,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> LinearOutput:
    """Log-probabilities of chosen tokens from hidden states and the head's weight, without the
    logits: :func:`selective_log_softmax` of ``z``, with

        y = hidden @ weight.T + bias
        z = softcap * tanh(y * logit_scale / softcap) / temperature

    The logits exist a tile at a time, and are made again for the gradient. Rows that are skipped
    take no part in any product; what has no gradient costs none.

    Args:
        hidden: ``[..., hidden_size]``, float32, float16 or bfloat16. Differentiable. Products are
            in its dtype, or in that of autocast.
        weight: ``[vocab, hidden_size]``, of any of these dtypes. Differentiable.
        index: token ids ``[...]``, int64 or int32.
        bias: ``[vocab]``. Differentiable.
        temperature: divides the logits; one number, or a float32 tensor ``[...]`` of one a row, as
            a constant.
        row_mask: ``[...]``; rows where it is 0 are skipped and give 0.
        outputs: what is wanted besides, by name: ``entropy`` of the row's distribution, which has a
            gradient; as constants ``log_sum_sq_probs``, the logarithm of the sum of the squares of
            all probabilities, ``mean_logits`` of ``z``, and ``is_top1``, whether no other token is
            likelier, nor as likely and before it.
        ignore_index: rows with this id are skipped and give 0. On CUDA finding them waits for the
            device.
        logit_scale: multiplies the logits before all else.
        softcap: limits the logits to plus or minus this (30 in Gemma 2); not without.
        lora: ``A`` ``[rank, hidden_size]``, ``B`` ``[vocab, rank]`` and a scale, of an adapter of
            the head: its weight is ``weight + scale * B @ A``, which is not made. ``A`` and ``B``
            are differentiable.

    Returns:
        ``[...]`` each, float32, in nats, and ``is_top1`` in bool.
    """
    index, ignore_index = _skipped_index(_lists.LINEAR.name, index, row_mask, ignore_index)
    hidden, rows = _linear.autocast(hidden), None
    if isinstance(temperature, Tensor) and temperature.dim():
        rows, temperature = _per_token(temperature).detach(), 1.0
    wants = _lists.wanted_of(outputs)
    a, b, scale = (None, None, 1.0) if lora is None else lora
    tensors = (hidden, weight, index, bias, rows, a, b)
    options = (temperature, ignore_index, logit_scale, softcap, scale)
    logp, entropy, _, *more = _ops.call(_linear.linear_logprob, *tensors, *wants, *options)
    found = (x if wanted else None for x, wanted in zip((entropy, *more), wants))
    return LinearOutput(logp, *found)


def token_kl(
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor | None = None,
    *,
    estimator: Estimator = "k1",
    log_ratio_clamp: Number | None = None,
    output_clamp: Number | None = None,
) -> Tensor:
    """KL divergence from a reference model, estimated for each token from log-probabilities.

    With d = logp - ref_logp: ``k1`` d; ``abs`` |d|; ``k2`` d^2 / 2; ``k3`` exp(-d) - 1 + d;
    ``k3_straight_through`` the value of k3 with the gradient of k2.

    Args:
        logp, ref_logp: ``[...]``. Differentiable.
        mask: ``[...]``.
        estimator: one of the above.
        log_ratio_clamp: clamps d to plus or minus this before the estimator (20 in verl).
        output_clamp: clamps the estimate likewise (10 in verl). Where a clamp changed anything the
            gradient is 0.

    Returns:
        float32, ``[...]``, 0 where masked.
    """
    tensors = (_per_token(logp), _per_token(ref_logp), _mask(mask))
    return _ops.call(_ops.token_kl, *tensors, log_ratio_clamp, output_clamp, estimator)


def full_kl(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None = None,
    *,
    divergence: Divergence = "forward",
    beta: Number = 0.5,
    skew: Number = 0.1,
    temperature: Number = 1.0,
) -> Tensor:
    """Exact KL, or another divergence, between the distributions of two rows of logits: p of
    ``logits``, q of ``ref_logits``, the teacher's in distillation.

    Args:
        logits, ref_logits: ``[..., vocab]`` of one dtype: float32, float16 or bfloat16.
            Differentiable.
        mask: ``[...]``; rows that are masked are not read.
        divergence: ``forward``, KL(p || q); ``reverse``, KL(q || p); ``jsd``, the generalised
            Jensen-Shannon divergence of TRL's GKD, beta KL(q || m) + (1 - beta) KL(p || m) with
            m = (1 - beta) p + beta q; ``skew_forward``, KL(p || skew p + (1 - skew) q);
            ``skew_reverse`` the same with p and q exchanged; or ``total_variation``,
            1 - sum min(p, q). All but the KLs look at the logits twice, and are always finite.
        beta, skew: above 0 and below 1. The ends of ``jsd`` are the KLs by definition, not as
            limits: in GKD beta is 0 for ``reverse`` and 1 for ``forward``.
        temperature: divides both logits.

    Returns:
        float32, ``[...]``, in nats; 0 where masked, +inf where a token that one gives a probability
        has none under the other.
    """
    options = (temperature, beta, skew, divergence)
    return _ops.call(_ops.full_kl, logits, ref_logits, _mask(mask), *options)[0]


def targets_from_tokens(tokens: Tensor, offsets: Tensor, ignore: int = -100) -> Tensor:
    """The targets of a pack's tokens: for each the next token of its row, and ``ignore`` for the
    last, which has none. A label that crosses into the next row would train on another sequence.

    Args:
        tokens: ids of the tokens of all rows, ``[tokens]``.
        offsets: where the rows begin, integers ``[rows + 1]``; see :func:`gae`.
        ignore: what losses by token are told to ignore.
    """
    op = _lists.TARGETS
    _lists.rows_of(op, tokens.shape, offsets.shape)
    _ops.check_offsets(op.name, offsets := _ids(offsets), tokens.device)
    if offsets.is_cpu and not torch.compiler.is_compiling():
        _lists.check_offsets(op.name, offsets.numpy(), len(tokens))
    if not len(tokens):
        return tokens.clone()
    # The last token of each row; where that is empty, of another row.
    return tokens.roll(-1).index_fill(0, (offsets[1:] - 1) % len(tokens), ignore)


class GaeOutput(NamedTuple):
    """What :func:`gae` returns: ``advantages, returns, *_ = gae(...)``."""

    advantages: Tensor
    """``[..., seq_len]``, 0 where masked."""
    returns: Tensor
    """``[..., seq_len]``: the targets of the value function, 0 where masked."""
    rewards: Tensor | None
    """``[..., seq_len]``: the rewards after shaping, if ``return_rewards``."""
    moments: Tensor
    """``[3]``, float64: count, mean and sum of squared deviations of the unmasked advantages,
    before whitening; see :func:`masked_moments`."""


def gae(
    values: Tensor,
    rewards: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    gamma: Number = 1.0,
    lam: Number = 0.95,
    value_lam: Number | None = None,
    kl: Tensor | None = None,
    kl_coef: Number = 0.05,
    scores: Tensor | None = None,
    score_placement: Literal["last", "after_last"] = "last",
    score_mean: Number = 0.0,
    score_std: Number | None = None,
    score_min: Number = -inf,
    score_max: Number = inf,
    score_order: Literal["scale_then_clip", "clip_then_scale"] = "scale_then_clip",
    has_eos: Tensor | None = None,
    missing_eos: Literal["keep", "subtract", "replace"] = "keep",
    missing_eos_value: Number = 0.0,
    dones: Tensor | None = None,
    bootstrap: Tensor | None = None,
    offsets: Tensor | None = None,
    lambda_per_row: Tensor | None = None,
    mask_mode: Literal["carry", "multiply"] = "carry",
    whiten: bool = False,
    return_rewards: bool = False,
) -> GaeOutput:
    """Generalised advantage estimation, with the shaping of the rewards in the same pass.

    For each row, from the last token backwards::

        r_t       = rewards_t - kl_coef kl_t + score    (the score at one place of the row only)
        delta_t   = r_t + gamma V_{t+1} - V_t
        A_t       = delta_t + gamma lam A_{t+1}
        returns_t = A_t + V_t

    It is not differentiable: the results are constants.

    Args:
        values: ``[..., seq_len]``.
        rewards: dense rewards, ``[..., seq_len]``.
        mask: ``[..., seq_len]``: padding left and right, and gaps.
        gamma, lam: discount, and lambda of the advantages.
        value_lam: lambda of the returns, if it is another.
        kl: KL to the reference model, ``[..., seq_len]``, times ``kl_coef`` subtracted.
        scores: of whole sequences, ``[...]``.
        score_placement: at the ``last`` unmasked token, or ``after_last``, if there is room.
        score_mean, score_std: if ``score_std`` is given, scores become (score - mean) / std.
        score_min, score_max: bounds that scores are clipped to.
        score_order: whether they are scaled or clipped first.
        has_eos: whether the sequence ended by itself, ``[...]``.
        missing_eos: where it did not, the score is kept, or ``missing_eos_value`` subtracted, or
            put in its place.
        dones: whether an episode ended with this step, ``[..., seq_len]``.
        bootstrap: value of the state after the last unmasked token, ``[...]``.
        offsets: where the rows of a pack begin, integers ``[rows + 1]``: row b is the tokens from
            ``offsets[b]`` up to ``offsets[b + 1]``, the first is 0 and the last the number of
            tokens. What is ``[..., seq_len]`` is ``[tokens]`` then, and what is ``[...]``
            ``[rows]``. On CUDA they are not checked.
        lambda_per_row: lambda of the advantages of each row, ``[...]``, in the place of ``lam``.
        mask_mode: ``carry``: a masked token is no step (verl, NeMo); ``multiply``: it is one of
            reward 0 and value 0, which discounts (TRL 0.11, OpenRLHF).
        whiten: whitens the advantages with :func:`masked_whiten`'s defaults.
        return_rewards: whether to return the rewards after shaping.
    """
    inputs = (values, rewards, mask, kl, scores, has_eos, dones, bootstrap)
    inputs += (offsets, lambda_per_row)
    scaling = (kl_coef, score_mean, score_std, score_min, score_max, missing_eos_value)
    choices = (mask_mode, score_placement, score_order, missing_eos)
    options = (gamma, lam, value_lam, *scaling, *choices)
    tensors = map(_constant, _taken(_lists.GAE, *inputs))
    advantages, returns, shaped, moments = _ops.call(_ops.gae, *tensors, return_rewards, *options)
    if whiten:
        advantages = masked_whiten(advantages, mask, moments=moments)
    return GaeOutput(advantages, returns, shaped if return_rewards else None, moments)


def _constant(tensor: Tensor | None) -> Tensor | None:
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor


class AdvantagesOutput(NamedTuple):
    """What :func:`outcome_advantages` returns: ``advantages, stats = outcome_advantages(...)``."""

    advantages: Tensor
    """``[..., seq_len]`` and 0 where masked if there is a mask, else ``[...]``."""
    stats: dict[str, Tensor]
    """Scalars, float64: ``score_mean`` and ``score_std`` of all scores, and ``zero_std_fraction``,
    the share of groups without two different scores, from which nothing is learnt."""


def outcome_advantages(
    scores: Tensor,
    groups: Tensor | Sequence[Hashable] | None = None,
    mask: Tensor | None = None,
    *,
    group_size: int | None = None,
    lengths: Tensor | None = None,
    score_baselines: Tensor | None = None,
    offsets: Tensor | None = None,
    baseline: Literal[
        "none", "group", "leave_one_out", "batch", "length_weighted", "runner_up"
    ] = "group",
    scale: Literal["none", "group", "leave_one_out", "batch", "mean", "nonzero"] = "group",
    singleton: Literal["zero", "keep"] = "zero",
    eps: Number = 1e-4,
    eps_placement: Literal["variance", "std"] = "std",
    unbiased: bool = True,
    score_min: Number = -inf,
    score_max: Number = inf,
) -> AdvantagesOutput:
    """Advantages from one score a sequence, as of GRPO and its relatives; by default TRL's GRPO.

    With x = clip(score) - score_baseline of each row::

        A = (x - baseline) / (scale + eps)

    :data:`ESTIMATORS` has the field's estimators by name, to be used like this:
    ``outcome_advantages(scores, groups, mask, **ESTIMATORS["rloo"])``. They are ``grpo``,
    ``dr_grpo``, ``rloo``, ``opo``, ``pass_at_k``, ``max_rl``, ``gpg``, ``remax`` (with
    ``score_baselines``), and ``reinforce_plus_plus_baseline``, whose second step is
    ``masked_whiten(advantages, mask)``.

    Equal scores give exactly 0. A score of NaN is left out, and its row gets 0; an infinite one
    makes NaN of every row that is compared with it. A scale of 0, or of too few scores to have one,
    divides nothing. Not differentiable: the results are constants.

    Args:
        scores: ``[...]``, one a sequence.
        groups: which rows belong together, ``[...]``: integers of any value and in any order, or on
            the CPU's side a list or array of anything hashable. Rows of equal ids are a group.
        mask: ``[..., seq_len]``; with it the advantages are spread over the unmasked tokens.
        group_size: in place of ``groups``: so many rows after each other are a group.
        lengths: of the sequences, ``[...]``, for ``length_weighted``; by default those of the mask.
        score_baselines: subtracted from the clipped scores before all else, ``[...]``: those of
            greedy answers in ReMax.
        offsets: where the rows of a pack begin, ``[rows + 1]``; see :func:`gae`. The mask, which
            they need, is ``[tokens]`` then, and so are the advantages.
        baseline: what is subtracted: ``none``; the mean of the ``group``; of the others in it
            (``leave_one_out``); of the ``batch``; of the group by lengths (``length_weighted``); or
            from the best of the group the second best, all others getting 0 (``runner_up``).
        scale: what is divided by: ``none``; the standard deviation of the ``group``; of the others
            in it (``leave_one_out``); of the ``batch``; the group's ``mean``; or the share of all
            rows whose score is not 0 (``nonzero``).
        singleton: what a row gets that is the only one of its group: ``zero``, or its score
            (``keep``). With ``runner_up`` it is an error on the CPU and NaN on CUDA.
        eps: keeps the divisor from 0; added to the standard deviation, or to the variance, or to
            another scale.
        unbiased: whether sums of squares are divided by n - 1, or else by n.
        score_min, score_max: bounds that scores are clipped to first.
    """
    groups = _numbered(groups, scores.device)
    if baseline == "length_weighted" and lengths is None and mask is not None:
        lengths = _lengths(mask != 0, offsets)
    inputs = (scores, groups, lengths, score_baselines, mask, offsets)
    options = (eps, score_min, score_max, baseline, scale, singleton, eps_placement, unbiased)
    tensors = map(_constant, _taken(_lists.ADVANTAGES, *inputs))
    rows, tokens, stats = _ops.call(_ops.outcome_advantages, *tensors, group_size or 0, *options)
    advantages = rows if mask is None else tokens
    return AdvantagesOutput(advantages, dict(zip(_lib.ADVANTAGE_STATS, stats.unbind())))


class TokenBaselineOutput(NamedTuple):
    """What :func:`optimal_token_baseline` returns, ``[..., seq_len]`` and 0 where masked."""

    advantages: Tensor
    returns: Tensor
    """The sum of the rewards from a token on."""


def optimal_token_baseline(
    rewards: Tensor,
    logp: Tensor,
    log_sum_sq_probs: Tensor,
    groups: Tensor | Sequence[Hashable] | None = None,
    mask: Tensor | None = None,
    *,
    group_size: int | None = None,
    weights: Tensor | None = None,
    offsets: Tensor | None = None,
    step: Literal["column", "unmasked"] = "column",
    lone_tail: bool = True,
    eps: Number = 1e-8,
) -> TokenBaselineOutput:
    """Advantages of tokens against verl's optimal token baseline, the baseline of least variance
    that is the same for the tokens of a group at one step.

    With G the sum of the rewards from a token on, and W the sum up to it of ``weights``² times
    ‖onehot - p‖², the squared norm of the gradient of its log-probability to the logits::

        A = G - sum(W G) / (sum(W) + eps)      over the tokens of the group at the same step

    A row that is alone in its group has no baseline. Not differentiable: the results are constants.

    Args:
        rewards: of the tokens, ``[..., seq_len]``.
        logp: log-probabilities of the tokens.
        log_sum_sq_probs: the logarithm of the sum of the squared probabilities of the whole
            vocabulary, which :func:`linear_logprobs` gives; of verl's ``sum_pi_squared`` the log.
        groups: which rows belong together, as of :func:`outcome_advantages`.
        mask: 0 where masked.
        group_size: in place of ``groups``: so many rows after each other are a group.
        weights: importance weights of the tokens.
        offsets: where the rows of a pack begin, ``[rows + 1]``; see :func:`gae`. All that is
            ``[..., seq_len]`` is ``[tokens]`` then.
        step: which tokens of a group have a baseline in common: those of one ``column``, or those
            before which as many are ``unmasked`` (verl's form for several turns).
        lone_tail: whether the one longest row of a group has no baseline from where the second
            longest ends (verl's ``handle_zero_tail``). It would be compared with itself there.
        eps: added to the sum of the weights.
    """
    groups = _numbered(groups, rewards.device)
    inputs = (rewards, logp, log_sum_sq_probs, groups, weights, mask, offsets)
    tensors = map(_constant, _taken(_lists.TOKEN_BASELINE, *inputs))
    options = (eps, step, lone_tail)
    found = _ops.call(_ops.optimal_token_baseline, *tensors, group_size or 0, *options)
    return TokenBaselineOutput(*found)


def _lengths(kept: Tensor, offsets: Tensor | None) -> Tensor:
    """How many tokens are kept of each row."""
    if offsets is None:
        return kept.sum(-1, dtype=torch.float32)
    counts = torch.cat((kept.new_zeros(1, dtype=torch.int64), kept.cumsum(-1)))
    counts = counts[offsets.clamp(0, len(kept))]
    return (counts[1:] - counts[:-1]).float()


def _numbered(groups: Tensor | Sequence[Hashable] | None, device: torch.device) -> Tensor | None:
    """A number for each, the same where they are equal; a tensor has them."""
    if groups is None or isinstance(groups, Tensor):
        return groups
    values = groups.tolist() if hasattr(groups, "tolist") else groups  # of arrays
    numbers: dict[Hashable, int] = defaultdict(count().__next__)
    # Through an array, in a sixth of the time of a tensor of a list; of nothing there is no buffer.
    ids = array("q", list(map(numbers.__getitem__, values)))
    of_cpu = torch.frombuffer(ids, dtype=torch.int64) if ids else torch.zeros(0).long()
    return of_cpu.to(device)


ESTIMATORS = _lists.ESTIMATORS


def gdpo_advantages(
    rewards: Tensor,
    weights: Sequence[float] | None = None,
    groups: Tensor | Sequence[Hashable] | None = None,
    mask: Tensor | None = None,
    *,
    group_size: int | None = None,
    over: Literal["rows", "tokens"] = "rows",
    singleton: Literal["zero", "keep"] = "zero",
    eps: Number = 1e-4,
) -> Tensor:
    """GDPO: advantages from several rewards, of which each is normalised by itself as in GRPO, and
    their weighted sum once more.

    A row without any reward, all being NaN, is left out of that, and gets 0.

    Args:
        rewards: ``[K, ...]``, one a sequence of each of K kinds.
        weights: one a reward; 1 by default.
        groups, mask, group_size, singleton, eps: as of :func:`outcome_advantages`.
        over: what the sum is normalised over: ``rows``, by mean and standard deviation with ``eps``
            (TRL's ``normalize_then_sum``), or ``tokens``, by :func:`masked_whiten` (verl), which
            needs the mask.

    Returns:
        float32, ``[..., seq_len]`` and 0 where masked if there is a mask, else ``[...]``.
    """
    weights = [1.0] * len(rewards) if weights is None else weights
    _lists.check_gdpo(rewards.shape, len(weights), over, mask is not None)
    groups = _numbered(groups, rewards.device)
    given = {"group_size": group_size, "singleton": singleton, "eps": eps}
    total = torch.zeros(rewards.shape[1:], device=rewards.device)
    for scores, weight in zip(rewards, weights):
        total = total + outcome_advantages(scores, groups, **given).advantages * weight
    missing = rewards.isnan().all(0)
    if over == "tokens":
        tokens = outcome_advantages(total, mask=mask, **ESTIMATORS["remax"]).advantages
        return masked_whiten(tokens, (mask != 0) & ~missing.unsqueeze(-1))
    total, over_batch = total.masked_fill(missing, nan), {"baseline": "batch", "scale": "batch"}
    return outcome_advantages(total, None, mask, eps=eps, **over_batch).advantages


def masked_moments(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Count, mean and sum of squared deviations of the unmasked values: ``[3]``, float64.

    Those of several shards merge into those of the whole, n_a and n_b being the counts::

        delta = mean_b - mean_a
        count = n_a + n_b
        mean  = mean_a + delta n_b / count
        m2    = m2_a + m2_b + delta^2 n_a n_b / count

    Not differentiable.
    """
    return _ops.masked_moments(*map(_constant, _taken(_lists.MASKED_MOMENTS, values, mask)))


def masked_whiten(
    values: Tensor,
    mask: Tensor | None = None,
    shift_mean: bool = True,
    *,
    unbiased: bool = True,
    eps: Number = 1e-8,
    eps_placement: Literal["variance", "std"] = "variance",
    moments: Tensor | None = None,
) -> Tensor:
    """(values - mean) / sqrt(var + eps) over the unmasked values.

    Args:
        values: ``[...]``. Differentiable.
        mask: ``[...]``.
        shift_mean: if not, the mean is added back after scaling.
        unbiased: whether the sum of squares is divided by n - 1, or else by n.
        eps: keeps the divisor from 0; added to the variance, or to the standard deviation.
        moments: :func:`masked_moments` of a larger set, as constants; else those of ``values``,
            through which the gradient goes too.

    Returns:
        float32, ``[...]``, 0 where masked. With fewer than 2 unmasked values (1 if not
        ``unbiased``) it is an error on the CPU and NaN on CUDA.
    """
    tensors = _taken(_lists.MASKED_WHITEN, values, mask)
    options = (eps, eps_placement, unbiased, shift_mean)
    if moments is None:
        return _ops.call(_ops.masked_whiten, *tensors, *options)[0]
    return _ops.call(_ops.masked_whiten_with, *tensors, moments, *options)


class CorrectionOutput(NamedTuple):
    """What :func:`correction` returns: ``weights, kept, stats = correction(...)``."""

    weights: Tensor
    """``[..., seq_len]``: for :func:`ppo_loss`; 0 where masked or rejected."""
    kept: Tensor
    """``[..., seq_len]``, bool: the mask without what is rejected."""
    stats: dict[str, Tensor]
    """float64 scalars on the same device."""


def correction(
    old_logp: Tensor,
    rollout_logp: Tensor,
    mask: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    level: Literal["token", "sequence_mean", "sequence_sum", "none"] = "token",
    log_ratio_clamp: Number | None = 20.0,
    low: Number | None = None,
    high: Number | None = 2.0,
    outside: Literal["truncate", "zero"] = "truncate",
    normalise: bool = False,
    rejection_metric: RejectionMetric = "none",
    rejection_level: RejectionLevel = "token",
    rejection_low: Number | None = None,
    rejection_high: Number | None = None,
    second_rejection_metric: RejectionMetric = "none",
    second_rejection_level: RejectionLevel = "token",
    second_rejection_low: Number | None = None,
    second_rejection_high: Number | None = None,
) -> CorrectionOutput:
    """Importance weights for tokens that another engine sampled than the one that trains, with
    rejections of those that the two disagree on too much.

    With d = old_logp - rollout_logp, and its sum or mean over a row::

        w      = exp(d), exp(sum d), exp(mean d) or 1         by the level
        weight = w where low <= w <= high, else the nearer bound or 0
        weight = 0 where a rejection's metric, of the token or its row, is out of its bounds

    The weights go into :func:`ppo_loss`, where 0 drops a token from the sum and not from the
    denominator; give it ``kept`` as the mask where rejected tokens shall leave that too (verl).
    :func:`named_correction` has those with names. It is not differentiable: all results are
    constants.

    Args:
        old_logp: log-probabilities as the trainer computes them before the update,
            ``[..., seq_len]``.
        rollout_logp: as the rollout engine computed them; where it could not, NaN, which counts as
            d = 0.
        mask: ``[..., seq_len]``.
        offsets: where the rows of a pack begin, ``[rows + 1]``; see :func:`gae`. What is
            ``[..., seq_len]`` is ``[tokens]`` then.
        level: the weight is the token's, its row's geometric mean or product, or ``none``: 1.
        log_ratio_clamp: clamps d, or its sum or mean, to plus or minus this.
        low, high: bounds of the weight.
        outside: what is outside becomes the bound, or 0 (IcePop), which is not rejected.
        normalise: divides the weights by the mean of those before rejections, over tokens, or of
            rows' weights over rows.
        rejection_metric: ``ratio``, exp(d); ``k2``, d^2/2; ``k3``, exp(d) - 1 - d, and
            ``reverse_k3``, that of -d; ``binary_kl``, the KL of token or not token of the rollout
            from the trainer, or the larger of both directions; ``total_variation``, the change of
            the probability. k1 is the logarithm of ``ratio``, in verl with the other sign: its
            bounds there are those of exp(-d).
        rejection_level: of the token, or its mean, its sum or its extremes over the row, which then
            is rejected as a whole; of ratios the geometric mean and the product.
        rejection_low, rejection_high: bounds of the metric, at least one of them.
        second_rejection_metric, second_rejection_level, second_rejection_low,
            second_rejection_high: another rule; what either rejects is.

    Returns:
        The weights, the mask that is left, and statistics, sums over tokens that ranks can add:
        ``tokens``, the unmasked ones with a log-probability of the rollout, over which the others
        are; ``unscored_tokens``, ``rejected_tokens`` (of weight 0), ``below_tokens`` and
        ``above_tokens`` (outside the bounds of the weight), ``rows``, ``rejected_rows``,
        ``weight_sum``, ``weight_square_sum``, ``log_ratio_sum``, ``log_ratio_abs_sum``,
        ``k3_sum``, ``ratio_square_sum``, ``mult_prob_error_sum``, ``row_ratio_square_sum``,
        ``log_ppl_sum`` and ``rollout_log_ppl_sum`` (over rows, of their means); and
        ``log_ratio_abs_max``, ``k3_max``, ``weight_max``, ``weight_min``, and ``ess``, the
        effective sample size as a share of the tokens. Nothing is NaN because there is no token.
    """
    _lists.check_rollout(rollout_logp)
    tensors = map(_constant, _taken(_lists.CORRECTION, old_logp, rollout_logp, mask, offsets))
    bounds = (log_ratio_clamp, low, high)
    rules = (rejection_low, rejection_high, second_rejection_low, second_rejection_high)
    first = (rejection_metric, rejection_level)
    second = (second_rejection_metric, second_rejection_level)
    options = (*bounds, *rules, level, outside, normalise, *first, *second)
    weights, kept, stats = _ops.call(_ops.correction, *tensors, *options)
    return CorrectionOutput(weights, kept, dict(zip(_lib.CORRECTION_STATS, stats.unbind())))


def ppo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    entropy: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    weights: Tensor | None = None,
    offsets: Tensor | None = None,
    clip_range: Number = 0.2,
    clip_range_high: Number | None = None,
    dual_clip: Number | None = None,
    log_ratio_clamp: Number | None = 20.0,
    value_clip_range: Number | None = 0.2,
    value_coef: Number = 0.1,
    entropy_coef: Number = 0.0,
    kl_coef: Number = 0.0,
    kl_estimator: Estimator = "k3",
    kl_log_ratio_clamp: Number | None = 20.0,
    kl_output_clamp: Number | None = None,
    aggregation: Aggregation = "token_mean",
    aggregation_divisor: Number | None = None,
    denominator: Number | None = None,
    clip_fraction: Literal["clipped_branch", "ratio_outside"] = "clipped_branch",
    surrogate: Surrogate = "clip",
    ratio: Literal["token", "sequence_mean", "sequence_sum"] = "token",
    ratio_gradient: Literal["spread", "own_token"] = "spread",
    ratio_cap: Number | None = None,
    soft_gate_tau_pos: Number = 1.0,
    soft_gate_tau_neg: Number = 1.05,
    gamma_k_pos: Number = 2.0,
    gamma_lambda_pos: Number = 3.0,
    gamma_k_neg: Number = 3.0,
    gamma_lambda_neg: Number = 2.0,
    trust_region: TrustRegion = "none",
    trust_region_low: Number = 0.2,
    trust_region_high: Number = 0.2,
    trust_region_sides: Literal["by_advantage", "both"] = "by_advantage",
    off_policy_threshold: Number | None = None,
    kl_against: Literal["reference", "old", "rollout"] = "reference",
    kl_gradient: Literal["own", "reverse"] = "own",
    kl_ratio: Literal["none", "gradient", "term"] = "none",
    kl_ratio_cap: Number | None = None,
    kl_weighted: bool = False,
    entropy_own_mean: bool = False,
    row_extremes: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The PPO loss and its statistics, from one pass that makes the gradients too.

    With d = logp - old_logp, clamped, ratio r = exp(d), advantage A, low and high the clip ranges::

        policy = max(-r A, -clip(r, 1 - low, 1 + high) A), at most -c A where A < 0 with dual clip c
        value  = max((v - R)^2, (clip(v, v_old - e, v_old + e) - R)^2) / 2
        loss   = agg(weights policy) + value_coef agg(value)
                 - entropy_coef agg(entropy) + kl_coef agg(kl)

    The other losses of its family are options of the policy term and of the KL term, each by
    itself; :func:`named_loss` has those of losses with names:
    ``ppo_loss(.., **named_loss("gspo"))``.

    Args:
        logp: log-probabilities under the policy that is trained, ``[..., seq_len]``.
            Differentiable.
        old_logp: under the policy that made the rollout; ``None`` where that is the one that is
            trained, and r is 1. Like all that is not said to be differentiable, a constant.
        advantages: already whitened, if they are to be. As ``weights`` a number for each token, or
            ``[...]``, with offsets ``[rows]``, one for each row.
        mask: ``[..., seq_len]``.
        values, old_values, returns: for the value term: the critic's predictions, differentiable;
            those at the time of the rollout, needed unless ``value_clip_range`` is ``None``; and
            their targets.
        entropy: of the policy at each token. Differentiable.
        ref_logp: log-probabilities under the reference model, for the KL term.
        rollout_logp: of the rollout as its engine computed them.
        weights: factors of the policy term, 0 or more: importance weights, rejections, masks. 0
            drops a token, whatever it holds, from the sum and not from the denominator; a ratio of
            rows is of all unmasked tokens all the same.
        offsets: where the rows of a pack begin, ``[rows + 1]``; see :func:`gae`. What is
            ``[..., seq_len]`` is ``[tokens]`` then, and the ``seq_len`` of an aggregation is the
            longest row.
        clip_range, clip_range_high: low, and high if it is another; infinity for no clip.
        dual_clip: c, above 1 (3 in verl).
        log_ratio_clamp: clamps d to plus or minus this.
        value_clip_range: e.
        value_coef, entropy_coef, kl_coef: factors of the terms.
        kl_estimator, kl_log_ratio_clamp, kl_output_clamp: as in :func:`token_kl`.
        aggregation: ``token_mean``; ``seq_mean_token_sum`` and ``seq_mean_token_mean``, means over
            the rows that have an unmasked token; ``seq_mean_token_sum_norm``, the sum over
            ``seq_len``, and ``seq_mean_token_sum_norm_rows``, over ``seq_len`` and those rows;
            ``batch_mean_token_sum`` and ``batch_mean_token_mean``, means over all rows (TRL's
            ``luspo`` and ``grpo``); ``constant``, the sum over ``aggregation_divisor``.
        denominator: replaces that of the aggregation, for gradient accumulation and data
            parallelism.
        clip_fraction: counts tokens whose clipped branch is larger, or whose ratio is outside.
        surrogate: what is made of r, A and logp, where sg stops the gradient: ``clip``, the policy
            term above; ``log_clip``, -r A of log-ratios that are clipped before their mean (GMPO);
            ``reinforce``, -A logp; ``clipped_weight``, -sg(clip(r)) A logp (CISPO, DPPO);
            ``gamma_weight``, -sg(exp(lambda) r^k exp(-lambda r)) A logp (VESPO); ``soft_gate``,
            -(4 / tau) sigmoid(tau (r - 1)) A (SAPO).
        ratio: r is of the token, or of the mean or the sum of d over the row.
        ratio_gradient: that of a row's ratio is spread over its tokens, or each has its own term's.
        ratio_cap: bounds r from above in the unclipped branch (TRL's ``delta``).
        soft_gate_tau_pos, soft_gate_tau_neg: tau where A > 0, and elsewhere.
        gamma_k_pos, gamma_lambda_pos, gamma_k_neg, gamma_lambda_neg: k and lambda where A >= 0, and
            elsewhere.
        trust_region: tokens outside have no policy term: by the change of their probability
            (``total_variation``), by the KL of token or not token (``binary_kl``), or by
            ``ratio``.
        trust_region_low, trust_region_high, trust_region_sides: its bounds, of which the upper
            holds where A > 0 and the lower elsewhere, or both.
        off_policy_threshold: drops tokens with A < 0 in rows whose mean of rollout_logp - logp (of
            old_logp - logp without it) is larger.
        kl_against: the policy that the KL term is against.
        kl_gradient: the estimator's own, or the log-ratio itself, which no clamp stops.
        kl_ratio, kl_ratio_cap: what r of the token, bounded by the cap, is a factor of: the KL
            term's gradient, or all of the ``term``.
        kl_weighted: whether ``weights`` are factors of the KL term too.
        entropy_own_mean: whether the entropy bonus is the mean over the unmasked tokens (TRL),
            whatever ``aggregation`` and ``denominator`` are.
        row_extremes: whether ``clip_high_row_max`` and ``clip_low_row_min`` are wanted, which takes
            another look at the tokens.

    Returns:
        The loss, and the statistics, all float32 scalars on the same device: ``loss``,
        ``policy_loss``, ``value_loss``, ``clip_fraction``, ``lower_clip_fraction``,
        ``clip_high_fraction`` and ``clip_low_fraction`` (clipped with A > 0, and without),
        ``clip_high_row_max`` and ``clip_low_row_min`` (their extremes over rows with a token),
        ``outside_fraction``, ``off_policy_fraction``, ``value_clip_fraction``,
        ``approx_kl_k1``, ``approx_kl_k2``, ``approx_kl_k3``,
        ``ratio_mean``, ``ratio_var``, ``ratio_min``, ``ratio_max``, ``entropy_mean``, ``kl_mean``,
        ``advantage_mean``, ``return_mean``, ``value_mean``, ``explained_variance`` and ``tokens``;
        NaN for what is not defined, where an input is not given, say.
    """
    if old_logp is None:
        old_logp = logp.detach()
    advantages, advantages_per_row = _of_rows(advantages, logp, offsets)
    weights, weights_per_row = _of_rows(weights, logp, offsets)
    of_terms = (values, old_values, returns, entropy, ref_logp, rollout_logp, weights)
    tensors = _taken(_lists.PPO_LOSS, logp, old_logp, advantages, *of_terms, mask, offsets)
    clips = (clip_range, clip_range_high, dual_clip, log_ratio_clamp, value_clip_range)
    terms = (value_coef, entropy_coef, kl_coef, kl_log_ratio_clamp, kl_output_clamp)
    means = (aggregation_divisor, denominator)
    soft = (ratio_cap, soft_gate_tau_pos, soft_gate_tau_neg)
    gamma = (gamma_k_pos, gamma_lambda_pos, gamma_k_neg, gamma_lambda_neg)
    regions = (trust_region_low, trust_region_high, off_policy_threshold, kl_ratio_cap)
    kinds = (aggregation, clip_fraction, kl_estimator, surrogate, ratio, ratio_gradient)
    more = (trust_region, trust_region_sides, kl_against, kl_gradient, kl_ratio, kl_weighted)
    rest = (entropy_own_mean, advantages_per_row, weights_per_row, row_extremes)
    options = (*clips, *terms, *means, *soft, *gamma, *regions, *kinds, *more, *rest)
    wanted = map(_wants_gradient, (logp, values, entropy))
    loss, stats, *_ = _ops.call(_ops.ppo_loss, *tensors, *wanted, *options)
    return loss, dict(zip(_lib.STATS, stats.unbind()))


class LinearPpoLossOutput(NamedTuple):
    """What :func:`linear_ppo_loss` gives."""

    loss: Tensor
    stats: dict[str, Tensor]
    logp: Tensor
    entropy: Tensor


_LOSS_DEFAULTS = _lists.PPO_LOSS.options.defaults()


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: Number | Tensor = 1.0,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    weights: Tensor | None = None,
    offsets: Tensor | None = None,
    **options: Any,
) -> LinearPpoLossOutput:
    """:func:`ppo_loss` from hidden states and the head's weight, without the logits of all tokens:
    what :func:`linear_logprobs` and :func:`ppo_loss` do one after the other, with three products
    with the weight and not four, since the gradients are made with the loss.

    Where an option looks at a whole row of tokens (``ratio``, ``off_policy_threshold``), and in
    float16, whose gradients are to be scaled before they are rounded, it is those two.

    Args:
        hidden: ``[..., seq_len, hidden_size]``. Differentiable, as the weight, bias and adapter.
        weight, bias, temperature, logit_scale, softcap, lora: as in :func:`linear_logprobs`.
        index: token ids ``[..., seq_len]``.
        old_logp, advantages, mask, ref_logp, rollout_logp, weights, offsets: as in
            :func:`ppo_loss`. Masked tokens take no part in any product. With offsets ``index`` is
            ``[tokens]``.
        options: those of :func:`ppo_loss`, by name.

    Returns:
        The loss, its statistics, and as constants the log-probabilities and entropies, ``[...,
        seq_len]``, 0 where masked.
    """
    for name in options:
        if name not in _LOSS_DEFAULTS or name in _lists.PPO_LOSS_PER_ROW:
            raise TypeError(f"linear_ppo_loss() got an unexpected keyword argument {name!r}")
    if old_logp is None:
        raise ValueError("linear_ppo_loss: `old_logp` is None, expected a tensor")
    settings = {**_LOSS_DEFAULTS, **options}
    hidden = _linear.autocast(hidden)
    head = {
        "temperature": temperature,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "lora": lora,
    }
    of_rows = settings["ratio"] != "token" or settings["off_policy_threshold"] is not None
    # A gradient for an upstream gradient of 1 may be below what float16 holds.
    if of_rows or hidden.dtype == torch.float16:
        found = linear_logprobs(
            hidden, weight, index, bias, row_mask=mask, outputs=("entropy",), **head
        )
        loss, stats = ppo_loss(
            found.logp,
            old_logp,
            advantages,
            mask,
            entropy=found.entropy,
            ref_logp=ref_logp,
            rollout_logp=rollout_logp,
            weights=weights,
            offsets=offsets,
            **options,
        )
        return LinearPpoLossOutput(loss, stats, found.logp.detach(), found.entropy.detach())
    op = _lists.LINEAR_PPO_LOSS.name
    advantages = _of_tokens(advantages, index, offsets)
    weights = _of_tokens(weights, index, offsets)
    index, ignore_index = _skipped_index(op, index, mask, None, "mask")
    rows = None
    if isinstance(temperature, Tensor) and temperature.dim():
        rows, temperature = _per_token(temperature).detach(), 1.0
    a, b, scale = (None, None, 1.0) if lora is None else lora
    of_tokens = (old_logp, advantages, ref_logp, rollout_logp, weights, mask, offsets)
    of_tokens = _taken(_lists.LINEAR_PPO_LOSS_ROWS, *of_tokens)
    tensors = (hidden, weight, index, bias, rows, a, b, *of_tokens)
    wanted = map(_wants_gradient, (hidden, weight, bias, a, b))
    of_head = (temperature, ignore_index, logit_scale, softcap, scale)
    found = _ops.call(_linear.linear_ppo_loss, *tensors, *wanted, *of_head, *settings.values())
    loss, *_, stats, logp, entropy = found
    return LinearPpoLossOutput(loss, dict(zip(_lib.STATS, stats.unbind())), logp, entropy)


def _of_rows(
    numbers: Tensor | None, tokens: Tensor, offsets: Tensor | None
) -> tuple[Tensor | None, bool]:
    """Numbers for tokens or for rows, and whether they are for rows."""
    if numbers is None or not tokens.dim():
        return numbers, False
    rows = tuple(tokens.shape[:-1])
    if offsets is not None:
        rows = (offsets.shape[0] - 1,) if offsets.dim() == 1 else ()
    per_row = _lists.is_per_row(tuple(numbers.shape), rows, tuple(tokens.shape))
    return (numbers.reshape(rows) if per_row else numbers), per_row


def _of_tokens(numbers: Tensor | None, tokens: Tensor, offsets: Tensor | None) -> Tensor | None:
    """Numbers for rows as numbers for tokens."""
    numbers, per_row = _of_rows(numbers, tokens, offsets)
    if not per_row:
        return numbers
    if offsets is None:
        return numbers.unsqueeze(-1).expand(tokens.shape)
    return numbers.repeat_interleave(offsets.diff(), output_size=tokens.numel())


def _wants_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


class PreferenceOutput(NamedTuple):
    """What :func:`preference_loss` returns."""

    loss: Tensor
    """A scalar. Differentiable."""
    losses: Tensor
    """``[pairs]``, or in KTO ``[rows]``: times their weights, as constants."""
    rewards: Tensor
    """``[rows]``: implicit rewards, ``beta`` times the log-ratio, which is averaged if the loss
    averages, as constants."""
    stats: dict[str, Tensor]
    """``loss``, ``preference_loss``, ``sft_loss``, ``accuracy``, ``reward_margin``,
    ``chosen_reward``, ``rejected_reward``, ``chosen_logp``, ``rejected_logp``, ``chosen`` and
    ``rejected``: means over responses, and how many there are; NaN for what is not defined."""


def preference_loss(
    logp: Tensor,
    ref_logp: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    loss: PreferenceLoss = "sigmoid",
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
    average_log_prob: bool = False,
    gamma: Number = 0.0,
    alpha: Number = 0.0,
    discopop_tau: Number = 0.05,
    f_divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = "reverse_kl",
    f_alpha: Number = 0.5,
    ld_alpha: Number | None = None,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
    sft_coef: Number = 0.0,
    denominator: Number | None = None,
    sft_denominator: Number | None = None,
    lengths: Tensor | None = None,
    weights: Tensor | None = None,
    margin: Tensor | None = None,
    labels: Tensor | None = None,
    offsets: Tensor | None = None,
    kl: Number | None = None,
) -> PreferenceOutput:
    """A preference loss, the DPO family or KTO, with implicit rewards and statistics, from one pass
    over the tokens that makes the gradient too.

    Rows are the chosen responses of all pairs, and then the rejected ones in the same order, as
    ``torch.cat((chosen, rejected))`` has them. With x and y the sums over the tokens of
    ``logp - ref_logp`` of a pair, s the logistic function and ls its logarithm::

        a = beta x, b = beta y, h = a - b - gamma - margin
        loss = mean of weight l(a, b, h) + sft_coef (mean of -logp of the chosen tokens)

    ============  =========================================================================
    ``loss``      l
    ============  =========================================================================
    sigmoid       -(1 - e) ls(h) - e ls(-h), e the label smoothing: DPO, cDPO
    robust        (-(1 - e) ls(h) + e ls(-h)) / (1 - 2 e)
    hinge         max(0, 1 - h)
    ipo           (x - y - 1 / (2 beta))^2; TRL averages x and y, OpenRLHF does not
    sigmoid_norm  as sigmoid, averaged
    exo_pair      KL of (s(h), s(-h)) to (1 - e, e), e above 0
    nca_pair      -ls(a) - (ls(-a) + ls(-b)) / 2
    bco_pair      -ls(a) - ls(-b)
    sppo_hard     (x - 1 / (2 beta))^2 + (y + 1 / (2 beta))^2
    apo_zero      1 - s(a) + s(b)
    apo_down      s(a) + 1 - s(h)
    discopop      -ls(h) (1 - g) + exp(-h) g, g = s(h / discopop_tau)
    aot           as sigmoid, of the sorted log-ratios of policy and reference
    aot_unpaired  as sigmoid, of the sorted x and the sorted y
    simpo         as sigmoid, without a reference, averaged (beta 2, gamma 0.5 to 1.4)
    cpo           as sigmoid, without a reference
    orpo          -beta ls(o(x) - o(y)), o(t) = t - ln(1 - exp(t)), without a reference, averaged
    alphapo       as simpo, of (1 - exp(-alpha t)) / alpha
    kto           w_d (1 - s(beta (x - kl))) where desirable, else w_u (1 - s(beta (kl - x)))
    ============  =========================================================================

    Args:
        logp: log-probabilities under the policy that is trained, ``[rows, seq_len]``, or of whole
            responses ``[rows]``. Differentiable.
        ref_logp: under the reference model, likewise, or of whole responses. Like all that is not
            said to be differentiable, a constant.
        mask: ``[rows, seq_len]``: the tokens of the response.
        loss: one of the above.
        beta: scale of the log-ratios.
        label_smoothing: e, up to 0.5, of losses that have it.
        average_log_prob: divides sums by lengths in other losses too.
        gamma: target margin of losses that are as sigmoid.
        alpha: of alphapo; 0 is simpo.
        discopop_tau: of discopop.
        f_divergence, f_alpha: what stands in place of x, of losses of h with a reference:
            ``forward_kl`` 1 - exp(-x); ``jensen_shannon`` ln 2 + ls(x); ``alpha``
            (exp((f_alpha - 1) x) - 1) / (f_alpha - 1).
        ld_alpha: weight of tokens beyond the length of the pair's shorter response (LD-DPO).
        desirable_weight, undesirable_weight: w_d and w_u.
        sft_coef: factor of the likelihood term (RPO, CPO, ORPO).
        denominator: replaces the number of pairs, or in kto of rows, for gradient accumulation and
            data parallelism.
        sft_denominator: replaces the number of the chosen responses' tokens likewise.
        lengths: ``[rows]``, int64, of responses without tokens, to average by.
        weights: ``[pairs]``, or in kto ``[rows]`` (WPO). Of weight 0 nothing is looked at.
        margin: ``[pairs]``, of losses that are as sigmoid.
        labels: ``[rows]``, of kto: 1 or ``True`` where desirable, else 0.
        offsets: where the rows of a pack begin, ``[rows + 1]``; see :func:`gae`. What is
            ``[rows, seq_len]`` is ``[tokens]`` then.
        kl: of kto, ``max(0, mean)`` of the log-ratios of mismatched prompts and responses, a number
            or a tensor of one; 0 without it, which is APO-zero unpaired.
    """
    lengths = None if lengths is None else lengths.long()
    ref_sums = None
    of_rows = offsets is None or (ref_logp is not None and ref_logp.shape != logp.shape)
    if ref_logp is not None and ref_logp.dim() == 1 and of_rows:
        ref_logp, ref_sums = None, ref_logp
    if mask is not None and logp.dim() == 1 and offsets is None:
        mask = mask.unsqueeze(-1)
    logp = _per_token(logp)
    of_rows = (ref_logp, ref_sums, mask, lengths, _classes(labels))
    tensors = (*_taken(_lists.PREFERENCE_ROWS, *of_rows), _per_token(weights), _per_token(margin))
    if kl is not None:
        kl = kl if isinstance(kl, Tensor) else torch.full((1,), kl, device=logp.device)
        kl = _per_token(kl).reshape(1)
    constants = map(_constant, (*tensors, kl, _ids(offsets)))
    numbers = (beta, label_smoothing, gamma, alpha, discopop_tau, f_alpha, ld_alpha)
    factors = (desirable_weight, undesirable_weight, sft_coef, denominator, sft_denominator)
    options = (*numbers, *factors, loss, f_divergence, average_log_prob)
    wanted = _wants_gradient(logp)
    found = _ops.call(_ops.preference_loss, logp, *constants, wanted, *options)
    total, _, stats, losses, rewards = found
    named = dict(zip(_lib.PREFERENCE_STATS, stats.unbind()))
    return PreferenceOutput(total, losses, rewards, named)


def _classes(labels: Tensor | None) -> Tensor | None:
    """Bytes, of which those that are no label are refused."""
    if labels is None or labels.dtype in _ops.BYTES:
        return labels
    return (2 - 2 * (labels == 0).byte() - (labels == 1).byte()).byte()


def reward_model_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    center_coef: Number = 0.0,
    denominator: Number | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The pairwise loss of a reward model and its statistics: the mean of
    ``-ls(chosen - rejected - margin) + center_coef (chosen + rejected)^2``, with ls the logarithm
    of the logistic function.

    Args:
        chosen, rejected: rewards of the responses, ``[pairs]``. Differentiable.
        margin: how much more the chosen one is to get, ``[pairs]``.
        weights: ``[pairs]``. Of weight 0 nothing is looked at.
        center_coef: keeps rewards around 0 (0.01 in Eisenstein et al.).
        denominator: replaces the number of pairs, for gradient accumulation and data parallelism.

    Returns:
        The loss, and the statistics of :func:`preference_loss`, of rewards.
    """
    op = _lists.REWARD_MODEL.name
    chosen, rejected, margin, weights = map(_per_token, (chosen, rejected, margin, weights))
    _lists.check_shape(op, "rejected", rejected.shape, chosen.shape)
    _ops.check_device(op, "rejected", rejected, chosen.device)
    rewards = torch.stack((chosen, rejected))
    constants = map(_constant, (margin, weights))
    wanted = _wants_gradient(rewards)
    options = (center_coef, denominator)
    loss, _, stats, _ = _ops.call(_ops.reward_model_loss, rewards, *constants, wanted, *options)
    return loss, dict(zip(_lib.PREFERENCE_STATS, stats.unbind()))
