"""Isolation of the tests that patch models."""

import importlib.util
import sys

import pytest
import torch

# transformers and accelerate are optional dependencies.
if not all(map(importlib.util.find_spec, ("transformers", "accelerate"))):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def stock_afterwards():
    """Stock classes for the next test."""
    yield
    from tiny import forget_patches

    forget_patches()


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """The next test's Accelerator is its own: Accelerate keeps the first one's settings for the process."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small spend their time on waking threads, the more so when tests share the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
