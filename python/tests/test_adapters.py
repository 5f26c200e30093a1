"""The adapters: ours in the place of the peers' functions give what those give."""

import importlib.util
import types

import numpy
import peers
import pytest
import torch

from ppo_kernels import adapters

TOLERANCE = {torch.float32: (1e-5, 2e-5), torch.bfloat16: (1.6e-2, 3e-2)}
DTYPES = list(TOLERANCE)


def load(name):
    return peers.find(name) or pytest.skip(f"{name.split('.')[0]} is not installed")


def compare(patch, call, *tensors, keep=None, equal_nan=False):
    """Results and gradients of ``call(*tensors)``, as the peer has it and with the patch. The first
    tensor gets the gradient; ``keep`` masks what counts of a result of its shape."""
    rtol, atol = TOLERANCE[tensors[0].dtype]

    def run():
        leaf = tensors[0].clone().requires_grad_()
        results = call(leaf, *(tensor.clone() for tensor in tensors[1:]))
        results = results if isinstance(results, tuple) else (results,)
        differentiable = [r for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
        upstream = [
            torch.sin(torch.arange(r.numel()) + 1.0).view(r.shape).to(r.dtype)
            for r in differentiable
        ]
        grads = torch.autograd.grad(differentiable, leaf, upstream) if differentiable else ()
        return results, grads

    expected, expected_grads = run()
    with patch():
        ours, grads = run()
    for a, b in zip((*ours, *grads), (*expected, *expected_grads), strict=True):
        if isinstance(b, torch.Tensor):
            if keep is not None and b.shape == keep.shape:
                a, b = a[keep], b[keep]
            close = {"rtol": rtol, "atol": atol, "equal_nan": equal_nan}
            torch.testing.assert_close(a.float(), b.float(), **close)
        elif isinstance(b, dict):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
        else:
            assert a == b
    assert len(grads) == len(expected_grads)


def per_token(count):
    return torch.randn(count, 4, 21).unbind()


def response_mask(dtype=torch.int64):
    mask = torch.rand(4, 21) > 0.3
    mask[:, 0], mask[3] = True, False
    return mask.to(dtype)


# --- TRL ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("scale", "softcap", "temperature"), [(1.0, None, 1.0), (0.5, None, 0.7), (0.5, 4.0, 0.7)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_head_of_trl(dtype, scale, softcap, temperature, bias):
    kernels = load("trl.kernels.chunked_logprob")
    hidden, targets = torch.randn(10, 8).to(dtype), torch.randint(40, (10,))
    weight, offset = torch.randn(40, 8).to(dtype) / 2, torch.randn(40).to(dtype)
    for outputs in (kernels.OPTIONAL_OUTPUTS, ("log_probs", "entropy"), ()):
        for place in range(3 if bias else 2):

            def call(leaf, *others, outputs=outputs, place=place):
                head = list(others)
                head.insert(place, leaf)
                head = head if bias else [*head, None]
                options = (temperature, 16, softcap, scale, outputs)
                return kernels.ChunkedLogProbFunction.apply(*head, targets, *options)

            tensors = [hidden, weight, offset][: 3 if bias else 2]
            leaf = tensors.pop(place)
            compare(adapters.patch_trl, call, leaf, *tensors)


def test_trl_has_its_own_head_for_what_is_not_ours():
    """And where it was imported by another name, ours."""
    kernels, utils = load("trl.kernels.chunked_logprob"), load("trl.trainer.utils")
    theirs = kernels.ChunkedLogProbFunction
    hidden, weight = torch.randn(3, 4).double(), torch.randn(9, 4).double().requires_grad_()
    with adapters.patch_trl():
        assert utils._ChunkedLogProbFunction is kernels.ChunkedLogProbFunction is not theirs
        given = (hidden, weight, None, torch.zeros(3, dtype=torch.int64), 1.0, 4)
        logp, *_ = kernels.ChunkedLogProbFunction.apply(*given)
        assert type(logp.grad_fn).__name__.startswith(theirs.__name__)
        given = (hidden.float(), weight.float(), *given[2:])
        # What is sharded when the backward pass comes is their function's to gather.
        given[1].ds_id = 0
        logp, *_ = kernels.ChunkedLogProbFunction.apply(*given)
        assert type(logp.grad_fn).__name__.startswith(theirs.__name__)
        del given[1].ds_id
        assert "linear_logprob" in kernels.ChunkedLogProbFunction.apply(*given)[0].grad_fn.name()
    assert utils._ChunkedLogProbFunction is kernels.ChunkedLogProbFunction is theirs


@pytest.mark.parametrize("dtype", DTYPES)
def test_trl(dtype):
    utils = load("trl.trainer.utils")
    logits, index = torch.randn(2, 5, 40).to(dtype), torch.randint(40, (2, 5))
    several = torch.randint(40, (2, 5, 3))

    def both(function, *arguments, **options):
        compare(
            adapters.patch_trl, lambda x: getattr(utils, function)(x, *arguments, **options), logits
        )

    both("selective_log_softmax", index)
    both("selective_log_softmax", several)
    both("entropy_from_logits")
    if not hasattr(utils, "selective_log_softmax_and_entropy"):
        return
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 1]])
    both("selective_log_softmax", index, temperature=0.7, row_mask=mask)
    both("selective_log_softmax", several, temperature=0.7)
    both("selective_log_softmax_and_entropy", index, temperature=0.7, row_mask=mask)
    both("selective_log_softmax_and_entropy", index, entropy_requires_grad=False)


def test_trl_has_its_kernels():
    """The stand-in for transformers lets TRL use Triton where that is installed."""
    utils = load("trl.trainer.utils")
    if not hasattr(utils, "selective_log_softmax_and_entropy"):
        pytest.skip("a version without kernels")
    installed = importlib.util.find_spec("triton") is not None
    assert utils.is_triton_available() == installed == hasattr(utils, "_fused_logprob_entropy")
    on_cuda = types.SimpleNamespace(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        ndim=3,
        shape=(2, 3, 8),
        stride=lambda _: 1,
    )
    index = types.SimpleNamespace(device=on_cuda.device, dtype=torch.int64, shape=(2, 3))
    assert utils._supports_trl_loss_kernel(on_cuda, index)


def test_trl_is_used_and_undone():
    utils = load("trl.trainer.utils")
    original = utils.selective_log_softmax
    user = types.ModuleType("trl.trainer.user")
    user.selective_log_softmax = original  # as `from .utils import selective_log_softmax` does
    late = types.ModuleType("trl.trainer.late")
    try:
        importlib.sys.modules.update({user.__name__: user, late.__name__: late})
        patch = adapters.patch_trl()
        assert user.selective_log_softmax is utils.selective_log_softmax is not original
        late.selective_log_softmax = utils.selective_log_softmax
        assert utils.selective_log_softmax.__name__ == "selective_log_softmax"
        logits, index = torch.randn(2, 5, 40), torch.randint(40, (2, 5))
        assert "ppo_kernels" not in str(original(logits.requires_grad_(), index).grad_fn)
        assert "ppo_kernels" in str(user.selective_log_softmax(logits, index).grad_fn)
        doubles = utils.selective_log_softmax(logits.double(), index)
        assert doubles.dtype == torch.float64  # theirs
        patch.undo()
        patch.undo()
        assert all(m.selective_log_softmax is original for m in (user, late, utils))
    finally:
        for module in (user, late):
            del importlib.sys.modules[module.__name__]


@pytest.mark.parametrize("first", [0, 1])
def test_two_patches_undone_in_either_order(first):
    utils = load("trl.trainer.utils")
    original = utils.selective_log_softmax
    patches = [adapters.patch_trl(), adapters.patch_trl()]
    replaced = utils.selective_log_softmax
    assert replaced.__wrapped__ is original
    patches[first].undo()
    assert utils.selective_log_softmax is replaced
    patches[1 - first].undo()
    assert utils.selective_log_softmax is original


class Other(torch.Tensor):
    """Stands for tensors that are not plain ones."""


def test_what_is_not_ours_is_theirs():
    utils = load("trl.trainer.utils")
    logits, index = torch.randn(2, 5, 40), torch.randint(40, (2, 5))
    nested = torch.nested.nested_tensor([torch.randn(3, 40), torch.randn(5, 40)])
    with adapters.patch_trl():
        assert type(utils.selective_log_softmax(logits.as_subclass(Other), index)) is Other
        assert type(utils.entropy_from_logits(logits.as_subclass(Other))) is Other
        with pytest.raises(RuntimeError, match="nested|Nested"):  # by torch, in their function
            utils.entropy_from_logits(nested)
        with pytest.raises(TypeError, match="selective_log_softmax.*unknown"):
            utils.selective_log_softmax(logits, index, unknown=1)
    # Ids and masks of other dtypes and shapes, as their functions have it.
    column = torch.tensor([[1], [0]])
    compare(
        adapters.patch_trl, lambda x: utils.selective_log_softmax(x, index, 1.0, column), logits
    )
    with pytest.raises(RuntimeError, match="gather"), adapters.patch_trl():
        utils.selective_log_softmax(logits, index.float())


def test_what_broadcasts_is_theirs():
    algorithms, patch = load("verl.trainer.ppo.core_algos"), adapters.patch_verl
    functions = load("verl.utils.torch_functional")
    logp, ref_logp = per_token(2)
    row, column = torch.rand(1, 21) > 0.5, torch.tensor([[1], [1], [0], [1]])
    compare(patch, lambda x: algorithms.kl_penalty(x, ref_logp[0], "k3"), logp)
    compare(patch, lambda x: functions.masked_whiten(x, row), logp)
    config = peers.Config(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None)
    config.update(global_batch_info={})
    loss = algorithms.compute_policy_loss_vanilla
    compare(patch, lambda x: loss(ref_logp, x, ref_logp[:, :1], column, config=config), logp)


def test_distributed_tensors_are_theirs():
    algorithms = load("verl.trainer.ppo.core_algos")
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("a torch without torch.distributed")
    store = distributed.HashStore()
    distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        logp, ref_logp = (distributed.tensor.distribute_tensor(x, mesh) for x in per_token(2))
        with adapters.patch_verl():
            kl = algorithms.kl_penalty(logp, ref_logp, "k3")
        assert isinstance(kl, distributed.tensor.DTensor)
        torch.testing.assert_close(kl, algorithms.kl_penalty(logp, ref_logp, "k3"))
    finally:
        distributed.destroy_process_group()


# --- verl ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(10,), (2, 5)])
def test_head_of_verl(dtype, shape):
    fused = load("verl.utils.experimental.torch_functional")
    hidden, index = torch.randn(*shape, 8).to(dtype), torch.randint(40, shape)
    weight = torch.randn(40, 8).to(dtype) / 2
    head = fused.FusedLinearForPPO(chunk_size=4)

    def of_hidden(hidden, weight):
        return head(hidden, weight, index, 0.7)

    def of_weight(weight, hidden):
        return head(hidden, weight, index, temperature=0.7)

    # Their entropy is rounded to the hidden states' dtype, and their weight's gradient a chunk.
    compare(adapters.patch_verl, of_hidden, hidden, weight)
    compare(adapters.patch_verl, of_weight, weight, hidden)
    with adapters.patch_verl():
        logp, _ = head(hidden.float(), weight.float().requires_grad_(), index)
        assert "linear_logprob" in str(logp.grad_fn) or "linear_logprob" in logp.grad_fn.name()


@pytest.mark.parametrize("dtype", DTYPES)
def test_verl_on_logits(dtype):
    functions = load("verl.utils.torch_functional")
    logits, labels = torch.randn(6, 40).to(dtype), torch.randint(40, (6,))
    batch, of_batch = torch.randn(2, 5, 40).to(dtype), torch.randint(40, (2, 5))
    patch = adapters.patch_verl
    compare(patch, lambda x: functions.logprobs_from_logits(x, labels), logits)
    compare(patch, lambda x: functions.logprobs_from_logits(logits=x, labels=of_batch), batch)
    compare(patch, lambda x: functions.logprobs_from_logits_v2(x, of_batch), batch)
    compare(patch, lambda x: functions.entropy_from_logits(x), batch)
    compare(patch, lambda x: functions.entropy_from_logits_with_chunking(x, chunk_size=4), logits)


@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.float32])
def test_verl_per_token(mask_dtype):
    functions = load("verl.utils.torch_functional")
    algorithms = load("verl.trainer.ppo.core_algos")
    mask, patch = response_mask(mask_dtype), adapters.patch_verl
    values, rewards = per_token(2)
    for shift in (True, False):
        compare(patch, lambda x: functions.masked_whiten(x * mask, mask, shift) * mask, values)

    def gae(x):
        advantages, returns = algorithms.get_adv_estimator_fn("gae")(
            token_level_rewards=rewards, values=x, response_mask=mask, gamma=0.99, lam=0.95
        )
        return advantages * mask, returns * mask

    compare(patch, gae, values)
    for kind in ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "abs+", "k2+", "k3+"):
        compare(patch, lambda x, y, kind=kind: algorithms.kl_penalty(x, y, kind), *per_token(2))
    with pytest.raises(NotImplementedError), patch():
        algorithms.kl_penalty(values, rewards, "full")


VERL_LOSSES = ["vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "dro", "cispo"]


@pytest.mark.parametrize("name", VERL_LOSSES)
@pytest.mark.parametrize(
    "mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
)
@pytest.mark.parametrize(
    "batch", [{}, {"dp_size": 2, "batch_num_tokens": 100, "global_batch_size": 6}]
)
def test_verl_policy_loss(name, mode, batch, monkeypatch):
    algorithms = load("verl.trainer.ppo.core_algos")
    if not hasattr(algorithms, f"compute_policy_loss_{name}"):
        pytest.skip("another version")
    monkeypatch.setattr(algorithms, "ActorConfig", peers.Config)
    mask = response_mask()
    clips = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 2.0}
    for given in ({"clip_ratio_low": None, "clip_ratio_high": None}, clips):
        config = peers.Config(clip_ratio=0.2, tau_pos=0.9, tau_neg=1.2, **given)
        config.update(global_batch_info=batch, policy_loss=peers.Config(dro_beta=0.3))

        def loss(x, old, advantages, **options):
            function = algorithms.get_policy_loss_fn(name)
            return function(old, x, advantages, mask, mode, config, **options)

        def log_probs():
            old, by, advantages = per_token(3)
            return -2 + 0.5 * old + 0.3 * by, -2 + 0.5 * old, advantages

        compare(adapters.patch_verl, loss, *log_probs())
        weights = torch.rand(4, 21)
        compare(adapters.patch_verl, lambda *t: loss(*t, rollout_is_weights=weights), *log_probs())
        with adapters.patch_verl() as patch:
            loss(*log_probs())
        if name.startswith("dppo") and given is clips:
            continue  # theirs where a ratio is above 2
        is_ours = mode != "seq-mean-token-sum-norm" or name == "sapo"
        counted = patch.calls[f"verl.trainer.ppo.core_algos.compute_policy_loss_{name}"]
        assert counted == is_ours
    mask = torch.zeros_like(mask)  # a micro-batch with nothing in it
    compare(adapters.patch_verl, loss, *log_probs(), equal_nan=True)
    if not batch:
        config.update(global_batch_info={"dp_size": 2})
        with pytest.raises(ValueError, match="dp_size"), adapters.patch_verl():
            loss(*log_probs())


@pytest.mark.parametrize("with_std", [True, False])
@pytest.mark.parametrize("singles", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "grpo",
        "grpo_vectorized",
        "grpo_passk",
        "rloo",
        "rloo_vectorized",
        "opo",
        "gpg",
        "reinforce_plus_plus_baseline",
        "reinforce_plus_plus",
    ],
)
def test_verl_outcome_advantages(name, singles, with_std):
    algorithms = load("verl.trainer.ppo.core_algos")
    mask = torch.rand(9, 21) > 0.3
    mask[:, 0] = True
    if singles and name == "grpo_passk":
        return
    index = numpy.array(list("aabbabbab" if not singles else "aabbcbbab"), dtype=object)
    given = {"response_mask": mask.long(), "index": index}
    given["config"] = peers.Config(gamma=0.9, norm_adv_by_std_in_grpo=with_std)
    if name.startswith("grpo"):
        given["norm_adv_by_std_in_grpo"] = with_std
    if name == "reinforce_plus_plus":
        del given["index"]

    def advantages(rewards):
        found = algorithms.get_adv_estimator_fn(name)(token_level_rewards=rewards, **given)
        return tuple(each * mask for each in found)

    rewards = torch.randn(9, 21)
    compare(adapters.patch_verl, lambda x: advantages(x.detach()), rewards)
    with adapters.patch_verl() as patch:
        advantages(rewards)
    assert sum(patch.calls.values()) == 1, patch.calls


# --- OpenRLHF ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_openrlhf_on_logits(dtype):
    utils = load("openrlhf.models.utils")
    logits, labels = torch.randn(2, 5, 40).to(dtype), torch.randint(40, (2, 5))
    patch = adapters.patch_openrlhf
    compare(patch, lambda x: utils.log_probs_from_logits(x, labels), logits)
    compare(patch, lambda x: utils.log_probs_from_logits(x * 1, labels, temperature=0.7), logits)
    if dtype == torch.float32:  # theirs is compiled
        entropy = utils.compute_entropy
        utils.compute_entropy = getattr(entropy, "_torchdynamo_orig_callable", entropy)
        try:
            compare(patch, lambda x: utils.compute_entropy(x), logits)
        finally:
            utils.compute_entropy = entropy


def test_openrlhf_per_token():
    utils, patch = load("openrlhf.models.utils"), adapters.patch_openrlhf
    for estimator in ("k1", "k2", "k3"):
        compare(
            patch,
            lambda x, y, e=estimator: utils.compute_approx_kl(x, y, kl_estimator=e),
            *per_token(2),
        )
        compare(
            patch,
            lambda x, y, e=estimator: utils.compute_approx_kl(
                x, y, kl_estimator=e, unbiased_gradient=True
            ),
            *per_token(2),
        )
    compare(patch, lambda x: utils.compute_approx_kl(x, x[0].detach()), per_token(1)[0])
    with pytest.raises(TypeError, match="compute_entropy"), patch():
        utils.compute_entropy(torch.zeros(2, 5, 40), 3)
    with pytest.raises(ValueError, match="Unknown kl_estimator"), patch():
        utils.compute_approx_kl(*per_token(2), kl_estimator="k4")
    maker = load("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker
    rewards, mask = torch.randn(4, 21), response_mask(torch.bool)
    for given in (mask, None):
        compare(
            patch,
            lambda x, given=given: maker.get_advantages_and_returns(
                None, x, rewards, given, 0.99, 0.9
            ),
            torch.randn(4, 21),
            keep=given,
        )


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_openrlhf_policy_loss(by_token, dual_clip):
    losses = load("openrlhf.models.loss")
    policy = losses.PolicyLoss(0.2, 0.3, dual_clip, by_token)
    mask = response_mask(torch.float32)
    totals = {"dp_size": 2, "batch_num_tokens": 90.0, "global_batch_size": 7}
    for given in (mask, torch.zeros_like(mask)):
        for options in ({}, totals):
            compare(
                adapters.patch_openrlhf,
                lambda *t, given=given, options=options: policy(*t, given, **options),
                *per_token(3),
                equal_nan=given is not mask,
            )
    # Its KL is of what the loss's own clamp has changed.
    logp, old_logp, advantages = per_token(3)
    far = (logp, old_logp + 30 * (old_logp > 1), advantages)
    compare(adapters.patch_openrlhf, lambda *t: policy(*t, mask), *far)


@pytest.mark.parametrize(
    ("level", "mode", "gating", "bounds"),
    [
        ("token", "clip", "ratio", [0.5, 2.0]),
        ("token", "mask", "ratio", [0.5, 2.0]),
        ("seq", "mask", "ratio", [0.8, 1.2]),
        ("token", "mask", "binary_kl", [0.0, 0.05]),
        ("seq", "mask", "binary_kl", [0.0, 0.05]),
        ("token", "mask", "tv", [0.0, 0.1]),
    ],
)
def test_openrlhf_corrections(level, mode, gating, bounds):
    losses, mask = load("openrlhf.models.loss"), response_mask(torch.float32)
    mask[3, 0] = 1.0  # of a row of none they take the mean
    policy = losses.PolicyLoss(
        is_correction_level=level,
        is_correction_mode=mode,
        is_correction_gating=gating,
        is_correction_threshold=bounds,
    )
    old = -0.5 - torch.rand(4, 21)
    rollout = old + 0.5 * torch.randn(4, 21).clamp(-1, 0.9)

    def loss(logp, advantages):
        return policy(logp, old, advantages, mask, rollout)

    tensors = (old + 0.1 * torch.randn(4, 21), torch.randn(4, 21))
    compare(adapters.patch_openrlhf, loss, *tensors)
    with adapters.patch_openrlhf() as patch:
        loss(*tensors)
    assert patch.calls["openrlhf.models.loss.PolicyLoss.forward"] == 1


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_openrlhf_gspo(dual_clip):
    losses, mask = load("openrlhf.models.loss"), response_mask(torch.float32)
    for level, rollout in (("off", None), ("token", torch.randn(4, 21))):
        policy = losses.PolicyLoss(
            0.02, 0.03, dual_clip, policy_loss_type="gspo", is_correction_level=level
        )
        for totals in ({}, {"dp_size": 2, "batch_num_tokens": 90.0, "global_batch_size": 7}):

            def loss(*tensors, policy=policy, rollout=rollout, totals=totals):
                return policy(*tensors, mask, rollout, **totals)

            compare(adapters.patch_openrlhf, loss, *per_token(3))
            with adapters.patch_openrlhf() as patch:
                loss(*per_token(3))
            assert patch.calls["openrlhf.models.loss.PolicyLoss.forward"] == 1
