"""What all tests share: one thread per process, reproducible examples, and GPU tests only where there is a GPU."""

import os

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("locum", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("locum")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = [item for item in items if "gpu" in item.keywords]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none here"))
