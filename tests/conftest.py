"""Shared by all tests: the device, and Triton's interpreter where there is no GPU."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

import pairs

# Tests import the scripts of bench by name. They come here and not by `pythonpath`, which plugins
# would see: a stand-in for a GPU is one, and may have a module `gpu`, as bench has.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

# Before any kernel is imported: without a GPU the real kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A process that a shell started in the background ignores Ctrl-C, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

# As in test files: what a failing assertion compared is shown.
pytest.register_assert_rewrite("comparison", "graphs", "losses", "trajectories")

torch.set_num_threads(1)  # the suite runs in parallel processes, on small tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


#: Files whose tests run over products of methods, bases, dtypes, sizes and backends, with what
#: their cases are many of. They take a covering set of them: every two values meet in some case.
#: With FASTSAM_EVERY_CASE=1 all cases run.
PRODUCTS = {
    "test_amplify": "bases and dtypes",
    "test_ascent_state": "methods with state, and ways of losing it",
    "test_bases": "bases",
    "test_contexts": "contexts of both passes",
    "test_contract": "methods with bases",
    "test_cpu": "sizes and odd gradients",
    "test_devices": "methods with bases, over devices",
    "test_edges": "sizes and layouts of tensors",
    "test_equalities": "methods that are equal in a special case",
    "test_faults": "methods, and where they fail",
    "test_grad_scaler": "methods and scales",
    "test_grad_scaler_overflow": "methods, and where the overflow is",
    "test_landscape": "shapes of grids and directions",
    "test_lets": "methods and Hessians",
    "test_lets_contract": "methods and Hessians",
    "test_lightsam": "rules and hyper-parameters",
    "test_master_weights": "methods and dtypes",
    "test_master_weights_faults": "methods, and where they fail",
    "test_master_weights_state": "methods, and ways of saving",
    "test_maximize": "methods with bases",
    "test_methods": "methods with bases and dtypes",
    "test_micro_batches_scaled": "methods, and where the overflow is",
    "test_msam": "bases and dtypes",
    "test_packages": "methods, and other packages' settings",
    "test_range": "methods and sizes of gradients",
    "test_resume": "methods, and ways of saving",
    "test_segments": "methods, and what a norm is over",
    "test_several": "methods, with several bases",
    "test_state": "methods, and ways of saving",
    "test_streams": "methods and streams",
    "test_theory": "theorems and their constants",
    "test_universal": "kinds and calls",
    "test_torch_suite": "classes with hyper-parameters",
    "test_torch_suite_state": "classes with hyper-parameters",
    "test_torch_suite_steps": "classes with hyper-parameters",
    "test_training_loops": "methods with bases",
}


#: Files that take methods of whatever kin; the others leave out those whose machinery is another's
#: (``registry.RELATIVES``), unless every case runs.
EQUATIONS = ("test_compiled_steps", "test_methods", "test_maximize", "test_range", "test_arguments",
             "test_api_reference", "test_examples")  # fmt: skip


def is_relative(item: pytest.Item) -> bool:
    """Whether a test is one of another method's, but for an equation."""
    from registry import RELATIVE_CLASSES, RELATIVES

    names = (*RELATIVES, *RELATIVE_CLASSES)
    given = getattr(item, "callspec", None)
    return given is not None and any(
        (x if isinstance(x, str) else getattr(x, "name", None)) in names
        for x in given.params.values()
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("FASTSAM_EVERY_CASE", "0") == "0":
        left_out = {x for x in items if x.path.stem not in EQUATIONS and is_relative(x)}
        products = [x for x in items if x.path.stem in PRODUCTS and x not in left_out]
        left_out |= pairs.left_out(products)
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
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


@pytest.fixture(scope="session")
def machine(request, tmp_path_factory):
    """A GPU that is not there, see ``emulator``; what it builds stays in pytest's cache."""
    import compiled_launches

    if reason := compiled_launches.missing():
        pytest.skip(reason)
    cache = getattr(request.config, "cache", None)
    folder = cache.mkdir("emulator") if cache is not None else tmp_path_factory.mktemp("emulator")
    found = compiled_launches.Machine(folder)
    yield found
    found.close()
