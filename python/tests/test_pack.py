"""Packs of rows of different lengths, against the same rows with padding."""

import numpy as np
import pytest
import torch

import ppo_kernels.numpy
from ppo_kernels import functional

LENGTHS = [0, 7, 1, 0, 30, 19, 0]
WIDTH = max(LENGTHS)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.manual_seed(0)
    return request.param


class Pack:
    """A padded batch of these lengths on a device."""

    def __init__(self, device):
        lengths = torch.tensor(LENGTHS, device=device)
        self.rows, self.tokens = len(LENGTHS), sum(LENGTHS)
        self.offsets = torch.cat((lengths[:1] * 0, lengths.cumsum(0)))
        self.inside = torch.arange(WIDTH, device=device) < lengths[:, None]
        self.mask = self.inside & (torch.rand(self.rows, WIDTH, device=device) > 0.2)
        self.device = device

    def draw(self):
        x = torch.randn(self.rows, WIDTH, device=self.device)
        return torch.where(self.inside, x, torch.nan)

    def of_rows(self):
        return torch.randn(self.rows, device=self.device)

    def pack(self, padded):
        return padded[self.inside]


@pytest.fixture
def pack(device):
    return Pack(device)


def test_gae(pack):
    values, rewards = pack.draw(), pack.draw()
    options = {"scores": pack.of_rows(), "lambda_per_row": torch.sigmoid(pack.of_rows())}
    padded = functional.gae(values, rewards, pack.mask, whiten=True, **options)
    packed = (pack.pack(x) for x in (values, rewards, pack.mask))
    ours = functional.gae(*packed, whiten=True, offsets=pack.offsets.int(), **options)
    assert torch.equal(ours.returns, pack.pack(padded.returns))
    torch.testing.assert_close(ours.advantages, pack.pack(padded.advantages))
    torch.testing.assert_close(ours.moments, padded.moments)


def test_gae_of_numpy(pack):
    if pack.device != "cpu":
        pytest.skip("arrays are on the CPU")
    values, rewards, scores = pack.draw(), pack.draw(), pack.of_rows()
    lambdas = torch.sigmoid(pack.of_rows())
    given = [pack.pack(x) for x in (values, rewards, pack.mask)]
    options = {"scores": scores, "offsets": pack.offsets, "lambda_per_row": lambdas}
    expected = functional.gae(*given, **options)
    arrays = {name: tensor.numpy() for name, tensor in options.items()}
    ours = ppo_kernels.numpy.gae(*(x.numpy() for x in given), **arrays)
    assert np.array_equal(ours.returns, expected.returns)
    assert np.array_equal(ours.moments, expected.moments)


@pytest.mark.parametrize("name", ["grpo", "opo"])
def test_outcome_advantages(pack, name):
    scores, options = pack.of_rows(), functional.ESTIMATORS[name]
    padded = functional.outcome_advantages(scores, [0] * pack.rows, pack.mask, **options)
    given = (scores, [0] * pack.rows, pack.pack(pack.mask))
    ours = functional.outcome_advantages(*given, offsets=pack.offsets, **options)
    assert torch.equal(ours.advantages, pack.pack(padded.advantages))
    if pack.device == "cpu":
        arrays = (np.asarray(x) for x in given)
        arrays = ppo_kernels.numpy.outcome_advantages(*arrays, offsets=pack.offsets, **options)
        assert np.array_equal(arrays.advantages, ours.advantages.numpy())
    with pytest.raises(ValueError, match="`mask` is missing, which `offsets` needs"):
        functional.outcome_advantages(scores, group_size=1, offsets=pack.offsets)


@pytest.mark.parametrize("step", ["column", "unmasked"])
def test_optimal_token_baseline(pack, step):
    rewards, logp = pack.draw(), -pack.draw().abs()
    tensors, groups = (rewards, logp, logp, pack.draw()), [0, 1, 1, 1, 0, 0, 1]
    padded = functional.optimal_token_baseline(
        *tensors[:3], groups, pack.mask, weights=tensors[3], step=step
    )
    *given, weights, mask = (pack.pack(x) for x in (*tensors, pack.mask))
    options = {"weights": weights, "offsets": pack.offsets, "step": step}
    ours = functional.optimal_token_baseline(*given, groups, mask, **options)
    for name, found in ours._asdict().items():
        assert torch.equal(found, pack.pack(getattr(padded, name)))
    if pack.device == "cpu":
        arrays = [np.asarray(x) for x in (*given, groups, mask)]
        arrays = ppo_kernels.numpy.optimal_token_baseline(*arrays, **options)
        assert all(np.array_equal(a, b.numpy()) for a, b in zip(arrays, ours))


@pytest.mark.parametrize("level", ["token", "sequence_mean", "sequence_sum"])
def test_correction(pack, level):
    old_logp = pack.draw()
    rollout_logp = old_logp + 0.1 * pack.draw()
    options = {"level": level, "rejection_metric": "k3", "rejection_level": "sequence_mean"}
    options["rejection_high"] = 0.006
    padded = functional.correction(old_logp, rollout_logp, pack.mask, **options)
    given = [pack.pack(x) for x in (old_logp, rollout_logp, pack.mask)]
    ours = functional.correction(*given, offsets=pack.offsets, **options)
    assert torch.equal(ours.weights, pack.pack(padded.weights))
    assert torch.equal(ours.kept, pack.pack(padded.kept))
    torch.testing.assert_close(ours.stats, padded.stats)
    if pack.device == "cpu":
        arrays = (x.numpy() for x in given)
        arrays = ppo_kernels.numpy.correction(*arrays, offsets=pack.offsets, **options)
        assert np.array_equal(arrays.weights, ours.weights.numpy())


LOSSES = [
    {},
    {"aggregation": "seq_mean_token_mean"},
    {"aggregation": "seq_mean_token_sum_norm"},
    {"aggregation": "seq_mean_token_sum_norm_rows"},
    ppo_kernels.named_loss("gspo"),
    ppo_kernels.named_loss("vespo"),
]


@pytest.mark.parametrize("options", LOSSES)
def test_ppo_loss(pack, options):
    logp, old_logp, advantages = pack.draw(), pack.draw(), pack.draw()
    leaves = [x.requires_grad_() for x in (logp, pack.pack(logp.detach()))]
    padded, stats = functional.ppo_loss(logp, old_logp, advantages, pack.mask, **options)
    given = (pack.pack(x) for x in (old_logp, advantages, pack.mask))
    ours, our_stats = functional.ppo_loss(leaves[1], *given, offsets=pack.offsets, **options)
    torch.testing.assert_close(ours, padded)
    torch.testing.assert_close(our_stats, stats, equal_nan=True)
    padded.backward()
    ours.backward()
    assert torch.equal(leaves[1].grad, pack.pack(leaves[0].grad))
    if pack.device == "cpu":
        arrays = [x.detach().numpy() for x in (leaves[1], pack.pack(old_logp))]
        arrays += [pack.pack(x).numpy() for x in (advantages, pack.mask)]
        _, _, gradients = ppo_kernels.numpy.ppo_loss(*arrays, offsets=pack.offsets, **options)
        assert np.array_equal(gradients["logp"], leaves[1].grad.numpy())


@pytest.mark.parametrize("options", [{}, ppo_kernels.named_loss("gspo")])
def test_ppo_loss_with_numbers_for_rows(pack, options):
    logp, old_logp = pack.draw(), pack.draw()
    of_rows = {"advantages": pack.of_rows(), "weights": torch.rand(pack.rows, device=pack.device)}
    of_tokens = {name: x[:, None].expand(-1, WIDTH) for name, x in of_rows.items()}
    options = {**options, "row_extremes": True}

    def run(logp, old_logp, mask, **more):
        leaf = logp.detach().requires_grad_()
        loss, stats = functional.ppo_loss(leaf, old_logp, mask=mask, **more, **options)
        loss.backward()
        return leaf.grad, stats

    expected, stats = run(logp, old_logp, pack.mask, **of_tokens)
    padded, padded_stats = run(logp, old_logp, pack.mask, **of_rows)
    assert torch.equal(padded, expected)
    torch.testing.assert_close(padded_stats, stats, equal_nan=True, rtol=0, atol=0)
    assert stats["clip_high_row_max"] >= stats["clip_high_fraction"]
    assert stats["clip_low_row_min"] <= stats["clip_low_fraction"]
    given = [pack.pack(x) for x in (logp, old_logp, pack.mask)]
    packed, packed_stats = run(*given, offsets=pack.offsets, **of_rows)
    assert torch.equal(packed, pack.pack(expected))
    torch.testing.assert_close(packed_stats, stats, equal_nan=True)
    if pack.device == "cpu":
        logp, old_logp, mask = (x.numpy() for x in given)
        arrays = {name: x.numpy() for name, x in of_rows.items()}
        more = {"mask": mask, "offsets": pack.offsets, **arrays, **options}
        _, _, gradients = ppo_kernels.numpy.ppo_loss(logp, old_logp, **more)
        assert np.array_equal(gradients["logp"], packed.numpy())


def test_numbers_for_other_rows_are_refused(pack):
    logp = pack.pack(pack.draw())
    with pytest.raises(ValueError, match="`advantages` has shape \\[6\\]"):
        functional.ppo_loss(logp, logp, pack.of_rows()[:6], offsets=pack.offsets)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "kto"])
def test_preference_loss(pack, loss):
    logp, ref_logp = pack.draw()[:6], pack.draw()[:6]
    inside, mask, offsets = pack.inside[:6], pack.mask[:6], pack.offsets[:7]
    options = {"loss": loss}
    if loss == "kto":
        options["labels"] = torch.tensor([1, 0, 1, 0, 1, 0], device=pack.device)
    leaves = [x.requires_grad_() for x in (logp, logp.detach()[inside])]
    padded = functional.preference_loss(logp, ref_logp, mask, **options)
    given = (ref_logp[inside], mask[inside])
    ours = functional.preference_loss(leaves[1], *given, offsets=offsets, **options)
    assert torch.equal(ours.losses, padded.losses) and torch.equal(ours.rewards, padded.rewards)
    padded.loss.backward()
    ours.loss.backward()
    assert torch.equal(leaves[1].grad, leaves[0].grad[inside])
    sums = torch.where(mask, ref_logp, 0).double().sum(-1).float()
    of_sums = functional.preference_loss(leaves[1], sums, given[1], offsets=offsets, **options)
    torch.testing.assert_close(of_sums.losses, ours.losses)
    if pack.device == "cpu":
        arrays = (x.detach().numpy() for x in (leaves[1], *given))
        arrays = ppo_kernels.numpy.preference_loss(*arrays, offsets=offsets, **options)
        assert np.array_equal(arrays.grad_logp, leaves[1].grad.numpy())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_offsets_are_not_waited_for():
    values, offsets = torch.zeros(6, device="cuda"), torch.tensor([0, 9, 2], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        functional.gae(values, offsets=offsets)
        functional.targets_from_tokens(values.long(), offsets.clamp(max=6))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("module", [functional, ppo_kernels.numpy])
def test_targets(module):
    tensor = torch.tensor if module is functional else np.array
    targets = module.targets_from_tokens(tensor([5, 6, 7, 8]), tensor([0, 0, 3, 3, 4, 4]))
    assert targets.tolist() == [6, 7, -100, -100]
    targets = module.targets_from_tokens(tensor([5, 6]), tensor([0, 2]), ignore=-1)
    assert targets.tolist() == [6, -1]
    nothing = tensor([5])[:0]
    assert module.targets_from_tokens(nothing, tensor([0, 0])).tolist() == []


BAD = [
    ([1, 2, 6], "begins at 1|is 1, expected 0"),
    ([0, 7, 6], "is 6, expected no less than the one before"),
    ([0, 2, 5], "the number of tokens"),
    ([0.0, 2.0, 6.0], "`offsets` has dtype float32, expected int64"),
    ([[0, 6]], r"`offsets` has shape \[1, 2\], expected \[rows \+ 1\]"),
    ([], r"`offsets` has shape \[0\], expected \[rows \+ 1\]"),
]


def packed_calls(module):
    yield lambda x, offsets: module.gae(x, offsets=offsets)
    yield lambda x, offsets: module.preference_loss(x, x, offsets=offsets)
    yield lambda x, offsets: module.correction(x, x, offsets=offsets)
    yield lambda x, offsets: module.ppo_loss(x, x, x, offsets=offsets)
    rows = torch.zeros(2) if module is functional else np.zeros(2)
    yield lambda x, offsets: module.outcome_advantages(rows, None, x, group_size=2, offsets=offsets)
    yield lambda x, offsets: module.targets_from_tokens(x, offsets)


@pytest.mark.parametrize("module", [functional, ppo_kernels.numpy])
@pytest.mark.parametrize(("offsets", "words"), BAD)
def test_bad_offsets(module, offsets, words):
    offsets = np.array(offsets, np.float32 if "float32" in words else np.int64)
    tokens = np.zeros(6, np.float32)
    if module is functional:
        offsets, tokens = torch.from_numpy(offsets), torch.from_numpy(tokens)
    for call in packed_calls(module):
        with pytest.raises(ValueError, match=words):
            call(tokens, offsets)


@pytest.mark.parametrize("module", [functional, ppo_kernels.numpy])
def test_padded_tokens_have_no_offsets(module):
    tokens, offsets = np.zeros((2, 3), np.float32), np.array([0, 3, 6])
    if module is functional:
        offsets, tokens = torch.from_numpy(offsets), torch.from_numpy(tokens)
    for call in packed_calls(module):
        with pytest.raises(ValueError, match=r"has shape \[2, 3\], expected \[tokens\]"):
            call(tokens, offsets)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    pack = Pack("cpu")

    def step(tokens, values, rewards, offsets):
        out = functional.gae(values, rewards, offsets=offsets)
        loss, _ = functional.ppo_loss(
            values, rewards, out.advantages, offsets=offsets, aggregation="seq_mean_token_mean"
        )
        return out.advantages, functional.targets_from_tokens(tokens, offsets), loss

    given = (torch.arange(pack.tokens), *(pack.pack(pack.draw()) for _ in range(2)), pack.offsets)
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for ours, expected in zip(compiled(*given), step(*given)):
        assert torch.equal(ours, expected)
