"""What ``python -m ppo_kernels.doctor`` says, and what it does not pass over."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import ppo_kernels.numpy
from ppo_kernels import _FUNCTIONS, doctor


def test_all_is_right_and_said():
    command = [sys.executable, "-m", "ppo_kernels.doctor"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.startswith(f"ppo-kernels        {ppo_kernels.library_version()}, ")
    assert re.search(r"^processor .* (avx512|avx2|neon|scalar), \d+ threads$", found.stdout, re.M)
    devices = re.findall(r"^(\w+): largest error", found.stdout, re.M)
    assert devices == ["numpy", "cpu", *["cuda"] * torch.cuda.is_available()]
    assert found.stdout.endswith("all right\n") and "WRONG" not in found.stdout


def test_every_function_is_run():
    """But for those that are made of others, or compute nothing."""
    run = {name.split()[0] for name, _ in doctor.check("numpy")}
    functions = {name for name in _FUNCTIONS if name.islower()}
    others = {"gdpo_advantages", "linear_ppo_loss", "masked_moments", "targets_from_tokens"}
    assert run == functions - others


@pytest.mark.parametrize("wrong", [1.001, np.nan])
def test_a_wrong_result_is_told(monkeypatch, capsys, wrong):
    right = ppo_kernels.numpy.token_kl
    monkeypatch.setattr(ppo_kernels.numpy, "token_kl", lambda *x, **y: wrong * right(*x, **y))
    assert doctor.main() == 1
    said = capsys.readouterr().out
    assert len(re.findall("WRONG", said)) == 1
    assert re.search(r"token_kl .* WRONG", said)


def test_an_error_is_told(monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(ppo_kernels.numpy, "gae", fails)
    assert doctor.main() == 1
    assert "RuntimeError: no such thing   WRONG" in capsys.readouterr().out
