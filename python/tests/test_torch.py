"""Values and gradients against plain PyTorch in float64, and what the docs promise of arguments."""

import math

import formulas
import pytest
import torch

import ppo_kernels
from ppo_kernels import _ops, functional

# Sums of V float32 terms of order 1 in float32, and the rounding of 16-bit gradients.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
}
F32 = TOLERANCE[torch.float32]
DTYPES = list(TOLERANCE)
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def check(ours, exact, inputs, exact_inputs, tolerance=F32):
    """Results and, for random upstream gradients, gradients."""
    ours, exact = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (ours, exact))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    upstream = [torch.randn_like(a) for a in ours]
    found = torch.autograd.grad(ours, inputs, upstream)
    expected = torch.autograd.grad(exact, exact_inputs, [g.double() for g in upstream])
    for a, b, x in zip(found, expected, inputs, strict=True):
        assert a.dtype == x.dtype and a.shape == x.shape
        torch.testing.assert_close(a.double(), b, **tolerance)


def logits_and_index(shape, dtype=torch.float32, device="cpu"):
    logits = (3 * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    index = torch.randint(shape[-1], shape[:-1], device=device)
    return logits, index, leaf(logits.double())


# --- all ---


@pytest.mark.filterwarnings("ignore:Input #")  # that they are not float64
def test_gradcheck(device):
    """Against differences of the op itself. Sums are in float32 and inputs float32 at most, so the
    steps are large and the tolerances theirs."""
    logits, index, _ = logits_and_index((3, 7), device=device)
    ref_logits = logits_and_index((3, 7), device=device)[0]
    mask = torch.tensor([[True, True, False, True], [True, False, True, True]], device=device)
    logp, other, old, values, returns = torch.randn(5, 2, 4, device=device).mul(0.3).unbind()
    logp, other, values = map(leaf, (logp, other, values))

    def loss(logp, values, entropy):
        given = {"values": values, "old_values": old, "returns": returns, "entropy": entropy}
        options = {"entropy_coef": 0.1, "kl_coef": 0.2, "ref_logp": old, "clip_range": 5.0}
        return functional.ppo_loss(
            logp, old, returns, mask, value_clip_range=5.0, **given, **options
        )[0]

    for function, inputs in {
        lambda z: functional.selective_log_softmax(z, index, 0.8): (logits,),
        lambda z: functional.selective_log_softmax(z, index[:, None], 0.8): (logits,),
        lambda z: functional.logprobs_and_entropy(z, index, 0.8): (logits,),
        lambda x, y: functional.token_kl(x, y, mask, estimator="k3"): (logp, other),
        functional.full_kl: (logits, ref_logits),
        lambda x: functional.masked_whiten(x, mask): (logp,),
        loss: (logp, values, other),
    }.items():
        torch.autograd.gradcheck(function, inputs, eps=1e-2, atol=2e-3, rtol=1e-2)


# --- logprob ---


@pytest.mark.parametrize("shape", [(1,), (7, 1), (5, 1000), (2, 3, 33), (2, 2, 3, 50)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_logprobs(shape, dtype, index_dtype, device):
    logits, index, exact = logits_and_index(shape, dtype, device)
    ours = functional.logprobs_and_entropy(logits, index.to(index_dtype), 0.7)
    reference = formulas.logprobs_and_entropy(exact, index, 0.7)
    check(ours, reference, [logits], [exact], TOLERANCE[dtype])
    alone = functional.selective_log_softmax(logits, index.to(index_dtype), 0.7)
    assert torch.equal(alone, ours[0]) and alone.dtype == torch.float32
    check(
        alone,
        formulas.logprobs_and_entropy(exact, index, 0.7)[0],
        [logits],
        [exact],
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_alone(dtype, device):
    logits, index, exact = logits_and_index((4, 65), dtype, device)
    ours = functional.logprobs_and_entropy(logits, index)[1]
    check(ours, formulas.logprobs_and_entropy(exact, index)[1], [logits], [exact], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 40), (2, 3, 33)])
def test_several_tokens_a_row(shape, dtype, device):
    logits, _, exact = logits_and_index(shape, dtype, device)
    index = torch.randint(shape[-1], (*shape[:-1], 5), device=device)  # some of them twice
    ours = functional.selective_log_softmax(logits, index, 1.3)
    reference, _ = formulas.logprobs_and_entropy(exact, index, 1.3)
    check(ours, reference, [logits], [exact], TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(9, 40), (2, 3, 33), (0, 8)])
def test_no_tokens_a_row(shape, device):
    logits, _, _ = logits_and_index(shape, device=device)
    index = torch.empty(*shape[:-1], 0, dtype=torch.int64, device=device)
    ours = functional.selective_log_softmax(logits, index)
    assert ours.shape == index.shape
    ours.sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_several_tokens_a_row_some_of_no_vocabulary(device, monkeypatch):
    """As on CUDA: each gives NaN, and so does the gradient of its row where it has one."""
    if device == "cpu":  # where they are an error: what comes after the check is shown
        places = _ops._places

        def unchecked(index, vocab):
            inside = index.clamp(0, vocab - 1)
            return places(inside, vocab)[0], inside != index

        monkeypatch.setattr(_ops, "_places", unchecked)
    logits, _, exact = logits_and_index((4, 20), device=device)
    index = torch.tensor([[3, 19, 0], [-1, 19, 3], [20, 19, 0], [5, 5, 1 << 40]], device=device)
    outside = (index < 0) | (index >= 20)
    upstream = torch.randn(4, 3, device=device)
    upstream[2, 0] = 0
    ours = functional.selective_log_softmax(logits, index, 0.7)
    reference, _ = formulas.logprobs_and_entropy(exact, index.clamp(0, 19), 0.7)
    expected = reference.masked_fill(outside, torch.nan)
    torch.testing.assert_close(ours.double(), expected, equal_nan=True, **F32)
    (grad,) = torch.autograd.grad(ours, logits, upstream)
    (want,) = torch.autograd.grad(reference, exact, upstream.double())
    want[[1, 3]] = torch.nan
    torch.testing.assert_close(grad.double(), want, equal_nan=True, **F32)


def test_impossible_tokens(device):
    logits = torch.tensor([[0.0, float("-inf"), 1.0]], device=device, requires_grad=True)
    for index in ([[1]], [[1, 0, 1]]):
        index = torch.tensor(index, device=device)
        logp = functional.selective_log_softmax(
            logits, index[:, 0] if index.numel() == 1 else index
        )
        assert logp.flatten()[0].isneginf()
        (grad,) = torch.autograd.grad(logp, logits, torch.ones_like(logp))
        assert grad.isfinite().all() and not (grad == 0).all()


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_rows_that_are_skipped(index_dtype, device):
    logits, index, _ = logits_and_index((3, 4, 20), device=device)
    mask = torch.rand(3, 4, device=device) > 0.5
    holes = leaf(torch.where(mask[..., None], logits, torch.nan))
    index = index.to(index_dtype)
    want = functional.selective_log_softmax(logits, index)
    for arguments in (
        {"row_mask": mask},
        {"row_mask": mask.long()},
        {"ignore_index": -100},
        {"row_mask": mask, "ignore_index": -100},
    ):
        chosen = index.masked_fill(~mask, -100) if "ignore_index" in arguments else index
        for function in (functional.selective_log_softmax, functional.logprobs_and_entropy):
            ours = function(holes, chosen, **arguments)
            ours = ours if isinstance(ours, tuple) else (ours,)
            assert torch.equal(ours[0], torch.where(mask, want, 0.0))
            (grad,) = torch.autograd.grad(ours, holes, [torch.ones_like(x) for x in ours])
            assert grad.isfinite().all() and (grad[~mask] == 0).all()


SLICES = [
    (slice(None), slice(None, -1)),
    (slice(None), slice(1, None, 2)),
    (slice(None, None, 2), slice(3, 5)),
    (slice(None), slice(None), slice(1, -1)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slices", SLICES)
def test_logits_that_are_not_contiguous(slices, dtype, device):
    logits, index, _ = logits_and_index((4, 6, 50), dtype, device)
    part = logits[slices]
    index = index[slices[:2]] % 40
    ours = functional.logprobs_and_entropy(part, index)
    same = leaf(part.contiguous())
    expected = functional.logprobs_and_entropy(same, index)
    assert all(map(torch.equal, ours, expected))
    upstream = [torch.randn_like(x) for x in ours]
    (found,) = torch.autograd.grad(ours, logits, upstream)
    (want,) = torch.autograd.grad(expected, same, upstream)
    assert torch.equal(found[slices], want)
    transposed = logits.detach().transpose(0, 1)
    again = functional.selective_log_softmax(
        transposed, torch.zeros(6, 4, dtype=torch.int64, device=device)
    )
    assert torch.equal(
        again[:, 0],
        functional.selective_log_softmax(
            logits[0], torch.zeros(6, dtype=torch.int64, device=device)
        ),
    )


# --- kl ---


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3", "k3_straight_through"])
@pytest.mark.parametrize("clamps", [(None, None), (1.0, None), (2.0, 0.5)])
def test_token_kl(estimator, clamps, device):
    logp, ref = (leaf(torch.randn(3, 40, device=device)) for _ in range(2))
    mask = torch.rand(3, 40, device=device) > 0.3
    with torch.no_grad():
        logp[~mask] = torch.nan
    options = dict(zip(("log_ratio_clamp", "output_clamp"), clamps))
    ours = functional.token_kl(logp, ref, mask, estimator=estimator, **options)
    assert (ours[~mask] == 0).all()
    exact = [leaf(x.double()) for x in (logp, ref)]
    expected = formulas.token_kl(*exact, estimator, *clamps)
    upstream = torch.randn_like(ours)
    found = torch.autograd.grad(ours, (logp, ref), upstream)
    want = torch.autograd.grad(expected, exact, upstream.double())
    torch.testing.assert_close(ours[mask].double(), expected[mask], **F32)
    for a, b in zip(found, want):
        assert (a[~mask] == 0).all()
        torch.testing.assert_close(a[mask].double(), b[mask], **F32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "divergence",
    ["forward", "reverse", "jsd", "skew_forward", "skew_reverse", "total_variation"],
)
def test_full_kl(divergence, dtype, device):
    (a, _, exact_a), (b, _, exact_b) = (
        logits_and_index((2, 3, 70), dtype, device) for _ in range(2)
    )
    options = {"divergence": divergence, "beta": 0.3, "skew": 0.2, "temperature": 0.8}
    ours = functional.full_kl(a, b, **options)
    exact = formulas.full_kl(exact_a, exact_b, **options)
    check(ours, exact, [a, b], [exact_a, exact_b], TOLERANCE[dtype])
    one = functional.full_kl(a.transpose(0, 1), b.detach().transpose(0, 1), **options)
    assert torch.equal(one, functional.full_kl(a, b, **options).T)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.uint8, device=device)
    holes = leaf(torch.where(mask[..., None] != 0, a, torch.nan))
    masked = functional.full_kl(holes, b.detach(), mask, **options)
    assert torch.equal(masked, torch.where(mask != 0, ours, 0.0))
    masked.sum().backward()
    assert holes.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slices", SLICES)
@pytest.mark.parametrize("both", [False, True])
def test_full_kl_of_logits_that_are_not_contiguous(both, slices, dtype, device):
    (policy, *_), (reference, *_) = (logits_and_index((4, 6, 50), dtype, device) for _ in range(2))
    part = policy[slices]
    ref_part = reference[slices] if both else leaf(reference[slices].contiguous())
    mask = torch.rand(part.shape[:-1], device=device) < 0.7
    ours = functional.full_kl(part, ref_part, mask)
    same, ref_same = leaf(part.contiguous()), leaf(ref_part.contiguous())
    expected = functional.full_kl(same, ref_same, mask)
    assert torch.equal(ours, expected)
    upstream = torch.randn_like(ours)
    found = torch.autograd.grad(ours, (part, ref_part), upstream)
    want = torch.autograd.grad(expected, (same, ref_same), upstream)
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("slices", SLICES[:1])
def test_leading_slices_of_logits_are_not_copied(slices, device, monkeypatch):
    """Were they, their copies would be what the library is given."""
    (policy, index, _), (reference, *_) = (
        logits_and_index((4, 6, 50), device=device) for _ in "ab"
    )
    call, given = _ops._call, set()

    def watched(*arguments):
        given.update(argument for argument in arguments if isinstance(argument, int))
        call(*arguments)

    monkeypatch.setattr(_ops, "_call", watched)
    logp = functional.selective_log_softmax(policy[slices], index[slices])
    (logp + functional.full_kl(policy[slices], reference[slices])).sum().backward()
    for logits in (policy, reference):
        assert {row.data_ptr() for row in logits} <= given


# --- gae and whitening ---


@pytest.mark.parametrize("mode", ["carry", "multiply"])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_gae(mode, mask_dtype, device):
    values, rewards = torch.randn(2, 4, 31, device=device)
    mask = torch.rand(4, 31, device=device) > 0.3
    mask[:, -3:] = False
    mask[:, 0] = True
    expected = formulas.gae(
        values.double(), rewards.double(), mask, 0.99, 0.9, multiply=mode == "multiply"
    )
    values, rewards = (torch.where(mask, x, torch.nan) for x in (values, rewards))
    options = {"gamma": 0.99, "lam": 0.9, "mask_mode": mode}
    ours = functional.gae(values, rewards, mask.to(mask_dtype), **options)
    for a, b in zip(ours[:2], expected):
        torch.testing.assert_close(a.double(), b, **F32)
    assert ours.rewards is None and ours.moments[0] == mask.sum()
    whitened = functional.gae(values, rewards, mask, whiten=True, **options)
    torch.testing.assert_close(whitened.advantages, functional.masked_whiten(ours.advantages, mask))
    assert torch.equal(whitened.returns, ours.returns)


def test_gae_shapes_rewards(device):
    kl, scores = torch.rand(2, 5, device=device), torch.tensor([20.0, -1.0], device=device)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool, device=device)
    ours = functional.gae(
        torch.zeros(2, 5, device=device),
        None,
        mask,
        kl=kl,
        kl_coef=0.5,
        scores=scores,
        score_min=-0.75,
        score_max=10.0,
        has_eos=torch.tensor([True, False], device=device),
        missing_eos="subtract",
        missing_eos_value=3.0,
        return_rewards=True,
    )
    expected = torch.where(mask, -0.5 * kl, 0.0)
    expected[0, 2] += 10
    expected[1, 4] += -0.75 - 3
    torch.testing.assert_close(ours.rewards, expected)


def test_gae_gives_constants(device):
    values = torch.randn(3, 5, device=device, requires_grad=True)
    ours = functional.gae(values, torch.randn(3, 5, device=device).bfloat16())
    assert not ours.advantages.requires_grad and not ours.returns.requires_grad
    assert functional.gae(values[0].detach()).advantages.shape == (5,)


ESTIMATORS = {
    "grpo": lambda x, mean, std: (x - mean) / (std + 1e-4),
    "dr_grpo": lambda x, mean, std: x - mean,
    "rloo": lambda x, mean, std: (x - mean) * 4 / 3,
    "reinforce_plus_plus_baseline": lambda x, mean, std: x - mean,
    "pass_at_k": lambda x, mean, std: (
        torch.where(x == x.amax(1, True), x - x.topk(2).values[:, 1:], 0.0) / (std + 1e-4)
    ),
    "max_rl": lambda x, mean, std: (x - mean) / (mean + 1e-6),
    "gpg": lambda x, mean, std: (x - mean) * x.numel() / (x != 0).sum(),
    "remax": lambda x, mean, std: x,
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outcome_advantages(name, dtype, device):
    scores = torch.rand(6, 4, device=device).to(dtype)
    scores[0, 1] = 0
    exact = scores.double()
    expected = ESTIMATORS[name](exact, exact.mean(1, True), exact.std(1, keepdim=True)).flatten()
    order, options = torch.randperm(24, device=device), functional.ESTIMATORS[name]
    ids, flat = torch.arange(6, device=device).repeat_interleave(4), scores.flatten()
    ours, stats = functional.outcome_advantages(flat, group_size=4, **options)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(stats["score_mean"], exact.mean(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(stats["score_std"], exact.std(), rtol=1e-6, atol=1e-7)
    assert stats["zero_std_fraction"] == 0
    mask = torch.rand(24, 9, device=device) > 0.4
    groups = -(ids[order] ** 9)
    for given in (groups, groups.int(), groups.tolist(), [f"{i}" for i in groups.tolist()]):
        ours, _ = functional.outcome_advantages(flat[order], given, mask, **options)
        spread = expected[order].unsqueeze(1) * mask
        torch.testing.assert_close(ours.double(), spread, rtol=1e-6, atol=1e-7)


def test_outcome_advantages_of_lengths(device):
    scores = torch.tensor([1.0, 0.0, 3.0, torch.nan], device=device, requires_grad=True)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 1, 1], [1, 1, 1]], device=device)
    ours, stats = functional.outcome_advantages(
        scores, None, mask, group_size=4, **functional.ESTIMATORS["opo"]
    )
    assert not ours.requires_grad and not stats["score_std"].requires_grad
    rows = torch.tensor([1.0, 0.0, 3.0, 7 / 6], device=device) - 7 / 6
    torch.testing.assert_close(ours, rows.unsqueeze(1) * mask)
    twice = functional.outcome_advantages(
        scores, group_size=4, lengths=2 * mask.sum(-1).float(), **functional.ESTIMATORS["opo"]
    )
    torch.testing.assert_close(twice.advantages, rows)


def test_outcome_advantages_of_other_shapes(device):
    scores = torch.randn(2, 8, device=device)
    mask = torch.ones(2, 8, 3, dtype=torch.bool, device=device)
    ours = functional.outcome_advantages(scores, mask=mask, group_size=8).advantages
    flat = functional.outcome_advantages(scores.flatten(), group_size=8).advantages
    assert torch.equal(ours, flat.view(2, 8, 1).expand(2, 8, 3))
    sliced = functional.outcome_advantages(scores.T, group_size=2).advantages
    assert torch.equal(
        sliced, functional.outcome_advantages(scores.T.contiguous(), group_size=2).advantages
    )
    none = functional.outcome_advantages(scores[:0], group_size=8, mask=mask[:0])
    assert none.advantages.shape == (0, 8, 3) and none.stats["score_mean"].isnan()


@pytest.mark.parametrize("over", ["rows", "tokens"])
def test_gdpo_advantages(over, device):
    rewards = torch.randn(3, 12, device=device)
    rewards[1:, 2] = torch.nan
    rewards[:, 7] = torch.nan
    mask = torch.rand(12, 5, device=device) > 0.3
    mask[7:9, 0] = True
    weights, groups = [1.0, 0.5, -2.0], torch.arange(12, device=device) % 3
    ours = functional.gdpo_advantages(rewards, weights, groups, mask, over=over)
    total = torch.zeros(12, dtype=torch.float64, device=device)
    for reward, weight in zip(rewards.double(), weights):
        for group in range(3):
            rows = (groups == group) & ~reward.isnan()
            x = reward[rows]
            total[rows] += weight * (x - x.mean()) / (x.std() + 1e-4)
    there = ~rewards.isnan().all(0)
    if over == "tokens":
        kept = mask & there[:, None]
        expected = formulas.masked_whiten(total[:, None].expand(12, 5), kept)
    else:
        x = total[there]
        expected = torch.where(there, (total - x.mean()) / (x.std() + 1e-4), 0.0)[:, None] * mask
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
def test_masked_whiten(shift_mean, unbiased, device):
    values = torch.randn(5, 21, device=device) * 3 + 7
    mask = torch.rand(5, 21, device=device) > 0.4
    values = leaf(torch.where(mask, values, torch.nan))
    exact = leaf(torch.where(mask, values, 0.0).double())
    ours = functional.masked_whiten(values, mask, shift_mean, unbiased=unbiased)
    check(ours, formulas.masked_whiten(exact, mask, shift_mean, unbiased), [values], [exact])


def test_whitening_with_moments_of_a_larger_set(device):
    values = torch.randn(2, 6, 9, device=device)
    parts = [functional.masked_moments(part) for part in values]
    (n, mean, m2), (k, other, more) = parts
    delta, count = other - mean, n + k
    merged = torch.stack([count, mean + delta * k / count, m2 + more + delta**2 * n * k / count])
    torch.testing.assert_close(merged, functional.masked_moments(values))
    part = leaf(values[0])
    ours = functional.masked_whiten(part, moments=merged)
    torch.testing.assert_close(ours, functional.masked_whiten(values)[0])
    (grad,) = torch.autograd.grad(ours, part, torch.ones_like(ours))
    torch.testing.assert_close(grad, values.var().rsqrt().expand(6, 9))


# --- ppo_loss ---


PPO_OPTIONS = [
    {},
    {"clip_range": 0.1, "clip_range_high": 0.3, "dual_clip": 2.0},
    {"aggregation": "seq_mean_token_sum"},
    {"aggregation": "seq_mean_token_mean", "value_coef": 0.7},
    {"aggregation": "seq_mean_token_sum_norm"},
    {"aggregation": "constant", "aggregation_divisor": 50.0},
    {"entropy_coef": 0.01, "kl_coef": 0.2},
]


@pytest.mark.parametrize("options", PPO_OPTIONS)
def test_ppo_loss(options, device):
    names = "logp old_logp advantages values old_values returns entropy ref_logp".split()
    tensors = dict(zip(names, torch.randn(8, 5, 30, device=device).unbind()))
    mask = torch.rand(5, 30, device=device) > 0.3
    mask[2] = False
    exact = {name: leaf(tensor.double()) for name, tensor in tensors.items()}
    tensors = {name: torch.where(mask, x, torch.nan) for name, x in tensors.items()}
    differentiable = ["logp", "values", "entropy"]
    tensors.update({name: leaf(tensors[name]) for name in differentiable})
    loss, stats = functional.ppo_loss(**tensors, mask=mask, **options)
    expected = formulas.ppo_loss(**exact, mask=mask, **options)
    check(loss, expected, [tensors[n] for n in differentiable], [exact[n] for n in differentiable])
    assert torch.equal(stats["loss"], loss) and stats["tokens"] == mask.sum()
    assert not stats["loss"].requires_grad


@pytest.mark.parametrize("name", formulas.NAMED)
@pytest.mark.parametrize("kind", ["plain", "tokens", "rows"])
def test_losses_with_names(name, kind, device):
    """The advantages and the weights may be of tokens or of rows."""
    logp, old_logp, more = torch.randn(3, 5, 30, device=device).unbind()
    old_logp = logp - 0.1 * old_logp
    logp, old_logp = logp - 3.0, old_logp - 3.0
    mask = torch.rand(5, 30, device=device) > 0.3
    mask[2] = False
    of_rows, options = kind == "rows", {}
    advantages = more[:, 0] if of_rows else more
    if kind != "plain":
        options["weights"] = (1 + more[:, 1] if of_rows else 1 + more).clamp(min=0)
    ours = leaf(torch.where(mask, logp, torch.nan))
    loss, stats = functional.ppo_loss(
        ours, old_logp, advantages, mask, **options, **ppo_kernels.named_loss(name)
    )
    exact = leaf(logp.double())
    as_tokens = [x.double()[:, None] if of_rows else x.double() for x in (advantages,)]
    weights = options.get("weights", torch.ones((), device=device)).double()
    expected, expected_stats = formulas.named_loss_and_stats(
        name,
        exact,
        old_logp.double(),
        as_tokens[0].expand(5, 30),
        mask,
        weights[:, None] if of_rows else weights,
    )
    check(loss, expected, [ours], [exact])
    for key, value in expected_stats.items():
        torch.testing.assert_close(stats[key].double(), value, rtol=1e-5, atol=1e-6, msg=key)


def test_named_losses_are_known_by_name():
    assert ppo_kernels.named_loss("ppo") == {}
    assert ppo_kernels.named_loss("dapo") == {"clip_range_high": 0.28}
    assert ppo_kernels.named_loss("gspo") == {
        "clip_range": 3e-4,
        "clip_range_high": 4e-4,
        "aggregation": "batch_mean_token_mean",
        "ratio": "sequence_mean",
    }
    with pytest.raises(ValueError, match=r"option `name` is \"gpso\", expected ppo, dapo"):
        ppo_kernels.named_loss("gpso")


CORRECTIONS = {
    "tis": lambda w, rows: w.clamp(max=2.0),
    "sequence_tis": lambda w, rows: rows.prod(1, True).clamp(max=2.0).expand_as(w),
    "icepop": lambda w, rows: w * ((w >= 0.5) & (w <= 5.0)),
    "sequence_mask": lambda w, rows: (rows.prod(1, True) * (rows.prod(1, True) <= 3.0)).expand_as(
        w
    ),
    "geometric_mask": lambda w, rows: w,
}


@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_corrections_with_names(name, dtype, device):
    old_logp, noise = torch.randn(2, 5, 9, device=device).unbind()
    old_logp = (old_logp - 3.0).to(dtype)
    rollout_logp = (old_logp.float() + 0.6 * noise).to(dtype)
    mask = torch.rand(5, 9, device=device) > 0.3
    options = ppo_kernels.named_correction(name)
    if name == "geometric_mask":
        options.update(rejection_low=1e-6, rejection_high=1e6)  # rejects nothing
    w = (old_logp.double() - rollout_logp.double()).exp()
    expected = CORRECTIONS[name](w, torch.where(mask, w, 1.0)) * mask
    ours = functional.correction(
        torch.where(mask, old_logp, torch.nan).requires_grad_(), rollout_logp, mask, **options
    )
    torch.testing.assert_close(ours.weights.double(), expected, rtol=1e-5, atol=1e-6)
    assert not ours.weights.requires_grad and torch.equal(ours.kept, mask)
    stats = ours.stats
    assert stats["tokens"] == mask.sum() and stats["rows"] == mask.any(1).sum()
    assert all(stat.dtype is torch.float64 and stat.device == w.device for stat in stats.values())
    torch.testing.assert_close(stats["weight_sum"], expected.sum(), rtol=1e-5, atol=1e-6)
    ess = expected.sum() ** 2 / (mask.sum() * (expected**2).sum())
    torch.testing.assert_close(stats["ess"], ess, rtol=1e-5, atol=1e-6)
    flat = functional.correction(old_logp[0], rollout_logp[0], mask[0], **options)
    assert torch.equal(flat.weights, ours.weights[0])


def test_corrections_are_known_by_name():
    assert ppo_kernels.named_correction("tis") == {}
    assert ppo_kernels.named_correction("icepop") == {"low": 0.5, "high": 5.0, "outside": "zero"}
    mask = {"log_ratio_clamp": None, "high": 3.0, "level": "sequence_sum", "outside": "zero"}
    assert ppo_kernels.named_correction("sequence_mask") == mask
    with pytest.raises(ValueError, match=r"option `name` is \"trl\", expected tis, sequence_tis"):
        ppo_kernels.named_correction("trl")


@pytest.mark.parametrize("metric", ["ratio", "k2", "k3", "reverse_k3", "binary_kl"])
@pytest.mark.parametrize("level", ["token", "sequence_mean", "sequence_sum", "sequence_max"])
def test_rejections(metric, level, device):
    """As they are written, at the median of what there is."""
    old_logp, noise = torch.randn(2, 8, 11, device=device).unbind()
    old_logp = old_logp.abs().neg() - 0.2
    rollout_logp = (old_logp + 0.4 * noise).clamp(max=-0.05)
    mask = torch.rand(8, 11, device=device) > 0.3
    mask[:, 0] = True
    d = old_logp.double() - rollout_logp.double()
    p, q = rollout_logp.double().exp(), old_logp.double().exp()
    value = {
        "ratio": d,
        "k2": d**2 / 2,
        "k3": d.exp() - 1 - d,
        "reverse_k3": (-d).exp() - 1 + d,
        "binary_kl": p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log(),
    }[metric]
    kept = torch.where(mask, value, 0.0)
    seen = {
        "token": value,
        "sequence_mean": kept.sum(1, True) / mask.sum(1, True),
        "sequence_sum": kept.sum(1, True),
        "sequence_max": torch.where(mask, value, -torch.inf).amax(1, True),
    }[level].expand_as(value)
    different = seen[mask].unique().sort().values
    bound = different[len(different) // 2 - 1 : len(different) // 2 + 1].mean().item()
    high = math.exp(bound) if metric == "ratio" else bound
    options = {"rejection_metric": metric, "rejection_level": level, "rejection_high": high}
    ours = functional.correction(old_logp, rollout_logp, mask, level="none", **options)
    assert torch.equal(ours.kept, mask & (seen <= bound))
    assert torch.equal(ours.weights, ours.kept.float())
    assert 0 < ours.stats["rejected_tokens"] < ours.stats["tokens"]


def test_without_an_old_policy_the_ratio_is_one(device):
    logp, advantages = leaf(torch.randn(3, 4, device=device)), torch.randn(3, 4, device=device)
    loss, stats = functional.ppo_loss(logp, None, advantages)
    loss.backward()
    torch.testing.assert_close(logp.grad, -advantages / 12)
    assert stats["ratio_mean"] == 1.0


def test_ppo_loss_of_the_policy_alone(device):
    logp = torch.randn(3, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    old_logp, advantages = torch.randn(2, 3, 8, device=device)
    with torch.no_grad():
        silent, _ = functional.ppo_loss(logp, old_logp, advantages)
    loss, stats = functional.ppo_loss(logp, old_logp, advantages)
    assert torch.equal(silent, loss) and stats["value_loss"].isnan() and not silent.requires_grad
    (2 * loss).backward()
    exact = leaf(logp.double())
    mask = torch.ones_like(logp, dtype=torch.bool)
    (2 * formulas.ppo_loss(exact, old_logp.double(), advantages.double(), mask)).backward()
    torch.testing.assert_close(logp.grad.double(), exact.grad, **TOLERANCE[torch.bfloat16])


def test_ppo_loss_takes_the_others_as_constants(device):
    logp, old_logp, advantages = torch.randn(3, 3, 8, device=device).requires_grad_().unbind()
    loss, _ = functional.ppo_loss(logp, old_logp, advantages)
    found = torch.autograd.grad(loss, (logp, old_logp, advantages), allow_unused=True)
    alone, _ = functional.ppo_loss(logp, old_logp.detach(), advantages.detach())
    assert torch.equal(found[0], torch.autograd.grad(alone, logp)[0])
    assert found[1:] == (None, None)


# --- what holds for all ---


def test_nothing_to_do(device):
    none = torch.empty(0, 7, device=device, requires_grad=True)
    index = torch.empty(0, dtype=torch.int64, device=device)
    for ours in functional.logprobs_and_entropy(none, index):
        assert ours.shape == (0,)
    functional.selective_log_softmax(none, index).sum().backward()
    assert none.grad.shape == (0, 7)
    assert functional.selective_log_softmax(
        none, torch.empty(0, 3, dtype=torch.int64, device=device)
    ).shape == (0, 3)
    assert functional.token_kl(none, none).shape == (0, 7)
    assert functional.full_kl(none, none).shape == (0,)
    assert functional.gae(none).advantages.shape == (0, 7)
    assert functional.gae(none.reshape(7, 0)).advantages.shape == (7, 0)
    assert functional.masked_moments(none).tolist() == [0, 0, 0]


def test_the_same_bits(device):
    logits, index, _ = logits_and_index((64, 5000), device=device)
    first = functional.logprobs_and_entropy(logits, index)
    for rows in (slice(None), slice(3, 9), slice(63, None)):
        again = functional.logprobs_and_entropy(logits[rows], index[rows])
        assert all(torch.equal(a[rows], b) for a, b in zip(first, again))


def test_gradients_of_gradients_are_refused():
    logits, index, _ = logits_and_index((3, 9))
    logp = functional.selective_log_softmax(logits, index)
    (grad,) = torch.autograd.grad(logp.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        grad.sum().backward()


def test_gradients_can_be_asked_for_twice():
    logits, index, _ = logits_and_index((3, 9))
    logp = functional.selective_log_softmax(logits, index)
    first = torch.autograd.grad(logp.sum(), logits, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(logp.sum(), logits)[0])


def test_changing_what_is_kept_is_seen():
    logits, index, _ = logits_and_index((3, 9))
    scaled = logits * 2
    logp = functional.selective_log_softmax(scaled, index)
    scaled.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


@pytest.mark.skipif(_ops._madvise is None, reason="large pages are asked for on Linux")
def test_large_results_have_large_pages(monkeypatch):
    """Every result and gradient of that size, and nothing that is smaller."""
    asked = []
    monkeypatch.setattr(_ops, "_OWN_MAPPING", 8 << 20)
    monkeypatch.setattr(_ops, "_madvise", lambda *arguments: asked.append(arguments))

    def ask(call):
        asked.clear()
        call()
        for start, size, advice in asked:
            assert start % (2 << 20) == size % (2 << 20) == 0 and advice == 14
            assert (4 << 20) <= size <= (8 << 20)
        return len(asked)

    a, b = (torch.zeros(1 << 11, 1 << 10, requires_grad=True) for _ in range(2))
    index, ones = torch.zeros(1 << 11, dtype=torch.int64), torch.ones(1 << 11)
    logp = functional.selective_log_softmax(a, index)
    assert ask(lambda: torch.autograd.grad(logp, a, ones)) == 1
    several = functional.selective_log_softmax(a, index[:, None])
    assert ask(lambda: torch.autograd.grad(several, a, ones[:, None])) == 1
    exact = functional.full_kl(a, b)
    assert ask(lambda: torch.autograd.grad(exact, (a, b), ones)) == 2
    kl = functional.token_kl(a, b)
    assert ask(lambda: functional.token_kl(a, b)) == 1
    assert ask(lambda: torch.autograd.grad(kl, (a, b), a)) == 2
    assert ask(lambda: functional.gae(a, whiten=True, return_rewards=True)) == 4
    mask = torch.ones(1 << 11, 1 << 10, dtype=torch.bool)
    assert ask(lambda: functional.outcome_advantages(ones, None, mask, group_size=8)) == 1
    whitened = functional.masked_whiten(a)
    assert ask(lambda: functional.masked_whiten(a)) == 1
    assert ask(lambda: torch.autograd.grad(whitened, a, a)) == 1
    loss = functional.ppo_loss(a, b, b)[0]
    assert ask(lambda: functional.ppo_loss(a, b, b, values=b, old_values=a, returns=a)) == 2
    assert ask(lambda: torch.autograd.grad(2 * loss, a)) == 1
    small = a[: 1 << 10]
    assert ask(lambda: functional.token_kl(small, small)) == 0


def test_package_attributes():
    assert ppo_kernels.selective_log_softmax is functional.selective_log_softmax
    assert set(functional.__all__) < set(ppo_kernels.__all__)
    assert ppo_kernels.library_version().count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ppo_kernels.nothing


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_current_stream():
    """Work on a stream sees what was done on it before, and waits for nothing else."""
    stream = torch.cuda.Stream()
    logits = torch.randn(512, 50257, device="cuda")
    index = torch.zeros(512, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        ours = functional.selective_log_softmax(logits * 2, index)
    stream.synchronize()
    exact, _ = formulas.logprobs_and_entropy(logits.double() * 2, index)
    torch.testing.assert_close(ours.double(), exact, **F32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graph_capture():
    logits = torch.randn(64, 1000, device="cuda")
    index = torch.zeros(64, dtype=torch.int64, device="cuda")
    functional.selective_log_softmax(logits, index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = functional.selective_log_softmax(logits, index)
    logits.mul_(2)
    graph.replay()
    assert torch.equal(ours, functional.selective_log_softmax(logits, index))
