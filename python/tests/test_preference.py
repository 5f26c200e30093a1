"""Preference losses: values and gradients against plain PyTorch in float64 and against what TRL
gave, what the docs promise of arguments, and what is refused."""

import inspect
import re

import formulas
import numpy as np
import pytest
import torch
from test_golden import cases, close, f32

import ppo_kernels.numpy
from ppo_kernels import _lib, functional, preference_loss, reward_model_loss

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def responses(rows=6, seq_len=40, device="cpu"):
    logp = (-2 * torch.rand(rows, seq_len, device=device)).requires_grad_()
    ref_logp = logp.detach() + 0.3 * torch.randn(rows, seq_len, device=device)
    ends = torch.randint(1, seq_len, (rows, 1), device=device)
    return logp, ref_logp, torch.arange(seq_len, device=device) < ends


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "nca_pair", "sppo_hard", "apo_zero"])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64])
def test_values_and_gradients(loss, mask_dtype, device):
    logp, ref_logp, mask = responses(device=device)
    exact = logp.detach().double().requires_grad_()
    reference = ref_logp.double()
    smoothing = 0.1 if loss == "sigmoid" else 0.0
    options = {"loss": loss, "beta": 0.3, "label_smoothing": smoothing}
    expected = formulas.preference_loss(exact, reference, mask, **options)
    (want,) = torch.autograd.grad(3 * expected, exact)
    sums = torch.where(mask, ref_logp, 0.0).sum(-1)
    for given in (ref_logp, sums):
        found = preference_loss(logp, given, mask.to(mask_dtype), **options)
        torch.testing.assert_close(found.loss.double(), expected, **EXACT)
        (grad,) = torch.autograd.grad(3 * found.loss, logp)
        torch.testing.assert_close(grad.double(), want, **EXACT)
        rewards = 0.3 * (torch.where(mask, exact - reference, 0.0).sum(-1))
        torch.testing.assert_close(found.rewards.double(), rewards.detach(), **EXACT)
        assert found.loss == found.stats["loss"] and found.stats["chosen"] == 3
        torch.testing.assert_close(found.losses.mean(), found.loss.detach())
        accuracy = (found.rewards[:3] > found.rewards[3:]).float().mean()
        assert found.stats["accuracy"] == accuracy
        assert not found.rewards.requires_grad and not found.losses.requires_grad


def test_sums_are_responses_of_one_token(device):
    logp, ref_logp, mask = responses(device=device)
    sums = torch.where(mask, logp, 0.0).sum(-1).detach().requires_grad_()
    of_reference = torch.where(mask, ref_logp, 0.0).sum(-1)
    from_tokens = preference_loss(logp, ref_logp, mask)
    from_sums = preference_loss(sums, of_reference)
    torch.testing.assert_close(from_sums.loss, from_tokens.loss)
    (found,) = torch.autograd.grad(from_sums.loss, sums)
    (want,) = torch.autograd.grad(from_tokens.loss, logp)
    torch.testing.assert_close(found, want.amin(-1) + want.amax(-1))
    lengths = mask.sum(-1)
    averaged = preference_loss(sums, of_reference, average_log_prob=True, lengths=lengths)
    of_tokens = preference_loss(logp, ref_logp, mask, average_log_prob=True)
    torch.testing.assert_close(averaged.loss, of_tokens.loss)
    chosen_and_rejected = torch.cat(sums.chunk(2))
    assert torch.equal(preference_loss(chosen_and_rejected, of_reference).loss, from_sums.loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_converted(dtype, device):
    logp, ref_logp, mask = responses(device=device)
    half = logp.detach().to(dtype).requires_grad_()
    found = preference_loss(half, ref_logp.to(dtype), mask)
    want = preference_loss(half.detach().float(), ref_logp.to(dtype).float(), mask)
    assert torch.equal(found.loss, want.loss)
    found.loss.backward()
    assert half.grad.dtype == dtype


def test_what_is_masked_or_of_weight_zero_may_hold_nan(device):
    logp, ref_logp, mask = responses(device=device)
    weights = torch.tensor([1.0, 0.0, 2.0], device=device)
    want = preference_loss(logp, ref_logp, mask, weights=weights)
    holes = logp.detach().masked_fill(~mask, torch.nan)
    holes[1] = torch.nan
    holes.requires_grad_()
    found = preference_loss(holes, ref_logp.masked_fill(~mask, torch.nan), mask, weights=weights)
    assert torch.equal(found.loss, want.loss) and found.stats["chosen"] == 2
    found.loss.backward()
    assert (holes.grad[~mask] == 0).all() and (holes.grad[[1, 4]] == 0).all()


@pytest.mark.parametrize("label_dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_kto(label_dtype, device):
    logp, ref_logp, mask = responses(7, device=device)
    desirable = torch.tensor([1, 0, 0, 1, 1, 0, 1], device=device)
    exact = logp.detach().double().requires_grad_()
    x = torch.where(mask, exact - ref_logp, 0.0).sum(-1)
    gains = 1 - torch.sigmoid(0.1 * (x - 0.5)), 1.5 * (1 - torch.sigmoid(0.1 * (0.5 - x)))
    expected = torch.where(desirable == 1, *gains).mean()
    for kl in (0.5, torch.tensor(0.5, device=device)):
        labels = desirable.to(label_dtype)
        options = {"labels": labels, "kl": kl, "undesirable_weight": 1.5}
        found = preference_loss(logp, ref_logp, mask, loss="kto", **options)
        torch.testing.assert_close(found.loss.double(), expected, **EXACT)
        (grad,) = torch.autograd.grad(found.loss, logp)
        (want,) = torch.autograd.grad(expected, exact, retain_graph=True)
        torch.testing.assert_close(grad.double(), want, **EXACT)
        assert found.stats["chosen"] == 4 and found.stats["accuracy"].isnan()


def test_reward_model(device):
    chosen, rejected, margin = torch.randn(3, 9, device=device)
    chosen.requires_grad_(), rejected.requires_grad_()
    loss, stats = reward_model_loss(chosen, rejected, margin, center_coef=0.01)
    a, b = (x.detach().double().requires_grad_() for x in (chosen, rejected))
    terms = -torch.nn.functional.logsigmoid(a - b - margin) + 0.01 * (a + b) ** 2
    expected = terms.mean()
    torch.testing.assert_close(loss.double(), expected, **EXACT)
    loss.backward(), expected.backward()
    torch.testing.assert_close(chosen.grad.double(), a.grad, **EXACT)
    torch.testing.assert_close(rejected.grad.double(), b.grad, **EXACT)
    assert stats["accuracy"] == (chosen > rejected).float().mean()
    plain, _ = reward_model_loss(chosen, rejected, margin, weights=torch.ones(9, device=device))
    assert plain < loss


def test_the_gradient_may_be_asked_for_twice(device):
    logp, ref_logp, mask = responses(device=device)
    loss = preference_loss(logp, ref_logp, mask).loss
    first = torch.autograd.grad(loss, logp, retain_graph=True)[0].clone()
    (second,) = torch.autograd.grad(loss, logp, torch.tensor(2.0, device=device))
    assert torch.equal(second, 2 * first)


# --- what TRL gave ---

TRL = "trl.trainer.dpo_trainer.DPOTrainer._compute_loss"
NAMES = {
    "forward_kl": "forward_kl",
    "js_divergence": "jensen_shannon",
    "alpha_divergence": "alpha",
    "reverse_kl": "reverse_kl",
}


@pytest.mark.parametrize(("inputs", "outputs"), cases("preference", TRL))
def test_trl(inputs, outputs):
    (loss, *others), weighting = inputs["loss_types"], inputs["use_weighting"]
    if others or weighting or loss == "sft":
        pytest.skip("of several terms, which are the caller's to add")
    logp = f32(inputs["per_token_logps"]).requires_grad_()
    mask = f32(inputs["completion_mask"])[:, 1:] > 0
    ref_logp = f32(inputs["ref_chosen_logps"] + inputs["ref_rejected_logps"])
    smoothed = loss in ("robust", "exo_pair", "aot", "aot_unpaired")
    found = preference_loss(
        logp,
        ref_logp,
        mask,
        loss=loss,
        beta=inputs["beta"],
        label_smoothing=inputs["label_smoothing"] if smoothed else 0.0,
        average_log_prob=loss == "ipo",
        f_divergence=NAMES[inputs["f_divergence_type"]],
        f_alpha=inputs["f_alpha_divergence_coef"],
        ld_alpha=inputs["ld_alpha"],
    )
    close(found.loss, outputs["loss"])
    found.loss.backward()
    close(logp.grad, outputs["grad_per_token_logps"], mask)


# --- NumPy ---


def test_numpy():
    logp, ref_logp, mask = responses()
    weights, margin = torch.rand(3) + 0.5, torch.randn(3)
    arrays = [x.detach().numpy() for x in (logp, ref_logp, mask)]
    options = {"beta": 0.2, "gamma": 0.1, "ld_alpha": 0.5, "sft_coef": 0.3}
    ours = ppo_kernels.numpy.preference_loss(
        *arrays, weights=weights.numpy(), margin=margin.tolist(), **options
    )
    found = preference_loss(logp, ref_logp, mask, weights=weights, margin=margin, **options)
    found.loss.backward()
    assert np.float32(ours.loss) == found.loss.item()
    np.testing.assert_array_equal(ours.losses, found.losses.numpy())
    np.testing.assert_array_equal(ours.rewards, found.rewards.numpy())
    np.testing.assert_array_equal(ours.grad_logp, logp.grad.numpy())
    for name, value in found.stats.items():
        np.testing.assert_equal(np.float32(ours.stats[name]), np.float32(value.item()))

    sums, labels = logp.detach().sum(-1).numpy(), [1, 0, 1, 1, 0, 0]
    ours = ppo_kernels.numpy.preference_loss(
        sums, sums - 1, loss="kto", labels=labels, kl=0.2, lengths=[4] * 6, average_log_prob=True
    )
    tensor = torch.from_numpy(sums)
    lengths = torch.full((6,), 4)
    options = {"labels": torch.tensor(labels), "kl": 0.2, "lengths": lengths}
    found = preference_loss(tensor, tensor - 1, loss="kto", average_log_prob=True, **options)
    assert np.float32(ours.loss) == found.loss.item() and ours.grad_logp.shape == (6,)

    chosen, rejected = np.random.randn(2, 5)
    loss, stats, gradients = ppo_kernels.numpy.reward_model_loss(chosen, rejected, center_coef=0.1)
    leaves = [torch.from_numpy(x).float().requires_grad_() for x in (chosen, rejected)]
    expected, tensors = reward_model_loss(*leaves, center_coef=0.1)
    expected.backward()
    assert np.float32(loss) == expected.item()
    assert np.float32(stats["accuracy"]) == tensors["accuracy"].item()
    for name, leaf in zip(("chosen", "rejected"), leaves):
        np.testing.assert_array_equal(gradients[name], leaf.grad.numpy())


# --- what is refused ---

logp, one = torch.randn(4, 3), torch.zeros(4)

REFUSED = [
    ((logp[:3],), {}, "3 rows, expected an even number"),
    ((logp[None],), {}, "`logp` has shape \\[1, 4, 3\\], expected \\[rows\\] or"),
    ((logp.double(),), {}, "preference_loss: `logp` has dtype float64, expected float32"),
    ((logp, logp[:2]), {}, "`ref_logp` has shape \\[2, 3\\], expected \\[4, 3\\]"),
    ((logp, one[:3]), {}, "`ref_sums` has shape \\[3\\], expected \\[4\\]"),
    ((logp, None, one), {}, "`mask` has shape \\[4\\], expected \\[4, 3\\]"),
    ((logp,), {"weights": one}, "`weights` has shape \\[4\\], expected \\[2\\]"),
    ((logp,), {"lengths": one[:1].long()}, "`lengths` has shape \\[1\\], expected \\[4\\]"),
    ((logp,), {"lengths": one.long() - 1}, "`lengths`\\[0\\] is -1, expected 0 or more"),
    ((logp,), {"loss": "dpo"}, "`loss` is 'dpo', expected one of 'sigmoid'"),
    ((logp,), {"beta": 0.0}, "`beta` is 0.0, expected above 0"),
    ((logp,), {"label_smoothing": 0.6}, "label_smoothing"),
    ((logp,), {"loss": "robust", "label_smoothing": 0.5}, "below 0.5 for this loss"),
    ((logp,), {"loss": "exo_pair"}, "above 0 and up to 0.5 for this loss"),
    ((logp,), {"loss": "hinge", "label_smoothing": 0.1}, "0 for this loss"),
    ((logp, logp), {"loss": "simpo"}, "`ref_logp` is given, expected none: this loss has no"),
    ((logp, one), {"loss": "cpo"}, "`ref_sums` is given, expected none: this loss has no"),
    ((logp,), {"loss": "orpo", "gamma": 1.0}, "gamma"),
    ((logp,), {"loss": "aot", "weights": one[:2]}, "`weights` is given"),
    ((logp,), {"loss": "nca_pair", "f_divergence": "forward_kl"}, "f_divergence"),
    ((logp,), {"loss": "kto"}, "`labels` is missing"),
    ((logp,), {"labels": one > 0}, "`labels` is given, expected none for a loss of pairs"),
    ((logp,), {"loss": "kto", "labels": one + 2}, "`labels`\\[0\\] is 2, expected 0 or 1"),
    ((logp,), {"loss": "kto", "labels": one - 1}, "`labels`\\[0\\] is 2, expected 0 or 1"),
    ((logp,), {"weights": one[:2]}, "`weights` keeps 0"),
]


@pytest.mark.parametrize(("arguments", "options", "message"), REFUSED)
def test_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(*arguments, **options)
    if "dtype" in message:
        return  # arrays are converted
    arrays = [None if x is None else x.numpy() for x in arguments]
    options = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        ppo_kernels.numpy.preference_loss(*arrays, **options)


def test_rewards_that_are_refused():
    for function in (reward_model_loss, ppo_kernels.numpy.reward_model_loss):
        wrap = (lambda x: x) if function is reward_model_loss else torch.Tensor.numpy
        with pytest.raises(ValueError, match="`rejected` has shape \\[3\\], expected \\[4\\]"):
            function(wrap(one), wrap(one[:3]))
        with pytest.raises(ValueError, match="`chosen` has shape \\[4, 3\\], expected \\[pairs\\]"):
            function(wrap(logp), wrap(logp))
        with pytest.raises(ValueError, match="`margin` has shape \\[3\\], expected \\[4\\]"):
            function(wrap(one), wrap(one), wrap(one[:3]))
        with pytest.raises(ValueError, match="center_coef"):
            function(wrap(one), wrap(one), center_coef=-1.0)


def test_statistics_are_documented():
    """In the order of the header's struct."""
    text = inspect.getsource(functional.PreferenceOutput).split("stats: dict[str, Tensor]")[1]
    assert re.findall(r"``(\w+)``", text) == [*_lib.PREFERENCE_STATS]
