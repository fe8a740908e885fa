import os

import hypothesis
import pytest
import torch

# Two cores are what the smallest machine has; one setting everywhere keeps CPU results comparable.
torch.set_num_threads(min(2, os.cpu_count() or 1))

# The same examples on every run: a failure is a failure for everybody.
hypothesis.settings.register_profile(
    "default", max_examples=40, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile("thorough", max_examples=2000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("default")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    # A Trainer run may allow TF32 for the whole process.
    torch.set_float32_matmul_precision("highest")


def pytest_generate_tests(metafunc):
    from tests.contract import parametrize

    parametrize(metafunc)
