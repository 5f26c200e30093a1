"""The ops as PyTorch's own machinery sees them: opcheck, and torch.compile without graph breaks."""

import functools
import inspect
import shutil

import pytest
import torch

import ppo_kernels
from ppo_kernels import _lists, _ops, functional

ops = torch.ops.ppo_kernels


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def options_of_loss(**changed):
    """Those of ppo_loss in the order of its op."""
    parameters = inspect.signature(functional.ppo_loss).parameters
    kinds = _lists.PPO_LOSS.options.kinds
    # Which inputs are of rows is no parameter: the shapes say it.
    defaults = dict.fromkeys(_lists.PPO_LOSS_PER_ROW, False)
    defaults |= {name: parameters[name].default for name in kinds if name in parameters}
    return tuple((defaults | changed)[name] for name in kinds)


def samples():
    """Arguments for each op, those that can have a gradient with one."""
    index = torch.randint(33, (2, 5))
    several = torch.randint(33, (2, 5, 3))
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]], dtype=torch.bool)
    rows, more = torch.randn(2, 2, 5)
    whiten = (1e-8, "variance", True, True)
    kl = (20.0, 10.0, "k3")
    bounds = (-1.0, 2.0)
    gae = (
        1.0,
        0.95,
        None,
        0.05,
        0.0,
        None,
        *bounds,
        0.0,
        "carry",
        "last",
        "scale_then_clip",
        "keep",
    )
    yield ops.logprob, (leaf(2, 5, 33), index, 0.7, None)
    yield ops.logprob, (leaf(2, 5, 33, dtype=torch.bfloat16), index.int(), 1.0, -100)
    yield ops.logprob, (leaf(2, 5, 33), index, 0.7, int(index[0, 0]))
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
    linear, nothing = (leaf(2, 5, 8), leaf(33, 8), index, leaf(33)), (False,) * 4
    lora, none = (leaf(3, 8), leaf(33, 3)), (None,) * 3
    options = (0.7, None, 1.0, None, 1.0)
    yield ops.linear_logprob, (*linear, *none, True, True, True, True, *options)
    capped = (0.7, int(index[0, 0]), 0.5, 3.0, 2.0)
    yield ops.linear_logprob, (*linear, 1 + rows.abs(), *lora, *nothing, *capped)
    yield ops.linear_logprob, (*linear[:3], None, *none, *nothing, *options)
    _, entropy, stats, *_ = ops.linear_logprob(*linear, *none, True, *nothing[1:], *options)
    linear, lora, stats, entropy = (
        [x.detach() for x in many] for many in (linear, lora, [stats], [entropy])
    )
    given = (*linear, None, *lora, *stats, *entropy, rows, more)
    yield ops.linear_logprob_backward, (*given, True, True, True, True, True, *options)
    given = (*linear[:3], None, *none, *stats, None, rows, None)
    yield ops.linear_logprob_backward, (*given, True, *nothing, *options)
    yield ops.token_kl, (leaf(2, 5), leaf(2, 5), mask, *kl)
    yield ops.token_kl_backward, (rows, more, mask, rows, True, False, *kl)
    yield ops.full_kl, (leaf(2, 5, 33), leaf(2, 5, 33), mask, 0.7, 0.5, 0.1, "reverse")
    _, stats = ops.full_kl(torch.zeros(2, 5, 33), torch.ones(2, 5, 33), None, 1.0, 0.3, 0.1, "jsd")
    both = (torch.zeros(2, 5, 33), torch.ones(2, 5, 33))
    yield ops.full_kl_backward, (*both, None, stats, rows, False, True, 1.0, 0.3, 0.1, "jsd")
    none = (None,) * 5
    yield ops.gae, (rows, more, mask, None, rows[:, 0], *none, True, *gae)
    lengths = torch.tensor([0, 4, 4, 10])
    packed = (rows.flatten(), more.flatten(), mask.flatten(), None, rows[0, :3], *none[:3])
    yield ops.gae, (*packed, lengths, more[0, :3].sigmoid(), False, *gae)
    scores, groups = torch.randn(2), torch.tensor([7, -7])
    grpo = (1e-4, -1.0, 2.0, "batch", "batch", "zero", "std", True)
    none = none[:3]
    yield ops.outcome_advantages, (scores, groups, scores.abs(), scores, mask, None, 0, *grpo)
    yield ops.outcome_advantages, (scores, *none, None, None, 2, *grpo)
    given = (torch.randn(3), *none, mask.flatten(), lengths)
    yield ops.outcome_advantages, (*given, 3, *grpo)
    given = (rows, more, more.abs(), groups, None, mask, None, 0, 1e-8, "unmasked", False)
    yield ops.optimal_token_baseline, given
    given = (rows.flatten(), more.flatten(), more.flatten(), None, rows.flatten(), None, lengths)
    yield ops.optimal_token_baseline, (*given, 3, 1e-8, "column", True)
    of_rules = ("zero", True, "ratio", "token", "k3", "sequence_mean")
    bounds = (20.0, 0.5, 2.0, 0.4, None, None, 1.5, "sequence_sum")
    yield ops.correction, (rows, more, mask, None, *bounds, *of_rules)
    packed = (rows.flatten(), more.flatten(), None, lengths)
    yield ops.correction, (*packed, *bounds, *of_rules)
    plain = ("truncate", False, "none", "token", "none", "token")
    yield ops.correction, (rows, more, None, None, None, None, 2.0, *(None,) * 4, "token", *plain)
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
        old_logp,
        torch.rand(2, 5),
    )
    terms = options_of_loss(clip_range=0.1, dual_clip=3.0, entropy_coef=0.01, kl_coef=0.1)
    yield ops.ppo_loss, (*tensors, mask, None, True, True, True, *terms)
    nothing_else = (None,) * 9
    only = (leaf(2, 5), old_logp, advantages, *nothing_else, True, False, False)
    yield ops.ppo_loss, (*only, *options_of_loss(**ppo_kernels.named_loss("gspo")))
    of_rows = (*tensors[:2], torch.randn(2), *tensors[3:9], torch.rand(2), mask, None)
    per_row = options_of_loss(advantages_per_row=True, weights_per_row=True, row_extremes=True)
    yield ops.ppo_loss, (*of_rows, True, True, True, *per_row)
    packed = [x.detach().flatten().requires_grad_(x.requires_grad) for x in tensors]
    given = (*packed, mask.flatten(), lengths, True, True, True)
    yield ops.ppo_loss, (*given, *options_of_loss(**ppo_kernels.named_loss("gspo")))
    weights, *others = leaf(33, 8), None, None, None, None
    head = (leaf(2, 5, 8), weights, index, *others)
    tokens = (old_logp, advantages, ref_logp, None, torch.rand(2, 5), None, None)
    wants = (True, True, False, False, False)
    yield ops.linear_ppo_loss, (*head, *tokens, *wants, 0.7, None, 1.0, None, 1.0, *terms)
    dpo = (
        0.1,
        0.05,
        0.1,
        0.0,
        0.05,
        0.5,
        None,
        1.0,
        1.0,
        0.2,
        None,
        30.0,
        "sigmoid",
        "alpha",
        False,
    )
    kto = (*dpo[:1], 0.0, 0.0, *dpo[3:9], 0.0, None, None, "kto", "reverse_kl", True)
    four, labels = torch.randn(4, 5), torch.tensor([True, False, False, True])
    of_rows = (rows[0, :4].exp() * 9).long()
    given = (
        leaf(4, 5),
        four,
        None,
        mask.repeat(2, 1),
        None,
        None,
        more[0, :2].exp(),
        *none[:2],
        None,
    )
    yield ops.preference_loss, (*given, True, *dpo)
    ends = torch.tensor([0, 3, 3, 15, 20])
    packed = (leaf(20), four.flatten(), None, mask.repeat(2, 1).flatten(), *given[4:-1], ends)
    yield ops.preference_loss, (*packed, True, *dpo)
    given = (
        leaf(4, 1),
        None,
        four[:, 0],
        None,
        of_rows,
        labels,
        None,
        None,
        rows[0, :1].exp(),
        None,
    )
    yield ops.preference_loss, (*given, True, *kto)
    yield ops.preference_loss, (four[:, :1], *given[1:], False, *kto)
    yield ops.reward_model_loss, (leaf(2, 3), more[0, :3], None, True, 0.01, None)
    yield ops.ppo_loss_backward, (torch.tensor(2.0), rows, torch.empty(0), more)


def with_numbers_that_move(op, arguments):
    """The form of the op that takes them from a tensor, and its arguments."""
    moving = _ops._moving[op.default]
    given = [torch.tensor(x) if isinstance(x, float) else x for x in arguments]
    return moving.form.overloadpacket, moving.arguments(given)


SAMPLES = list(samples())
SAMPLES += [
    with_numbers_that_move(*sample) for sample in SAMPLES if sample[0].default in _ops._moving
]


@pytest.mark.parametrize(("op", "arguments"), SAMPLES, ids=[str(op) for op, _ in SAMPLES])
def test_opcheck(op, arguments, monkeypatch):
    # It takes NaN, which statistics are that are not defined, for a difference.
    same = functools.partial(torch.testing.assert_close, equal_nan=True)
    monkeypatch.setattr(torch.testing, "assert_close", same)
    torch.library.opcheck(op, arguments)


def test_every_op_is_checked():
    defined = {
        name.removeprefix("ppo_kernels::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("ppo_kernels::")
    }
    assert defined == {op._qualified_op_name.removeprefix("ppo_kernels::") for op, _ in SAMPLES}


ICEPOP = ppo_kernels.named_correction("icepop")


def step(logits, ref_logits, index, values, old_logp, rewards, mask):
    """Every function once: what is between the logits and the loss."""
    logp, entropy = functional.logprobs_and_entropy(logits, index, 0.9)
    ref_logp = functional.selective_log_softmax(ref_logits, index, row_mask=mask)
    top = functional.selective_log_softmax(logits, torch.stack([index, index * 0], -1))
    kl = functional.token_kl(logp, ref_logp, mask, estimator="k3")
    head = functional.linear_logprobs(
        logits[..., :8], values.new_ones(50, 8), index, outputs=["entropy"]
    )
    entropy = entropy + head.logp + head.entropy
    exact = functional.full_kl(logits, ref_logits, mask)
    out = functional.gae(values, rewards, mask, kl=kl, whiten=True)
    scores, ids = rewards[:, 0], index[:, 0] % 2
    by_ids, by_rank = (
        functional.outcome_advantages(scores, ids, mask, baseline="length_weighted"),
        functional.outcome_advantages(scores, group_size=1, singleton="keep"),
    )
    sums = functional.gdpo_advantages(rewards.T, [0.5] * 7, ids, mask, over="tokens")
    more = by_ids.advantages + sums + by_ids.stats["score_mean"] + by_rank.advantages[:, None]
    more = more + functional.optimal_token_baseline(rewards, logp, logp, ids, mask).advantages
    out = out._replace(advantages=out.advantages + more)
    icepop = functional.correction(old_logp, rewards, mask, **ICEPOP)
    loss, stats = functional.ppo_loss(
        logp,
        old_logp,
        out.advantages,
        icepop.kept & mask,
        weights=icepop.weights + icepop.stats["ess"].float(),
        values=values,
        old_values=values.detach(),
        returns=out.returns,
        entropy=entropy,
        entropy_coef=0.01,
    )
    pairs = functional.preference_loss(logp.repeat(2, 1), ref_logp.repeat(2, 1), mask.repeat(2, 1))
    model_loss, _ = functional.reward_model_loss(logp[:, 0], logp[:, 1])
    loss = loss + pairs.loss + model_loss
    whitened = functional.masked_whiten(logp, mask)
    return loss + exact.mean() + kl.mean() + (whitened**3).mean() + top.mean(), stats[
        "clip_fraction"
    ]


BACKENDS = ["eager", "aot_eager"] + (["inductor"] if shutil.which("g++") else [])


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


def step_of_numbers(logits, ref_logits, index, mask, number, other):
    """Every option that is a number of every function, as it comes and derived."""
    tensors = logits.detach().flatten(1)[:, :7]
    logp, entropy = functional.logprobs_and_entropy(logits, index, number)
    ref_logp = functional.selective_log_softmax(ref_logits, index, number + 0.1)
    top = functional.selective_log_softmax(logits, torch.stack([index, index * 0], -1), other)
    kl = functional.token_kl(logp, ref_logp, mask, log_ratio_clamp=other, output_clamp=number)
    head = (logits[..., :8], logits.new_ones(50, 8), index, None, number)
    logp = logp + functional.linear_logprobs(*head, logit_scale=other, softcap=number).logp
    exact = functional.full_kl(logits, ref_logits, mask, temperature=other * number)
    out = functional.gae(
        tensors,
        ref_logp,
        mask,
        gamma=other / 4,
        lam=number / 2,
        value_lam=number / 4,
        kl=kl,
        kl_coef=number,
        scores=tensors[:, 0],
        score_mean=other,
        score_std=number,
        score_min=-other,
        score_max=number * 2,
        has_eos=mask[:, 0],
        missing_eos="subtract",
        missing_eos_value=number,
    )
    numbers = {"eps": number, "score_min": -other, "score_max": number * 2}
    more = functional.outcome_advantages(tensors[:, 0], None, mask, group_size=2, **numbers)
    out = out._replace(advantages=out.advantages + more.advantages)
    weights, *_ = functional.correction(
        tensors,
        ref_logp.detach(),
        mask,
        log_ratio_clamp=number,
        low=number / 10,
        high=other * 5,
        rejection_metric="k2",
        rejection_high=other * 20,
        second_rejection_metric="ratio",
        second_rejection_level="sequence_mean",
        second_rejection_low=number / 1000,
        second_rejection_high=other * 1000,
    )
    loss, stats = functional.ppo_loss(
        logp,
        ref_logp,
        out.advantages,
        mask,
        weights=weights,
        values=entropy,
        old_values=entropy,
        returns=out.returns,
        entropy=entropy,
        ref_logp=ref_logp,
        clip_range=number / 10,
        clip_range_high=number / 5,
        dual_clip=other + 1,
        log_ratio_clamp=number,
        value_clip_range=number / 3,
        value_coef=other,
        entropy_coef=number,
        kl_coef=other * number,
        kl_log_ratio_clamp=number,
        kl_output_clamp=other,
        aggregation="constant",
        aggregation_divisor=other + number,
    )
    other_loss, _ = functional.ppo_loss(logp, ref_logp, out.advantages, denominator=number * 3)
    preference = functional.preference_loss(
        logp.repeat(2, 1),
        ref_logp.repeat(2, 1) * other,
        loss="sigmoid",
        beta=number,
        label_smoothing=number / 10,
        gamma=other,
        discopop_tau=number,
        f_divergence="alpha",
        f_alpha=other / 4,
        ld_alpha=other / 4,
        sft_coef=number,
        denominator=other + number,
        sft_denominator=other,
    )
    alphapo = functional.preference_loss(logp.repeat(2, 1), loss="alphapo", alpha=number)
    labels = {"labels": mask[:, 0], "desirable_weight": number, "undesirable_weight": other}
    kto = functional.preference_loss(logp, ref_logp, loss="kto", kl=0.5, **labels)
    model_loss, _ = functional.reward_model_loss(
        logp[:, 0], logp[:, 1], center_coef=number, denominator=other
    )
    loss = loss + preference.loss + alphapo.loss + kto.loss + model_loss
    whitened = functional.masked_whiten(logp, mask, eps=number)
    moments = functional.masked_moments(entropy, mask)
    again = functional.masked_whiten(entropy, mask, eps=other, moments=moments)
    terms = [loss, other_loss, top.mean(), exact.mean(), (whitened**3).mean(), (again**3).mean()]
    return torch.stack(terms), stats


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_options_that_move_compile_twice(backend, kind):
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(step_of_numbers, fullgraph=True, backend=counting)
    logits, ref_logits = leaf(2, 7, 50), torch.randn(2, 7, 50)
    arguments = (logits, ref_logits, torch.randint(50, (2, 7)), torch.rand(2, 7) > 0.3)
    for call in range(12):
        numbers = (kind(0.8 + call / 10), kind(1.9 - call / 20))
        ours, stats = compiled(*arguments, *numbers)
        expected, expected_stats = step_of_numbers(*arguments, *numbers)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(stats, expected_stats, equal_nan=True)
        (found,) = torch.autograd.grad(ours.sum(), logits)
        (want,) = torch.autograd.grad(expected.sum(), logits)
        torch.testing.assert_close(found, want)
    assert len(graphs) <= 2


def test_whole_numbers_that_move():
    torch._dynamo.reset()
    compiled = torch.compile(functional.ppo_loss, fullgraph=True, backend="aot_eager")
    tensors = torch.randn(3, 2, 7)
    for tokens in range(3, 15):
        ours, expected = (
            f(*tensors, denominator=tokens)[0] for f in (compiled, functional.ppo_loss)
        )
        torch.testing.assert_close(ours, expected)


def test_a_tensor_as_a_number():
    tensors = torch.randn(3, 2, 7)
    loss, _ = functional.ppo_loss(*tensors, denominator=torch.tensor(5))
    assert torch.equal(loss, functional.ppo_loss(*tensors, denominator=5.0)[0])
    for compiled in (False, True):
        torch._dynamo.reset()
        f = torch.compile(functional.ppo_loss, backend="eager") if compiled else functional.ppo_loss
        with pytest.raises(
            Exception, match=r"ppo_loss: option `kl_coef` is a tensor of shape \[2\]"
        ):
            f(*tensors, kl_coef=torch.ones(2))
        with pytest.raises(
            Exception, match="ppo_loss: option `kl_coef` is a tensor on device meta"
        ):
            f(*tensors, kl_coef=torch.ones((), device="meta"))


def test_what_has_no_gradient_says_so():
    values = leaf(2, 7)
    moments = ops.masked_moments(values, None)
    with pytest.raises(RuntimeError, match="masked_moments has no gradient"):
        moments.sum().backward()
