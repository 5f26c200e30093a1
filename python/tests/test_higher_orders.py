"""Gradients of gradients and forward mode: refused in words of ours, however they are asked for."""

import pytest
import torch
from torch.autograd import forward_ad

from ppo_kernels import functional

index = torch.tensor([[0, 3], [2, 1]])
mask = torch.tensor([[True, True], [True, False]])


def logits(h):
    return torch.stack([h, 2 * h, h.sin(), -h], -1)


# Scalars of a tensor [2, 2], by every op that has a gradient.
OPS = {
    "logp": lambda h: functional.selective_log_softmax(logits(h), index).sum(),
    "several": lambda h: functional.selective_log_softmax(
        logits(h), index.unsqueeze(-1).expand(2, 2, 3)
    ).sum(),
    "entropy": lambda h: functional.logprobs_and_entropy(logits(h), index)[1].sum(),
    "token_kl": lambda h: functional.token_kl(h, h.sin(), mask, estimator="k3").sum(),
    "full_kl": lambda h: functional.full_kl(logits(h), logits(h.sin()), mask).sum(),
    "whiten": lambda h: functional.masked_whiten(h, mask).pow(2).sum(),
    "whiten_with": lambda h: (
        functional.masked_whiten(h, mask, moments=functional.masked_moments(h, mask)).pow(3).sum()
    ),
    "ppo_loss": lambda h: functional.ppo_loss(h, h.detach() + 0.01, h.sin(), mask)[0],
    "preference": lambda h: functional.preference_loss(h, h.detach() + 0.01).loss,
    "reward_model": lambda h: functional.reward_model_loss(h[0], h[1])[0],
}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def hidden():
    w = torch.randn(2, 2, requires_grad=True)
    return w, torch.tanh(w)


REFUSED = "ppo_kernels: gradients of gradients are not supported"


def test_a_gradient_of_a_gradient(op):
    w, h = hidden()
    (grad,) = torch.autograd.grad(op(h), h, create_graph=True)
    assert grad.requires_grad
    penalised = op(h) + 10 * grad.pow(2).sum()
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(penalised, w)
    w, h = hidden()
    (grad,) = torch.autograd.grad(op(h), h, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        (10 * grad.pow(2).sum()).backward(inputs=[w])
    w, h = hidden()
    (grad,) = torch.autograd.grad(op(h), h, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        grad.sum().backward()


def test_hessians(op):
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.functional.hessian(op, torch.randn(2, 2))


def test_a_gradient_with_a_graph_is_a_gradient(op):
    w, h = hidden()
    (plain,) = torch.autograd.grad(op(h), w, retain_graph=True)
    (with_graph,) = torch.autograd.grad(op(h), w, create_graph=True)
    assert torch.equal(plain, with_graph)


def test_forward_mode(op):
    refused = "ppo_kernels: forward-mode differentiation is not supported"
    x, tangent = torch.randn(2, 2), torch.randn(2, 2)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=refused):
        op(forward_ad.make_dual(x, tangent))
    with forward_ad.dual_level():
        op(x)  # nothing to differentiate
    with pytest.raises(RuntimeError, match="ppo_kernels"):
        torch.func.jvp(op, (x,), (tangent,))


def test_gradients_of_one_loss_are_apart():
    x = torch.randn(2, 2, requires_grad=True)
    loss, _ = functional.ppo_loss(x, x.detach() + 0.01, torch.ones(2, 2))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    first.mul_(7)
    (second,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(second, kept)
    second.zero_()
    (third,) = torch.autograd.grad(loss, x)
    assert torch.equal(third, kept)


def test_empty_tensors_are_there():
    rows = torch.zeros(0, 3)
    options = {"entropy_coef": 0.1, "kl_coef": 0.1, "denominator": 1.0}
    terms = {"values": rows, "old_values": rows, "returns": rows, "entropy": rows, "ref_logp": rows}
    loss, stats = functional.ppo_loss(rows, rows, rows, mask=rows > 0, **terms, **options)
    assert loss == 0.0 and stats["tokens"] == 0.0
    given = {"scores": torch.zeros(0), "has_eos": torch.zeros(0, dtype=torch.bool)}
    missing = {"missing_eos": "subtract", "missing_eos_value": 1.0}
    out = functional.gae(rows, **given, **missing, return_rewards=True)
    assert out.advantages.shape == out.rewards.shape == (0, 3)
    weights, kept, stats = functional.correction(rows, rows)
    assert weights.shape == kept.shape == (0, 3) and stats["tokens"] == stats["ess"] == 0.0
    flat = torch.zeros(0, requires_grad=True)
    functional.token_kl(flat, flat.detach()).sum().backward()
    assert flat.grad.shape == (0,)


def test_errors_name_arguments_as_they_are_here():
    rows = torch.randn(2, 2)
    for change, named in [
        ({"lam": 2.0}, "lam"),
        ({"value_lam": 2.0}, "value_lam"),
        ({"score_min": 1.0, "score_max": 0.0}, "score_max"),
        ({"score_std": 0.0}, "score_std"),
        ({"missing_eos": "subtract", "missing_eos_value": float("nan")}, "missing_eos_value"),
    ]:
        with pytest.raises(ValueError, match=f"`{named}`"):
            functional.gae(rows, scores=rows[0], has_eos=rows[0] > 0, **change)
    with pytest.raises(ValueError, match="`kl_output_clamp`"):
        functional.ppo_loss(rows, rows, rows, kl_output_clamp=0.0)
    with pytest.raises(ValueError, match="`index`"):
        functional.selective_log_softmax(torch.randn(2, 2, 4), torch.full((2, 2), 9))
    with pytest.raises(ValueError, match="`mask` keeps 0"):
        functional.masked_whiten(rows, torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="`values` keeps 1"):
        functional.masked_whiten(rows[:1, :1])
    with pytest.raises(ValueError, match="`moments` keeps 1"):
        functional.masked_whiten(rows, moments=torch.tensor([1.0, 0, 0], dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients_are_those_one_by_one(op):
    w, h = hidden()
    loss = op(h)
    upstream = torch.tensor([1.0, -2.0, 0.0])
    options = {"retain_graph": True}
    (batched,) = torch.autograd.grad(loss, w, upstream, is_grads_batched=True, **options)
    for found, grad in zip(batched, upstream, strict=True):
        assert torch.equal(found, torch.autograd.grad(loss, w, grad, **options)[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_one_by_one(op):
    several = torch.randn(3, 2, 2)
    assert torch.equal(torch.func.vmap(op)(several), torch.stack([op(h) for h in several]))


def test_gradients_of_torch_func(op):
    h = torch.randn(2, 2)
    asked = (torch.func.grad, torch.func.jacrev, torch.func.hessian)
    for transform in (*asked, lambda op: torch.func.vmap(torch.func.grad(op))):
        with pytest.raises(RuntimeError, match="ppo_kernels: .* not supported"):
            transform(op)(h if transform in asked else h.expand(3, 2, 2))
