"""What the package knows of the C library is what the header says, and what the library does."""

import contextlib
import ctypes
import inspect
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

import ppo_kernels.numpy
from ppo_kernels import _header, _lib, _lists, functional

HERE = Path(__file__).parents[1]
HEADER = HERE.parent / "include" / "ppo_kernels.h"
pytestmark = pytest.mark.skipif(not HEADER.exists(), reason="not in the source tree")
sys.path.append(str(HERE))
import generate  # noqa: E402  it is no part of the package

PASSES = {name: given for name, given in vars(_lists).items() if isinstance(given, _lib.Pass)}
OPTIONS = {
    "logprob": (_lists.LOGPROB.options, "selective_log_softmax"),
    "kl_token": (_lists.TOKEN_KL.options, "token_kl"),
    "kl_full": (_lists.FULL_KL.options, "full_kl"),
    "gae": (_lists.GAE.options, "gae"),
    "advantages": (_lists.ADVANTAGES.options, "outcome_advantages"),
    "optimal_token_baseline": (_lists.TOKEN_BASELINE.options, "optimal_token_baseline"),
    "whiten": (_lists.MASKED_WHITEN.options, "masked_whiten"),
    "correction": (_lists.CORRECTION.options, "correction"),
    "ppo_loss": (_lists.PPO_LOSS.options, "ppo_loss"),
    "preference": (_lists.PREFERENCE.options, "preference_loss"),
    "reward_model": (_lists.REWARD_MODEL.options, "reward_model_loss"),
}


def header():
    return generate.parse(HEADER.read_text())


def test_generated():
    assert generate.GENERATED.read_text() == generate.python(header())


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_as_a_compiler_sees_it(tmp_path):
    """Sizes and offsets of all structs, values of all constants, arguments of all functions."""
    lines, expected = [], []
    constants = {name for name in vars(_header) if name.isupper()} - {"OPTIONS", "FUNCTIONS"}
    for name in sorted(constants):
        lines.append(f'printf("%.17g\\n", (double)PPOK_{name});')
        expected.append(getattr(_header, name))
    structs = [s for s in vars(_header).values() if isinstance(s, type(ctypes.Structure))]
    for struct in structs:
        if struct is not ctypes.Structure:
            fields = [field for field, _ in struct._fields_]
            name = f"ppok_{struct.__name__}"
            lines.append(f'printf("%zu\\n", sizeof({name}));')
            lines += [f'printf("%zu\\n", offsetof({name}, {field}));' for field in fields]
            lines += [f'printf("%zu\\n", sizeof((({name} *)0)->{field}));' for field in fields]
            expected += [ctypes.sizeof(struct)]
            expected += [getattr(struct, field).offset for field in fields]
            expected += [getattr(struct, field).size for field in fields]
    names = {ctypes.c_void_p: "void *", ctypes.c_size_t: "size_t", ctypes.c_int32: "int32_t"}
    names[ctypes.c_char_p] = "const char *"
    for name, (result, types) in _header.FUNCTIONS.items():
        # Pointers to anything are passed as those to void are, which C says with a warning.
        given = ", ".join(f"({names[kind]})0" for kind in types)
        lines.append(f"if (argc > 1) {{ {names[result]} got = ppok_{name}({given}); (void)got; }}")
    assert len(expected) > 200 and len(_header.FUNCTIONS) >= 3 * len(PASSES)
    program = tmp_path / "program.c"
    program.write_text(
        '#include <stdio.h>\n#include "ppo_kernels.h"\n'
        f"int main(int argc, char **argv) {{ (void)argv;\n{chr(10).join(lines)}\nreturn 0; }}\n"
    )
    library = _lib._path()
    include = f"-I{HEADER.parent}"
    command = ["cc", "-Wall", "-Werror", include, str(program), str(library), "-o"]
    run = str(tmp_path / "program")
    subprocess.run([*command, run, f"-Wl,-rpath,{library.parent}"], check=True)
    said = subprocess.run([run], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert [float(line) for line in said.split()] == expected


@pytest.mark.parametrize("given", PASSES.values(), ids=PASSES)
def test_pass(given):
    fields = {field for field, _ in given.struct._fields_}
    names = [*given.names]
    if given.options is not None:
        names.insert(0, "options")
        assert given.options.struct.__name__.removesuffix("_options") in given.struct.__name__
    assert {*names} == fields - {"struct_size", "reserved"}
    assert len(names) == len(set(names))
    numbers = given.arguments("options" in fields, *range(2, 2 + len(given.names)))
    struct = given.struct.from_buffer_copy(numbers)
    assert struct.struct_size == len(numbers) == ctypes.sizeof(struct)
    for number, name in enumerate(names, 1 if "options" in names else 2):
        assert getattr(struct, name) == number


def test_every_pass_is_there():
    passes = {name.removesuffix("_cpu") for name in _header.FUNCTIONS if name.endswith("_cpu")}
    passes.remove("logits_ppo_loss")  # has no op of PyTorch's yet
    assert {given.struct.__name__.removesuffix("_args") for given in PASSES.values()} == passes


KINDS = {
    _lists.NUMBERS: "const float *",
    _lists.FLAGS: "const uint8_t *",
    _lists.INTEGERS: "const int64_t *",
    _lists.OFFSETS: "const int64_t *",
    _lists.OTHER: "const void *",
}


@pytest.mark.parametrize(
    ("inputs", "passes"),
    [
        (_lists.LOGPROB_BACKWARD.inputs[3:], ("logprob_backward",)),
        (_lists.TOKEN_KL.inputs, ("kl_token_forward", "kl_token_backward")),
        (_lists.TOKEN_KL_BACKWARD.inputs, ("kl_token_backward",)),
        (_lists.FULL_KL.inputs, ("kl_full_forward", "kl_full_backward")),
        (_lists.FULL_KL_BACKWARD.inputs, ("kl_full_backward",)),
        (_lists.GAE.inputs, ("gae",)),
        (_lists.ADVANTAGES.inputs, ("advantages",)),
        (_lists.TOKEN_BASELINE.inputs, ("optimal_token_baseline",)),
        (_lists.CORRECTION.inputs, ("correction",)),
        (_lists.PPO_LOSS.inputs, ("ppo_loss",)),
        (_lists.PREFERENCE.inputs, ("preference_loss",)),
        (_lists.REWARD_MODEL.inputs, ("reward_model_loss",)),
    ],
)
def test_kinds_of_inputs(inputs, passes):
    for name in passes:
        types = {field.name: field.type for field in header().structs[f"{name}_args"]}
        for argument in inputs:
            assert types[argument.name] == KINDS[argument.kind], (name, argument)
            assert argument.type in ("Tensor", "Tensor?")


@pytest.mark.parametrize("module", [functional, ppo_kernels.numpy])
@pytest.mark.parametrize("name", OPTIONS)
def test_types_of_options(name, module):
    """Those of the public functions are those of the header, whose choices they list in order."""
    options, function = OPTIONS[name]
    types = typing.get_type_hints(getattr(module, function))
    number = functional.Number if module is functional else float
    python = {"float": number, "bool": bool, "float?": number | None, "int?": int | None}
    for option, kind in options.kinds.items():
        if option in _lists.PPO_LOSS_PER_ROW:
            assert option not in types
        elif isinstance(kind, str):
            assert types[option] == python[kind], option
        elif module is functional:
            assert typing.get_args(types[option]) == kind, option
        else:
            assert types[option] is str, option


def defaults_of(parameters, options):
    """Those of a function; which inputs are of rows is no parameter, their shapes say it."""
    named = {option: parameters[option].default for option in options.kinds if option in parameters}
    per_row = {option: False for option in _lists.PPO_LOSS_PER_ROW if option in options.kinds}
    return {option: (per_row | named)[option] for option in options.kinds}


@pytest.mark.parametrize("module", [functional, ppo_kernels.numpy])
@pytest.mark.parametrize("name", OPTIONS)
def test_defaults(name, module):
    """Those of the public functions are those of the library."""
    options, function = OPTIONS[name]
    parameters = inspect.signature(getattr(module, function)).parameters
    ours = options.among(defaults_of(parameters, options)).struct
    theirs = options.struct()
    init = _lib.function(f"{name}_options_init")
    assert init(ctypes.byref(theirs), ctypes.sizeof(theirs)) == 0
    for field, _ in theirs._fields_:
        assert getattr(ours, field) == getattr(theirs, field), field


def test_names_of_what_can_be_chosen():
    assert _lists.GAE.options.kinds["score_placement"] == ("last", "after_last")
    estimators = _lists.TOKEN_KL.options.kinds["estimator"]
    assert estimators[_header.KL_K3_STRAIGHT_THROUGH] == "k3_straight_through"


def test_statistics_are_documented():
    """In the order of the header's struct, which is that of the dictionary."""
    assert _lib.STATS[0] == "loss"
    named = functional.ppo_loss.__doc__.split("Returns:")[1]
    assert re.findall(r"``(\w+)``", named) == [*_lib.STATS]
    named = functional.correction.__doc__.split("Returns:")[1]
    assert re.findall(r"``(\w+)``", named) == [*_lib.CORRECTION_STATS]


TENSORS = {name: torch.zeros(2, 3) for name in "logits ref_logits logp ref_logp values".split()}
TENSORS |= {name: torch.zeros(2, 3) for name in "rewards log_sum_sq_probs".split()}
TENSORS["scores"] = torch.zeros(4)
TENSORS |= {name: torch.zeros(3) for name in "chosen rejected".split()}
TENSORS |= {name: torch.zeros(2, 3) for name in "old_logp rollout_logp advantages".split()}
TENSORS["index"] = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("module", [functional, ppo_kernels.numpy])
@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name, (options, _) in OPTIONS.items()
        for option in options.kinds
        if option not in _lists.PPO_LOSS_PER_ROW  # test_pack.py has them
    ],
)
def test_options_arrive(name, option, module, monkeypatch):
    """One that is not its default is what the library gets for it, with the defaults of others."""
    options, function = OPTIONS[name]
    parameters = inspect.signature(getattr(module, function)).parameters
    defaults = defaults_of(parameters, options)
    kind, address, arrived = options.kinds[option], options.address, []
    monkeypatch.setattr(options, "address", lambda *given: arrived.append(given) or address(*given))
    if isinstance(kind, tuple):
        value = next(choice for choice in kind if choice != defaults[option])
    else:
        value = {"bool": not defaults[option], "int?": 1}.get(kind, 0.625)
    needed = [each for each, about in parameters.items() if about.default is about.empty]
    tensors = [TENSORS[each] if module is functional else TENSORS[each].numpy() for each in needed]
    with contextlib.suppress(ValueError):  # some are refused without another option, once there
        getattr(module, function)(*tensors, **{option: value})
    assert value != defaults[option]
    assert arrived == [(*{**defaults, option: value}.values(),)]
    field, struct = options.fields[option], address(*arrived[0]).struct
    assert getattr(struct, field) == (kind.index(value) if isinstance(kind, tuple) else value)
