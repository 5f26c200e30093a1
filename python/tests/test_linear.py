"""Log-probabilities from hidden states: against plain PyTorch in float64 and what TRL, verl and
Liger gave, in one tile and in many."""

import formulas
import numpy as np
import pytest
import torch
from test_golden import GOLDEN, cases, close, f32

import ppo_kernels.numpy
from ppo_kernels import _linear, functional

OPTIONS = [
    {},
    {"temperature": 0.7},
    {"logit_scale": 0.3, "temperature": 1.5},
    {"softcap": 2.0, "logit_scale": 1.4},
    {"softcap": 4.0, "temperature": 0.8},
    {"rows": True},
    {"rows": True, "softcap": 3.0},
    {"ignore_index": -100},
    {"ignore_index": 2, "temperature": 0.7, "rows": True},
]
SHAPE, VOCAB, HIDDEN = (3, 7), 301, 16
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(autouse=True, params=DEVICES)
def device(request):
    """What all tensors are made on."""
    if request.param == "cuda" and "numpy" in request.node.name:
        pytest.skip("arrays are on the CPU")
    with torch.device(request.param):
        yield request.param


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    """Several chunks of rows and ranges of columns, the last of each narrower."""
    if request.param == "many tiles":
        monkeypatch.setattr(_linear, "ROWS", 4)
        monkeypatch.setattr(_linear, "TILE_BYTES", {"cpu": 0, "cuda": 0})
        monkeypatch.setattr(_linear, "_LEAST_COLUMNS", 64)


def inputs(dtype=torch.float32, bias=True):
    hidden = torch.randn(*SHAPE, HIDDEN).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, HIDDEN) / 2).to(dtype).requires_grad_()
    bias = torch.randn(VOCAB).to(dtype).requires_grad_() if bias else None
    return hidden, weight, torch.randint(VOCAB, SHAPE), bias


def split(options, index):
    """The op's options; those rows are skipped where the id is one of them."""
    options = dict(options)
    if options.pop("rows", False):
        options["temperature"] = 0.5 + torch.rand(SHAPE)
    if "ignore_index" in options:
        index[0, :3] = index[2] = options["ignore_index"]
    return options


EXTRAS = ("log_sum_sq_probs", "mean_logits", "is_top1")


def check_extras(ours, z, index, options):
    """Against logits in float64."""
    ignored = options.get("ignore_index")
    counts = index != (-1 if ignored is None else ignored)
    expected = {
        "log_sum_sq_probs": (2 * z.log_softmax(-1)).logsumexp(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == index,
    }
    for name in EXTRAS:
        found = torch.as_tensor(getattr(ours, name))
        assert (found[~counts] == 0).all() and not found.requires_grad
        if name == "is_top1":
            assert torch.equal(found[counts], expected[name][counts])
        else:
            wanted = expected[name][counts]
            torch.testing.assert_close(found[counts].double(), wanted, rtol=4e-6, atol=8e-6)


def exact_logits(hidden, weight, bias, options):
    """In float64."""
    z = hidden.double() @ weight.double().T
    z = (z if bias is None else z + bias.double()) * options.get("logit_scale", 1.0)
    if cap := options.get("softcap"):
        z = cap * torch.tanh(z / cap)
    temperature = options.get("temperature", 1.0)
    many = getattr(temperature, "ndim", 0) > 0
    return z / (torch.as_tensor(temperature)[..., None] if many else temperature)


def exact(hidden, weight, index, bias, options):
    """Log-probabilities and entropies in float64."""
    z = exact_logits(hidden, weight, bias, options)
    ignored = options.get("ignore_index")
    skipped = index == (-1 if ignored is None else ignored)
    found = formulas.logprobs_and_entropy(z, index.masked_fill(skipped, 0))
    return [torch.where(skipped, 0.0, x) for x in found]


def grads(outputs, upstream, *leaves):
    leaves = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients(options, bias, tiles):
    hidden, weight, index, bias = inputs(bias=bias)
    options = split(options, index)
    ours = functional.linear_logprobs(hidden, weight, index, bias, outputs=["entropy"], **options)
    expected = exact(hidden, weight, index, bias, options)
    for a, b in zip(ours[:2], expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=4e-6)
    upstream = torch.randn(2, *SHAPE)
    found = grads(ours[:2], [*upstream], hidden, weight, bias)
    wanted = grads(expected, [*upstream.double()], hidden, weight, bias)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)
    # Without the entropy the same log-probabilities, and the same gradient of them.
    alone = functional.linear_logprobs(hidden, weight, index, bias, **options)
    assert alone[1:] == (None,) * 4 and torch.equal(alone.logp, ours.logp)
    a, b = (grads(x.logp, upstream[0], hidden, weight, bias) for x in (alone, ours))
    assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS[:7], ids=str)
def test_halves(options, dtype, tiles):
    """As far from float64 as rounded logits and rounded sums are: eight bits, or eleven."""
    hidden, weight, index, bias = inputs(dtype)
    options = split(options, index)
    ours = functional.linear_logprobs(hidden, weight, index, bias, outputs=["entropy"], **options)
    expected = exact(hidden, weight, index, bias, options)
    ulp = torch.finfo(dtype).eps
    for a, b in zip(ours[:2], expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=ulp, atol=8 * ulp)
    upstream = torch.randn(2, *SHAPE)
    found = grads(ours[:2], [*upstream], hidden, weight, bias)
    wanted = grads(expected, [*upstream.double()], hidden, weight, bias)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b.double()).norm() < 8 * ulp * b.double().norm()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_else_is_asked_for(options, tiles):
    hidden, weight, index, bias = inputs()
    options = split(options, index)
    z = exact_logits(hidden, weight, bias, options).detach()
    index[1] = torch.where(torch.rand(SHAPE[1]) > 0.5, z[1].argmax(-1), index[1])
    ours = functional.linear_logprobs(hidden, weight, index, bias, outputs=EXTRAS, **options)
    assert ours.entropy is None
    check_extras(ours, z, index, options)
    assert ours.is_top1[1].any()


def test_of_equals_the_first_is_on_top(tiles):
    hidden, weight = torch.ones(3, 1), torch.zeros(200, 1)
    weight[[70, 71, 150]] = 1.0
    ours = functional.linear_logprobs(hidden, weight, torch.tensor([70, 71, 150]), outputs=EXTRAS)
    assert ours.is_top1.tolist() == [True, False, False]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_adapter_is_a_weight(options, tiles):
    """Values and all gradients are those of the weight that it makes."""
    hidden, weight, index, bias = inputs()
    options = split(options, index)
    a, b = (torch.randn(3, HIDDEN) / 3).requires_grad_(), torch.randn(VOCAB, 3).requires_grad_()
    lora = (a, b, 0.6)
    head = (hidden, weight, index, bias)
    ours = functional.linear_logprobs(*head, outputs=["entropy"], lora=lora, **options)[:2]
    adapted = weight.double() + 0.6 * (b.double() @ a.double())
    expected = exact(hidden, adapted, index, bias, options)
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=4e-6, atol=8e-6)
    upstream = torch.randn(2, *SHAPE)
    leaves = (hidden, weight, bias, a, b)
    found = grads(ours, [*upstream], *leaves)
    wanted = grads(expected, [*upstream.double()], *leaves)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=2e-5)
    # With all else frozen, as it is with adapters.
    head = [None if x is None else x.detach() for x in head]
    alone = functional.linear_logprobs(*head, outputs=["entropy"], lora=lora, **options)[:2]
    for x, y in zip(grads(alone, [*upstream], a, b), found[3:]):
        torch.testing.assert_close(x, y)


def test_a_mask_is_an_index_that_is_ignored(tiles):
    hidden, weight, index, bias = inputs()
    mask = torch.rand(SHAPE) > 0.4
    hidden.data[~mask] = torch.nan
    ours = functional.linear_logprobs(
        hidden, weight, index, bias, row_mask=mask, outputs=["entropy"]
    )
    ids = index.masked_fill(~mask, -7)
    other = functional.linear_logprobs(
        hidden, weight, ids, bias, ignore_index=-7, outputs=["entropy"]
    )
    for a, b in zip(ours[:2], other):
        assert torch.equal(a, b) and (a[~mask] == 0).all() and a.isfinite().all()
    (grad,) = grads(ours[:2], [torch.ones(SHAPE)] * 2, hidden)
    assert grad.isfinite().all() and (grad[~mask] == 0).all() and (grad[mask] != 0).any()


def test_what_is_frozen_costs_nothing(monkeypatch, tiles):
    hidden, weight, index, bias = inputs()
    upstream = torch.ones(SHAPE)
    ours = functional.linear_logprobs(hidden, weight, index, bias)
    everything = grads(ours.logp, upstream, hidden, weight, bias)
    products = set()
    for name, what in (("_accumulate", "hidden"), ("_add_product", "weight")):
        owner = _linear if name == "_accumulate" else _linear.Gradients
        theirs = getattr(owner, name)

        def counted(*given, theirs=theirs, what=what):
            products.add(what)
            theirs(*given)

        monkeypatch.setattr(owner, name, counted)
    for place in range(3):
        leaves = [hidden, weight, bias]
        frozen = [x.detach() if i != place else x for i, x in enumerate(leaves)]
        ours = functional.linear_logprobs(frozen[0], frozen[1], index, frozen[2])
        (grad,) = grads(ours.logp, upstream, leaves[place])
        torch.testing.assert_close(grad, everything[place])
        assert products == [{"hidden"}, {"weight"}, set()][place]
        products.clear()
    assert not functional.linear_logprobs(
        *(x.detach() for x in (hidden, weight)), index
    ).logp.requires_grad


def test_no_row_that_counts(tiles):
    hidden, weight, index, bias = inputs()
    index.fill_(-100)
    ours = functional.linear_logprobs(
        hidden, weight, index, bias, ignore_index=-100, outputs=["entropy"]
    )
    assert (ours.logp == 0).all() and (ours.entropy == 0).all() and ours.logp.requires_grad
    for grad in grads(ours[:2], [torch.ones(SHAPE)] * 2, hidden, weight, bias):
        assert (grad == 0).all()
    empty = functional.linear_logprobs(hidden[:0], weight, index[:0])
    assert empty.logp.shape == (0, 7)
    assert (grads(empty.logp, torch.ones(0, 7), weight)[0] == 0).all()


def test_only_one_gradient_comes(tiles):
    hidden, weight, index, bias = inputs()
    ours = functional.linear_logprobs(hidden, weight, index, bias, outputs=["entropy"])
    expected = exact(hidden, weight, index, bias, {})
    for a, b in zip(ours, expected):
        found, wanted = (grads(x.sum(), None, hidden, weight, bias) for x in (a, b))
        for x, y in zip(found, wanted):
            torch.testing.assert_close(x, y.float(), rtol=1e-5, atol=1e-5)


def test_autocast(device):
    hidden, weight, index, _ = inputs()
    with torch.autocast(device, torch.bfloat16):
        ours = functional.linear_logprobs(hidden, weight, index, temperature=0.9).logp
        found = grads(ours.sum(), None, hidden, weight)
    halves = hidden.bfloat16(), weight.bfloat16()
    other = functional.linear_logprobs(*halves, index, temperature=0.9).logp
    assert torch.equal(ours, other)
    for a, b in zip(found, grads(other.sum(), None, hidden, weight)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_a_weight_of_another_dtype(tiles):
    hidden, weight, index, _ = inputs()
    other = weight.detach().bfloat16().requires_grad_()
    ours = functional.linear_logprobs(hidden, other, index).logp
    expected = exact(hidden, other, index, None, {})[0]
    torch.testing.assert_close(ours.double(), expected, rtol=2e-6, atol=4e-6)
    (found,), (wanted,) = (grads(x.sum(), None, other) for x in (ours, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def test_numpy(monkeypatch):
    for width in (8 << 20, 1):
        monkeypatch.setattr(ppo_kernels.numpy, "_TILE", width)
        for options in OPTIONS:
            hidden, weight, index, bias = inputs()
            options = split(options, index)
            expected = exact(hidden, weight, index, bias, options)
            options = {k: v.numpy() if hasattr(v, "numpy") else v for k, v in options.items()}
            arrays = [x.detach().numpy() for x in (hidden, weight, index, bias)]
            ours = ppo_kernels.numpy.linear_logprobs(*arrays, outputs=["entropy"], **options)
            for a, b in zip(ours, expected):
                np.testing.assert_allclose(a, b.detach(), rtol=2e-6, atol=4e-6)
            alone = ppo_kernels.numpy.linear_logprobs(*arrays, **options)
            assert alone[1:] == (None,) * 4 and (alone.logp == ours.logp).all()
            every = ppo_kernels.numpy.linear_logprobs(*arrays, outputs=EXTRAS, **options)
            assert every.entropy is None and (every.logp == ours.logp).all()
            check_extras(every, exact_logits(hidden, weight, bias, options), index, options)


BAD = [
    ({"weight": torch.zeros(5, 3)}, r"`weight` has shape \[5, 3\], expected \[vocab, 4\]"),
    ({"weight": torch.zeros(0, 4)}, "`weight` has shape"),
    ({"weight": torch.zeros(4)}, "`weight` has shape"),
    ({"index": torch.zeros(3, dtype=torch.int64)}, r"`index` has shape \[3\], expected \[2\]"),
    ({"index": torch.full((2,), 5)}, r"`index`\[0\] is 5"),
    ({"bias": torch.zeros(4)}, r"`bias` has shape \[4\], expected \[5\]"),
    ({"temperature": 0.0}, "option `temperature` is 0.0"),
    ({"temperature": -1.0, "softcap": 30.0}, "option `temperature` is -1.0"),
    ({"temperature": -1.0, "logit_scale": 2.0}, "option `temperature` is -1.0"),
    ({"temperature": -1.0, "row_mask": torch.zeros(2)}, "option `temperature` is -1.0"),
    ({"hidden": torch.zeros(2, 0), "weight": torch.zeros(5, 0)}, "`hidden` has shape"),
    ({"hidden": torch.tensor(1.0)}, "`hidden` has shape"),
    ({"index": torch.zeros(2), "row_mask": torch.ones(2)}, "`index` has dtype float32"),
    ({"index": torch.tensor([-100, 9]), "ignore_index": -100}, r"`index`\[\d\] is 9"),
    ({"temperature": torch.tensor([1.0, 0.0])}, "`temperature` has others"),
    ({"temperature": torch.ones(3)}, r"`(row_)?temperature` has shape \[3\], expected \[2\]"),
    ({"softcap": 0.0}, "option `softcap` is 0.0, expected a finite number above 0"),
    ({"softcap": float("nan")}, "option `softcap`"),
    ({"logit_scale": -1.0}, "option `logit_scale`"),
    ({"row_mask": torch.ones(3, dtype=torch.bool)}, "`row_mask` has shape"),
]
LORA = [
    ((torch.zeros(3, 5), torch.zeros(5, 3)), r"`lora_a` has shape \[3, 5\], expected \[3, 4\]"),
    ((torch.zeros(3, 4), torch.zeros(5, 2)), r"`lora_b` has shape \[5, 2\], expected \[5, 3\]"),
    ((torch.zeros(3, 4), torch.zeros(4, 3)), r"`lora_b` has shape \[4, 3\], expected \[5, 3\]"),
    ((torch.zeros(4), torch.zeros(5, 3)), "`lora_a` has shape"),
    ((torch.zeros(3, 4).double(), torch.zeros(5, 3)), "`lora_a` has dtype float64"),
]


@pytest.mark.parametrize("array", [False, True], ids=["torch", "numpy"])
@pytest.mark.parametrize(("change", "said"), BAD, ids=[f"{change}" for change, _ in BAD])
def test_what_does_not_fit_is_refused(change, said, array):
    given = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4)}
    given |= {"index": torch.zeros(2, dtype=torch.int64), **change}
    module = functional
    if array:
        given = {k: v.numpy() if hasattr(v, "numpy") else v for k, v in given.items()}
        module = ppo_kernels.numpy
    with pytest.raises(ValueError, match=said):
        module.linear_logprobs(**given)


@pytest.mark.parametrize(("lora", "said"), LORA)
def test_an_adapter_that_does_not_fit_is_refused(lora, said):
    head = torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=said):
        functional.linear_logprobs(*head, lora=(*lora, 1.0))


def test_dtypes_are_refused():
    hidden, index = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="`weight` has dtype float64"):
        functional.linear_logprobs(hidden, torch.zeros(5, 4, dtype=torch.float64), index)
    with pytest.raises(ValueError, match="`outputs` has 'Entropy', expected any of 'entropy', "):
        functional.linear_logprobs(hidden, torch.zeros(5, 4), index, outputs=["Entropy"])
    with pytest.raises(ValueError, match="`index` has dtype float32"):
        functional.linear_logprobs(hidden, torch.zeros(5, 4), index.float())


def test_the_row_of_a_wrong_id_is_the_caller_s():
    head = torch.zeros(3, 4), torch.zeros(5, 4)
    for dtype in (torch.int32, torch.int64):
        index = torch.tensor([-100, -100, -3], dtype=dtype)
        with pytest.raises(ValueError, match=r"`index`\[2\] is -3, expected 0..5"):
            functional.linear_logprobs(*head, index, ignore_index=-100)


def test_what_an_ignored_row_has_counts_for_nothing():
    hidden, weight, index, _ = inputs()
    index[0, 0] = -100
    temperature = torch.ones(SHAPE)
    expected = functional.linear_logprobs(hidden, weight, index, ignore_index=-100)
    temperature[0, 0] = 0.0
    options = {"temperature": temperature, "ignore_index": -100}
    ours = functional.linear_logprobs(hidden, weight, index, **options)
    torch.testing.assert_close(ours.logp, expected.logp)


def test_a_row_of_nan_has_no_top(tiles):
    hidden, weight, _, bias = inputs()
    index = (hidden @ weight[:64].T).argmax(-1)
    bias = torch.zeros(VOCAB)
    bias[200] = torch.nan
    ours = functional.linear_logprobs(hidden, weight, index, bias, outputs=EXTRAS)
    assert ours.logp.isnan().all() and not ours.is_top1.any()


def test_results_may_be_changed_in_place(tiles):
    hidden, weight, index, bias = inputs()
    ours = functional.linear_logprobs(hidden, weight, index, bias, outputs=EXTRAS)
    for name in ("log_sum_sq_probs", "mean_logits", "is_top1"):
        getattr(ours, name).zero_()
    (ours.logp * 1).sum().backward()
    assert hidden.grad.isfinite().all()


def test_meta_tensors_have_shapes():
    hidden, weight, index, bias = (x.detach().to("meta") for x in inputs())
    ours = functional.linear_logprobs(hidden, weight, index, bias, outputs=["entropy"])
    assert ours.logp.shape == ours.entropy.shape == SHAPE and ours.logp.is_meta


# --- what others gave ---

TRL = "trl.kernels.chunked_logprob.ChunkedLogProbFunction.apply"
VERL = "verl.utils.experimental.torch_functional.FusedLinearForPPOFunction.apply"
LIGER = (
    "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    ".LigerFusedLinearScaledCrossEntropyFunction.apply (torch fallback)"
)


def golden(*functions):
    return cases("linear_logprob", *functions, dtype="float32")


@pytest.mark.skipif(not GOLDEN.exists(), reason="not in the source tree")
@pytest.mark.parametrize(("inputs", "outputs"), golden(TRL, VERL, LIGER))
def test_golden(inputs, outputs):
    if inputs.get("autocast"):
        pytest.skip("their tiles are of 16 bits")
    hidden, weight = (f32(inputs[name]).requires_grad_() for name in ("hidden", "weight"))
    bias = inputs.get("bias")
    bias = bias and f32(bias).requires_grad_()
    options = {"temperature": inputs["temperature"], "ignore_index": inputs.get("ignore_index")}
    options |= {"logit_scale": inputs.get("logit_scale", 1.0)}
    options |= {"softcap": inputs.get("final_logit_softcapping")}
    index = torch.tensor(inputs["targets"])
    every = ["entropy", *EXTRAS]
    ours = functional.linear_logprobs(hidden, weight, index, bias, outputs=every, **options)
    sign = -1.0 if "nll" in outputs else 1.0
    # A row that is offset by 1000 costs them three digits.
    far = hidden.max() > 500
    atol, rtol = (2e-4, 2e-4) if far else (2e-5, 1e-5)
    close(sign * ours.logp, outputs["nll" if "nll" in outputs else "log_probs"], atol=atol)
    for a, b in zip(ours[:2], exact(hidden, weight, index, bias, options), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=4e-6)
    if "entropy" in outputs:
        close(ours.entropy, outputs["entropy"], atol=atol)
    for name in EXTRAS:
        if name in outputs:
            close(getattr(ours, name), outputs[name], atol=atol)
    if inputs.get("grad_out_selected"):
        return  # their gradient is that of other tokens' log-probabilities too
    names = ("grad_out_nll" if sign < 0 else "grad_out_log_probs", "grad_out_entropy")
    upstream = [inputs.get(name) for name in names]
    upstream = [torch.zeros_like(ours.logp) if g is None else f32(g) for g in upstream]
    found = grads(ours[:2], [sign * upstream[0], upstream[1]], hidden, weight, bias)
    for name, grad in zip(("grad_hidden", "grad_weight", "grad_bias"), found):
        if name in outputs:
            close(grad, outputs[name], atol=atol, rtol=rtol)
