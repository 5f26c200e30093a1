"""Says what an installation is and whether it computes right::

    python -m ppo_kernels.doctor

Prints the library's version, the processor's instructions and threads, CUDA, and the trainers that
can be patched; then every function is run once on NumPy arrays, and on PyTorch's CPU and GPU where
they are there, and compared with float64. It ends with status 1 if one of them is not right.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import _lib, numpy, patch

__all__ = ["check", "main"]

# Rows, tokens of a row, and size of the vocabulary. Logits of a row are in parts on a GPU.
_SHAPE, _VOCAB = (5, 37), 20_011
# Of the largest number: float32 has 1.2e-7.
_TOLERANCE = 1e-5


def _samples(rng: np.random.Generator) -> dict[str, Any]:
    """Arguments of all functions, in float32."""

    def draw(*shape: int, scale: float = 1.0, centre: float = 0.0) -> np.ndarray:
        return rng.normal(centre, scale, shape).astype(np.float32)

    rows, tokens = _SHAPE
    mask = rng.random(_SHAPE) > 0.2
    mask[:, 0] = True
    logp = -np.abs(draw(*_SHAPE, centre=1.0))
    own = np.exp(2 * logp)
    return {
        "logits": draw(rows, _VOCAB, scale=3.0),
        "ref_logits": draw(rows, _VOCAB, scale=3.0),
        "index": rng.integers(0, _VOCAB, rows),
        "hidden": draw(rows, 16),
        "weight": draw(_VOCAB, 16),
        "logp": logp,
        "log_sums": np.log(own + 0.5 * (1 - own)),
        "one_group": np.zeros(rows, np.int64),
        "old_logp": logp + draw(*_SHAPE, scale=0.3),
        "advantages": draw(*_SHAPE),
        "values": draw(*_SHAPE),
        "rewards": draw(*_SHAPE),
        "scores": draw(rows * 4),
        "groups": np.repeat(np.arange(rows), 4),
        "chosen": draw(tokens),
        "rejected": draw(tokens),
        "mask": mask,
    }


# --- The formulas, in float64 ---


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def _picked(z: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.take_along_axis(_log_softmax(z), index[:, None], -1)[:, 0]


def _entropy(z: np.ndarray) -> np.ndarray:
    logp = _log_softmax(z)
    return -(np.exp(logp) * logp).sum(-1)


def _gae(values: np.ndarray, rewards: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """With gamma 0.99 and lambda 0.95; masked tokens are no steps."""
    advantages = np.zeros_like(values)
    for row in range(len(values)):
        after, value_after = 0.0, 0.0
        for t in reversed(range(values.shape[1])):
            if mask[row, t]:
                delta = rewards[row, t] + 0.99 * value_after - values[row, t]
                after = advantages[row, t] = delta + 0.99 * 0.95 * after
                value_after = values[row, t]
    return advantages


def _grpo(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    of_groups = scores.reshape(-1, 4)
    assert (groups == np.repeat(np.arange(len(of_groups)), 4)).all()
    centred = of_groups - of_groups.mean(1, keepdims=True)
    return (centred / (of_groups.std(1, ddof=1, keepdims=True) + 1e-4)).ravel()


def _token_baseline(
    rewards: np.ndarray, logp: np.ndarray, log_sums: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """Of rows that are all one group."""
    returns = np.where(mask, rewards, 0.0)[:, ::-1].cumsum(1)[:, ::-1]
    norms = np.where(mask, 1 - 2 * np.exp(logp) + np.exp(log_sums), 0.0)
    weights = np.where(mask, norms.cumsum(1), 0.0)
    baseline = (weights * returns).sum(0) / (weights.sum(0) + 1e-8)
    lengths = mask.sum(1)
    second = np.sort(lengths)[-2]
    in_tail = (lengths > second)[:, None] & (np.arange(mask.shape[1]) >= second)
    return np.where(mask, returns - np.where(in_tail, 0.0, baseline), 0.0)


def _whitened(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    kept = values[mask]
    return np.where(mask, (values - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8), 0.0)


def _clipped(
    logp: np.ndarray, old_logp: np.ndarray, advantages: np.ndarray, mask: np.ndarray
) -> tuple[float, np.ndarray]:
    """The clipped surrogate, averaged over the unmasked tokens, and its gradient."""
    ratio = np.exp(logp - old_logp)
    unclipped, clipped = -ratio * advantages, -np.clip(ratio, 0.8, 1.2) * advantages
    flows = mask & (unclipped >= clipped)
    loss = np.maximum(unclipped, clipped)[mask].mean()
    return loss, np.where(flows, unclipped, 0.0) / mask.sum()


def _dpo(margins: np.ndarray) -> float:
    return np.logaddexp(0.0, -margins).mean()


# --- What is compared ---

Compared = tuple[str, Any, Any]


def _compared(run: Any, given: dict[str, Any]) -> Iterator[Compared]:
    """Names, results of the functions ``run`` has, and what they are in float64."""
    exact = {k: x.astype(np.float64) if x.dtype == np.float32 else x for k, x in given.items()}

    def pick(names: str, among: dict[str, Any] = given) -> list[Any]:
        return [among[name] for name in names.split()]

    z, ref, index, mask = pick("logits ref_logits index mask", exact)
    of_row = _picked(z, index)
    yield "selective_log_softmax", run.selective_log_softmax(*pick("logits index")), of_row
    logp, entropy = run.logprobs_and_entropy(*pick("logits index"))[:2]
    yield "logprobs_and_entropy", (logp, entropy), (of_row, _entropy(z))
    hidden, weight = pick("hidden weight", exact)
    found = run.linear_logprobs(*pick("hidden weight index")).logp
    yield "linear_logprobs", found, _picked(hidden @ weight.T, index)
    new, old, advantages = pick("logp old_logp advantages", exact)
    difference = new - old
    k3 = np.where(mask, np.expm1(-difference) + difference, 0.0)
    found = run.token_kl(*pick("logp old_logp mask"), estimator="k3")
    yield "token_kl", found, k3
    p, q = _log_softmax(z), _log_softmax(ref)
    found = run.full_kl(*pick("logits ref_logits"))
    yield "full_kl", found, (np.exp(p) * (p - q)).sum(-1)
    found = run.gae(*pick("values rewards mask"), gamma=0.99, lam=0.95, whiten=False).advantages
    yield "gae", found, _gae(*pick("values rewards mask", exact))
    found = run.outcome_advantages(*pick("scores groups")).advantages
    yield "outcome_advantages", found, _grpo(*pick("scores groups", exact))
    names = "rewards logp log_sums"
    found = run.optimal_token_baseline(*pick(f"{names} one_group mask")).advantages
    yield "optimal_token_baseline", found, _token_baseline(*pick(f"{names} mask", exact))
    found = run.masked_whiten(*pick("values mask"))
    yield "masked_whiten", found, _whitened(*pick("values mask", exact))
    found = run.correction(*pick("logp old_logp mask")).weights
    yield "correction", found, np.where(mask, np.minimum(np.exp(difference), 2.0), 0.0)
    found = run.clipped_loss(*pick("logp old_logp advantages mask"))
    yield "ppo_loss and its gradient", found, _clipped(new, old, advantages, mask)
    chosen, rejected = pick("chosen rejected", exact)
    both = np.concatenate(pick("chosen rejected"))
    found = run.preference_loss(both, np.zeros_like(both), beta=0.1).loss
    yield "preference_loss", found, _dpo(0.1 * (chosen - rejected))
    found = run.reward_model_loss(*pick("chosen rejected"))[0]
    yield "reward_model_loss", found, _dpo(chosen - rejected)


class _Arrays:
    """The functions on arrays."""

    def __getattr__(self, name: str) -> Any:
        return getattr(numpy, name)

    def clipped_loss(self, *given: Any) -> tuple[float, np.ndarray]:
        loss, _, gradients = numpy.ppo_loss(*given)
        return loss, gradients["logp"]


class _Tensors:
    """The functions on tensors of a device, which take and give arrays."""

    def __init__(self, device: str) -> None:
        self._device = device

    def _tensor(self, x: Any) -> Any:
        import torch

        return torch.from_numpy(x).to(self._device) if isinstance(x, np.ndarray) else x

    def __getattr__(self, name: str) -> Callable:
        from . import functional

        function = getattr(functional, name)
        return lambda *given, **options: function(*map(self._tensor, given), **options)

    def clipped_loss(self, logp: np.ndarray, *given: Any) -> tuple[Any, Any]:
        leaf = self._tensor(logp).requires_grad_()
        loss, _ = self.ppo_loss(leaf, *given)
        loss.backward()
        return loss.detach(), leaf.grad


def _error(found: Any, expected: Any) -> float:
    """The largest difference, as a share of the largest number."""
    if isinstance(expected, tuple):
        return max(map(_error, found, expected))
    found = np.asarray(found.cpu() if hasattr(found, "cpu") else found, np.float64)
    if found.shape != np.shape(expected) or not np.isfinite(found).all():
        return np.inf
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


def check(device: str) -> Iterator[tuple[str, float | Exception]]:
    """Runs every function once on ``numpy``, or on a device of PyTorch's; gives their names and
    largest errors, as shares of the largest number, or what they raised."""
    run = _Arrays() if device == "numpy" else _Tensors(device)
    compared = _compared(run, _samples(np.random.default_rng(0)))
    while True:
        try:
            name, found, expected = next(compared)
            yield name, _error(found, expected)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001
            yield "a function", error
            return


# --- What is said of the installation ---


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda() -> tuple[str, bool]:
    """What is there of CUDA, and whether the functions can be run on it."""
    if not _version("torch"):
        return "not looked for without PyTorch", False
    import torch

    if not torch.cuda.is_available():
        return "none that PyTorch sees", False
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return f"{torch.cuda.get_device_name()}, compute capability {capability}", True


def _facts() -> Iterator[tuple[str, str]]:
    yield "ppo-kernels", f"{_lib.version_string().decode()}, {_lib._path()}"
    machine = f"{platform.machine()} {platform.system()}, {_lib.instruction_set().decode()}"
    yield "processor", f"{machine}, {_lib.num_threads()} threads"
    yield "CUDA", _cuda()[0]
    versions = [f"Python {platform.python_version()}", f"NumPy {np.__version__}"]
    yield "beside it", ", ".join((*versions, f"PyTorch {_version('torch') or 'not installed'}"))
    for package in patch.PACKAGES:
        found = _version(package)
        yield package, found or "not installed"
    setting = os.environ.get(patch.VARIABLE)
    yield patch.VARIABLE, setting or "not set: nothing is patched by it"


def main() -> int:
    """Prints all that, and returns the process's status."""
    if _version("torch"):
        from . import functional  # noqa: F401  # the threads are torch's from here on
    for name, fact in _facts():
        print(f"{name:<18} {fact}")
    devices = ["numpy"]
    if _version("torch"):
        devices += ["cpu", "cuda"] if _cuda()[1] else ["cpu"]
    wrong = 0
    for device in devices:
        print(f"\n{device}: largest error against float64, of the largest number")
        for name, error in check(device):
            good = isinstance(error, float) and error < _TOLERANCE
            wrong += not good
            said = (
                f"{error:.1e}" if isinstance(error, float) else f"{type(error).__name__}: {error}"
            )
            print(f"  {name:<26} {said}{'' if good else '   WRONG'}")
    print("\nall right" if not wrong else f"\n{wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
