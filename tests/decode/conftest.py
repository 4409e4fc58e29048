"""What the tests of this folder share; helpers are in `toys.py`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without checks of shapes at run time, for tests that call small functions a hundred thousand times."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
