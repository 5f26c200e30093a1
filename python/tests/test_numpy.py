"""NumPy arrays: the same numbers as PyTorch tensors, and no PyTorch needed."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import ppo_kernels.numpy as ppok
from ppo_kernels import functional


def same(array, tensor):
    assert array.dtype == np.float32 and array.shape == tuple(tensor.shape)
    np.testing.assert_array_equal(array, tensor.numpy())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("index_dtype", [np.int64, np.int32, np.uint32, np.int16])
def test_logprobs(dtype, index_dtype):
    logits = np.random.randn(2, 3, 40).astype(dtype)
    index = np.random.randint(0, 40, (2, 3)).astype(index_dtype)
    mask = np.array([[True, False, True], [True, True, False]])
    tensor = torch.from_numpy(logits if dtype != np.float64 else logits.astype(np.float32))
    tensors = (tensor, torch.from_numpy(index.astype(np.int64)), 0.7, torch.from_numpy(mask))
    logp, entropy = ppok.logprobs_and_entropy(logits, index, 0.7, mask)
    expected = functional.logprobs_and_entropy(*tensors)
    same(logp, expected[0])
    same(entropy, expected[1])
    same(ppok.selective_log_softmax(logits, index, 0.7, mask), expected[0])
    sliced = ppok.selective_log_softmax(logits[:, ::2], index[:, ::2], 0.7)
    same(sliced, functional.selective_log_softmax(tensor[:, ::2], tensors[1][:, ::2], 0.7))
    if index_dtype != np.uint32:
        skipped = ppok.selective_log_softmax(
            logits, np.where(mask, index, -1), 0.7, ignore_index=-1
        )
        same(skipped, expected[0])


def test_per_token_ops():
    logp, ref_logp, values, rewards = np.random.randn(4, 3, 20).astype(np.float32)
    mask = np.random.rand(3, 20) > 0.3
    scores = np.array([1.0, -2.0, 3.0])
    t = {name: torch.from_numpy(array) for name, array in locals().items() if name != "scores"}
    mask64 = mask.astype(np.int64)
    same(
        ppok.token_kl(logp, ref_logp, mask64, estimator="k3"),
        functional.token_kl(t["logp"], t["ref_logp"], t["mask"], estimator="k3"),
    )
    same(
        ppok.full_kl(logp, ref_logp, divergence="reverse"),
        functional.full_kl(t["logp"], t["ref_logp"], divergence="reverse"),
    )
    options = {"divergence": "jsd", "beta": 0.2}
    jsd = functional.full_kl(t["logp"], t["ref_logp"], **options)
    same(ppok.full_kl(logp, ref_logp, **options), jsd)
    options = {"gamma": 0.9, "whiten": True, "return_rewards": True}
    ours = ppok.gae(values, rewards, mask64, scores=scores, **options)
    expected = functional.gae(
        t["values"], t["rewards"], t["mask"], scores=torch.from_numpy(scores).float(), **options
    )
    for a, b in zip(ours[:3], expected[:3]):
        same(a, b)
    assert ours.moments.tolist() == expected.moments.tolist()
    same(
        ppok.masked_whiten(values, mask, False),
        functional.masked_whiten(t["values"], t["mask"], False),
    )
    assert ppok.masked_moments(values).tolist() == functional.masked_moments(t["values"]).tolist()

    ids, lengths = np.array([3, -1, 3]), np.array([2, 3, 4])
    for groups in (ids, ids.astype(np.int8), ["b", "a", "b"], np.array(["b", "a", "b"], object)):
        ours, stats = ppok.outcome_advantages(scores, groups, mask64, lengths=lengths)
        expected, tensors = functional.outcome_advantages(
            torch.from_numpy(scores).float(), torch.from_numpy(ids), t["mask"]
        )
        same(ours, expected)
        assert stats == {name: value.item() for name, value in tensors.items()}
    opo = {**ppok.ESTIMATORS["opo"], "group_size": 3}
    scores32 = torch.from_numpy(scores).float()
    for options in (opo, {**opo, "lengths": lengths}):
        ours = ppok.outcome_advantages(scores, mask=mask, **options).advantages
        if "lengths" in options:
            options = {**options, "lengths": torch.from_numpy(lengths).float()}
        same(ours, functional.outcome_advantages(scores32, None, t["mask"], **options).advantages)
    several = np.stack([scores, scores[::-1] * 2, [np.nan, 1.0, np.nan]])
    for over in ("rows", "tokens"):
        options = {"group_size": 3, "over": over}
        same(
            ppok.gdpo_advantages(several, [1.0, 0.5, 2.0], None, mask, **options),
            functional.gdpo_advantages(
                torch.from_numpy(several).float(), [1.0, 0.5, 2.0], None, t["mask"], **options
            ),
        )
    options = {"normalise": True, "rejection_metric": "k2", "rejection_high": 0.5}
    ours = ppok.correction(logp, ref_logp, mask64, **options)
    expected = functional.correction(t["logp"], t["ref_logp"], t["mask"], **options)
    same(ours.weights, expected.weights)
    assert ours.kept.dtype == bool and ours.kept.tolist() == expected.kept.tolist()
    assert ours.stats == {name: stat.item() for name, stat in expected.stats.items()}

    arguments = ("logp", "ref_logp", "rewards", "mask")
    loss, stats, gradients = ppok.ppo_loss(
        logp, ref_logp, rewards, mask, values=values, old_values=logp, returns=rewards
    )
    leaves = {name: t[name].clone().requires_grad_() for name in ("logp", "values")}
    expected, tensors = functional.ppo_loss(
        leaves["logp"],
        *(t[name] for name in arguments[1:]),
        values=leaves["values"],
        old_values=t["logp"],
        returns=t["rewards"],
    )
    expected.backward()
    assert np.float32(loss) == expected.item() and set(gradients) == set(leaves)
    assert np.float32(stats["clip_fraction"]) == tensors["clip_fraction"].item()
    for name, leaf in leaves.items():
        same(gradients[name], leaf.grad)


def test_any_layout_will_do():
    """Not aligned, not contiguous, of the other byte order: all give what plain arrays do."""

    def unaligned(array):
        room = np.zeros(array.nbytes + 1, np.uint8)
        odd = room[1:].view(array.dtype).reshape(array.shape)
        odd[...] = array
        assert array.dtype.itemsize == 1 or not odd.flags.aligned
        return odd

    def every_other(array):
        return np.repeat(array, 2, axis=0)[::2]

    def swapped(array):
        return array.astype(array.dtype.newbyteorder())

    logits, ref_logits = np.random.randn(2, 3, 40).astype(np.float32)
    index, ids = np.array([5, 0, 39]), np.array([5, 0, 39], np.uint32)
    a, b, c, d = np.random.randn(4, 3, 7).astype(np.float32)
    mask = np.random.rand(3, 7) > 0.3
    moments = ppok.masked_moments(a, mask)
    losses = ("values", "old_values", "returns")
    for call, arrays in (
        (ppok.selective_log_softmax, (logits, index)),
        (ppok.logprobs_and_entropy, (logits.astype(np.float16), ids)),
        (ppok.token_kl, (a, b, mask)),
        (ppok.full_kl, (logits, ref_logits, mask[:, 0])),
        (ppok.correction, (a, b, mask)),
        (
            lambda v, r, m, k, s, e, x, w: ppok.gae(
                v, r, m, kl=k, scores=s, has_eos=e, dones=x, bootstrap=w, missing_eos="replace"
            ),
            (a, b, mask, c, d[:, 0].copy(), mask[:, 1].copy(), ~mask, d[:, 1].copy()),
        ),
        (ppok.masked_moments, (a, mask.astype(np.int64))),
        (
            lambda s, g, m, n, b: ppok.outcome_advantages(
                s, g, m, lengths=n, score_baselines=b, baseline="length_weighted"
            ),
            (d[:, 0].copy(), np.array([1, 9, 1]), mask, abs(d[:, 1]), d[:, 2].copy()),
        ),
        (lambda v, m, n: ppok.masked_whiten(v, m, moments=n), (a, mask, moments)),
        (lambda *t: ppok.ppo_loss(*t[:4], **dict(zip(losses, t[4:]))), (a, b, c, mask, d, a, b)),
    ):
        expected = call(*arrays)
        for change in (unaligned, every_other, swapped):
            found = call(*(change(array) for array in arrays))
            np.testing.assert_equal(found, expected)


def test_lists_and_scalars():
    assert ppok.selective_log_softmax([0.0, 0.0], 1) == np.float32(-np.log(2))
    assert ppok.masked_whiten([1, 2, 3]).tolist() == pytest.approx([-1, 0, 1])


def test_errors():
    with pytest.raises(ValueError, match="`index` has shape \\[3\\], expected \\[2\\]"):
        ppok.selective_log_softmax(np.zeros((2, 4)), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="0..4"):
        ppok.selective_log_softmax(np.zeros((2, 4)), np.array([0, 4]))
    with pytest.raises(ValueError, match="`mask` has shape"):
        ppok.gae(np.zeros((2, 4)), mask=np.zeros(4))
    with pytest.raises(ValueError, match="`rollout_logp` is missing"):
        ppok.correction(np.zeros((2, 4)), None)
    with pytest.raises(ValueError, match="`estimator` is 'x'"):
        ppok.token_kl(np.zeros(2), np.zeros(2), estimator="x")


PROGRAM = """
import sys
sys.modules["torch"] = None  # makes `import torch` fail
import ppo_kernels, ppo_kernels.numpy
assert ppo_kernels.library_version()
assert abs(ppo_kernels.numpy.gae([[0.5]], [[1.0]]).advantages[0, 0] - 0.5) < 1e-6
"""


def test_without_torch():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


@pytest.mark.parametrize("index", [1.7, True, "1", float("nan"), 2**63])
def test_what_is_no_id_is_refused(index):
    with pytest.raises(ValueError, match="`index`"):
        ppok.selective_log_softmax(np.zeros((1, 4)), np.array([index]))


def test_logits_of_two_dtypes_are_refused():
    logits = np.random.randn(2, 4)
    with pytest.raises(ValueError, match="`ref_logits` has dtype float32, expected float16"):
        ppok.full_kl(logits.astype(np.float16), logits.astype(np.float32))
    exact = ppok.full_kl(logits, (logits + 1).tolist())  # both are made float32
    np.testing.assert_allclose(exact, 0, atol=1e-6)


def test_errors_name_what_has_too_few_elements():
    with pytest.raises(ValueError, match="`mask` keeps 1"):
        ppok.masked_whiten([1.0, 2.0], [True, False])
    with pytest.raises(ValueError, match="`values` keeps 1"):
        ppok.masked_whiten([1.0])


def test_all_that_is_named_is_there():
    for name in ppok.__all__:
        assert getattr(ppok, name)
