"""Every test starts from the same random state, and hypothesis draws the same examples everywhere."""

import os

# Before torch starts its threads: spinning ones starve each other where a runner has fewer processors than it says, and
# those of several workers do.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """The slowest files first, so that no process is left alone with one at the end."""
    slowest = ["real_model", "triton", "triton_aot", "architectures"]
    order = {f"test_{name}.py": place for place, name in enumerate(slowest)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
