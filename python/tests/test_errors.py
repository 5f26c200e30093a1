"""Arguments that are refused: each with a ValueError that names the op and the argument."""

import pytest
import torch

from ppo_kernels import functional

logits, index, rows = torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64), torch.randn(2, 3)
one = torch.tensor([[1, 0, 0], [0, 0, 0]], dtype=torch.bool)
far = torch.full((2, 3), 8)

CASES = [
    (functional.selective_log_softmax, (logits, far), "selective_log_softmax|logprob.*8.*0..8"),
    (functional.selective_log_softmax, (logits, -far.int()), "expected 0..8 or ignore_index"),
    (
        functional.selective_log_softmax,
        (logits, index[0]),
        "`index` has shape \\[3\\], expected \\[2, 3\\]",
    ),
    (functional.selective_log_softmax, (logits, rows), "`index` has dtype float32, expected int64"),
    (functional.selective_log_softmax, (logits.double(), index), "`logits` has dtype float64"),
    (functional.selective_log_softmax, (logits[0, 0, 0], index[0, 0]), "go with one|shape"),
    (functional.selective_log_softmax, (logits[..., :0], index), "vocab"),
    (functional.selective_log_softmax, (logits, index, 0.0), "temperature"),
    (functional.selective_log_softmax, (logits, index, float("nan")), "temperature"),
    (functional.selective_log_softmax, (logits, logits.long(), 1.0, one), "row_mask"),
    (
        functional.selective_log_softmax,
        (logits, index, 1.0, one[0]),
        "selective_log_softmax: `row_mask` has shape \\[3\\], expected \\[2, 3\\]",
    ),
    (
        functional.selective_log_softmax,
        (logits, index[0], 1.0, one),
        "selective_log_softmax: `index` has shape \\[3\\]",
    ),
    (functional.logprobs_and_entropy, (logits, index, 1.0, one.T), "`row_mask` has shape"),
    (
        functional.logprobs_and_entropy,
        (logits, index, 1.0, one.to("meta")),
        "logprobs_and_entropy: `row_mask` is on device meta, expected cpu",
    ),
    (
        functional.selective_log_softmax,
        (logits, torch.zeros(3, 2, 5).long()),
        "`index` has shape \\[3, 2, 5\\], expected \\[2, 3, 5\\]",
    ),
    (
        functional.selective_log_softmax,
        (logits, torch.zeros(3, 2, 0).long()),
        "`index` has shape \\[3, 2, 0\\], expected \\[2, 3, 0\\]",
    ),
    (
        functional.selective_log_softmax,
        (logits, torch.tensor([[0, 7], [3, 8], [9, 0]]).expand(2, 3, 2)),
        "selective_log_softmax: `index`\\[1, 1\\] is 8, expected 0..8",
    ),
    (
        functional.selective_log_softmax,
        (logits.transpose(0, 1), torch.tensor([[0, 7, 8], [-1, 0, 9]]).T.unsqueeze(-1).int()),
        "selective_log_softmax: `index`\\[1, 0\\] is -1, expected 0..8",
    ),
    (functional.logprobs_and_entropy, (logits, logits.long()), "`index` has shape \\[2, 3, 8\\]"),
    (functional.token_kl, (rows, rows.T), "token_kl: `ref_logp` has shape \\[3, 2\\]"),
    (functional.token_kl, (rows.double(), rows), "token_kl: `logp` has dtype float64"),
    (functional.token_kl, (rows, rows, one[0]), "token_kl: `mask` has shape"),
    (
        functional.full_kl,
        (logits, logits.half()),
        "`ref_logits` has dtype float16, expected float32",
    ),
    (functional.full_kl, (logits, logits[:1]), "`ref_logits` has shape"),
    (functional.full_kl, (logits, logits, rows.T > 0), "`mask` has shape"),
    (functional.gae, (rows[0, 0],), "gae: `values` has shape \\[\\]"),
    (functional.gae, (rows, rows.T), "gae: `rewards` has shape"),
    (functional.outcome_advantages, (rows,), "advantages: `groups` is missing, which `baseline`"),
    (
        functional.outcome_advantages,
        (rows, rows),
        "outcome_advantages: `groups` has dtype float32, expected int64",
    ),
    (functional.outcome_advantages, (rows, index[0]), "`groups` has shape \\[3\\]"),
    (functional.optimal_token_baseline, (rows, rows, rows), "`groups` is missing"),
    (
        functional.optimal_token_baseline,
        (rows, rows, rows[0]),
        "optimal_token_baseline: `log_sum_sq_probs` has shape",
    ),
    (functional.outcome_advantages, (rows, index, one), "`mask` has shape \\[2, 3\\]"),
    (functional.outcome_advantages, (rows[0, 0], None, rows[0, 0]), "`mask` has shape \\[\\]"),
    (functional.outcome_advantages, (rows.double(), index), "`scores` has dtype float64"),
    (functional.gdpo_advantages, (rows, [1.0]), "`weights` has 1, expected 2, one a reward"),
    (functional.masked_whiten, (rows, one), "1 element.*at least 2"),
    (functional.masked_whiten, (rows, one.T), "`mask` has shape"),
    (functional.correction, (rows, None), "correction: `rollout_logp` is missing; .* `weights`"),
    (functional.correction, (rows, rows.T), "correction: `rollout_logp` has shape \\[3, 2\\]"),
    (functional.correction, (rows, rows.double()), "`rollout_logp` has dtype float64"),
    (functional.correction, (rows, rows, one.T), "`mask` has shape"),
    (functional.correction, (rows[0, 0], rows), "`old_logp` has shape \\[\\]"),
    (functional.ppo_loss, (rows, rows, rows, one & False), "mask"),
    (functional.ppo_loss, (rows, rows.T, rows), "`old_logp` has shape"),
    (functional.ppo_loss, (rows[0, 0], rows, rows), "`logp` has shape \\[\\]"),
]
OPTIONS = [
    (
        functional.token_kl,
        (rows, rows),
        {"estimator": "k4"},
        "`estimator` is 'k4', expected one of 'k1'",
    ),
    (functional.token_kl, (rows, rows), {"output_clamp": -1.0}, "`output_clamp` is -1.0"),
    (functional.token_kl, (rows, rows), {"output_clamp": -2.0}, "output_clamp"),
    (
        functional.full_kl,
        (logits, logits),
        {"divergence": "sideways"},
        "`divergence` is 'sideways'",
    ),
    (functional.full_kl, (logits, logits), {"divergence": "jsd", "beta": 1.0}, "`beta` is 1"),
    (functional.full_kl, (logits, logits), {"divergence": "jsd", "skew": 0.0}, "`skew` is 0"),
    (functional.gae, (rows,), {"gamma": 1.5}, "gamma"),
    (functional.gae, (rows,), {"scores": rows}, "`scores` has shape \\[2, 3\\], expected \\[2\\]"),
    (functional.gae, (rows,), {"mask_mode": "no"}, "`mask_mode` is 'no'"),
    (functional.gae, (rows,), {"missing_eos": "subtract"}, "missing_eos"),
    (
        functional.outcome_advantages,
        (rows,),
        {"group_size": 4},
        "`scores` has shape \\[6\\].*k \\* 4",
    ),
    (
        functional.outcome_advantages,
        (rows, index),
        {"group_size": 3},
        "`group_size` is 3, expected 0 where `groups`",
    ),
    (functional.outcome_advantages, (rows, index), {"eps": -1.0}, "`eps` is -1.0"),
    (
        functional.outcome_advantages,
        (rows, index),
        {"score_min": 2.0, "score_max": 1.0},
        "`score_max` is 1.0, expected `score_min`, 2.0 or above",
    ),
    (
        functional.outcome_advantages,
        (rows, index),
        {"baseline": "length_weighted"},
        "`lengths` is missing",
    ),
    (
        functional.outcome_advantages,
        (rows[0], ["a", "b", "a"]),
        {"baseline": "runner_up"},
        "`baseline` is RunnerUp.* single row, as that of row 1",
    ),
    (
        functional.outcome_advantages,
        (rows, index),
        {"baseline": "median"},
        "`baseline` is 'median', expected one of 'none', 'group'",
    ),
    (functional.gdpo_advantages, (rows,), {"over": "all"}, "`over` is 'all'"),
    (functional.gdpo_advantages, (rows,), {"over": "tokens"}, "`mask` is missing"),
    (functional.masked_whiten, (rows,), {"eps": -1.0}, "eps"),
    (functional.masked_whiten, (rows,), {"moments": rows}, "`moments` has dtype float32"),
    (
        functional.correction,
        (rows, rows),
        {"low": 3.0},
        "`high` is 2.0, expected 3.0 or more, the lower bound",
    ),
    (
        functional.correction,
        (rows, rows),
        {"rejection_metric": "ratio", "rejection_low": 0.0},
        "`rejection_low` is 0.0, expected above 0, for its logarithm is taken",
    ),
    (
        functional.correction,
        (rows, rows),
        {"second_rejection_metric": "k3"},
        "`second_rejection_metric` is K3 without, expected one with a lower or an upper bound",
    ),
    (functional.correction, (rows, rows), {"rejection_high": 0.1}, "none without a metric"),
    (functional.correction, (rows, rows), {"level": "row"}, "`level` is 'row', expected one of"),
    (functional.ppo_loss, (rows, rows, rows), {"values": rows}, "returns"),
    (functional.ppo_loss, (rows, rows, rows), {"dual_clip": 0.5}, "dual_clip"),
    (functional.ppo_loss, (rows, rows, rows), {"aggregation": "mean"}, "`aggregation` is 'mean'"),
    (
        functional.ppo_loss,
        (rows, rows, rows),
        {"aggregation": "constant"},
        "`aggregation_divisor` is 0.0, expected above 0",
    ),
    (functional.ppo_loss, (rows, rows, rows), {"kl_coef": 0.1}, "ref_logp"),
]


@pytest.mark.parametrize(("function", "arguments", "message"), CASES)
def test_argument(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize(("function", "arguments", "options", "message"), OPTIONS)
def test_option(function, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)


def test_device():
    with pytest.raises(ValueError, match="`index` is on device meta, expected cpu"):
        functional.selective_log_softmax(logits, index.to("meta"))
    with pytest.raises(NotImplementedError):
        functional.selective_log_softmax(logits.to_sparse(), index)
