"""What the package knows of the C library is what the header says, and what the library does."""

import ctypes
import inspect
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import ppo_kernels.numpy
from ppo_kernels import _header, _lib, _lists, functional

HERE = Path(__file__).parents[1]
HEADER = HERE.parent / "include" / "ppo_kernels.h"
pytestmark = pytest.mark.skipif(not HEADER.exists(), reason="not in the source tree")
sys.path.append(str(HERE))
import generate  # noqa: E402  it is no part of the package

PASSES = {name: given for name, given in vars(_lists).items() if isinstance(given, _lib.Pass)}
OPTIONS = {
    "logprob": (_lists.logprob_options, "selective_log_softmax"),
    "kl_token": (_lists.token_kl_options, "token_kl"),
    "kl_full": (_lists.full_kl_options, "full_kl"),
    "gae": (_lists.gae_options, "gae"),
    "whiten": (_lists.whiten_options, "masked_whiten"),
    "ppo_loss": (_lists.ppo_loss_options, "ppo_loss"),
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
    fields = [field for field, _ in given.struct._fields_]
    assert {*given.names} == {*fields} - {"struct_size", "reserved"}
    assert len(given.names) == len(set(given.names))
    numbers = given.arguments(*range(1, 1 + len(given.names)))
    struct = given.struct.from_buffer_copy(numbers)
    assert struct.struct_size == len(numbers) == ctypes.sizeof(struct)
    for number, name in enumerate(given.names, 1):
        assert getattr(struct, name) == number


def test_every_pass_is_there():
    passes = {name.removesuffix("_cpu") for name in _header.FUNCTIONS if name.endswith("_cpu")}
    assert {given.struct.__name__.removesuffix("_args") for given in PASSES.values()} == passes


KINDS = {
    _lists.NUMBERS: "const float *",
    _lists.FLAGS: "const uint8_t *",
    _lists.OTHER: "const void *",
}


@pytest.mark.parametrize(
    ("inputs", "passes"),
    [
        (_lists.LOGPROB_GRADIENTS, ("logprob_backward",)),
        (_lists.TOKEN_KL, ("kl_token_forward", "kl_token_backward")),
        (_lists.FULL_KL, ("kl_full_forward", "kl_full_backward")),
        (_lists.GAE, ("gae",)),
        (_lists.PPO_LOSS, ("ppo_loss",)),
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
    python = {"float": float, "bool": bool, "float?": float | None, "int?": int | None}
    for option, kind in options.kinds.items():
        if isinstance(kind, str):
            assert types[option] == python[kind], option
        elif module is functional:
            assert typing.get_args(types[option]) == kind, option
        else:
            assert types[option] is str, option


@pytest.mark.parametrize("module", [functional, ppo_kernels.numpy])
@pytest.mark.parametrize("name", OPTIONS)
def test_defaults(name, module):
    """Those of the public functions are those of the library."""
    options, function = OPTIONS[name]
    parameters = inspect.signature(getattr(module, function)).parameters
    ours = options.among({option: parameters[option].default for option in options.kinds}).struct
    theirs = options.struct()
    init = _lib.function(f"{name}_options_init")
    assert init(ctypes.byref(theirs), ctypes.sizeof(theirs)) == 0
    for field, _ in theirs._fields_:
        assert getattr(ours, field) == getattr(theirs, field), field


def test_names_of_what_can_be_chosen():
    assert _lists.gae_options.kinds["score_placement"] == ("last", "after_last")
    assert _lists.token_kl_options.kinds["estimator"][_header.KL_K3_STRAIGHT_THROUGH] == (
        "k3_straight_through"
    )
    assert len(_lib.STATS) == len(set(_lib.STATS)) == 20 and _lib.STATS[0] == "loss"
