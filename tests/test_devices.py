"""Devices and targets: every figure has a source, every wrong name one clear error."""

from __future__ import annotations

import pytest

from paretorch.cost_model import devices
from paretorch.cost_model.device_rows import CPUS, FAKES, GPUS
from paretorch.cost_model.devices import DEVICES, Target
from paretorch.ir.errors import TargetError


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_rows_are_complete(device):
    assert device.source
    assert all(rate > 0 for rate in device.peak_flops_per_s.values())
    assert device.peak_flops_per_s["f32"] <= device.peak("bf16") or device in CPUS
    assert min(device.bandwidth_bytes_per_s, device.memory_bytes, device.cache_bytes, device.launch_s) > 0
    assert device in FAKES or "launch_s" in device.sources


def test_rows_of_the_issue_exist():
    names = {device.name for device in GPUS} | {device.arch for device in CPUS} | {device.name for device in FAKES}
    wanted = {"a100-sxm4-80gb", "h100-sxm", "h200", "l4", "rtx4090", "mi300x", "avx2", "avx512", "avx512_bf16", "amx"}
    assert wanted | {"fake-bandwidth", "fake-compute"} <= names


def test_peak_of_a_dtype_without_a_rate():
    row = DEVICES["cpu-avx2"]
    assert row.peak("bf16") == row.peak_flops_per_s["f32"]
    assert DEVICES["l4"].peak("f64") == DEVICES["l4"].peak_flops_per_s["f32"] / 2


def test_cpu_is_here(monkeypatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None if name == "openvino" else object())
    target = Target.parse("cpu")
    assert target.is_here
    assert target.runtimes == ("eager", "inductor", "onnxruntime")
    assert str(target) == "cpu"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match="'cpu:openvino' needs openvino, which is not installed: pip install openvino"):
        Target.parse("cpu:openvino")


def test_grammar():
    assert Target.parse("cpu:onnxruntime").runtimes == ("onnxruntime",)
    onnx = Target.parse("onnx")
    assert (onnx.runtimes, onnx.is_here, str(onnx)) == (("onnxruntime",), True, "onnx")
    h100 = Target.parse("cuda:h100")
    assert (h100.device.name, h100.chip, h100.is_here) == ("h100-sxm", "h100", False)
    assert h100.runtimes == ("eager", "inductor", "triton")
    assert Target.parse("cuda:h100:inductor").runtimes == ("inductor",)
    assert Target.parse("rocm:mi300x").device.arch == "gfx942"
    assert Target.parse("CPU:AVX2:eager").runtimes == ("eager",)
    fake = Target.parse("fake-bandwidth")
    assert (fake.device.name, fake.is_here) == ("fake-bandwidth", False)


def test_a_chip_by_feature_set_is_here_only_if_it_is_this_processor(monkeypatch):
    monkeypatch.setattr(devices, "cpu_features", lambda: "avx512")
    devices._cpu_here.cache_clear()
    assert Target.parse("cpu:avx512").is_here
    assert not Target.parse("cpu:amx").is_here
    devices._cpu_here.cache_clear()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("cuda:a10", r"no device named 'cuda:a10'\. Close: cuda:a100\. Known: cpu, onnx, cpu:avx2, .*cuda:h100"),
        ("tpu", r"no device named 'tpu'\. Close: cpu\. Known: "),
        ("", r"no device named ''\. Known: "),
        ("cpu:onnxruntme", r"no runtime named 'onnxruntme' for cpu\. Close: onnxruntime\. Known: eager, inductor, onnxruntime, openvino"),
        ("cuda:h100:onnxruntime", r"no runtime named 'onnxruntime' for cuda\. Known: eager, inductor"),
        ("cpu:eager:amx", r"'cpu:eager:amx' goes on after the runtime 'eager'; expected device\[:chip\]\[:runtime\]"),
        ("cpu:amx:eager:1", r"no device named 'cpu:amx:eager:1'"),
        (7, r"target is int; expected a name"),
    ],
)
def test_wrong_names(text, sentence):
    with pytest.raises(TargetError, match=sentence):
        Target.parse(text)


def test_cuda_without_a_chip_and_without_a_gpu(monkeypatch):
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: False)
    with pytest.raises(TargetError, match=r"'cuda' names no chip, and no GPU is here to be found\. Name the one to plan for: cuda:a100"):
        Target.parse("cuda")


def test_a_gpu_that_is_here(monkeypatch):
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices.torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert Target.parse("cuda").device.name == "h100-sxm"
    assert Target.parse("cuda:h100").is_here
    assert not Target.parse("cuda:a100").is_here
    monkeypatch.setattr(devices.torch.cuda, "get_device_name", lambda: "NVIDIA T4")
    with pytest.raises(TargetError, match=r"the GPU here, 'NVIDIA T4', has no device row\. Name the closest: cuda:a100"):
        Target.parse("cuda")
