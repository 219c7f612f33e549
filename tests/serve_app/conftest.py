"""Runs the end-to-end modules after everything else: they are slow, and a failure elsewhere should show first."""

import os

import pytest

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read when ray is imported: it then stays on loopback
LAST = ("test_e2e_serve.py", "test_e2e_faults.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name in LAST and 1 + LAST.index(item.path.name))
