"""Numbers that the functions of TRL, verl and OpenRLHF gave; tests/golden/README.md says which."""

import json
from pathlib import Path

import pytest
import torch

from ppo_kernels import functional

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason="not in the source tree")
NUMBERS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def cases(file, *functions, dtype="float64"):
    """Those of a file whose function is one of these, their inputs completed. Names are as in the
    peers' own code."""
    if not GOLDEN.exists():
        return []
    every = {case["id"]: case for case in json.loads((GOLDEN / f"{file}.json").read_text())}
    found = []
    for name, case in every.items():
        if (
            case["function"] in functions
            and case["dtype"] == dtype
            and "raises" not in case["outputs"]
        ):
            same = case["inputs"].get("same_inputs_as")
            inputs = {**(every[same]["inputs"] if same else {}), **case["inputs"]}
            found.append(pytest.param(inputs, case["outputs"], id=name))
    return found


def numbers(nested):
    if isinstance(nested, list):
        return [numbers(entry) for entry in nested]
    return NUMBERS.get(nested, nested)


def f32(nested):
    return torch.tensor(numbers(nested), dtype=torch.float32)


def close(ours, expected, mask=None, rtol=1e-5, atol=2e-5):
    expected = torch.tensor(numbers(expected), dtype=torch.float64)
    if mask is not None:
        ours, expected = ours[mask], expected[mask]
    torch.testing.assert_close(ours.double(), expected, rtol=rtol, atol=atol)


LOGPROB = (
    "trl.trainer.utils.selective_log_softmax",
    "trl.trainer.utils.selective_log_softmax (K indices per position)",
    "verl.utils.torch_functional.logprobs_from_logits_v2 / _naive",
    "openrlhf.models.utils.log_probs_from_logits",
)


@pytest.mark.parametrize(("inputs", "outputs"), cases("logprob", *LOGPROB))
def test_logprob(inputs, outputs):
    logits = f32(inputs["logits"]).requires_grad_()
    index = torch.tensor(inputs["labels" if "labels" in inputs else "index"])
    ours = functional.selective_log_softmax(logits, index.long(), inputs.get("temperature", 1.0))
    close(ours, outputs.get("logp", outputs.get("logp_naive")))
    grad = outputs.get("grad_logits", outputs.get("grad_logits_naive"))
    if grad is not None:  # those of large vocabularies were not kept
        ours.backward(f32(inputs["grad_out"]))
        close(logits.grad, grad)


@pytest.mark.parametrize(
    ("inputs", "outputs"), cases("entropy", "trl.trainer.utils.entropy_from_logits")
)
def test_entropy(inputs, outputs):
    logits = f32(inputs["logits"]).requires_grad_()
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    _, ours = functional.logprobs_and_entropy(logits, index, inputs.get("temperature", 1.0))
    if inputs["kind"] == "neginf":  # theirs is NaN
        return
    close(ours, outputs["entropy"])
    if "grad_logits" in outputs:
        ours.backward(f32(inputs["grad_out"]))
        close(logits.grad, outputs["grad_logits"])


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    cases("gae", "verl.trainer.ppo.core_algos.compute_gae_advantage_return"),
)
def test_gae_of_verl(inputs, outputs):
    mask = f32(inputs["mask"]) != 0
    options = {"gamma": inputs["gamma"], "lam": inputs["lam"]}
    arguments = (f32(inputs["values"]), f32(inputs["rewards"]), mask)
    close(functional.gae(*arguments, **options).advantages, outputs["advantages_unwhitened"], mask)
    ours = functional.gae(*arguments, whiten=True, **options)
    close(ours.advantages, outputs["advantages"], mask, rtol=1e-4)
    close(ours.returns, outputs["returns"], mask)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    cases(
        "gae",
        "openrlhf.trainer.ppo_utils.experience_maker"
        ".RemoteExperienceMaker.get_advantages_and_returns",
    ),
)
def test_gae_of_openrlhf(inputs, outputs):
    mask = f32(inputs["mask"]) != 0
    options = {"gamma": inputs["gamma"], "lam": inputs["lam"], "mask_mode": "multiply"}
    ours = functional.gae(f32(inputs["values"]), f32(inputs["rewards"]), mask, **options)
    close(ours.advantages, outputs["advantages"], mask)
    close(ours.returns, outputs["returns"], mask)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    cases("policy_loss_verl", "verl.trainer.ppo.core_algos.compute_policy_loss_vanilla"),
)
def test_policy_loss_of_verl(inputs, outputs):
    aggregation = inputs["loss_agg_mode"].replace("-", "_")
    special = {"rollout_is_weights", "global_batch_info", "batch_num_tokens", "dp_size"}
    if special & set(inputs):
        pytest.skip("an option that is the adapter's to pass on")
    logp = f32(inputs["log_prob"]).requires_grad_()
    old_logp, advantages = f32(inputs["old_log_prob"]), f32(inputs["advantages"])
    low, high = inputs.get("clip_ratio_low"), inputs.get("clip_ratio_high")
    loss, stats = functional.ppo_loss(
        logp,
        old_logp,
        advantages,
        f32(inputs["response_mask"]),
        clip_range=inputs["clip_ratio"] if low is None else low,
        clip_range_high=inputs["clip_ratio"] if high is None else high,
        dual_clip=inputs.get("clip_ratio_c", 3.0),
        aggregation=aggregation,
    )
    close(loss, outputs["loss"])
    for name, theirs in (
        ("clip_fraction", "pg_clipfrac"),
        ("approx_kl_k1", "ppo_kl"),
        ("lower_clip_fraction", "pg_clipfrac_lower"),
    ):
        close(stats[name], outputs[theirs])
    loss.backward(f32(inputs.get("grad_out", 1.0)))
    close(logp.grad, outputs["grad_log_prob"])


CORE = "verl.trainer.ppo.core_algos.compute_"
OF_VERL = {
    f"{CORE}grpo_outcome_advantage": "grpo",
    f"{CORE}grpo_passk_outcome_advantage": "pass_at_k",
    f"{CORE}rloo_outcome_advantage": "rloo",
    f"{CORE}opo_outcome_advantage": "opo",
    f"{CORE}gpg_outcome_advantage": "gpg",
    f"{CORE}reinforce_plus_plus_baseline_outcome_advantage": "reinforce_plus_plus_baseline",
}


@pytest.mark.parametrize(
    ("function", "inputs", "outputs"),
    [
        pytest.param(function, *case.values, id=case.id)
        for function in OF_VERL
        for file in ("outcome_advantages", "advantages2")
        for case in cases(file, function)
    ],
)
def test_outcome_advantages_of_verl(function, inputs, outputs):
    name, mask = OF_VERL[function], f32(inputs["response_mask"]) != 0
    options = {"singleton": "keep", **functional.ESTIMATORS[name]}
    if options["scale"] == "group":
        by_std = inputs.get("norm_adv_by_std_in_grpo", True)
        options.update({"eps": 1e-6} if by_std else {"scale": "none"})
    scores = f32(inputs["token_level_rewards"]).sum(-1)
    ours = functional.outcome_advantages(scores, inputs["index"], mask, **options).advantages
    if name == "reinforce_plus_plus_baseline":
        ours = functional.masked_whiten(ours, mask)
    close(ours, outputs["advantages"])


@pytest.mark.parametrize("number", ["", "multi_turn_"])
def test_optimal_token_baseline_of_verl(number):
    function = f"{CORE}{number}optimal_token_baseline_advantage"
    several = [*cases("outcome_advantages", function), *cases("advantages2", function)]
    assert len(several) == (4 if number else 16)
    for inputs, outputs in (case.values for case in several):
        mask, weights = f32(inputs["response_mask"]) != 0, inputs["rollout_is_weights"]
        ours = functional.optimal_token_baseline(
            f32(inputs["token_level_rewards"]),
            f32(inputs["old_log_probs"]),
            f32(inputs["sum_pi_squared"]).log(),
            inputs["index"],
            mask,
            weights=weights and f32(weights),
            step="unmasked" if number else "column",
            lone_tail=inputs["handle_zero_tail"],
        )
        close(ours.advantages, outputs["advantages"], mask, rtol=1e-4)
        close(ours.returns, outputs["returns"], mask)


HELPER = "verl.trainer.ppo.rollout_corr_helper.compute_rollout_"


@pytest.mark.parametrize(
    ("inputs", "outputs"), cases("rollout_correction", f"{HELPER}correction_weights")
)
def test_correction_of_verl(inputs, outputs):
    low, _, high = str(inputs["rollout_is_threshold"]).rpartition("_")
    ours = functional.correction(
        f32(inputs["old_log_prob"]),
        f32(inputs["rollout_log_prob"]),
        f32(inputs["response_mask"]) != 0,
        level={"token": "token", "sequence": "sequence_sum"}[inputs["rollout_is"]],
        low=float(low) if low else None,
        high=float(high),
        outside="zero" if low else "truncate",
        normalise=inputs["rollout_is_batch_normalize"],
    )
    close(ours.weights, outputs["weights"])


@pytest.mark.parametrize(
    ("inputs", "outputs"), cases("rollout_correction", f"{HELPER}rejection_mask")
)
def test_rejections_of_verl(inputs, outputs):
    """Those of verl's k1 are bounds of the rollout's probability over the trainer's, in either
    direction where one number is given."""
    options = {}
    names = zip(inputs["rollout_rs"].split(","), inputs["rollout_rs_threshold"].split(","))
    for prefix, (name, bounds) in zip(("rejection", "second_rejection"), names):
        level, metric = name.rsplit("_", 1)
        low, _, high = bounds.rpartition("_")
        low, high = float(low) if low else None, float(high)
        if metric == "k1":
            low, high = 1 / high, 1 / (low or 1 / high)
        options |= {
            f"{prefix}_metric": "ratio" if metric == "k1" else metric,
            f"{prefix}_level": level.replace("seq", "sequence"),
            f"{prefix}_low": low,
            f"{prefix}_high": high,
        }
    mask = f32(inputs["response_mask"]) != 0
    tensors = (f32(inputs["old_log_prob"]), f32(inputs["rollout_log_prob"]), mask)
    ours = functional.correction(*tensors, level="none", **options)
    assert torch.equal(ours.kept, f32(outputs["response_mask"]) != 0)


AREAL = "areal.utils.functional.functional"
LOSSES = [f"{AREAL}.{name}" for name in ("ppo_actor_loss_fn", "sapo_loss_fn", "cispo_loss_fn")]


def mean_of_rows(values, mask, offsets):
    """That of the unmasked tokens of each row, on all of its tokens."""
    means = torch.zeros_like(values)
    for start, end in zip(offsets, offsets[1:]):
        row = slice(start, end)
        means[row] = (values[row] * mask[row]).sum() / mask[row].sum().clamp(min=1)
    return means


@pytest.mark.parametrize(("inputs", "outputs"), cases("packed", *LOSSES, dtype="float32"))
def test_losses_of_areal(inputs, outputs):
    """On packs. A ratio of rows goes with the row's mean advantage, and weights with rejections."""
    of_one_row = [0, len(inputs["logprobs"])]
    offsets = torch.tensor(inputs.get("cu_seqlens", of_one_row))
    mask = f32(inputs["loss_mask"]) != 0
    old_logp = f32(inputs.get("proximal_logprobs") or inputs["old_logprobs"])
    advantages = f32(inputs["advantages"])
    options = {"value_clip_range": None, "log_ratio_clamp": None, "offsets": offsets}
    if "tau_pos" in inputs:
        options |= {f"soft_gate_{name}": inputs[name] for name in ("tau_pos", "tau_neg")}
        options["surrogate"] = "soft_gate"
    else:
        options |= {"clip_range": inputs["eps_clip"], "clip_range_high": inputs["eps_clip_higher"]}
        options["dual_clip"] = inputs.get("c_clip")
        options["surrogate"] = "clip" if "c_clip" in inputs else "clipped_weight"
    if inputs.get("importance_sampling_level") == "sequence":
        options["ratio"] = "sequence_mean"
        advantages = mean_of_rows(advantages, mask, offsets)
    if rule := inputs.get("rejection_sampling"):
        of_rows, is_ratio = rule["level"] == "sequence", rule["metric"] == "ratio"
        corrected = functional.correction(
            old_logp,
            f32(inputs["old_logprobs"]),
            mask,
            level="sequence_mean" if of_rows and is_ratio else "token",
            high=None,
            log_ratio_clamp=None,
            rejection_metric="ratio" if is_ratio else "reverse_k3",
            rejection_level=f"sequence_{rule['agg']}" if of_rows else "token",
            rejection_low=rule["lower"],
            rejection_high=rule["upper"],
            offsets=offsets,
        )
        options["weights"] = corrected.weights
    logp = f32(inputs["logprobs"]).requires_grad_()
    loss, _ = functional.ppo_loss(logp, old_logp, advantages, mask, **options)
    loss.backward()
    close(loss, outputs["loss"])
    close(logp.grad, outputs["grad_logprobs"])


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    cases("packed", f"{AREAL}.dpo_pair_logratios + dpo_preference_loss", dtype="float32"),
)
def test_dpo_of_areal(inputs, outputs):
    """Its rows alternate, chosen and rejected; the last position of a row has no target."""
    offsets, logp = torch.tensor(inputs["cu_seqlens"]), f32(inputs["logprobs"])
    targets = functional.targets_from_tokens(f32(inputs["loss_mask"]).long(), offsets, ignore=0)
    rows = [slice(start, end) for start, end in zip(offsets, offsets[1:])]
    order = torch.cat([torch.arange(len(logp))[row] for row in rows[::2] + rows[1::2]])
    lengths = (offsets[1:] - offsets[:-1]).reshape(-1, 2).T.flatten()
    ends = torch.cat((offsets[:1], lengths.cumsum(0)))
    leaf = logp[order].requires_grad_()
    given = (f32(inputs["ref_logprobs"])[order], targets[order])
    ours = functional.preference_loss(leaf, *given, beta=inputs["beta"], offsets=ends)
    ours.loss.backward()
    close(ours.loss, outputs["loss"])
    close(leaf.grad, [outputs["grad_logprobs"][place] for place in order])


@pytest.mark.parametrize(("inputs", "outputs"), cases("packed", f"{AREAL}.masked_normalization"))
def test_normalization_of_areal(inputs, outputs):
    """A pack's tokens as they are: rows do not matter."""
    mask = f32(inputs["mask"]) != 0
    options = {"unbiased": inputs["unbiased"], "eps": inputs["eps"], "eps_placement": "std"}
    ours = functional.masked_whiten(f32(inputs["x"]), mask, **options)
    close(ours, outputs["normalized"], mask)
