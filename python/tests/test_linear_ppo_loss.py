"""The loss from hidden states: against log-probabilities and loss one after the other, which other
tests compare with plain PyTorch, in one tile and in many."""

import pytest
import torch
from test_linear import DEVICES, SHAPE, VOCAB, inputs

import ppo_kernels
from ppo_kernels import _linear, functional


@pytest.fixture(autouse=True, params=DEVICES)
def device(request):
    with torch.device(request.param):
        yield request.param


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    """Several chunks of rows, the last of them smaller."""
    if request.param == "many tiles":
        row = 4 * VOCAB
        monkeypatch.setattr(_linear, "LOSS_TILE_BYTES", {"cpu": 4 * row, "cuda": 4 * row})


def of_tokens():
    names = ("old_logp", "ref_logp", "rollout_logp")
    given = {name: torch.randn(SHAPE) - 6.0 for name in names}
    return given | {"advantages": torch.randn(SHAPE), "weights": torch.rand(SHAPE)}


def composed(hidden, weight, index, *, mask, head, **loss):
    """The two calls."""
    found = functional.linear_logprobs(
        hidden, weight, index, row_mask=mask, outputs=("entropy",), **head
    )
    return functional.ppo_loss(found.logp, entropy=found.entropy, mask=mask, **loss)


HEADS = [{}, {"temperature": 0.7}, {"softcap": 3.0, "logit_scale": 1.3}]
LOSSES = [
    {},
    {"entropy_coef": 0.1, "kl_coef": 0.2, "aggregation": "batch_mean_token_mean"},
    {"kl_coef": 0.3, "kl_against": "rollout", "kl_weighted": True, "dual_clip": 2.0},
    {"aggregation": "constant", "aggregation_divisor": 7.0, "log_ratio_clamp": 0.5},
    {"aggregation": "seq_mean_token_sum", "denominator": 11.0, "entropy_coef": 0.02},
    *({**ppo_kernels.named_loss(name), "kl_coef": 0.1} for name in ("cispo", "sapo", "dppo")),
    {**ppo_kernels.named_loss("gspo"), "entropy_coef": 0.1},
    {"off_policy_threshold": 0.1},
    {
        "entropy_coef": 0.1,
        "entropy_own_mean": True,
        "aggregation": "seq_mean_token_mean",
        "row_extremes": True,
    },
]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_two_calls(head, loss, tiles):
    hidden, weight, index, bias = inputs()
    mask, tokens = torch.rand(SHAPE) > 0.3, of_tokens()
    mask[1] = False
    head = {**head, "bias": bias}
    if "softcap" in head:
        head["temperature"] = 0.5 + torch.rand(SHAPE)
    ours = functional.linear_ppo_loss(hidden, weight, index, mask=mask, **head, **tokens, **loss)
    expected, stats = composed(hidden, weight, index, mask=mask, head=head, **tokens, **loss)
    torch.testing.assert_close(ours.loss, expected, rtol=1e-5, atol=1e-6)
    for name, value in stats.items():
        torch.testing.assert_close(ours.stats[name], value, rtol=1e-5, atol=1e-6, equal_nan=True)
    wanted = [hidden, weight, bias]
    grads = torch.autograd.grad(-1.7 * ours.loss, wanted)
    for grad, want in zip(grads, torch.autograd.grad(-1.7 * expected, wanted)):
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())
    assert not ours.logp[~mask].any() and not ours.entropy[~mask].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_packs_equal_the_two_calls(loss, tiles):
    hidden, weight, index, _ = inputs()
    tokens = index.numel()
    hidden, index = hidden.detach().reshape(tokens, -1).requires_grad_(), index.flatten()
    numbers = {name: x.flatten() for name, x in of_tokens().items()}
    mask = torch.rand(tokens) > 0.3
    numbers["offsets"] = torch.tensor([0, 1, 1, tokens - 2, tokens])
    ours = functional.linear_ppo_loss(hidden, weight, index, mask=mask, **numbers, **loss)
    expected, stats = composed(hidden, weight, index, mask=mask, head={}, **numbers, **loss)
    torch.testing.assert_close(ours.loss, expected, rtol=1e-5, atol=1e-6)
    for name, value in stats.items():
        torch.testing.assert_close(ours.stats[name], value, rtol=1e-5, atol=1e-6, equal_nan=True)
    wanted = [hidden, weight]
    grads = torch.autograd.grad(ours.loss, wanted)
    for grad, want in zip(grads, torch.autograd.grad(expected, wanted)):
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())


@pytest.mark.parametrize("offsets", [None, torch.tensor([0, 3, 3, 12])])
def test_numbers_for_rows(offsets):
    hidden, weight, index, _ = inputs()
    tokens = of_tokens()
    rows = SHAPE[:-1]
    if offsets is not None:
        hidden, index = hidden.detach().reshape(-1, hidden.shape[-1])[:12], index.flatten()[:12]
        hidden.requires_grad_()
        tokens, rows = {name: x.flatten()[:12] for name, x in tokens.items()}, (3,)
    of_rows = {"advantages": torch.randn(rows), "weights": torch.rand(rows)}
    given = {**tokens, **of_rows, "offsets": offsets}
    ours = functional.linear_ppo_loss(hidden, weight, index, **given)
    expected, _ = composed(hidden, weight, index, mask=None, head={}, **given)
    torch.testing.assert_close(ours.loss, expected, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(loss, [hidden, weight]) for loss in (ours.loss, expected)]
    for grad, want in zip(*grads):
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())
    with pytest.raises(TypeError, match="unexpected keyword argument 'advantages_per_row'"):
        functional.linear_ppo_loss(hidden, weight, index, **given, advantages_per_row=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(dtype, tiles):
    hidden, weight, index, bias = inputs(dtype)
    tokens = of_tokens()
    ours = functional.linear_ppo_loss(hidden, weight, index, bias=bias, **tokens)
    head = {"bias": bias}
    expected, _ = composed(hidden, weight, index, mask=None, head=head, **tokens)
    torch.testing.assert_close(ours.loss, expected, rtol=1e-3, atol=1e-3)
    wanted = [hidden, weight, bias]
    grads = torch.autograd.grad(ours.loss, wanted)
    for grad, want in zip(grads, torch.autograd.grad(expected, wanted)):
        assert grad.dtype == dtype
        error = (grad.float() - want.float()).norm() / want.float().norm()
        assert error < 2e-2


def test_an_adapter_and_frozen_weights(tiles):
    hidden, weight, index, _ = inputs(bias=False)
    weight = weight.detach()
    a, b = torch.randn(4, hidden.shape[-1]), torch.randn(VOCAB, 4)
    a, b = a.requires_grad_(), b.requires_grad_()
    tokens, head = of_tokens(), {"lora": (a, b, 0.3)}
    ours = functional.linear_ppo_loss(hidden, weight, index, **head, **tokens)
    expected, _ = composed(hidden, weight, index, mask=None, head=head, **tokens)
    grads = torch.autograd.grad(ours.loss, [hidden, a, b], retain_graph=True)
    again = torch.autograd.grad(ours.loss, [hidden, a, b])
    for grad, once_more, want in zip(
        grads, again, torch.autograd.grad(expected, [hidden, a, b]), strict=True
    ):
        assert torch.equal(grad, once_more)
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_without_a_gradient_only_the_loss_is_made(monkeypatch, tiles):
    hidden, weight, index, _ = inputs(bias=False)
    tokens = of_tokens()
    with torch.no_grad():
        monkeypatch.setattr(_linear.Gradients, "add", None)  # would be called
        ours = functional.linear_ppo_loss(hidden, weight, index, **tokens)
        expected, _ = composed(hidden, weight, index, mask=None, head={}, **tokens)
    torch.testing.assert_close(ours.loss, expected)
    assert not ours.loss.requires_grad


def test_advantages_of_rows_and_nan_under_the_mask(tiles):
    hidden, weight, index, _ = inputs(bias=False)
    tokens, mask = of_tokens(), torch.rand(SHAPE) > 0.4
    expected = functional.linear_ppo_loss(hidden, weight, index, mask=mask, **tokens)
    want = torch.autograd.grad(expected.loss, [hidden, weight])
    spoilt = {name: torch.where(mask, x, torch.nan) for name, x in tokens.items()}
    dirty = torch.where(mask[..., None], hidden, torch.nan)
    ours = functional.linear_ppo_loss(dirty, weight, index, mask=mask, **spoilt)
    assert torch.equal(ours.loss, expected.loss)
    assert torch.equal(torch.autograd.grad(ours.loss, [weight])[0], want[1])
    tokens["advantages"] = torch.randn(SHAPE[0])
    of_rows = functional.linear_ppo_loss(hidden, weight, index, mask=mask, **tokens)
    tokens["advantages"] = tokens["advantages"][:, None].expand(SHAPE)
    assert torch.equal(
        of_rows.loss, functional.linear_ppo_loss(hidden, weight, index, mask=mask, **tokens).loss
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_upstream_gradients_are_not_rounded(dtype):
    """Those of loss scaling are beyond float16, and others are no numbers of bfloat16."""
    hidden, weight, index, _ = inputs(dtype, bias=False)
    tokens = of_tokens()
    loss = functional.linear_ppo_loss(hidden, weight, index, **tokens).loss
    expected, _ = composed(hidden, weight, index, mask=None, head={}, **tokens)
    for upstream in (131072.0, 1 / 3):
        (grad,) = torch.autograd.grad(upstream * loss, hidden, retain_graph=True)
        (want,) = torch.autograd.grad(upstream * expected, hidden, retain_graph=True)
        if want.isfinite().all():
            error = (grad.float() - want.float()).norm() / want.float().norm()
            assert error < (1e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles(backend):
    torch._dynamo.reset()
    hidden, weight, index, _ = inputs(bias=False)
    tokens, mask = of_tokens(), torch.rand(SHAPE) > 0.4

    def step(hidden, weight):
        found = functional.linear_ppo_loss(
            hidden, weight, index, mask=mask, entropy_coef=0.1, **tokens
        )
        return found.loss, found.stats["tokens"]

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    (loss, count), (expected, _) = compiled(hidden, weight), step(hidden, weight)
    assert torch.equal(loss, expected) and count == mask.sum()
    grads = torch.autograd.grad(loss, [hidden, weight])
    for grad, want in zip(grads, torch.autograd.grad(expected, [hidden, weight])):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"old_logp": torch.zeros(2, 2)}, ValueError, "linear_ppo_loss: `old_logp` has shape"),
        ({"weights": torch.zeros(5)}, ValueError, "linear_ppo_loss: `weights` has shape"),
        ({"dual_clip": 0.5}, ValueError, "option `dual_clip`"),
        ({"kl_coef": 0.1}, ValueError, "option `kl_coef`"),
        ({"mask": torch.ones(2, 2)}, ValueError, "linear_ppo_loss: `mask` has shape"),
        ({"offsets": torch.tensor([0, 6])}, ValueError, "linear_ppo_loss: `index` has shape"),
        ({"old_logp": None}, ValueError, "linear_ppo_loss: `old_logp` is None"),
        ({"clip": 0.5}, TypeError, "unexpected keyword argument 'clip'"),
        ({"surrogate": "clop"}, ValueError, "`surrogate` is 'clop'"),
        ({"mask": torch.zeros(SHAPE)}, ValueError, "mask"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, said, device):
    hidden, weight, index, _ = inputs(bias=False)
    if device != "cpu":
        pytest.skip("on CUDA a mask is not looked at")
    tokens = of_tokens()
    tokens.pop("ref_logp")
    with pytest.raises(error, match=said):
        functional.linear_ppo_loss(hidden, weight, index, **{**tokens, **change})
