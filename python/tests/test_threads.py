"""The library's threads: where there are none the caller's does the work, to the same bits. On
tensors they are torch's."""

import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import ppo_kernels
import ppo_kernels.numpy as ppok

ON_TENSORS = """
import sys
import numpy as np
import ppo_kernels
import torch
values = np.sin(np.arange(64 * 2048, dtype=np.float32)).reshape(64, 2048)
values = torch.from_numpy(values)
sys.stdout.buffer.write(ppo_kernels.gae(values, values).moments.numpy().tobytes())
"""
PROGRAM = """
import sys
import numpy as np
import ppo_kernels.numpy as ppok
values = np.sin(np.arange(64 * 2048, dtype=np.float32)).reshape(64, 2048)
sys.stdout.buffer.write(ppok.gae(values, values).moments.tobytes())
"""


def moments():
    values = np.sin(np.arange(64 * 2048, dtype=np.float32)).reshape(64, 2048)
    return ppok.gae(values, values).moments.tobytes()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_the_child_of_a_fork_works_alone():
    expected = moments()  # the pool is there
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.apply_async(moments).get(timeout=60)
        again = pool.apply_async(moments).get(timeout=60)
    assert found == again == expected == moments()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_on_tensors_they_are_torchs(count):
    values = torch.sin(torch.arange(64 * 2048.0)).reshape(64, 2048)
    expected, before = ppo_kernels.gae(values, values), torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        assert ppo_kernels.num_threads() == count
        for found in (ppo_kernels.gae(values, values), ppo_kernels.gae(values, values)):
            assert torch.equal(found.advantages, expected.advantages)
            assert torch.equal(found.moments, expected.moments)

        def in_a_new_thread():
            ppo_kernels.gae(values, values)
            counts.append(ppo_kernels.num_threads())

        counts = []
        thread = threading.Thread(target=in_a_new_thread)
        thread.start()
        thread.join()
        assert counts == [count]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("program", "count"), [(ON_TENSORS, 1), (PROGRAM, 1), (PROGRAM, 3)])
def test_openmp_says_how_many(program, count):
    environment = {**os.environ, "OMP_NUM_THREADS": str(count)}
    environment.pop("RAYON_NUM_THREADS", None)
    program += "print(__import__('ppo_kernels').num_threads(), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout == moments()
    assert int(run.stderr) == count


@pytest.mark.parametrize(
    "variables",
    [{"RAYON_NUM_THREADS": "1"}, {"RAYON_NUM_THREADS": "3"}, {"RUST_MIN_STACK": str(1 << 46)}],
)
def test_threads_that_there_are_or_cannot_be(variables):
    """No stack is as large as the last asks for, so that no thread can start."""
    environment = {**os.environ, **variables}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout == moments()
    assert run.stderr == b""
