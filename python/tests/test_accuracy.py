"""How far from the truth, in long double: ours, and what PyTorch makes of the same in float32.

Errors are counted in units in the last place (2^-24) of the sum of the magnitudes that a result is
made of. Ours may be above 4 of them only where PyTorch's is more than half as large.
``python test_accuracy.py`` prints the table of docs/correctness.md.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from ppo_kernels import functional

ULP = 2.0**-24


def wide(tensor):
    return tensor.detach().numpy().astype(np.longdouble)


def tokens(seed, *shape, scale=1.0, shift=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale + shift


def statistic(name, logp, old_logp, **inputs):
    advantages = inputs.pop("advantages", torch.ones_like(logp))
    return functional.ppo_loss(logp, old_logp, advantages, **inputs)[1][name]


def ratios_that_agree():
    """Ratios of 0.18, give or take 1e-5."""
    old_logp = tokens(1, 64, 512, scale=1e-5, shift=1.7)
    logp = torch.zeros_like(old_logp)
    ratio = np.exp(wide(logp) - wide(old_logp))
    truth = ratio.var()
    eager = (logp - old_logp).exp().var(correction=0)
    return statistic("ratio_var", logp, old_logp), eager, truth, truth


def ratio_mean():
    logp, old_logp = tokens(2, 64, 512, shift=-2), tokens(3, 64, 512, shift=-2)
    ratio = np.exp(wide(logp) - wide(old_logp))
    eager = (logp - old_logp).exp().mean()
    return statistic("ratio_mean", logp, old_logp), eager, ratio.mean(), ratio.mean()


def returns_with_an_outlier():
    returns = tokens(4, 64, 512, shift=0.5)
    returns[0, 0] = 1e6
    zeros = torch.zeros_like(returns)
    given = {"values": zeros, "old_values": zeros, "returns": returns}
    found = statistic("return_mean", zeros, zeros, **given)
    exact = wide(returns)
    return found, returns.mean(), exact.mean(), abs(exact).mean()


def policy_loss():
    logp, old_logp = tokens(5, 64, 512, scale=0.3), tokens(6, 64, 512, scale=0.3)
    advantages = tokens(7, 64, 512)
    ours = functional.ppo_loss(logp, old_logp, advantages)[0]

    def loss(exp, clip, maximum, logp, old_logp, advantages):
        ratio = exp(logp - old_logp)
        return maximum(-ratio * advantages, -clip(ratio, 0.8, 1.2) * advantages)

    eager = loss(torch.exp, torch.clamp, torch.maximum, logp, old_logp, advantages).mean()
    exact = loss(np.exp, np.clip, np.maximum, *map(wide, (logp, old_logp, advantages)))
    return ours, eager, exact.mean(), abs(exact).mean()


def k3(scale):
    def row():
        logp, ref_logp = tokens(8, 64, 512, shift=-2), tokens(9, 64, 512, shift=-2)
        ref_logp = logp + (ref_logp - logp) * scale
        d = wide(logp) - wide(ref_logp)
        eager = (ref_logp - logp).exp() - 1 + (logp - ref_logp)
        truth = np.expm1(-d) + d
        ours = functional.token_kl(logp, ref_logp, estimator="k3")
        return ours, eager, truth, np.exp(-d) + 1 + abs(d)

    return row


def kl_of_what_cannot_be():
    """A log-probability of -inf, and an estimate that is clamped."""
    logp, ref_logp = torch.tensor([-torch.inf, -1.0]), torch.tensor([-1.0, -2.0])
    ours = functional.token_kl(logp, ref_logp, estimator="k3", output_clamp=10.0)
    eager = ((ref_logp - logp).exp() - 1 + (logp - ref_logp)).clamp(-10, 10)
    truth = np.array([10, np.exp(np.longdouble(-1))])
    return ours, eager, truth, truth


def gradients(upstream, lowest=-100.0):
    """Of tokens of probabilities down to e^-100, less than the least normal float."""

    def row():
        some = torch.tensor([[0.0, -1, -20, -80, -86, -87, -87.5, -88, -90, -95]])
        logits = torch.cat((some, torch.tensor([[lowest]])), 1).requires_grad_()
        index = torch.tensor([1])
        p = softmax(wide(logits))
        truth = np.longdouble(upstream) * ((np.arange(11) == 1) - p)
        ours = functional.selective_log_softmax(logits, index).sum() * upstream
        eager = torch.log_softmax(logits, -1)[0, 1] * upstream
        return *gradients_of(logits, ours, eager), truth, of_exponentials(truth, np.log(p))

    return row


def entropy_gradients():
    logits = torch.tensor([[0.0, -1, -20, -80, -88, -90, -95, -100]], requires_grad=True)
    p = softmax(wide(logits))
    ln_p = np.log(p)
    truth = -p * (ln_p - (p * ln_p).sum())
    ours = functional.logprobs_and_entropy(logits, torch.tensor([1]))[1].sum()
    eager = torch.log_softmax(logits, -1)
    eager = -(eager.exp() * eager).sum()
    return *gradients_of(logits, ours, eager), truth, of_exponentials(truth, ln_p)


def full_kl_gradients():
    logits = torch.tensor([[0.0, -1, -20, -80, -88, -90, -95, -100]], requires_grad=True)
    ref_logits = torch.tensor([[0.0, -2, -19, -85, -84, -92, -90, -101]])
    p, q = softmax(wide(logits)), softmax(wide(ref_logits))
    gap = np.log(p) - np.log(q)
    truth = p * (gap - (p * gap).sum())
    ours = functional.full_kl(logits, ref_logits).sum()
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(ref_logits, -1)
    eager = (log_p.exp() * (log_p - log_q)).sum()
    return *gradients_of(logits, ours, eager), truth, of_exponentials(p * (1 + abs(gap)), np.log(p))


def gradients_of_unlikely_ratios():
    """Of ratios down to e^-100, without a clamp."""
    d = torch.tensor([-1.0, -20, -80, -87, -88, -90, -95, -100])
    old_logp, advantages = torch.full_like(d, -2.0), torch.full_like(d, -1e20)
    logp = (old_logp + d).requires_grad_()
    given = {"clip_range": torch.inf, "log_ratio_clamp": None, "aggregation": "constant"}
    ours = functional.ppo_loss(
        logp[None], old_logp[None], advantages[None], aggregation_divisor=1.0, **given
    )[0]
    eager = -((logp - old_logp).exp() * advantages).sum()
    truth = -np.exp(wide(d)) * wide(advantages)
    return *gradients_of(logp, ours, eager), truth, of_exponentials(truth, wide(d))


def dpo(margins):
    """Losses of pairs, and their gradients to the chosen response's log-probability."""

    def row():
        margin = torch.tensor(margins)
        logp = torch.stack((margin * 5, margin * -5)).flatten().requires_grad_()
        ref_logp, pairs = torch.zeros(2 * len(margins)), len(margins)
        h = wide(margin)
        ours = functional.preference_loss(logp, ref_logp, beta=0.1, denominator=1.0)
        eager = -torch.nn.functional.logsigmoid(0.1 * (logp[:pairs] - logp[pairs:]))
        slope = -np.longdouble(0.1) / (1 + np.exp(h))
        truth = np.concatenate((slope, -slope))
        found = gradients_of(logp, ours.loss, eager.sum())
        return *found, truth, of_exponentials(truth, np.concatenate((h, h)))

    return row


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gradients_of(x, *losses):
    return [torch.autograd.grad(loss, x)[0] for loss in losses]


def of_exponentials(truth, x):
    """The magnitude of e^x, of which to one unit of x, of magnitude 100, 100 come; and an error of
    the least float is none."""
    return np.maximum(abs(truth) * np.maximum(1, abs(x)), 2.0**-149 / ULP / 4)


def logprob(scale):
    def row():
        logits, index = tokens(10, 64, 5003, scale=scale), torch.arange(64) * 70
        z = wide(logits)
        log_sum = np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1)) + z.max(-1)
        chosen = z[np.arange(64), index.numpy()]
        ours = functional.selective_log_softmax(logits, index)
        eager = torch.log_softmax(logits, -1)[torch.arange(64), index]
        return ours, eager, chosen - log_sum, abs(chosen) + abs(log_sum)

    return row


def sure(output):
    """Of tokens that the model is sure of: what is left to the others is down to 1e-13."""

    def row():
        logits, index = tokens(14, 6, 5003), torch.arange(6) * 70
        leads = torch.tensor([3.0, 8, 14, 20, 30, 38])
        logits[torch.arange(6), index] = leads
        ln_p = wide(logits) - leads.numpy()[:, None]
        rest = np.exp(ln_p)
        rest[np.arange(6), index] = 0
        ln_p -= np.log1p(rest.sum(-1))[:, None]
        log_p = torch.log_softmax(logits, -1)
        if output == "logp":
            ours = functional.selective_log_softmax(logits, index)
            truth = ln_p[np.arange(6), index]
            return ours, log_p[torch.arange(6), index], truth, abs(truth)
        ours = functional.logprobs_and_entropy(logits, index)[1]
        truth = -(np.exp(ln_p) * ln_p).sum(-1)
        return ours, -(log_p.exp() * log_p).sum(-1), truth, truth

    return row


def entropy(scale):
    def row():
        logits, index = tokens(15, 64, 5003, scale=scale), torch.arange(64) * 70
        p = softmax(wide(logits))
        ours = functional.logprobs_and_entropy(logits, index)[1]
        log_p = torch.log_softmax(logits, -1)
        truth = -(p * np.log(p)).sum(-1)
        return ours, -(log_p.exp() * log_p).sum(-1), truth, truth

    return row


def full_kl(apart):
    """The KL of distributions that are more or less alike."""

    def row():
        logits = tokens(16, 64, 5003, scale=3.0)
        ref_logits = logits + tokens(17, 64, 5003, scale=apart)
        p, q = softmax(wide(logits)), softmax(wide(ref_logits))
        log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(ref_logits, -1)
        eager = (log_p.exp() * (log_p - log_q)).sum(-1)
        terms = p * (np.log(p) - np.log(q))
        ours = functional.full_kl(logits, ref_logits)
        return ours, eager, terms.sum(-1), abs(terms).sum(-1)

    return row


def approx_kl(name):
    """An estimate of the KL of policies that are close, as they are in PPO."""

    def row():
        old_logp = tokens(18, 64, 512, shift=-2)
        logp = old_logp + tokens(19, 64, 512, scale=1e-2)
        d = wide(logp) - wide(old_logp)
        log_ratio = logp - old_logp
        eager, terms = {
            "approx_kl_k1": (-log_ratio, -d),
            "approx_kl_k2": (0.5 * log_ratio**2, 0.5 * d**2),
            "approx_kl_k3": (log_ratio.exp() - 1 - log_ratio, np.expm1(d) - d),
        }[name]
        return statistic(name, logp, old_logp), eager.mean(), terms.mean(), abs(terms).mean()

    return row


def value_loss():
    values, returns = tokens(20, 64, 512, shift=100), tokens(21, 64, 512, shift=100)
    zeros = torch.zeros_like(values)
    given = {"values": values, "returns": returns, "value_clip_range": None}
    truth = 0.5 * ((wide(values) - wide(returns)) ** 2).mean()
    eager = 0.5 * (values - returns).square().mean()
    return statistic("value_loss", zeros, zeros, **given), eager, truth, truth


def explained_variance():
    returns = tokens(22, 64, 512, shift=1000)
    values = returns + tokens(23, 64, 512, scale=0.3)
    zeros = torch.zeros_like(values)
    given = {"values": values, "returns": returns, "value_clip_range": None}
    left = (wide(returns) - wide(values)).var() / wide(returns).var()
    eager = 1 - (returns - values).var() / returns.var()
    return statistic("explained_variance", zeros, zeros, **given), eager, 1 - left, 1 + left


def ratio_of_rows():
    """The clipped loss of ratios of sequences (GSPO)."""
    logp, old_logp = tokens(24, 64, 512, scale=0.3), tokens(25, 64, 512, scale=0.3)
    advantages = tokens(26, 64, 512)
    given = {"ratio": "sequence_mean", "clip_range": torch.inf}
    ours = functional.ppo_loss(logp, old_logp, advantages, **given)[0]
    eager = -((logp - old_logp).mean(-1, keepdim=True).exp() * advantages).mean()
    terms = -np.exp((wide(logp) - wide(old_logp)).mean(-1, keepdims=True)) * wide(advantages)
    return ours, eager, terms.mean(), abs(terms).mean()


def correction_weights(level):
    """Importance weights of tokens, and of sequences, sums of 512 log-ratios."""

    def row():
        old_logp, rollout_logp = tokens(27, 64, 512, shift=-2), tokens(28, 64, 512, shift=-2)
        rollout_logp = old_logp + rollout_logp * 1e-2
        d, log_ratio = wide(old_logp) - wide(rollout_logp), old_logp - rollout_logp
        if level == "sequence_sum":
            d, log_ratio = d.sum(-1, keepdims=True), log_ratio.sum(-1, keepdim=True)
        found = functional.correction(old_logp, rollout_logp, level=level, high=1e30)
        truth, eager = (
            x + 0 * y for x, y in ((np.exp(d), wide(old_logp)), (log_ratio.exp(), old_logp))
        )
        return found.weights, eager, truth, truth * np.maximum(1, abs(d))

    return row


def variance(shift):
    def row():
        values = tokens(29, 64, 512, shift=shift)
        count, _, m2 = functional.masked_moments(values)
        truth = wide(values).var(ddof=1)
        return m2 / (count - 1), values.var(), truth, truth

    return row


def group_advantages():
    """GRPO's, of groups whose scores are nearly the same."""
    scores = tokens(30, 64, scale=1e-3, shift=10)
    groups, x = scores.view(8, 8), wide(scores).reshape(8, 8)
    ours, _ = functional.outcome_advantages(scores, group_size=8)
    eager = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    truth = (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + np.longdouble(1e-4))
    return ours, eager.flatten(), truth.flatten(), abs(truth.flatten()) + 1


def advantages(gamma, lam):
    def row():
        values, rewards = tokens(11, 16, 700, shift=3), tokens(12, 16, 700)

        def scan(values, rewards, zero):
            following, accumulated, found = zero, zero, []
            for t in reversed(range(700)):
                accumulated = rewards[:, t] + gamma * following - values[:, t] + decay * accumulated
                following = values[:, t]
                found.append(accumulated)
            return found[::-1]

        decay = np.longdouble(gamma) * np.longdouble(lam)
        truth = np.stack(scan(wide(values), wide(rewards), np.zeros(16, np.longdouble)), 1)
        decay = gamma * lam
        eager = torch.stack(scan(values, rewards, torch.zeros(16)), 1)
        magnitude = [np.zeros(16, np.longdouble)]
        for t in reversed(range(700)):
            here = abs(wide(rewards[:, t])) + 2 * abs(wide(values[:, t]))
            magnitude.append(here + decay * magnitude[-1])
        ours = functional.gae(values, rewards, gamma=gamma, lam=lam).advantages
        return ours, eager, truth, np.stack(magnitude[:0:-1], 1)

    return row


def whitened(shift):
    def row():
        values = tokens(13, 64, 512, shift=shift)
        x = wide(values)
        truth = (x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-8)
        eager = (values - values.mean()) * torch.rsqrt(values.var() + 1e-8)
        return functional.masked_whiten(values), eager, truth, abs(truth) + 1

    return row


ROWS = {
    "log-probability, logits of 3": logprob(3.0),
    "log-probability, logits of 0.1": logprob(0.1),
    "log-probability of sure tokens": sure("logp"),
    "entropy, logits of 3": entropy(3.0),
    "entropy, logits of 0.1": entropy(0.1),
    "entropy at sure tokens": sure("entropy"),
    "gradient of unlikely tokens": gradients(1.0),
    "the same, times 1e20": gradients(1e20, lowest=-140.0),
    "the same, times 1e-15": gradients(1e-15),
    "the same, of the entropy": entropy_gradients,
    "exact KL, logits that differ by 1": full_kl(1.0),
    "exact KL, logits that differ by 0.001": full_kl(1e-3),
    "its gradient to unlikely tokens": full_kl_gradients,
    "k3, d of 1": k3(1.0),
    "k3, d of 0.01": k3(0.01),
    "k3 of -inf, clamped": kl_of_what_cannot_be,
    "advantages, gamma 1, lambda 0.95": advantages(1.0, 0.95),
    "advantages, gamma 0.999, lambda 1": advantages(0.999, 1.0),
    "advantages of groups (GRPO)": group_advantages,
    "whitened": whitened(0.0),
    "whitened, around 1000": whitened(1000.0),
    "variance": variance(0.0),
    "variance, around 1000": variance(1000.0),
    "correction, of tokens": correction_weights("token"),
    "correction, of sequences": correction_weights("sequence_sum"),
    "policy loss": policy_loss,
    "policy loss, ratios of rows": ratio_of_rows,
    "gradient of unlikely ratios": gradients_of_unlikely_ratios,
    "value loss, around 100": value_loss,
    "ratio_mean": ratio_mean,
    "ratio_var, ratios 0.18 +- 1e-5": ratios_that_agree,
    "approx_kl_k1, d of 0.01": approx_kl("approx_kl_k1"),
    "approx_kl_k2, d of 0.01": approx_kl("approx_kl_k2"),
    "approx_kl_k3, d of 0.01": approx_kl("approx_kl_k3"),
    "return_mean, an outlier first": returns_with_an_outlier,
    "explained_variance, around 1000": explained_variance,
    "DPO's gradient": dpo([-3.0, -0.5, 0.0, 0.5, 3.0]),
    "DPO's gradient, pairs far apart": dpo([20.0, 80, 86, 88, 90, 95, 99]),
}


def errors(row):
    """The largest of ours and of PyTorch's."""
    ours, eager, truth, magnitude = row()
    found = (abs(wide(x) - truth) / (magnitude * ULP) for x in (ours, eager))
    return [float(np.max(np.nan_to_num(x, nan=np.inf))) for x in found]


@pytest.mark.parametrize("name", ROWS)
def test_no_row_is_worse_than_pytorch(name):
    ours, eager = errors(ROWS[name])
    assert ours <= max(2 * eager, 4), f"{ours:.3g} units, PyTorch {eager:.3g}"


def test_the_table_in_the_docs_has_these_rows():
    docs = Path(__file__).parents[2] / "docs" / "correctness.md"
    rows = [line.split(" | ")[0][2:] for line in docs.read_text().splitlines() if line[:2] == "| "]
    assert rows == ["what", *ROWS]


if __name__ == "__main__":
    print("| what | ours | PyTorch |\n|---|--:|--:|")
    for name, row in ROWS.items():
        print("| {} | {:.2g} | {:.2g} |".format(name, *errors(row)))
