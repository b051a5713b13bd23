"""The device of the tests on a GPU: they are skipped where there is none, but for a rehearsal, which uses the CPU."""

import os

import pytest
import torch

REHEARSAL = "SHARDSTEP_GPU_REHEARSAL"
"""Name of the environment variable that makes these tests run on the CPU."""


@pytest.fixture(scope="session")
def device() -> str:
    """cuda, or cpu in a rehearsal."""
    if torch.cuda.is_available():
        return "cuda"
    if not os.environ.get(REHEARSAL):
        pytest.skip("no GPU here: `make gpu` shows how these tests run, on the CPU")
    return "cpu"
