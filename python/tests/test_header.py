"""The types that the package gives the C functions are those of the header."""

import ctypes
import re
from pathlib import Path

import pytest

from ppo_kernels import _lib

HEADER = Path(__file__).parents[2] / "include" / "ppo_kernels.h"
pytestmark = pytest.mark.skipif(not HEADER.exists(), reason="not in the source tree")

CONSTANTS = {"size_t": "z", "int32_t": "i"}
STRUCTS = {
    "logprob_options": _lib.LogprobOptions,
    "kl_token_options": _lib.KlTokenOptions,
    "kl_full_options": _lib.KlFullOptions,
    "gae_options": _lib.GaeOptions,
    "gae_inputs": _lib.GaeInputs,
    "gae_outputs": _lib.GaeOutputs,
    "whiten_options": _lib.WhitenOptions,
    "ppo_loss_options": _lib.PpoLossOptions,
    "ppo_loss_inputs": _lib.PpoLossInputs,
    "ppo_loss_gradients": _lib.PpoLossGradients,
}
RENAMED = {"lambda": "lam", "value_lambda": "value_lam"}
C_TYPES = {
    "size_t": ctypes.c_size_t,
    "double": ctypes.c_double,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
}


def text() -> str:
    return re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)


@pytest.mark.parametrize(("name", "letters"), _lib.signatures().items())
def test_function(name, letters):
    declared = re.search(rf"int32_t ppok_{name}\((.*?)\);", text(), re.S)
    assert declared, f"ppok_{name} is not in the header"
    arguments = [argument.strip() for argument in declared[1].split(",")]
    found = "".join("p" if "*" in a else CONSTANTS[a.split()[0]] for a in arguments)
    assert found == letters


@pytest.mark.parametrize(("name", "struct"), STRUCTS.items())
def test_struct(name, struct):
    body = re.search(rf"typedef struct ppok_{name} {{(.*?)}}", text(), re.S)[1]
    fields = []
    for field in body.split(";")[:-1]:
        *kind, identifier = field.replace("*", " * ").split()
        c_type = ctypes.c_void_p if "*" in kind else C_TYPES[kind[0]]
        fields.append((RENAMED.get(identifier, identifier), c_type))
    assert struct._fields_ == fields


def test_statistics():
    names = re.findall(r"#define PPOK_PPO_STAT_(\w+) (\d+)", text())
    assert [name.lower() for name, _ in names] == list(_lib.STATS)
    assert [int(number) for _, number in names] == list(range(len(_lib.STATS)))


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        ("KL", _lib._ESTIMATORS),
        ("KL", _lib._DIRECTIONS),
        ("GAE_MASK", _lib._MASK_MODES),
        ("GAE_SCORE_AT", ("last",)),
        ("GAE_SCORE_AFTER", ("last",)),
        ("GAE", _lib._SCORE_ORDERS),
        ("GAE_MISSING_EOS", _lib._MISSING_EOS),
        ("WHITEN_EPS_IN", _lib._EPS_PLACEMENTS),
        ("PPO_LOSS", _lib._AGGREGATIONS),
        ("PPO_LOSS", _lib._CLIP_FRACTIONS),
    ],
)
def test_constants(prefix, names):
    for number, name in enumerate(names):
        found = re.search(rf"#define PPOK_{prefix}_{name.upper()} (\d+)", text())
        expected = 1 if prefix == "GAE_SCORE_AFTER" else number
        assert found and int(found[1]) == expected, name


def test_defaults(monkeypatch):
    """Those of the functions here are those of the library."""
    import inspect

    from ppo_kernels import functional

    library = ctypes.CDLL(str(_lib._path()))
    cases = {
        "logprob_options": (functional.selective_log_softmax, _lib.logprob_options),
        "kl_token_options": (functional.token_kl, _lib.kl_token_options),
        "kl_full_options": (functional.full_kl, _lib.kl_full_options),
        "gae_options": (functional.gae, _lib.gae_options),
        "whiten_options": (functional.masked_whiten, _lib.whiten_options),
        "ppo_loss_options": (functional.ppo_loss, _lib.ppo_loss_options),
    }
    for name, (function, make) in cases.items():
        defaults = inspect.signature(function).parameters
        ours = make(*(defaults[p].default for p in inspect.signature(make).parameters))
        theirs = STRUCTS[name]()
        init = getattr(library, f"ppok_{name}_init")
        assert init(ctypes.byref(theirs), ctypes.c_size_t(ctypes.sizeof(theirs))) == 0
        for field, _ in theirs._fields_:
            if field != "aggregation_divisor":  # not looked at by default
                assert getattr(ours, field) == getattr(theirs, field), (name, field)
