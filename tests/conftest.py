"""Set-up of all tests: triton's interpreter, threads, golden files, and the long runs that wait for --slow."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import difflib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # two processes of two threads wait for each other on two cores


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite golden files instead of comparing with them")
    parser.addoption("--slow", action="store_true", help="also run the tests that are marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long run; pytest --slow runs it"))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compares a text with golden/<test file>/<test name>.txt; a missing or different file fails with the difference."""
    name = request.node.name.replace("[", "-").replace("]", "")
    path = GOLDEN / Path(request.node.fspath).stem / f"{name}.txt"

    def check(text: str) -> None:
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        there = path.read_text() if path.exists() else ""
        if text != there:
            diff = "".join(difflib.unified_diff(there.splitlines(True), text.splitlines(True), str(path), "now"))
            what = "differs" if path.exists() else "is missing"
            pytest.fail(f"{path} {what}; if this is meant, run pytest --update-golden and read the diff\n{diff}", pytrace=False)

    return check
