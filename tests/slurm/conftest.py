"""The cluster, once for all tests that need it."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four virtual nodes; where they cannot run, the test is skipped with the reason."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    running = Cluster()
    yield running
    running.stop()
