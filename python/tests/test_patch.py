"""The environment says which packages are patched, in processes of their own."""

import os
import subprocess
import sys
import types
from pathlib import Path

import peers
import pytest

import ppo_kernels
from ppo_kernels import adapters, patch

# A function of each, and a call of it.
CALLS = {
    "trl": ("trl.trainer.utils", "selective_log_softmax", "(x, torch.tensor([0, 2]))"),
    "verl": ("verl.trainer.ppo.core_algos", "kl_penalty", "(x, x, 'k1')"),
    "openrlhf": ("openrlhf.models.utils", "compute_approx_kl", "(x, x)"),
}


def run(program, names):
    """What the program, with the peers' stand-ins, says on both outputs."""
    paths = (Path(__file__).parent, Path(ppo_kernels.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    environment.pop("PPO_KERNELS_PATCH", None)
    if names is not None:
        environment["PPO_KERNELS_PATCH"] = names
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("package", "before"), [("trl", True), ("trl", False), ("verl", True), ("openrlhf", True)]
)
def test_what_is_named_is_patched(package, before):
    if peers.find(package) is None:
        pytest.skip(f"{package} is not installed")
    module, function, call = CALLS[package]
    imports = ["import ppo_kernels.patch", f"import {module} as theirs"]
    program = [
        "import torch, peers",
        *(imports if before else reversed(imports)),
        "x = torch.randn(2, 3)",
        f"theirs.{function}{call}",
        f"print(ppo_kernels.patch.calls()['{module}.{function}'])",
    ]
    code, said, warned = run("; ".join(program), f" {package} ")
    assert (code, said.strip()) == (0, "1"), warned
    version = adapters.version_of(package)
    lines = [line for line in warned.splitlines() if f"replaced in {module} of" in line]
    assert len(lines) == 1 and f" {package} {version}: " in lines[0] and function in lines[0]


@pytest.mark.parametrize("names", [None, "verl"])
def test_others_are_left_alone(names):
    if peers.find("trl") is None:
        pytest.skip("trl is not installed")
    program = "import peers, ppo_kernels.patch, trl.trainer.utils as theirs"
    program += "; print(hasattr(theirs.selective_log_softmax, '__wrapped__'))"
    code, said, warned = run(program, names)
    assert (code, said.strip()) == (0, "False") and "ppo-kernels" not in warned, warned


def test_without_the_variable_nothing_is_imported():
    program = "import sys, ppo_kernels.patch as patch; finders = map(type, sys.meta_path)"
    program += "; print(sum(each is patch._Finder for each in finders), 'torch' in sys.modules)"
    assert run(program, None)[1].strip() == "0 False"
    assert run(program, "verl")[1].strip() == "1 False"


def test_every_package_with_adapters_can_be_named():
    assert set(patch.PACKAGES) == set(adapters.PARTS)


def test_unknown_names_are_refused():
    message = "PPO_KERNELS_PATCH is 'verl,tlr', expected names of trl, verl, openrlhf"
    code, _, warned = run("import ppo_kernels.patch", "verl,tlr")
    assert code == 1 and message in warned
    # Also where that stops nothing, as in a file that Python reads at its start.
    program = "import contextlib, peers"
    program += "\nwith contextlib.suppress(ValueError): import ppo_kernels.patch"
    code, _, warned = run(f"{program}\nimport verl", "verl,tlr")
    assert code == 1 and message in warned


def test_every_process_of_an_installation_is_patched():
    site = Path(ppo_kernels.__file__).parents[1]
    if not (site / "ppo_kernels.pth").exists():
        pytest.skip("ppo_kernels is not installed")
    code, said, _ = run("import sys; print('ppo_kernels.patch' in sys.modules)", "verl")
    assert (code, said.strip()) == (0, "True")
    assert run("import sys; print('ppo_kernels' in sys.modules)", None)[1].strip() == "False"


def test_a_patch_that_finds_nothing_says_so(monkeypatch):
    package, module = types.ModuleType("trl"), types.ModuleType("trl.trainer.utils")
    package.__path__ = []
    for each in (package, module):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    for name in adapters.PARTS["trl"]:
        if name != module.__name__:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(RuntimeError, match="no function in .*tested with trl 1.16.0"):
        adapters.patch_trl()
