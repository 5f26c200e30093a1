"""The ops as PyTorch's own machinery sees them: opcheck, and torch.compile without graph breaks."""

import shutil

import pytest
import torch
import torch._functorch.config

from ppo_kernels import functional

ops = torch.ops.ppo_kernels


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def samples():
    """Arguments for each op, those that can have a gradient with one. None that make a NaN, which
    opcheck takes for a difference: so no row that is ignored, of which the kept log-sum is NaN."""
    index = torch.randint(33, (2, 5))
    several = torch.randint(33, (2, 5, 3))
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]], dtype=torch.bool)
    rows, more = torch.randn(2, 2, 5)
    whiten = (1e-8, "variance", True, True)
    kl = (20.0, 10.0, "k3")
    gae = (1.0, 0.95, None, 0.05, 0.0, None, None, 0.0, "carry", "last", "scale_then_clip", "keep")
    ppo = (0.2, None, 3.0, 20.0, 0.2, 0.1, 0.01, 0.1, 20.0, None, 0.0, None, "token_mean")
    yield ops.logprob, (leaf(2, 5, 33), index, 0.7, None)
    yield ops.logprob, (leaf(2, 5, 33, dtype=torch.bfloat16), index.int(), 1.0, -100)
    yield ops.logprob, (leaf(2, 7, 33)[:, 1:-1], index, 1.0, None)
    yield ops.logprob_entropy, (leaf(2, 5, 33), index, 0.7, -100)
    stats = ops.logprob(torch.zeros(2, 5, 33), index, 1.0, None)[1]
    backward = (torch.zeros(2, 5, 33), index, stats)
    yield ops.logprob_backward, (*backward, rows, rows, more, 1.0, None)
    yield ops.logprob_backward, (*backward, None, rows, None, 1.0, None)
    yield ops.logprobs, (leaf(2, 5, 33), several, 0.7)
    yield ops.logprobs, (leaf(2, 5, 33), several[..., :0], 0.7)
    logp, stats = ops.logprobs(torch.zeros(2, 5, 33), several, 0.7)
    yield ops.logprobs_backward, (torch.zeros(2, 5, 33), several, stats, logp, 0.7)
    yield ops.token_kl, (leaf(2, 5), leaf(2, 5), mask, *kl)
    yield ops.token_kl_backward, (rows, more, mask, rows, True, False, *kl)
    yield ops.full_kl, (leaf(2, 5, 33), leaf(2, 5, 33), mask, 0.7, "reverse")
    _, stats = ops.full_kl(torch.zeros(2, 5, 33), torch.ones(2, 5, 33), None, 1.0, "forward")
    both = (torch.zeros(2, 5, 33), torch.ones(2, 5, 33))
    yield ops.full_kl_backward, (*both, None, stats, rows, False, True, 1.0, "forward")
    yield ops.gae, (rows, more, mask, None, rows[:, 0], None, None, None, True, *gae)
    yield ops.masked_moments, (rows, mask)
    yield ops.masked_whiten, (leaf(2, 5), mask, *whiten)
    moments = torch.tensor([10.0, 1.0, 5.0], dtype=torch.float64)
    yield ops.masked_whiten_with, (leaf(2, 5), mask, moments, *whiten)
    yield ops.masked_whiten_backward, (more, mask, moments, rows, *whiten)
    yield ops.masked_whiten_backward, (more, None, moments, None, *whiten)
    constants = torch.randn(5, 2, 5)
    old_logp, advantages, old_values, returns, ref_logp = constants
    tensors = (
        leaf(2, 5),
        old_logp,
        advantages,
        leaf(2, 5),
        old_values,
        returns,
        leaf(2, 5),
        ref_logp,
    )
    yield ops.ppo_loss, (*tensors, mask, True, True, True, *ppo, "clipped_branch", "k3")
    yield ops.ppo_loss_backward, (torch.tensor(2.0), rows, torch.empty(0), more)


SAMPLES = list(samples())


@pytest.mark.parametrize(("op", "arguments"), SAMPLES, ids=[str(op) for op, _ in SAMPLES])
def test_opcheck(op, arguments):
    torch.library.opcheck(op, arguments)


def test_every_op_is_checked():
    defined = {
        name.removeprefix("ppo_kernels::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("ppo_kernels::")
    }
    assert defined == {op._qualified_op_name.removeprefix("ppo_kernels::") for op, _ in SAMPLES}


def step(logits, ref_logits, index, values, old_logp, rewards, mask):
    """Every function once: what is between the logits and the loss."""
    logp, entropy = functional.logprobs_and_entropy(logits, index, 0.9)
    ref_logp = functional.selective_log_softmax(ref_logits, index, row_mask=mask)
    top = functional.selective_log_softmax(logits, torch.stack([index, index * 0], -1))
    kl = functional.token_kl(logp, ref_logp, mask, estimator="k3")
    exact = functional.full_kl(logits, ref_logits, mask)
    out = functional.gae(values, rewards, mask, kl=kl, whiten=True)
    loss, stats = functional.ppo_loss(
        logp,
        old_logp,
        out.advantages,
        mask,
        values=values,
        old_values=values.detach(),
        returns=out.returns,
        entropy=entropy,
        entropy_coef=0.01,
    )
    whitened = functional.masked_whiten(logp, mask)
    return loss + exact.mean() + kl.mean() + (whitened**3).mean() + top.mean(), stats[
        "clip_fraction"
    ]


BACKENDS = ["eager", "aot_eager"] + (["inductor"] if shutil.which("g++") else [])


# That cache would find an earlier run's backward passes by what is called forwards, and with them
# the ops as they were then.
@torch._functorch.config.patch(enable_autograd_cache=False)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    for batch in (2, 3):
        logits, values = leaf(batch, 7, 50), leaf(batch, 7)
        arguments = (
            torch.randn(batch, 7, 50),
            torch.randint(50, (batch, 7)),
            values,
            torch.randn(batch, 7),
            torch.randn(batch, 7),
            torch.rand(batch, 7) > 0.3,
        )
        ours, stat = compiled(logits, *arguments)
        expected, expected_stat = step(logits, *arguments)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(stat, expected_stat)
        found = torch.autograd.grad(ours, (logits, values))
        want = torch.autograd.grad(expected, (logits, values))
        torch.testing.assert_close(found, want)
