"""The library's threads: where there are none the caller's does the work, to the same bits."""

import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest

import ppo_kernels.numpy as ppok

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
