"""What goes into every op, listed once: for PyTorch's schemas, for checks, and for the C library.

An op's tensors are in the order of its torch op. A pass has its name in the library, and the order
in which it gets its sizes, tensors and results here, by their names in its struct of arguments.
``tests/test_header.py`` compares all that with the header.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from math import inf
from typing import Any, NamedTuple, NoReturn

from . import _header
from ._lib import Options, Pass

NUMBERS, FLAGS, INTEGERS, MOMENTS, OTHER = "numbers", "flags", "integers", "moments", "other"
OFFSETS = "offsets"


class Argument(NamedTuple):
    """An input of an op. Its name ends in ``?`` where it is made, if it may be left out."""

    name: str
    type: str  # in the schema of the torch op
    kind: str = OTHER
    # Of the shape of the op's first input without its last dimension; or the option that says so.
    per_row: bool | str = False
    stacked: int = 0  # that many of this shape


def _tensor(
    name: str, kind: str = OTHER, per_row: bool | str = False, stacked: int = 0
) -> Argument:
    optional = "?" if name.endswith("?") else ""
    return Argument(name.removesuffix("?"), f"Tensor{optional}", kind, per_row, stacked)


_numbers = partial(_tensor, kind=NUMBERS)  # a float32 for each token, or for each row
_flags = partial(_tensor, kind=FLAGS)  # a byte for each, which is not 0 where something holds


_offsets = _tensor("offsets?", kind=OFFSETS)  # where the rows of a pack begin


class Op(NamedTuple):
    """The tensors and the options of an op, by the name that errors give it."""

    name: str
    inputs: tuple[Argument, ...]
    options: Options | Choices | None = None

    def but(self, name: str, *more: Argument) -> Op:
        """One with another name and more inputs."""
        return self._replace(name=name, inputs=(*self.inputs, *more))


def _pass(name: str, op: Op, sizes: str, results: str, inputs: str = "") -> Pass:
    """One with the inputs of an op, which may have other names there, and its options."""
    names = [argument.name for argument in op.inputs]
    tensors = inputs.split() or names
    order = (*sizes.split(), *tensors, *results.split())
    return Pass(name, op.options, order, dict(zip(tensors, names)))


# --- Errors, in the library's words ---


def refuse(op: str, name: str, found: str, expected: object) -> NoReturn:
    raise ValueError(f"{op}: `{name}` {found}, expected {expected}")


def check_shape(op: str, name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    if shape != expected:
        refuse(op, name, f"has shape {list(shape)}", list(expected))


def check_rows(op: str, name: str, shape: Sequence[int], dimension: str) -> None:
    if not shape:
        refuse(op, name, "has shape []", f"[..., {dimension}]")


def rows_of(
    op: Op, tokens: Sequence[int], offsets: Sequence[int] | None, name: str | None = None
) -> tuple[int, ...]:
    """The shape of what there is one of for a row, by those of the tokens and of the offsets. The
    tokens are those of the argument ``name``, or of the first."""
    name = name or op.inputs[0].name
    if offsets is None:
        check_rows(op.name, name, tokens, "seq_len")
        return tuple(tokens[:-1])
    if len(tokens) != 1:
        expected = "[tokens], of all rows one behind the other, with `offsets`"
        refuse(op.name, name, f"has shape {list(tokens)}", expected)
    return _rows_between(op.name, offsets)


def _rows_between(op: str, offsets: Sequence[int]) -> tuple[int]:
    if len(offsets) != 1 or not offsets[0]:
        refuse(op, "offsets", f"has shape {list(offsets)}", "[rows + 1]")
    return (offsets[0] - 1,)


def offsets_among(op: Op, tensors: Sequence[Any]) -> Any:
    """The offsets, if the op takes any and they are given."""
    place = _OFFSETS_AT.get(op.name)
    return None if place is None else tensors[place]


def check_positive(op: str, option: str, value: float) -> None:
    if not 0 < value < inf:
        raise ValueError(f"{op}: option `{option}` is {value}, expected a finite number above 0")


# --- logprob ---

_inputs = (_tensor("logits"), _tensor("index"))
LOGPROB = Op("selective_log_softmax", _inputs, Options("logprob", "logprob"))
LOGPROB_ENTROPY = LOGPROB.but("logprobs_and_entropy")
LOGPROB_BACKWARD = LOGPROB.but(
    "logprob_backward",
    _numbers("stats", per_row=True, stacked=2),
    _numbers("entropy?", per_row=True),
    _numbers("grad_logp?", per_row=True),
    _numbers("grad_entropy?", per_row=True),
)
LOGPROBS = LOGPROB._replace(options=Options("logprob", "logprob", "ignore_index"))
LOGPROBS_BACKWARD = LOGPROBS.but(
    "logprobs_backward", _numbers("stats", per_row=True, stacked=2), _numbers("grad_logp")
)

_sizes = "rows vocab logits_type"
_all = f"{_sizes} targets_type max log_sum"
_inputs = "logits targets entropy"
logprob_forward = _pass("logprob_forward", LOGPROB, _all, "logp", _inputs)
_inputs = f"{_inputs} grad_logp grad_entropy"
_all = f"{_all} columns first_column"
logprob_backward = _pass("logprob_backward", LOGPROB, _all, "grad_logits", _inputs)

# --- linear ---


class Choices(NamedTuple):
    """Options that the library does not know as a struct: by name, their types."""

    kinds: dict[str, str]


_inputs = (
    _tensor("hidden"),
    _tensor("weight"),
    _tensor("index"),
    _tensor("bias?"),
    _tensor("row_temperature?"),
    _tensor("lora_a?"),
    _tensor("lora_b?"),
)
_kinds = {
    "temperature": "float",
    "ignore_index": "int?",
    "logit_scale": "float",
    "softcap": "float?",
    "lora_scale": "float",
}
LINEAR = Op("linear_logprobs", _inputs, Choices(_kinds))
# What may be asked for besides the log-probabilities.
LINEAR_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
LINEAR_BACKWARD = LINEAR.but("linear_logprobs_backward", *LOGPROB_BACKWARD.inputs[2:])
LINEAR_BACKWARD_ROWS = Op(LINEAR_BACKWARD.name, LOGPROB_BACKWARD.inputs[2:])


def check_head(hidden: Sequence[int], weight: Sequence[int], some_columns: bool = False) -> None:
    """With ``some_columns`` the weight is a shard, which may have none."""
    check_rows(LINEAR.name, "hidden", hidden, "hidden_size")
    if not hidden[-1]:
        refuse(LINEAR.name, "hidden", f"has shape {list(hidden)}", "[..., hidden_size] above 0")
    if len(weight) != 2 or weight[1] != hidden[-1] or not (weight[0] or some_columns):
        refuse(LINEAR.name, "weight", f"has shape {list(weight)}", f"[vocab, {hidden[-1]}]")


def wanted_of(outputs: Collection[str]) -> tuple[bool, ...]:
    """Which of them are among these names."""
    for name in outputs:
        if name not in LINEAR_OUTPUTS:
            expected = ", ".join(map(repr, LINEAR_OUTPUTS))
            raise ValueError(f"{LINEAR.name}: `outputs` has {name!r}, expected any of {expected}")
    return tuple(name in outputs for name in LINEAR_OUTPUTS)


_TILES = Op(LINEAR.name, LOGPROB.inputs, Options("logprob", LINEAR.name))
_sums, _tile = "max rest logit weighted", "rows columns first_column vocab logits_type targets_type"
_more = f"{_tile} begins"
logprob_partial = _pass("logprob_partial", _TILES, _more, _sums, "logits targets")
_others = "other_max other_rest other_logit other_weighted"
logprob_merge = _pass("logprob_merge", _TILES, "rows", _sums, _others)
_more = f"{_sums} logp log_sum entropy"
logprob_finish = _pass("logprob_finish", _TILES, "rows vocab targets_type", _more, "targets")
_more = "logits targets max log_sum entropy grad_logp grad_entropy"
logprob_tile_backward = _pass("logprob_backward", _TILES, _tile, "grad_logits", _more)

# --- kl ---

_inputs = (_numbers("logp"), _numbers("ref_logp"), _flags("mask?"))
TOKEN_KL = Op("token_kl", _inputs, Options("kl_token", "token_kl"))
TOKEN_KL_BACKWARD = TOKEN_KL.but("token_kl_backward", _numbers("grad_kl"))

_results = "grad_logp grad_ref_logp"
token_kl_forward = _pass("kl_token_forward", TOKEN_KL, "tokens", "kl")
token_kl_backward = _pass("kl_token_backward", TOKEN_KL_BACKWARD, "tokens", _results)

_inputs = (_tensor("logits"), _tensor("ref_logits"), _flags("mask?", per_row=True))
FULL_KL = Op("full_kl", _inputs, Options("kl_full", "full_kl"))
_stats = _numbers("stats", per_row=True, stacked=_header.KL_FULL_STATS)
FULL_KL_BACKWARD = FULL_KL.but("full_kl_backward", _stats, _numbers("grad_kl", per_row=True))

_sizes, _results = f"{_sizes} stats", "grad_kl grad_logits grad_ref_logits"
full_kl_forward = _pass("kl_full_forward", FULL_KL, _sizes, "")
full_kl_backward = _pass("kl_full_backward", FULL_KL, _sizes, _results)

# --- packs ---

TARGETS = Op("targets_from_tokens", (_tensor("tokens"), _offsets))


def check_offsets(op: str, offsets: Any, tokens: int) -> None:
    """Refuses an array that does not begin at 0, falls, or does not end at the number of tokens."""
    falls = offsets[1:] < offsets[:-1]
    if offsets[0] != 0:
        refuse(op, "offsets", f"begins at {offsets[0]}", "0, where the first row begins")
    if falls.any():
        place = int(falls.argmax()) + 1
        refuse(op, f"offsets[{place}]", f"is {offsets[place]}", "no less than the one before")
    if offsets[-1] != tokens:
        refuse(op, "offsets", f"ends at {offsets[-1]}", f"{tokens}, the number of tokens")


# --- gae ---

_inputs = (
    _numbers("values"),
    _numbers("rewards?"),
    _flags("mask?"),
    _numbers("kl?"),
    _numbers("scores?", per_row=True),
    _flags("has_eos?", per_row=True),
    _flags("dones?"),
    _numbers("bootstrap?", per_row=True),
    _offsets,
    _numbers("lambda_per_row?", per_row=True),
)
GAE = Op("gae", _inputs, Options("gae", "gae"))

gae = _pass("gae", GAE, "batch seq_len", "advantages returns shaped_rewards moments")

# --- advantages ---

_inputs = (
    _numbers("scores", per_row=True),
    _tensor("groups?", INTEGERS, per_row=True),
    _numbers("lengths?", per_row=True),
    _numbers("score_baselines?", per_row=True),
    _flags("mask?"),
    _offsets,
)
ADVANTAGES = Op("outcome_advantages", _inputs, Options("advantages", "outcome_advantages"))

_sizes, _results = "batch seq_len group_size", "advantages token_advantages stats"
advantages = _pass("advantages", ADVANTAGES, _sizes, _results)

_inputs = (
    _numbers("rewards"),
    _numbers("logp"),
    _numbers("log_sum_sq_probs"),
    _tensor("groups?", INTEGERS, per_row=True),
    _numbers("weights?"),
    _flags("mask?"),
    _offsets,
)
TOKEN_BASELINE = Op(
    "optimal_token_baseline", _inputs, Options("optimal_token_baseline", "optimal_token_baseline")
)
_sizes, _results = "batch seq_len group_size", "advantages returns"
optimal_token_baseline = _pass("optimal_token_baseline", TOKEN_BASELINE, _sizes, _results)

# The estimators that the field has names for, as arguments of outcome_advantages.
ESTIMATORS: dict[str, dict[str, Any]] = {
    "grpo": {"baseline": "group", "scale": "group"},
    "dr_grpo": {"baseline": "group", "scale": "none"},
    "rloo": {"baseline": "leave_one_out", "scale": "none"},
    "reinforce_plus_plus_baseline": {"baseline": "group", "scale": "none", "singleton": "keep"},
    "opo": {"baseline": "length_weighted", "scale": "none"},
    "pass_at_k": {"baseline": "runner_up", "scale": "group"},
    "max_rl": {"baseline": "group", "scale": "mean", "eps": 1e-6},
    "gpg": {"baseline": "group", "scale": "nonzero", "eps": 0.0},
    "remax": {"baseline": "none", "scale": "none"},
}


def tokens_of(
    rows: Sequence[int], mask: Sequence[int] | None, offsets: Sequence[int] | None
) -> tuple[int, ...]:
    """The shape of the tokens of the advantages of rows, of which there are none without a mask."""
    if mask is None:
        if offsets is not None:
            raise ValueError(f"{ADVANTAGES.name}: `mask` is missing, which `offsets` needs")
        return (*rows, 0)
    if offsets is None:
        check_rows(ADVANTAGES.name, "mask", mask, "seq_len")
        return (*rows, mask[-1])
    if len(mask) != 1:
        expected = "[tokens], of all rows one behind the other, with `offsets`"
        refuse(ADVANTAGES.name, "mask", f"has shape {list(mask)}", expected)
    check_shape(ADVANTAGES.name, "scores", tuple(rows), _rows_between(ADVANTAGES.name, offsets))
    return (mask[0],)


def check_gdpo(rewards: Sequence[int], weights: int, over: str, masked: bool) -> None:
    check_rows("gdpo_advantages", "rewards", rewards, "rows")
    if weights != rewards[0]:
        refuse("gdpo_advantages", "weights", f"has {weights}", f"{rewards[0]}, one a reward")
    if over not in ("rows", "tokens"):
        raise ValueError(f"gdpo_advantages: `over` is {over!r}, expected one of 'rows', 'tokens'")
    if over == "tokens" and not masked:
        raise ValueError("gdpo_advantages: `mask` is missing, which `over` needs")


# --- whiten ---

_inputs, _moments = (_numbers("values"), _flags("mask?")), _tensor("moments", MOMENTS)
MASKED_MOMENTS = Op("masked_moments", _inputs)
MASKED_WHITEN = Op("masked_whiten", _inputs, Options("whiten", "masked_whiten"))
MASKED_WHITEN_WITH = MASKED_WHITEN.but("masked_whiten", _moments)
_inputs = (_numbers("grad"), _flags("mask?"), _moments, _numbers("values?"))
MASKED_WHITEN_BACKWARD = Op("masked_whiten_backward", _inputs, MASKED_WHITEN.options)

whiten_moments = _pass("whiten_moments", MASKED_MOMENTS, "elements", "moments", "x mask")
whiten_forward = _pass("whiten_forward", MASKED_WHITEN, "elements", "y", "x mask moments")
_inputs = "grad_y mask moments"
_op = MASKED_WHITEN_BACKWARD
whiten_backward = _pass("whiten_backward", _op, "elements", "grad_x x", _inputs)
whiten_with_backward = _pass("whiten_with_backward", _op, "elements", "grad_x", _inputs)

# --- correction ---

_inputs = (_numbers("old_logp"), _numbers("rollout_logp"), _flags("mask?"), _offsets)
CORRECTION = Op("correction", _inputs, Options("correction", "correction"))

correction = _pass("correction", CORRECTION, "batch seq_len", "weights kept stats")


def check_rollout(rollout_logp: object) -> None:
    if rollout_logp is None:
        instead = "without it there is nothing to correct, and ppo_loss takes no `weights`"
        raise ValueError(f"{CORRECTION.name}: `rollout_logp` is missing; {instead}")


# --- ppo_loss ---

_inputs = (
    _numbers("logp"),
    _numbers("old_logp"),
    _numbers("advantages", per_row="advantages_per_row"),
    _numbers("values?"),
    _numbers("old_values?"),
    _numbers("returns?"),
    _numbers("entropy?"),
    _numbers("ref_logp?"),
    _numbers("rollout_logp?"),
    _numbers("weights?", per_row="weights_per_row"),
    _flags("mask?"),
    _offsets,
)
PPO_LOSS = Op("ppo_loss", _inputs, Options("ppo_loss", "ppo_loss"))
# The options that say which of them are of rows: made of their shapes.
PPO_LOSS_PER_ROW = tuple(each.per_row for each in PPO_LOSS.inputs if each.per_row)
# Which of them the loss has gradients of.
PPO_LOSS_GRADIENTS = ("logp", "values", "entropy")
_gradients = [f"grad_{name}" for name in PPO_LOSS_GRADIENTS]
PPO_LOSS_BACKWARD = Op("ppo_loss_backward", (_numbers("grad"), *map(_numbers, _gradients)))

_results = " ".join(_gradients)
ppo_loss = _pass("ppo_loss", PPO_LOSS, "batch seq_len", f"stats loss {_results}")
_stored = _results.replace("grad_", "stored_")
ppo_loss_scale = _pass(
    "ppo_loss_scale", PPO_LOSS_BACKWARD, "tokens", _results, f"upstream {_stored}"
)


def is_per_row(shape: Sequence[int], rows: Sequence[int], tokens: Sequence[int]) -> bool:
    """Whether an array of that shape has a number for each row, by the shapes of those and of the
    tokens."""
    return shape != tokens and shape in (rows, (*rows, 1))


# --- the loss from hidden states ---

# Apart from those of the head, each but the offsets of the shape of the ids.
_others = ("logp", "entropy")
_of_loss = [each for each in PPO_LOSS.inputs if each.name not in _others]
_of_loss = tuple(each for each in _of_loss if not each.name.endswith(("values", "returns")))
LINEAR_PPO_LOSS_ROWS = Op("linear_ppo_loss", _of_loss)
_options = Choices({**LINEAR.options.kinds, **PPO_LOSS.options.kinds})
LINEAR_PPO_LOSS = Op("linear_ppo_loss", (*LINEAR.inputs, *_of_loss), _options)


# --- preference ---

_inputs = (
    _numbers("logp"),
    _numbers("ref_logp?"),
    _numbers("ref_sums?", per_row=True),
    _flags("mask?"),
    _tensor("lengths?", INTEGERS, per_row=True),
    _flags("labels?", per_row=True),
    _numbers("weights?"),
    _numbers("margin?"),
    _numbers("kl?"),
    _offsets,
)
PREFERENCE = Op("preference_loss", _inputs, Options("preference", "preference_loss"))
# The log-probabilities, what else there is of tokens and rows, of pairs, of which there is one, and
# the offsets.
_parts = (slice(1), slice(1, 6), slice(6, 8), slice(8, 9), slice(9, 10))
PREFERENCE_LOGP, PREFERENCE_ROWS, PREFERENCE_UNITS, PREFERENCE_KL, PREFERENCE_OFFSETS = (
    Op(PREFERENCE.name, _inputs[part]) for part in _parts
)
_results = "stats loss losses rewards grad_logp"
preference_loss = _pass("preference_loss", PREFERENCE, "rows seq_len", _results)

_inputs = (_numbers("rewards"), _numbers("margin?"), _numbers("weights?"))
REWARD_MODEL = Op("reward_model_loss", _inputs, Options("reward_model", "reward_model_loss"))
REWARD_MODEL_REWARDS, REWARD_MODEL_PAIRS = (
    Op(REWARD_MODEL.name, _inputs[part]) for part in (slice(1), slice(1, 3))
)
_results = "stats loss losses grad_rewards"
reward_model_loss = _pass("reward_model_loss", REWARD_MODEL, "pairs", _results)


def responses(
    logp: Sequence[int], offsets: Sequence[int] | None = None
) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Rows, and tokens of each, or with offsets of all: one where the log-probabilities are of
    whole responses; and the shape of the tokens."""
    if offsets is not None:
        (rows,) = rows_of(PREFERENCE, logp, offsets)
        return (rows, logp[0]), (logp[0],)
    if len(logp) not in (1, 2):
        refuse(PREFERENCE.name, "logp", f"has shape {list(logp)}", "[rows] or [rows, seq_len]")
    return (*logp, 1)[:2], (*logp, 1)[:2]


def check_rewards(stacked: Sequence[int]) -> None:
    if len(stacked) != 2 or stacked[0] != 2:
        refuse(REWARD_MODEL.name, "chosen", f"has shape {list(stacked[1:])}", "[pairs]")


def units_of(rows: int, options: Sequence) -> int:
    """Pairs, or in KTO rows; an odd number of rows is refused later."""
    loss = options[[*PREFERENCE.options.kinds].index("loss")]
    return rows if loss == "kto" else rows // 2


_OFFSETS_AT = {
    op.name: place
    for op in (GAE, TOKEN_BASELINE, CORRECTION, PPO_LOSS)
    for place, argument in enumerate(op.inputs)
    if argument.kind == OFFSETS
}
