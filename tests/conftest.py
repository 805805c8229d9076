"""Shared by all tests: the device, and Triton's interpreter where there is no GPU."""

import os
import signal

import pytest
import torch

# Before any kernel is imported: without a GPU the real kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A process that a shell started in the background ignores Ctrl-C, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # the suite runs in parallel processes, on small tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter():
    if "TRITON_INTERPRET" not in os.environ:
        yield
        return
    from quick_interpreter import quick

    with quick():
        yield
