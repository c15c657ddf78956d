"""The GPU benchmark without a GPU: its kernels are generated, its goals are listed as not measured, and it says why it stops."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import paretorch
from benchmarks import gpu, gpu_kernels
from benchmarks.gpu_goals import GOALS, NOT_MEASURED, table
from paretorch.codegen.regions import schedules_of

pytest.importorskip("triton")

NAMES = {goal.name for goal in GOALS}


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 1
    assert capsys.readouterr().out.strip() == gpu.NO_GPU


def test_every_goal_has_what_measures_it() -> None:
    assert {name for name, _ in gpu.kernels(1.0)} | {name for name, _ in gpu.models()} == NAMES


def test_each_kernel_is_one_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "DEVICE", "meta")
    monkeypatch.setattr(gpu_kernels, "call_of", lambda function, **types: gpu_kernels.kernel_of(function, **types)[0])
    made: dict[str, Any] = {name: make() for name, make in gpu_kernels.streaming().items()}
    assert {kernel.template for kernel in made.values()} == {"row", "elementwise", "attention", "product"}
    assert [name for name, kernel in made.items() if kernel.parts] == ["decode, bf16 batch 16, 32k keys, 8 key heads"]
    assert len(gpu_kernels.attention(1, 16, 4096, 128, left=1023, right=0)[1]) == 3
    assert len(gpu_kernels.divided()) == len(gpu_kernels.four_bits()) == 2
    assert len(gpu_kernels.sized(8, 12, 4096, 64)) == len(gpu_kernels.matching()) == 2


def test_a_chosen_schedule_beside_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def choose(regions: Any) -> list[Any]:
        asked.extend(regions)
        return [schedules_of(regions[0])[-1]]

    monkeypatch.setattr(gpu_kernels, "DEVICE", "meta")
    chosen, default = gpu_kernels.scheduled(choose)
    assert [region.template for region in asked] == ["attention"]
    assert callable(chosen)
    assert callable(default)


def test_forms_of_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the processor nothing is replayed, and the row would say why."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.LayerNorm(8)).eval()
    x = torch.randn(2, 8)
    session = paretorch.optimize(model, (x,), target="cuda:h100").session
    assert session is not None
    session.tuner = None
    plain, replayed, reasons = gpu.forms(session)
    for call in (plain, replayed):
        torch.testing.assert_close(call()[0], model(x), rtol=1e-4, atol=1e-5)  # type: ignore[index]
    assert reasons == ["its inputs are on cpu; a recording takes one CUDA device"]
    monkeypatch.setattr(gpu, "seconds", lambda call: 1.0)
    monkeypatch.setattr(paretorch, "optimize", lambda *args, **options: SimpleNamespace(session=session))
    with pytest.raises(RuntimeError, match="takes one CUDA device"):
        gpu.graphed(model, (x,))


def test_table() -> None:
    first, second, third = GOALS[:3]
    lines = table({first.name: first.at_least, second.name: second.at_least - 0.01, third.name: "failed: no memory"})
    assert lines[2].endswith(f"| {first.at_least:.2f} | met |")
    assert lines[3].endswith("| not met |")
    assert lines[4].endswith("| failed: no memory |  |")
    assert all(NOT_MEASURED in line for line in lines[5:])
    page = (Path(gpu.RESULTS) / "README.md").read_text()
    assert all(f"| {goal.name} |" in page for goal in GOALS)
