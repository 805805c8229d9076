"""pytest's part: every test runs on the stand-in, and fails where a kernel does what it must not.

What the stand-in cannot run is skipped, with the reason.
"""

import pytest

from standin import driver
from standin.operators import Operators

driver.execute()
operators = Operators()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.path.parent.name == "distributed" and "gpu" in item.keywords:
        pytest.skip("the stand-in has no NCCL")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    driver.faults()
    before = driver.counter("torch_launches")
    try:
        with operators:
            result = yield
            driver.synchronize()  # some tests replace torch's function
    finally:
        if driver.counter("torch_launches") != before:  # whatever came of it means nothing
            name = driver.last_torch_kernel()[:150]
            pytest.skip(f"the stand-in cannot run a kernel of torch's: {name}")
    if found := driver.faults():
        raise AssertionError(f"in a compiled kernel: {found}")
    return result
