"""The ops as plain PyTorch, to be run in float64: what values and gradients are compared with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def logprobs_and_entropy(logits, index, temperature=1.0):
    logp = F.log_softmax(logits / temperature, -1)
    many = index if index.dim() == logits.dim() else index.unsqueeze(-1)
    chosen = logp.gather(-1, many.long())
    entropy = -torch.where(logp.isneginf(), 0.0, logp.exp() * logp).sum(-1)
    return (chosen if many is index else chosen.squeeze(-1)), entropy


def token_kl(logp, ref_logp, estimator, log_ratio_clamp=None, output_clamp=None):
    d = logp - ref_logp
    if log_ratio_clamp is not None:
        d = d.clamp(-log_ratio_clamp, log_ratio_clamp)
    k2 = d * d / 2
    k3 = torch.exp(-d) - 1 + d
    kl = {"k1": d, "abs": d.abs(), "k2": k2, "k3": k3, "k3_straight_through": k2}[estimator]
    if estimator == "k3_straight_through":
        kl = k3.detach() + k2 - k2.detach()
    return kl if output_clamp is None else kl.clamp(-output_clamp, output_clamp)


def full_kl(logits, ref_logits, divergence="forward", beta=0.5, skew=0.1, temperature=1.0):
    p, q = (F.log_softmax(z / temperature, -1) for z in (logits, ref_logits))

    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)

    def mixture(p, q, share):
        return torch.logaddexp(p + math.log(share), q + math.log1p(-share))

    if divergence == "total_variation":
        return 1 - torch.minimum(p, q).exp().sum(-1)
    if divergence == "jsd":
        m = mixture(p, q, 1 - beta)
        return beta * kl(q, m) + (1 - beta) * kl(p, m)
    p, q = (q, p) if "reverse" in divergence else (p, q)
    return kl(p, mixture(p, q, skew) if "skew" in divergence else q)


def gae(values, rewards, mask, gamma, lam, multiply=False):
    """Rows of [B, T], token by token from the last."""
    values, rewards = (torch.where(mask, tensor, 0.0) for tensor in (values, rewards))
    following = accumulated = torch.zeros_like(values[:, 0])
    advantages = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        step = mask[:, t] | multiply
        accumulated = torch.where(step, delta + gamma * lam * accumulated, accumulated)
        following = torch.where(step, values[:, t], following)
        advantages.append(accumulated)
    advantages = torch.stack(advantages[::-1], 1)
    return advantages * mask, (advantages + values) * mask


def masked_whiten(values, mask, shift_mean=True, unbiased=True, eps=1e-8):
    kept = values[mask]
    mean, var = kept.mean(), kept.var(correction=int(unbiased))
    whitened = (values - mean) * torch.rsqrt(var + eps) + (0.0 if shift_mean else mean)
    return torch.where(mask, whitened, 0.0)


def aggregate(loss, mask, aggregation, divisor=None):
    loss, lengths = torch.where(mask, loss, 0.0), mask.sum(-1)
    rows = (lengths > 0).sum()
    if aggregation == "token_mean":
        return loss.sum() / mask.sum()
    if aggregation == "seq_mean_token_sum":
        return loss.sum() / rows
    if aggregation == "seq_mean_token_mean":
        return (loss.sum(-1) / lengths.clamp(min=1)).sum() / rows
    return loss.sum() / (loss.shape[-1] if divisor is None else divisor)


def ppo_loss(
    logp,
    old_logp,
    advantages,
    mask,
    *,
    values=None,
    old_values=None,
    returns=None,
    entropy=None,
    ref_logp=None,
    clip_range=0.2,
    clip_range_high=None,
    dual_clip=None,
    log_ratio_clamp=20.0,
    value_clip_range=0.2,
    value_coef=0.1,
    entropy_coef=0.0,
    kl_coef=0.0,
    aggregation="token_mean",
    aggregation_divisor=None,
):
    def agg(loss):
        return aggregate(loss, mask, aggregation, aggregation_divisor)

    ratio = (logp - old_logp).clamp(-log_ratio_clamp, log_ratio_clamp).exp()
    high = clip_range if clip_range_high is None else clip_range_high
    free, clipped = -ratio * advantages, -ratio.clamp(1 - clip_range, 1 + high) * advantages
    policy = torch.maximum(free, clipped)
    if dual_clip is not None:
        bounded = torch.minimum(policy, -dual_clip * advantages)
        policy = torch.where(advantages < 0, bounded, policy)
    loss = agg(policy)
    if values is not None:
        near = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
        loss = loss + value_coef * agg(
            torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
        )
    if entropy is not None:
        loss = loss - entropy_coef * agg(entropy)
    if ref_logp is not None:
        loss = loss + kl_coef * agg(token_kl(logp, ref_logp, "k3", 20.0))
    return loss


def correction(old_logp, rollout_logp, mask):
    """Weights of tokens, 2 at most, of rows whose mean of k3 is 0.01 or less."""
    d = torch.where(mask, old_logp - rollout_logp, 0.0).clamp(-20, 20)
    k3 = ((d.exp() - 1 - d) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    return torch.where(mask & (k3 <= 0.01), d.exp().clamp(max=2.0), 0.0)


# The losses that have names in ppo_kernels.
NAMED = (
    "ppo dapo grpo dr_grpo bnpo luspo rloo gspo gspo_token gmpo cispo dppo sapo vespo reinforce gpg"
).split()


def named_loss(name, logp, old_logp, advantages, mask, weights=1.0):
    """The losses that have names, by the defaults of their papers."""
    return terms_of_named_loss(name, logp, old_logp, advantages, mask, weights)[0]


def named_loss_and_stats(name, logp, old_logp, advantages, mask, weights=1.0):
    """The same with what one looks at beside it, means over the tokens."""
    loss, ratio, clipped = terms_of_named_loss(name, logp, old_logp, advantages, mask, weights)
    with torch.no_grad():
        m = mask.to(logp.dtype)
        tokens = m.sum()
        ratio = ratio.expand_as(m)
        d = torch.where(mask, logp - old_logp, 0.0).clamp(-20.0, 20.0)
        a = torch.where(mask, advantages, 0.0)

        def mean(x):
            return (x * m).sum() / tokens

        ratio_mean = mean(ratio)
        stats = {
            "loss": loss.detach(),
            "tokens": tokens,
            "clip_fraction": mean(clipped),
            "clip_high_fraction": mean(clipped & (a > 0)),
            "clip_low_fraction": mean(clipped & ~(a > 0)),
            "approx_kl_k1": mean(-d),
            "approx_kl_k2": mean(d**2 / 2),
            "approx_kl_k3": mean(d.exp() - 1 - d),
            "ratio_mean": ratio_mean,
            "ratio_var": mean((ratio - ratio_mean) ** 2),
            "ratio_min": torch.where(mask, ratio, torch.inf).min(),
            "ratio_max": torch.where(mask, ratio, -torch.inf).max(),
            "advantage_mean": mean(a),
        }
    return loss, stats


def terms_of_named_loss(name, logp, old_logp, advantages, mask, weights):
    """The loss, the ratios in it, and what is clipped."""
    m, n = mask.to(logp.dtype), mask.sum(-1, keepdim=True).clamp(min=1)
    d = torch.where(mask, logp - old_logp, 0.0)
    logp, a = torch.where(mask, logp, 0.0), torch.where(mask, advantages, 0.0)
    weights = m * torch.where(mask, weights, 0.0)
    clipped = torch.zeros_like(mask)
    low, high = {
        "dapo": (0.2, 0.28),
        "gspo": (3e-4, 4e-4),
        "gspo_token": (3e-4, 4e-4),
        "luspo": (3e-4, 4e-4),
        "gmpo": (0.4, 0.4),
    }.get(name, (0.2, 0.2))
    if name in ("gspo", "luspo"):
        d = d.sum(-1, keepdim=True) / n
    elif name == "gspo_token":
        d = (d.sum(-1, keepdim=True) / n).detach() + d - d.detach()
    elif name == "gmpo":
        clipped = torch.where(a > 0, d > high, d < -low)
        d = torch.where(a > 0, d.clamp(max=high), d.clamp(min=-low))
        d = (d * m).sum(-1, keepdim=True) / n
    elif name in ("rloo", "vespo"):
        d = d.sum(-1, keepdim=True)
    ratio = d.exp()
    if name in ("reinforce", "gpg"):
        loss = -a * logp
    elif name == "dro":
        loss = -a * logp + 0.1 * d**2 / 2
    elif name == "gmpo":
        loss = -ratio * a
    elif name in ("cispo", "dppo"):
        cap = 5.0 if name == "cispo" else 20.0
        clipped = ratio > cap
        loss = -ratio.clamp(max=cap).detach() * a * logp
    elif name == "vespo":
        k, lam = torch.where(a >= 0, 2.0, 3.0), torch.where(a >= 0, 3.0, 2.0)
        d = d.clamp(-18.420680743952367, 20.0)
        loss = -(lam + k * d - lam * d.exp()).exp().detach() * a * logp
    elif name == "sapo":
        tau = torch.where(a > 0, 1.0, 1.05)
        loss = -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * a
    else:
        free, bounded = -ratio * a, -ratio.clamp(1 - low, 1 + high) * a
        clipped = bounded > free
        loss = torch.maximum(free, bounded)
    if name == "dppo":
        moved = torch.where(mask, (logp.exp() - old_logp.exp()).detach(), 0.0)
        weights = weights * torch.where(a > 0, moved <= 0.2, moved >= -0.2)
    loss = loss * weights
    if name in ("grpo", "gspo", "gspo_token", "gmpo", "sapo", "rloo"):
        total = (loss.sum(-1) / n.squeeze(-1)).sum() / len(loss)
    elif name == "dr_grpo":
        total = loss.sum() / (mask.any(-1).sum() * loss.shape[-1])
    else:
        total = loss.sum() / (len(loss) if name == "luspo" else m.sum())
    return total, ratio, clipped


def optimal_token_baseline(rewards, logp, log_sum_sq_probs, groups, mask):
    """Of groups by their numbers from 0 on; all rows of two or more and of equal lengths, as sums
    over the rows of each group at each column."""
    rewards = torch.where(mask, rewards, 0.0)
    returns = rewards.flip(-1).cumsum(-1).flip(-1) * mask
    norms = (1 - 2 * logp.exp() + log_sum_sq_probs.exp()) * mask
    weights = norms.cumsum(-1) * mask
    sums = logp.new_zeros(2, int(groups.max()) + 1, logp.shape[-1])
    sums[0].index_add_(0, groups, weights * returns)
    sums[1].index_add_(0, groups, weights)
    baselines = sums[0] / (sums[1] + 1e-8)
    return (returns - baselines[groups]) * mask, returns


def preference_loss(logp, ref_logp, mask, loss="sigmoid", beta=0.1, label_smoothing=0.0):
    """Of rows [chosen..., rejected...] of tokens, and a reference of tokens or of rows."""
    sums = torch.where(mask, logp, 0.0).sum(-1)
    if ref_logp.dim() == 2:
        ref_logp = torch.where(mask, ref_logp, 0.0).sum(-1)
    x, y = (sums - ref_logp).chunk(2)
    a, b = beta * x, beta * y
    h, eps = a - b, label_smoothing
    losses = {
        "sigmoid": -(1 - eps) * F.logsigmoid(h) - eps * F.logsigmoid(-h),
        "hinge": torch.relu(1 - h),
        "ipo": (x - y - 1 / (2 * beta)) ** 2,
        "nca_pair": -F.logsigmoid(a) - (F.logsigmoid(-a) + F.logsigmoid(-b)) / 2,
        "sppo_hard": (x - 0.5 / beta) ** 2 + (y + 0.5 / beta) ** 2,
        "apo_zero": 1 - a.sigmoid() + b.sigmoid(),
    }[loss]
    return losses.mean()


def dpo(logp, ref_logp, mask=None):
    """DPO as it is written, of rows of tokens or of sums."""
    sums = logp if mask is None else (logp * mask).sum(-1)
    chosen, rejected = (sums - ref_logp).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()
