"""The command line on a model that a user's module builds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paretorch import cli, settle
from paretorch.cost_model.devices import DEVICES
from paretorch.ir.errors import InputError

MODULE = """
import torch
from tests.zoo import make

def build():
    return make("vit_class")

def batches():
    return [make("vit_class")[1] for _ in range(4)]

def alone():
    return make("vit_class")[0]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.delitem(sys.modules, "users_models", raising=False)
    return "users_models"


def said(*arguments: str) -> str:
    found = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def test_why_names_the_sites_or_the_sentence(module: str) -> None:
    assert "attention" in said("why", "tome", f"{module}:build", "--target", "cpu:eager")
    assert "already local" in said("why", "sliding_window", f"{module}:build", "--target", "cpu:eager")


def test_a_result_is_saved_and_shown(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle, "_is_slower", lambda *_: False)  # else the original may come back, of which nothing is saved
    options = ["--target", "cpu:eager", "-o", "fast.pt", "--html", "page.html"]
    report = said("optimize", f"{module}:build", *options)
    assert "measured side by side" in report
    assert "measured side by side" in (tmp_path / "page.html").read_text()
    shown = said("show", "fast.pt", "--graph")
    assert "measured side by side" in shown
    assert "layer_norm" in shown


def test_a_drift_needs_data(module: str) -> None:
    options = [f"{module}:build", "--target", "cpu:eager", "--drift", "0.5", "--time-limit", "5"]
    with pytest.raises(cli.ParetorchError, match="needs data="):
        said("optimize", *options)
    assert "seconds by stage" in said("optimize", *options, "--data", f"{module}:batches")


def test_all_devices_are_listed() -> None:
    text = said("devices")
    assert [name for name in DEVICES if name not in text] == []


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("users_models", "names no function"),
        ("no_such_module:build", "cannot import 'no_such_module'"),
        ("users_models:missing", "has no 'missing'"),
        ("users_models:alone", "expected a pair"),
    ],
)
def test_a_model_that_is_not_there(module: str, reference: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        said("why", "tome", reference)


def test_errors_are_printed_without_a_traceback(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["paretorch", "why", "tomee", f"{module}:build"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    printed = capsys.readouterr().err
    assert "RuleError" in printed
    assert "tome" in printed
    assert "Traceback" not in printed
