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

# As in test files: what a failing assertion compared is shown.
pytest.register_assert_rewrite("comparison", "graphs", "losses")

torch.set_num_threads(1)  # the suite runs in parallel processes, on small tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _is_interpreted(item: pytest.Item) -> bool:
    params = getattr(getattr(item, "callspec", None), "params", {})
    return params.get("backend") == "triton"


#: Files with hundreds of cases for every backend. Without a GPU the triton backend's take Triton's
#: interpreter a second and more each: it runs every third, or with FASTSAM_EVERY_CASE=1 all.
SAMPLED = ("test_bases", "test_contract", "test_edges", "test_lets", "test_lets_contract",
           "test_methods", "test_state", "test_training_loops")  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available() and os.environ.get("FASTSAM_EVERY_CASE", "0") == "0":
        slow = [item for item in items if _is_interpreted(item) and item.path.stem in SAMPLED]
        left_out = set(slow) - set(slow[::3])
        config.hook.pytest_deselected(items=[item for item in slow if item in left_out])
        items[:] = [item for item in items if item not in left_out]
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
