"""Every test starts from the same random state, and hypothesis draws the same examples everywhere."""

import os

# Before torch starts its threads: spinning ones starve each other where a runner has fewer processors than it says.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
