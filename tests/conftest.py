"""Set-up of all tests: triton's interpreter, one thread, and golden files."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite golden files instead of comparing with them")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compares a text with golden/<test file>/<test name>.txt; a missing or different file fails."""
    name = request.node.name.replace("[", "-").replace("]", "")
    path = GOLDEN / Path(request.node.fspath).stem / f"{name}.txt"

    def check(text: str) -> None:
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"no golden file {path}; look at the text, then run pytest --update-golden"
        assert text == path.read_text(), f"the text differs from {path}; if that is meant, run pytest --update-golden and read the diff"

    return check
