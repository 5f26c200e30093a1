"""Ours beside eager PyTorch, torch.compile and other packages' functions: same tensors, one run.

    python bench.py                  the CPU, with two threads
    python bench.py --device cuda    the GPU: GB/s, and the share of the copy speed of the same run
    python bench.py --only gae       the groups with that in their name; may be given several times
    python bench.py --without verl   no candidate with that in its name; ours and eager PyTorch stay

Each group first checks that all give the same, and leaves out who does not. A group in which ours
fails, or differs from eager PyTorch, is left out too, and makes the run end with an error once the
others are measured. Then they take turns, each with a call that is not counted and calls that are,
and medians are reported: on the CPU by the clock, on CUDA by events, with the L2 cache overwritten
in between. Packages that are not installed are left out, and so are those that do not import; of
TRL, verl and OpenRLHF `pip install --no-deps` is enough.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

THREADS = 2
SEQUENCES = 8  # that rows of logits are divided into, as TRL and verl loop over them
os.environ.setdefault("RAYON_NUM_THREADS", str(THREADS))

import numpy as np  # noqa: E402
import torch  # noqa: E402  after the number of threads is set
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402


def importable(module: str, name: str) -> Callable | None:
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # what does not import is left out, and said to be
        print(f"{module} is left out: {error}", file=sys.stderr)
        return None


# Before the peers, as these are not to meet the stand-ins for what the peers import.
LIGER = importable("liger_kernel.transformers.functional", "liger_cross_entropy")
QUACK = importable("quack.cross_entropy", "cross_entropy")
QUACK_WITH_GRADIENT = importable("quack.cross_entropy", "cross_entropy_fwd")

sys.path.append(str(Path(__file__).parent / "tests"))
import formulas  # noqa: E402
import peers  # noqa: E402

import ppo_kernels  # noqa: E402


class Group(NamedTuple):
    """What is compared. The first candidate is ours, the second eager PyTorch."""

    name: str
    candidates: dict[str, Callable[[], object]]
    bytes: int  # that have to be moved at least
    repeat: int = 1  # calls for one sample
    restore: dict[str, Callable[[], object]] = {}  # puts back what a candidate writes over

    def put_back(self, name: str) -> None:
        if name in self.restore:
            self.restore[name]()


def function_of(module: str, name: str) -> Callable | None:
    try:
        found = peers.find(module)
    except Exception as error:
        print(f"{module} is left out: {error}", file=sys.stderr)
        return None
    return getattr(found, name, None)


def present(candidates: dict[str, Callable | None]) -> dict[str, Callable]:
    return {name: call for name, call in candidates.items() if call is not None}


def bound(function: Callable | None, *arguments: object, **options: object) -> Callable | None:
    return None if function is None else lambda: function(*arguments, **options)


# --- What eager PyTorch, and what is compiled, does ---


def eager_logprobs(logits: Tensor, index: Tensor) -> Tensor:
    return F.log_softmax(logits, -1).gather(-1, index.unsqueeze(-1)).squeeze(-1)


def rowwise(cross_entropy: Callable, logits: Tensor, index: Tensor) -> Tensor:
    loss = cross_entropy(logits.flatten(0, -2), index.flatten(), reduction="none")
    return -loss.view(index.shape)


def negated_cross_entropy(logits: Tensor, index: Tensor) -> Tensor:
    return rowwise(F.cross_entropy, logits, index)


def eager_entropy(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    logp = F.log_softmax(logits, -1)
    return logp.gather(-1, index.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def eager_full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    p, q = F.log_softmax(logits, -1), F.log_softmax(ref_logits, -1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def eager_token_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    d = (logp - ref_logp).clamp(-20, 20)
    return (torch.exp(-d) - 1 + d).clamp(-10, 10)


def eager_gae(values: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return formulas.gae(values, rewards, mask, 1.0, 0.95)


def eager_whiten(values: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum()
    mean = torch.where(mask, values, 0.0).sum() / count
    centred = torch.where(mask, values - mean, 0.0)
    return centred * torch.rsqrt(centred.square().sum() / (count - 1) + 1e-8)


def eager_whitened_gae(values: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    advantages, returns = eager_gae(values, rewards, mask)
    return eager_whiten(advantages, mask), returns


# --- Groups ---


def forward(function: Callable, *arguments: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> object:
        return function(*arguments)

    return call


def both(function: Callable, upstream: Tensor, leaf: Tensor, *arguments: Tensor) -> Callable:
    def call() -> Tensor:
        leaf.grad = None
        result = function(leaf, *arguments)
        result = result if isinstance(result, tuple) else (result,)
        torch.autograd.backward(result, [upstream.to(part.dtype) for part in result])
        return leaf.grad

    return call


# On CUDA these write the gradient over the logits, and get logits that no other is given.
WRITE_OVER_LOGITS = ("verl", "Liger-Kernel")


def logprob_groups(rows: int, vocab: int, dtype: torch.dtype, device: str) -> Iterator[Group]:
    batch = (SEQUENCES, rows // SEQUENCES)
    logits = torch.randn(*batch, vocab, dtype=dtype, device=device).requires_grad_()
    index = torch.randint(vocab, batch, device=device)
    upstream = torch.randn(batch, device=device)
    size = logits.nbytes
    shape = f"{str(dtype).removeprefix('torch.')} {rows} x {vocab}"
    liger, quack = (LIGER, QUACK) if device == "cuda" else (None, None)
    functions = {
        "ours": ppo_kernels.selective_log_softmax,
        "eager log_softmax + gather": eager_logprobs,
        "eager cross_entropy": negated_cross_entropy,
        "torch.compile": torch.compile(eager_logprobs),
        "TRL": function_of("trl.trainer.utils", "selective_log_softmax"),
        "verl": function_of("verl.utils.torch_functional", "logprobs_from_logits"),
        "OpenRLHF": function_of("openrlhf.models.utils", "log_probs_from_logits"),
        "Liger-Kernel": liger and functools.partial(rowwise, liger),
        "QuACK": quack and functools.partial(rowwise, quack),
    }
    functions = present(functions)
    given, restore = dict.fromkeys(functions, logits), {}
    if device == "cuda" and not functions.keys().isdisjoint(WRITE_OVER_LOGITS):
        own = logits.detach().clone().requires_grad_()
        for name in functions.keys() & WRITE_OVER_LOGITS:
            given[name] = own
            restore[name] = lambda: own.detach().copy_(logits.detach())
    forwards = {n: forward(f, given[n], index) for n, f in functions.items()}
    yield Group(f"logprob forward {shape}", forwards, size, restore=restore)
    gradients = {n: both(f, upstream, given[n], index) for n, f in functions.items()}
    yield Group(f"logprob forward + backward {shape}", gradients, 3 * size, restore=restore)
    if device == "cuda":
        yield cross_entropy_group(logits, index, shape)

    functions = present(
        {
            "ours": ppo_kernels.logprobs_and_entropy,
            "eager": eager_entropy,
            "torch.compile": torch.compile(eager_entropy),
            "TRL": function_of("trl.trainer.utils", "selective_log_softmax_and_entropy"),
        }
    )
    name = "logprob and entropy"
    forwards = {n: forward(f, logits, index) for n, f in functions.items()}
    yield Group(f"{name} forward {shape}", forwards, size)
    gradients = {n: both(f, upstream, logits, index) for n, f in functions.items()}
    yield Group(f"{name} forward + backward {shape}", gradients, 3 * size)


def eager_head(hidden: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return eager_entropy(F.linear(hidden, weight), index)


def head_groups(
    rows: int, hidden_size: int, vocab: int, dtype: torch.dtype, device: str
) -> Iterator[Group]:
    """From hidden states, with the entropy: the gradients of hidden states and weight."""
    hidden = torch.randn(rows, hidden_size, device=device).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden_size, device=device).mul_(hidden_size**-0.5)
    weight = weight.to(dtype).requires_grad_()
    index = torch.randint(vocab, (rows,), device=device)
    upstream = torch.randn(2, rows, device=device).unbind()
    trl = function_of("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")
    verl = function_of("verl.utils.experimental.torch_functional", "FusedLinearForPPOFunction")

    def of_trl(hidden: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        options = (1.0, 32768, None, 1.0, ("entropy",))
        return trl.apply(hidden, weight, None, index, *options)[:2]

    functions = {
        "ours": lambda *given: ppo_kernels.linear_logprobs(*given, outputs=["entropy"])[:2],
        "eager": eager_head,
        "TRL": trl and of_trl,
        "verl": verl and (lambda h, w, i: verl.apply(h[None], w, i[None], 1.0, 512)),
    }

    def gradients(function: Callable) -> Callable[[], tuple]:
        def call() -> tuple:
            hidden.grad = weight.grad = None
            found = function(hidden, weight, index)
            upstreams = [g.view_as(part).to(part.dtype) for g, part in zip(upstream, found)]
            torch.autograd.backward(found, upstreams)
            return hidden.grad, weight.grad

        return call

    candidates = {name: gradients(call) for name, call in present(functions).items()}
    shape = f"{str(dtype).removeprefix('torch.')} {rows} x {hidden_size} x {vocab}"
    yield Group(f"head forward + backward {shape}", candidates, 0)


def cross_entropy_group(logits: Tensor, index: Tensor, shape: str) -> Group:
    """The gradient of the negated log-probabilities, each taken once: QuACK's forward pass can give
    it too, and then reads the logits once."""
    upstream = -torch.ones(index.shape, device=logits.device)
    rows = logits.detach().flatten(0, -2), index.flatten()
    quack = QUACK_WITH_GRADIENT
    functions = {
        "ours": ppo_kernels.selective_log_softmax,
        "eager cross_entropy": negated_cross_entropy,
    }
    candidates = {n: both(f, upstream, logits, index) for n, f in functions.items()}
    candidates["QuACK, return_dx"] = quack and (lambda: quack(*rows, return_dx=True)[1])
    return Group(f"cross entropy and gradient {shape}", present(candidates), 2 * logits.nbytes)


def full_kl_groups(rows: int, vocab: int, dtype: torch.dtype, device: str) -> Iterator[Group]:
    logits, ref_logits = torch.randn(2, rows, vocab, dtype=dtype, device=device)
    logits = logits.requires_grad_()
    upstream = torch.randn(rows, device=device)
    functions = {
        "ours": ppo_kernels.full_kl,
        "eager": eager_full_kl,
        "torch.compile": torch.compile(eager_full_kl),
    }
    shape = f"{str(dtype).removeprefix('torch.')} {rows} x {vocab}"
    forwards = {n: forward(f, logits, ref_logits) for n, f in functions.items()}
    yield Group(f"full_kl forward {shape}", forwards, 2 * logits.nbytes)
    gradients = {n: both(f, upstream, logits, ref_logits) for n, f in functions.items()}
    yield Group(f"full_kl forward + backward {shape}", gradients, 5 * logits.nbytes)
    for divergence in ("jsd", "total_variation"):
        given = {"divergence": divergence}
        functions = {
            "ours": functools.partial(ppo_kernels.full_kl, **given),
            "eager": functools.partial(formulas.full_kl, **given),
            "torch.compile": torch.compile(functools.partial(formulas.full_kl, **given)),
        }
        gradients = {n: both(f, upstream, logits, ref_logits) for n, f in functions.items()}
        yield Group(f"{divergence} forward + backward {shape}", gradients, 5 * logits.nbytes)


def token_kl_groups(batch: int, seq_len: int, device: str) -> Iterator[Group]:
    """The estimator k3, clamped as in verl."""
    logp, ref_logp, upstream = torch.randn(3, batch, seq_len, device=device)
    logp = logp.requires_grad_()
    verl = function_of("verl.trainer.ppo.core_algos", "kl_penalty")
    openrlhf = function_of("openrlhf.models.utils", "compute_approx_kl")
    functions = present(
        {
            "ours": functools.partial(
                ppo_kernels.token_kl, estimator="k3", log_ratio_clamp=20.0, output_clamp=10.0
            ),
            "eager": eager_token_kl,
            "torch.compile": torch.compile(eager_token_kl),
            "verl": verl and (lambda a, b: verl(a, b, "low_var_kl")),
            "OpenRLHF": openrlhf and functools.partial(openrlhf, kl_estimator="k3"),
        }
    )
    shape, size = f"{batch} x {seq_len}", logp.nbytes
    forwards = {n: forward(f, logp, ref_logp) for n, f in functions.items()}
    yield Group(f"token_kl forward {shape}", forwards, 3 * size)
    gradients = {n: both(f, upstream, logp, ref_logp) for n, f in functions.items()}
    yield Group(f"token_kl forward + backward {shape}", gradients, 7 * size)


# Steps that torch.compile unrolls in some seconds; those of a long sequence take it many minutes.
COMPILED_STEPS = 64


def gae_groups(batch: int, seq_len: int, device: str) -> Iterator[Group]:
    values, rewards = torch.randn(2, batch, seq_len, device=device)
    mask = torch.ones(batch, seq_len, dtype=torch.bool, device=device)
    number = mask.float()
    compiled = seq_len <= COMPILED_STEPS
    verl = function_of("verl.trainer.ppo.core_algos", "compute_gae_advantage_return")
    maker = function_of("openrlhf.trainer.ppo_utils.experience_maker", "RemoteExperienceMaker")
    openrlhf = maker and (
        lambda: maker.get_advantages_and_returns(None, values, rewards, number, 1.0, 0.95)
    )
    arguments = (values, rewards, mask)
    plain = {
        "ours": lambda: ppo_kernels.gae(*arguments)[:2],
        "eager loop": bound(eager_gae, *arguments),
        "torch.compile": bound(torch.compile(eager_gae), *arguments) if compiled else None,
        "OpenRLHF": openrlhf,
    }
    whitened = {
        "ours": lambda: ppo_kernels.gae(*arguments, whiten=True)[:2],
        "eager loop": bound(eager_whitened_gae, *arguments),
        "verl": bound(verl, rewards, values, number, 1.0, 0.95),
    }
    size = 4 * values.nbytes + mask.nbytes
    yield Group(f"gae {batch} x {seq_len}", present(plain), size)
    yield Group(f"gae, whitened {batch} x {seq_len}", present(whitened), size + 2 * values.nbytes)


def eager_grpo(rewards: Tensor, mask: Tensor, size: int) -> Tensor:
    """Groups of rows that stand after each other, as TRL has them."""
    grouped = rewards.sum(-1).view(-1, size)
    deviations = grouped - grouped.mean(1, keepdim=True)
    advantages = deviations / (grouped.std(1, keepdim=True) + 1e-6)
    return advantages.view(-1, 1) * mask


def advantages_groups(batch: int, seq_len: int, size: int, device: str) -> Iterator[Group]:
    """From token rewards, of which the last is a score, to GRPO's advantages of tokens."""
    rewards = torch.zeros(batch, seq_len, device=device)
    rewards[:, -1] = torch.randn(batch, device=device)
    mask = torch.ones(batch, seq_len, device=device)
    ids = torch.arange(batch, device=device) // size
    shuffled = torch.randperm(batch // size, device=device).repeat(size)
    loop = function_of("verl.trainer.ppo.core_algos", "compute_grpo_outcome_advantage")
    vector = function_of("verl.trainer.ppo.core_algos", "compute_grpo_vectorized_outcome_advantage")

    def ours(groups: object, group_size: int | None = None) -> Tensor:
        scores = rewards.sum(-1)
        given = {"group_size": group_size, "eps": 1e-6}
        return ppo_kernels.outcome_advantages(scores, groups, flags, **given).advantages

    def of_verl(function: Callable | None, index: object) -> Callable | None:
        return function and (lambda: function(rewards, mask, index)[0])

    shape, bytes = f"{batch} x {seq_len} in groups of {size}", rewards.nbytes * 3
    flags = mask.bool()
    index = ids.cpu().numpy()
    strings = np.array([f"prompt {i}" for i in range(batch // size)], object).repeat(size)
    ordered = {
        "ours": lambda: ours(None, size),
        "eager": lambda: eager_grpo(rewards, mask, size),
        "ours, by ids": lambda: ours(ids),
        "verl's loop": of_verl(loop, index),
        "verl, vectorised": of_verl(vector, index),
        "ours, by strings": lambda: ours(strings),
        "verl's loop, by strings": of_verl(loop, strings),
        "verl, vectorised, by strings": of_verl(vector, strings),
    }
    yield Group(f"grpo {shape}", present(ordered), bytes)
    order = shuffled.argsort(stable=True)
    back = order.argsort()
    scattered = {
        "ours": lambda: ours(shuffled),
        "eager": lambda: eager_grpo(rewards[order], mask, size)[back],
        "verl's loop": of_verl(loop, shuffled.cpu().numpy()),
        "verl, vectorised": of_verl(vector, shuffled.cpu().numpy()),
    }
    yield Group(f"grpo, scattered {shape}", present(scattered), bytes)


def token_baseline_groups(batch: int, seq_len: int, size: int, device: str) -> Iterator[Group]:
    """Groups of rows after each other, of which two at least have all tokens."""
    rewards = torch.zeros(batch, seq_len, device=device)
    rewards[:, -1] = torch.randn(batch, device=device)
    logp = -torch.rand(batch, seq_len, device=device) * 3
    log_sums = (2 * logp).exp().add(0.5 * (1 - (2 * logp).exp())).log()
    mask = torch.ones(batch, seq_len, dtype=torch.bool, device=device)
    groups = torch.arange(batch, device=device) // size
    given, squares = (rewards, logp, log_sums, groups, mask), log_sums.exp()
    name = "compute_optimal_token_baseline_advantage"
    theirs = function_of("verl.trainer.ppo.core_algos", name)
    index = groups.cpu().numpy()

    def verl() -> Tensor:
        return theirs(rewards, mask.float(), index, logp, squares)

    candidates = {
        "ours": bound(ppo_kernels.optimal_token_baseline, *given),
        "eager": bound(formulas.optimal_token_baseline, *given),
        "verl": theirs and verl,
    }
    shape = f"{batch} x {seq_len} in groups of {size}"
    # Three inputs and the mask; advantages and returns.
    size = 5 * rewards.nbytes + mask.nbytes
    yield Group(f"optimal_token_baseline {shape}", present(candidates), size)


def whiten_groups(batch: int, seq_len: int, device: str) -> Iterator[Group]:
    """With nothing masked, as verl leaves that as it is."""
    values = torch.randn(batch, seq_len, device=device)
    mask = torch.ones(batch, seq_len, dtype=torch.bool, device=device)
    verl = function_of("verl.utils.torch_functional", "masked_whiten")
    candidates = {
        "ours": bound(ppo_kernels.masked_whiten, values, mask),
        "eager": bound(eager_whiten, values, mask),
        "torch.compile": bound(torch.compile(eager_whiten), values, mask),
        "verl": bound(verl, values, mask.float()),
    }
    size = 3 * values.nbytes + 2 * mask.nbytes
    yield Group(f"masked_whiten {batch} x {seq_len}", present(candidates), size)


def gradients_of(
    loss: Callable | None, leaves: tuple[Tensor, ...], *arguments: Tensor, **options: object
) -> Callable | None:
    def call() -> tuple:
        for leaf in leaves:
            leaf.grad = None
        result = loss(*arguments, **options)
        (result[0] if isinstance(result, tuple) else result).backward()
        return tuple(leaf.grad for leaf in leaves)

    return loss and call


def ppo_loss_groups(batch: int, seq_len: int, device: str) -> Iterator[Group]:
    tensors = torch.randn(6, batch, seq_len, device=device)
    old_logp, advantages, old_values, returns = tensors[:4]
    logp, values = (tensor.clone().requires_grad_() for tensor in tensors[4:])
    mask = torch.rand(batch, seq_len, device=device) > 0.1
    options = {"values": values, "old_values": old_values, "returns": returns}

    def run(loss: Callable) -> Callable | None:
        return gradients_of(loss, (logp, values), logp, old_logp, advantages, mask, **options)

    candidates = {
        "ours, with statistics": run(ppo_kernels.ppo_loss),
        "eager, without": run(formulas.ppo_loss),
        "torch.compile, without": run(torch.compile(formulas.ppo_loss)),
    }
    # Six inputs, the mask; two gradients, written, and read and written again when scaled.
    size = 12 * logp.nbytes + mask.nbytes
    yield Group(f"ppo_loss forward + backward {batch} x {seq_len}", candidates, size)


def policy_loss_groups(batch: int, seq_len: int, device: str) -> Iterator[Group]:
    """Without a value term, as verl and OpenRLHF have it, and with the dual clip that verl has."""
    old_logp, advantages = torch.randn(2, batch, seq_len, device=device)
    logp = torch.randn(batch, seq_len, device=device, requires_grad=True)
    mask = torch.rand(batch, seq_len, device=device) > 0.1
    number = mask.float()
    vanilla = function_of("verl.trainer.ppo.core_algos", "compute_policy_loss_vanilla")
    module = function_of("openrlhf.models.loss", "PolicyLoss")
    openrlhf = module and module(0.2, 0.2, 3.0, True)
    config = peers.Config(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None)
    config.update(clip_ratio_c=3.0, global_batch_info={})

    def run(loss: Callable | None, mask: Tensor, **options: object) -> Callable | None:
        return gradients_of(loss, (logp,), logp, old_logp, advantages, mask, **options)

    def verl(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> tuple:
        return vanilla(old_logp, logp, advantages, mask, "token-mean", config)

    candidates = {
        "ours, with statistics": run(ppo_kernels.ppo_loss, mask, dual_clip=3.0),
        "eager, without": run(formulas.ppo_loss, mask, dual_clip=3.0),
        "torch.compile, without": run(torch.compile(formulas.ppo_loss), mask, dual_clip=3.0),
        "verl": run(vanilla and verl, number),
        "OpenRLHF": run(openrlhf, number),
    }
    # Three inputs, the mask; the gradient, written, and read and written again when scaled.
    size = 6 * logp.nbytes + mask.nbytes
    yield Group(f"policy loss forward + backward {batch} x {seq_len}", present(candidates), size)


# DRO, whose factor has no default, has no name.
DRO = {"surrogate": "reinforce", "kl_estimator": "k2", "kl_against": "old", "kl_coef": 0.1}


def named_loss_groups(batch: int, seq_len: int, device: str) -> Iterator[Group]:
    """The family, by the losses that have names, with the statistics that ours always has."""
    old_logp = -torch.rand(batch, seq_len, device=device) * 3
    logp = (old_logp + 0.1 * torch.randn(batch, seq_len, device=device)).requires_grad_()
    # One a row, as outcome advantages are.
    advantages = torch.randn(batch, 1, device=device).expand(batch, seq_len).contiguous()
    mask = torch.rand(batch, seq_len, device=device) > 0.1
    tensors = (logp, old_logp, advantages, mask)
    for name in [*formulas.NAMED, "dro"]:

        def of(loss: Callable, name: str = name) -> Callable:
            return gradients_of(functools.partial(loss, name), (logp,), *tensors)

        both = formulas.named_loss_and_stats
        options = DRO if name == "dro" else ppo_kernels.named_loss(name)
        candidates = {
            "ours, with statistics": gradients_of(
                ppo_kernels.ppo_loss, (logp,), *tensors, **options
            ),
            "eager, with statistics": of(both),
            "torch.compile, with statistics": of(torch.compile(both, dynamic=False)),
            "eager, without": of(formulas.named_loss),
            "torch.compile, without": of(torch.compile(formulas.named_loss, dynamic=False)),
        }
        # Three inputs, the mask; the gradient, written, and read and written again when scaled.
        size = 6 * logp.nbytes + mask.nbytes
        yield Group(f"{name} forward + backward {batch} x {seq_len}", candidates, size)


def preference_groups(device: str) -> Iterator[Group]:
    """DPO of 4,096 pairs of 512 tokens, and of 2,048 pairs of sums: as it is written, and ours with
    rewards and statistics."""
    rows, seq_len = 8192, 512
    compiled = torch.compile(formulas.dpo, dynamic=False)
    logp = torch.rand(rows, seq_len, device=device) * -3
    mask = torch.arange(seq_len, device=device) < torch.randint(
        1, seq_len, (rows, 1), device=device
    )
    ref_logp = (logp * mask).sum(-1) + torch.randn(rows, device=device)

    def run(loss: Callable, leaf: Tensor, *rest: Tensor) -> Callable[[], object]:
        return gradients_of(loss, (leaf,), leaf, *rest)

    tokens, sums = logp.requires_grad_(), ref_logp[::2].clone().requires_grad_()
    of_sums = sums.detach() + torch.randn_like(sums)
    candidates = {
        "ours, with statistics": run(ppo_kernels.preference_loss, tokens, ref_logp, mask),
        "eager, without": run(formulas.dpo, tokens, ref_logp, mask),
        "torch.compile, without": run(compiled, tokens, ref_logp, mask),
    }
    # The log-probabilities, the mask twice; the gradient.
    size = 2 * logp.nbytes + 2 * mask.nbytes
    yield Group(f"preference loss forward + backward {rows} x {seq_len}", candidates, size)
    candidates = {
        "ours, with statistics": run(ppo_kernels.preference_loss, sums, of_sums),
        "eager, without": run(formulas.dpo, sums, of_sums),
        "torch.compile, without": run(compiled, sums, of_sums),
    }
    name = f"preference loss forward + backward {sums.numel()} sums"
    yield Group(name, candidates, 3 * sums.nbytes, 20)


def correction_groups(batch: int, seq_len: int, device: str) -> Iterator[Group]:
    """Weights of tokens, truncated, with rows rejected by the mean of k3 and verl's statistics."""
    old_logp = -torch.rand(batch, seq_len, device=device) * 3
    rollout_logp = old_logp + 0.05 * torch.randn(batch, seq_len, device=device)
    mask = torch.rand(batch, seq_len, device=device) > 0.1
    number = mask.float()
    verl = function_of(
        "verl.trainer.ppo.rollout_corr_helper", "compute_rollout_correction_and_rejection_mask"
    )
    options = {"rejection_metric": "k3", "rejection_level": "sequence_mean", "rejection_high": 0.01}

    def ours() -> Tensor:
        return ppo_kernels.correction(old_logp, rollout_logp, mask, **options).weights

    def of_verl() -> Tensor:
        settings = {"rollout_is": "token", "rollout_is_threshold": 2.0}
        settings |= {"rollout_rs": "seq_mean_k3", "rollout_rs_threshold": "0.01"}
        weights, kept, _ = verl(old_logp, rollout_logp, number, **settings)
        return weights.batch["rollout_is_weights"] * kept

    tensors = (old_logp, rollout_logp, mask)
    candidates = {
        "ours, with statistics": ours,
        "eager, without": bound(formulas.correction, *tensors),
        "torch.compile, without": bound(torch.compile(formulas.correction), *tensors),
        "verl, with statistics": verl and of_verl,
    }
    # Both inputs and the mask twice, the weights and the mask that is left.
    size = 5 * old_logp.nbytes + 3 * mask.nbytes
    yield Group(f"correction {batch} x {seq_len}", present(candidates), size)


def packed_groups(device: str) -> Iterator[Group]:
    """Rows of 1 to 2048 tokens, 512 in the mean, one behind the other, with padding, and as many
    tokens in rows of full length. The first row is the same in all, and is what is compared."""
    rows, width = 64, 2048
    lengths = (1 + (width - 1) * (torch.arange(rows) / (rows - 1)) ** 3).long().roll(1)
    lengths[-1] += rows // 4 * width - lengths.sum()
    offsets = torch.cat((torch.zeros(1).long(), lengths.cumsum(0))).to(device)
    mask = torch.arange(width, device=device) < lengths.to(device)[:, None]
    padded = torch.randn(4, rows, width, device=device)
    full = torch.cat((padded[:, :1], padded[:, : rows // 4 - 1]), 1)
    ways = {
        "ours, packed": (padded[:, mask].contiguous(), {"offsets": offsets}),
        "ours, padded": (padded, {"mask": mask}),
        "ours, full rows": (full, {}),
    }
    tokens = int(offsets[-1])

    def first_row(call: Callable) -> Callable:
        def start() -> tuple[Tensor, ...]:
            found = call()
            return tuple(part.flatten()[:width] for part in found)

        return start

    def gae(x: Tensor, options: dict) -> Callable:
        return lambda: ppo_kernels.gae(x[0], x[1], **options)[:2]

    def loss(x: Tensor, options: dict, name: str) -> Callable:
        logp, more = x[2].clone().requires_grad_(), {**ppo_kernels.named_loss(name), **options}
        return gradients_of(ppo_kernels.ppo_loss, (logp,), logp, x[0], x[1], **more)

    def whiten(x: Tensor, options: dict) -> Callable:
        return lambda: (ppo_kernels.masked_whiten(x[0], options.get("mask")),)

    shape, of_token = f"{rows} rows of 1 to {width}", 4 * tokens
    made = {name: first_row(gae(*way)) for name, way in ways.items()}
    yield Group(f"packed gae, {shape}", made, 4 * of_token)
    for name in ("ppo", "gspo"):
        made = {who: first_row(loss(*way, name)) for who, way in ways.items()}
        yield Group(f"packed {name} forward + backward, {shape}", made, 6 * of_token)
    made = {name: first_row(whiten(*way)) for name, way in ways.items() if "full" not in name}
    yield Group(f"packed masked_whiten, {shape}", made, 3 * of_token)


def overhead_groups(device: str) -> Iterator[Group]:
    logits = torch.randn(4, 32, device=device, requires_grad=True)
    index = torch.randint(32, (4,), device=device)
    upstream = torch.ones(4, device=device)
    functions = {
        "ours": ppo_kernels.selective_log_softmax,
        "eager log_softmax + gather": eager_logprobs,
        "eager cross_entropy": negated_cross_entropy,
    }

    def gradient(function: Callable) -> Tensor:
        logits.grad = None
        function(logits, index).backward(upstream)
        return logits.grad

    forwards = {name: bound(f, logits, index) for name, f in functions.items()}
    yield Group("overhead forward 4 x 32", forwards, 0, 1000)
    gradients = {name: bound(gradient, f) for name, f in functions.items()}
    yield Group("overhead forward + backward 4 x 32", gradients, 0, 1000)


CUDA_LOGITS = [
    (8192, 151936),
    (16384, 128256),
    (32768, 50257),
    (4096, 262144),
    (512, 49152),
    (64, 151936),
]


def groups(device: str) -> Iterator[Callable[[], Iterator[Group]]]:
    """Makers of groups, so that the tensors of one are gone before those of the next are made."""
    if device == "cpu":
        for dtype in (torch.float32, torch.bfloat16):
            yield lambda dtype=dtype: logprob_groups(512, 49152, dtype, device)
            yield lambda dtype=dtype: full_kl_groups(512, 49152, dtype, device)
            yield lambda dtype=dtype: head_groups(2048, 576, 49152, dtype, device)
        yield lambda: gae_groups(64, 2048, device)
        yield lambda: gae_groups(64, COMPILED_STEPS, device)
    else:
        for rows, vocab in CUDA_LOGITS:
            yield lambda r=rows, v=vocab: logprob_groups(r, v, torch.bfloat16, device)
            yield lambda r=rows, v=vocab: full_kl_groups(r, v, torch.bfloat16, device)
        for size in ((8192, 4096, 131072), (2048, 3584, 152064)):
            yield lambda size=size: head_groups(*size, torch.bfloat16, device)
        for batch, seq_len in ((8192, 2048), (512, 1024), (16, 131072), (8192, COMPILED_STEPS)):
            yield lambda b=batch, s=seq_len: gae_groups(b, s, device)
    for seq_len in (32, 1024):
        yield lambda s=seq_len: advantages_groups(4096, s, 8, device)
    yield lambda: token_baseline_groups(512, 1024, 8, device)
    batch = 64 if device == "cpu" else 8192
    makers = (token_kl_groups, whiten_groups, correction_groups, ppo_loss_groups)
    for make in (*makers, policy_loss_groups, named_loss_groups):
        yield lambda make=make: make(batch, 2048, device)
    yield lambda: preference_groups(device)
    yield lambda: packed_groups(device)
    yield lambda: overhead_groups(device)


# --- Measuring ---


def agreeing(group: Group) -> Group:
    """Without the candidates whose results begin otherwise than ours, and without those that fail,
    as for want of memory. Raises when ours fails, or ours and eager PyTorch differ."""

    def beginnings(name: str) -> list[Tensor]:
        group.put_back(name)
        result = group.candidates[name]()
        result = result if isinstance(result, tuple) else (result,)
        # Copies, also because a gradient can be what was written over the logits.
        return [part.detach().flatten()[: 1 << 22].float().clone() for part in result]

    ours, eager, *_ = names = list(group.candidates)
    expected = beginnings(ours)
    kept = [ours]
    for name in names[1:]:
        try:
            for a, b in zip(expected, beginnings(name)):
                # Gradients of a mean are small as a whole.
                scale = min(1.0, b.abs().max().item()) if b.numel() else 1.0
                torch.testing.assert_close(a, b, rtol=3e-2, atol=6e-2 * scale)
            kept.append(name)
        except Exception as error:
            if name == eager and isinstance(error, AssertionError):
                raise
            print(f"{group.name}: {name} is left out: {error}", file=sys.stderr)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return group._replace(candidates={name: group.candidates[name] for name in kept})


class Clock:
    """Times of calls, in seconds."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.cache = torch.empty(256 << 20, dtype=torch.uint8, device=device) if self.cuda else None

    def sample(self, group: Group, name: str, repeat: int) -> float:
        call = group.candidates[name]
        call()  # what the one before left behind, threads that still spin included, is not counted
        group.put_back(name)  # nor is this
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            return (time.perf_counter() - start) / repeat
        self.cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeat):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / repeat

    def medians(self, group: Group, budget: float) -> dict[str, float]:
        """Turn by turn, for about as many seconds as said, at least five turns."""
        for name in group.candidates:
            self.sample(group, name, min(group.repeat, 100))
        samples = {name: [] for name in group.candidates}
        start = time.perf_counter()
        while min(map(len, samples.values())) < 5 or time.perf_counter() - start < budget:
            for name in group.candidates:
                samples[name].append(self.sample(group, name, group.repeat))
        return {name: statistics.median(times) for name, times in samples.items()}


def copy_speed(clock: Clock) -> float:
    """Bytes a second of a device-to-device copy, read and written."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = Group("copy", {"ours": lambda: target.copy_(source)}, 2 * source.nbytes)
    return copy.bytes / clock.medians(copy, 1.0)["ours"]


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def without(group: Group, names: list[str]) -> Group:
    """Without the candidates that have one of the names as part of theirs; ours and eager PyTorch
    stay."""
    kept = {
        name: call
        for number, (name, call) in enumerate(group.candidates.items())
        if number < 2 or not any(part in name for part in names)
    }
    return group._replace(candidates=kept)


def rows(group: Group, medians: dict[str, float], speed: float | None) -> Iterator[list[str]]:
    """The cells of each candidate, ours first. With the speed of a copy those of the rates too."""
    ours = next(iter(medians.values()))
    for number, (name, seconds) in enumerate(medians.items()):
        what = "" if number else group.name
        cells = [what, name, duration(seconds), f"{seconds / ours:.2f}"]
        if speed is not None:
            rate = group.bytes / seconds
            cells += [f"{rate / 1e9:.0f}", f"{100 * rate / speed:.0f}%"] if rate else ["", ""]
        yield cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", action="append", help="part of a group's name; repeatable")
    parser.add_argument(
        "--without", action="append", default=[], help="part of a candidate's name; repeatable"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="for each group")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    clock = Clock(arguments.device)
    where, speed = f"CPU, {THREADS} threads", None
    if arguments.device == "cuda":
        speed = copy_speed(clock)
        where = f"{torch.cuda.get_device_name()}, copy at {speed / 1e9:.0f} GB/s"
    print(f"PyTorch {torch.__version__}, ppo-kernels {ppo_kernels.library_version()}, {where}\n")
    columns = ["what", "who", "time", "times ours"]
    columns += ["GB/s", "of a copy"] if arguments.device == "cuda" else []
    print(f"| {' | '.join(columns)} |\n|---|---|{'--:|' * (len(columns) - 2)}", flush=True)
    failed = []
    for make in groups(arguments.device):
        try:
            for group in make():
                if not any(part in group.name for part in arguments.only or [""]):
                    continue
                torch.compiler.reset()  # or what many groups compile stays eager from the ninth on
                try:
                    group = agreeing(without(group, arguments.without))
                    medians = clock.medians(group, arguments.seconds)
                except Exception as error:
                    failed.append(group.name)
                    print(f"{group.name} is left out: {error}", file=sys.stderr)
                    continue
                for cells in rows(group, medians, speed):
                    print(f"| {' | '.join(cells)} |", flush=True)
        except Exception as error:  # as for want of memory for the tensors
            failed.append("the groups that were to be made")
            print(f"groups are left out: {error}", file=sys.stderr)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
