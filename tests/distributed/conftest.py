"""Pools of worker processes that live as long as the test session: a start costs seconds, a check little."""

import importlib.util
import sys
from pathlib import Path

import pytest

# The tiny models, which the workers import too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))

if not all(map(importlib.util.find_spec, ("transformers", "accelerate"))):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def pools():
    from tests.distributed.workers import Workers

    started: dict[int, Workers] = {}
    yield lambda size: started.setdefault(size, Workers(size))
    for workers in started.values():
        workers.close()


@pytest.fixture
def workers(pools):
    """``workers(function, *args)`` calls a module's function in two processes of one gloo group."""
    return pools(2)


@pytest.fixture
def four_workers(pools):
    return pools(4)
