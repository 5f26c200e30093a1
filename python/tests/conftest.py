import os
import tempfile

import numpy
import pytest
import torch

# torch.compile keeps what it compiled, under keys that say nothing of how our ops go backwards:
# what an earlier state of the package left is not to be found.
_compiled = tempfile.TemporaryDirectory()
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    numpy.random.seed(0)
