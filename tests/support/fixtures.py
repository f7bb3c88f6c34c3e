"""Fixtures for tests against S3, and for scripts in forks: a pytest plugin, loaded by ``tests/conftest.py``."""

from collections.abc import Iterator

import pytest

from tests.support import ceph, moto
from tests.support.proxy import FaultProxy
from tests.support.s3 import Bucket, Store
from tests.support.warm import Warm, warm


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a real server."""
    for item in items:
        if "s3_ceph" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.servers)


@pytest.fixture(scope="session")
def s3_moto() -> Iterator[Store]:
    """Run moto's server."""
    with moto.moto() as store:
        yield store


@pytest.fixture(scope="session")
def s3_ceph() -> Iterator[Store]:
    """Run Ceph's gateway, a real store; skips where its packages are not installed."""
    if not ceph.available():
        pytest.skip(f"Ceph is not installed (missing: {', '.join(ceph.missing())})")
    with ceph.ceph() as store:
        yield store


@pytest.fixture(params=["moto", pytest.param("ceph", marks=pytest.mark.servers)])
def s3(request: pytest.FixtureRequest) -> Store:
    """Return each store in turn."""
    store: Store = request.getfixturevalue(f"s3_{request.param}")
    return store


@pytest.fixture
def bucket(s3: Store) -> Bucket:
    """Return a new bucket in each store in turn."""
    return s3.bucket()


@pytest.fixture
def fault_proxy(s3: Store) -> Iterator[FaultProxy]:
    """Return a proxy in front of the same store as ``s3`` and ``bucket``, as yet without faults."""
    with FaultProxy(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def forks() -> Iterator[Warm]:
    """Give a process that runs scripts in forks of it."""
    with warm() as process:
        yield process
