"""The cluster of the launcher's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api_server import Cluster, serving


@pytest.fixture
def cluster(schemas: Path) -> Iterator[Cluster]:
    with serving(schemas) as server:
        yield server
