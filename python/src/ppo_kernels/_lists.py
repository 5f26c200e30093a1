"""What goes into every op, listed once: for PyTorch's schemas, for checks, and for the C library.

An op's tensors are in the order of its torch op. A pass has its name in the library, and the order
in which it gets its sizes, tensors, options and results here, by their names in its struct of
arguments. ``tests/test_header.py`` compares all that with the header.
"""

from __future__ import annotations

from typing import NamedTuple

from ._lib import Options, Pass

NUMBERS, FLAGS, MOMENTS, OTHER = "numbers", "flags", "moments", "other"


class Argument(NamedTuple):
    """An input of an op. Its name ends in ``?`` where it is made, if it may be left out."""

    name: str
    type: str  # in the schema of the torch op
    kind: str = OTHER
    per_row: bool = False  # of the shape of the op's first input without its last dimension


def _tensor(name: str, kind: str = OTHER, per_row: bool = False) -> Argument:
    optional = "?" if name.endswith("?") else ""
    return Argument(name.removesuffix("?"), f"Tensor{optional}", kind, per_row)


def numbers(name: str, per_row: bool = False) -> Argument:
    """A float32 for each token, or for each row."""
    return _tensor(name, NUMBERS, per_row)


def flags(name: str, per_row: bool = False) -> Argument:
    """A byte for each token, or for each row, that is not 0 where something holds."""
    return _tensor(name, FLAGS, per_row)


def _pass(name: str, sizes: str, inputs: tuple[Argument, ...], rest: str) -> Pass:
    return Pass(name, (*sizes.split(), *(argument.name for argument in inputs), *rest.split()))


# --- logprob ---

LOGPROB = (_tensor("logits"), _tensor("index"))
LOGPROB_GRADIENTS = (numbers("entropy?"), numbers("grad_logp?"), numbers("grad_entropy?"))
logprob_options = Options("logprob", "logprob")
_BOTH = "rows vocab logits_type targets_type logits targets max log_sum"
logprob_forward = _pass("logprob_forward", _BOTH, (), "entropy options logp")
logprob_backward = _pass("logprob_backward", _BOTH, LOGPROB_GRADIENTS, "options grad_logits")

# --- kl ---

TOKEN_KL = (numbers("logp"), numbers("ref_logp"), flags("mask?"))
token_kl_options = Options("kl_token", "token_kl")
token_kl_forward = _pass("kl_token_forward", "tokens", TOKEN_KL, "options kl")
token_kl_backward = _pass(
    "kl_token_backward", "tokens", TOKEN_KL, "options grad_kl grad_logp grad_ref_logp"
)

FULL_KL = (_tensor("logits"), _tensor("ref_logits"), flags("mask?", per_row=True))
full_kl_options = Options("kl_full", "full_kl")
full_kl_forward = _pass("kl_full_forward", "rows vocab logits_type", FULL_KL, "options stats")
full_kl_backward = _pass(
    "kl_full_backward",
    "rows vocab logits_type",
    FULL_KL,
    "options stats grad_kl grad_logits grad_ref_logits",
)

# --- gae ---

GAE = (
    numbers("values"),
    numbers("rewards?"),
    flags("mask?"),
    numbers("kl?"),
    numbers("scores?", per_row=True),
    flags("has_eos?", per_row=True),
    flags("dones?"),
    numbers("bootstrap?", per_row=True),
)
gae_options = Options("gae", "gae")
gae = _pass("gae", "batch seq_len", GAE, "options advantages returns shaped_rewards moments")

# --- whiten ---

WHITEN = (numbers("values"), flags("mask?"))
whiten_options = Options("whiten", "masked_whiten")
whiten_moments = _pass("whiten_moments", "elements x mask", (), "moments")
whiten_forward = _pass("whiten_forward", "elements x mask moments", (), "options y")
whiten_backward = _pass("whiten_backward", "elements x mask moments", (), "grad_y options grad_x")
whiten_with_backward = _pass(
    "whiten_with_backward", "elements mask moments", (), "grad_y options grad_x"
)

# --- ppo_loss ---

PPO_LOSS = (
    numbers("logp"),
    numbers("old_logp"),
    numbers("advantages"),
    numbers("values?"),
    numbers("old_values?"),
    numbers("returns?"),
    numbers("entropy?"),
    numbers("ref_logp?"),
    flags("mask?"),
)
# Which of them the loss has gradients of.
PPO_LOSS_GRADIENTS = ("logp", "values", "entropy")
_GRADIENTS = " ".join(f"grad_{name}" for name in PPO_LOSS_GRADIENTS)
_STORED = " ".join(f"stored_{name}" for name in PPO_LOSS_GRADIENTS)
ppo_loss_options = Options("ppo_loss", "ppo_loss")
ppo_loss = _pass("ppo_loss", "batch seq_len", PPO_LOSS, f"options stats loss {_GRADIENTS}")
ppo_loss_scale = _pass("ppo_loss_scale", "tokens upstream", (), f"{_STORED} {_GRADIENTS}")
