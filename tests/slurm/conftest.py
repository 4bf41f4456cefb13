"""The SLURM of these tests, started once per test session."""

import os
from collections.abc import Iterator

import pytest
from local_cluster import LocalCluster, Unavailable, install


@pytest.fixture(scope="session")
def slurm() -> Iterator[LocalCluster]:
    """A running SLURM. Skips where it cannot be had on this machine; continuous integration (CI=true) must have it."""
    try:
        install()
    except Unavailable as reason:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no SLURM here: {reason}")
    cluster = LocalCluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
