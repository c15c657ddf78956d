"""Devices and targets: what a plan is made for.

`Target.parse(text)` reads `device[:chip][:runtime]`: "cpu", "cpu:onnxruntime", "cpu:amx", "onnx", "cuda", "cuda:h100", "cuda:h100:inductor".
"""

from __future__ import annotations

import difflib
import importlib.util
import platform
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from paretorch.cost_model.device_rows import CPU_CORES, CPUS, FAKES, GPUS, Device
from paretorch.ir.errors import TargetError

DEVICES: dict[str, Device] = {device.name: device for device in (*CPUS, *GPUS, *FAKES)}

CPU_RUNTIMES = ("eager", "inductor", "onnxruntime", "openvino")
GPU_RUNTIMES = ("eager", "inductor", "triton")
PACKAGES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "triton": "triton"}  # runtime -> the package it needs


@dataclass(frozen=True)
class Target:
    """A device, and the runtimes that a plan for it may use. is_here: whether this machine is that device, so that it can be measured."""

    device: Device
    chip: str
    runtimes: tuple[str, ...]
    is_here: bool
    text: str

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, text: str) -> Target:
        """The target of that name. Raises TargetError with the close and the known names."""
        if not isinstance(text, str):
            raise TargetError(f"target is {type(text).__name__}; expected a name such as 'cpu' or 'cuda:h100', or a Target")
        name, *rest = text.strip().lower().split(":")
        if name == "onnx" and not rest:
            return replace(cls.parse("cpu:onnxruntime"), text=text)
        places = _places()
        kind = {place.split(":")[0] for place in places}
        if name not in kind or len(rest) > 2:
            raise _unknown_device(text, places)
        chip = rest.pop(0) if rest and f"{name}:{rest[0]}" in places else ""
        runtime = rest.pop(0) if rest else ""
        allowed = _allowed(name)
        if rest or (runtime and runtime not in allowed):
            raise _unknown_part(text, name, runtime, allowed, places)
        device = places[f"{name}:{chip}"] if chip else _device_here(name, text)
        is_here = device.kind != "fake" and (not chip or _is_here(name, device))
        device = _device_here(name, text) if is_here else device
        return cls(device, chip, _usable(text, allowed, runtime, is_here), is_here, text)


def _places() -> dict[str, Device]:
    """The devices by the names that targets give them: "cpu:avx2", "cuda:h100", "fake-bandwidth"."""
    found = {f"{device.kind}:{device.name.removeprefix('cpu-').split('-')[0]}": device for device in (*CPUS, *GPUS)}
    return {**found, **{device.name: device for device in FAKES}}


def known_targets() -> tuple[str, ...]:
    """The names that a user may give, without runtimes."""
    return ("cpu", "onnx", *(place for place in _places() if not place.startswith("fake")))


def _unknown_device(text: str, places: dict[str, Device]) -> TargetError:
    close = difflib.get_close_matches(text.lower(), [*places, "cpu", "onnx", "cuda"], n=1)
    hint = f" Close: {close[0]}." if close else ""
    return TargetError(f"no device named {text!r}.{hint} Known: {', '.join(known_targets())}.")


def _unknown_part(text: str, name: str, part: str, allowed: tuple[str, ...], places: dict[str, Device]) -> TargetError:
    """For a second or third part that is neither a chip of this device nor one of its runtimes."""
    chips = [place.partition(":")[2] for place in places if place.startswith(f"{name}:")]
    runtime = difflib.get_close_matches(part, allowed, n=1)
    if not runtime and text.count(":") == 1 and chips:
        return _unknown_device(text, places)
    if part in allowed:
        return TargetError(f"{text!r} goes on after the runtime {part!r}; expected device[:chip][:runtime].")
    hint = f" Close: {runtime[0]}." if runtime else ""
    return TargetError(f"{text!r}: no runtime named {part!r} for {name}.{hint} Known: {', '.join(allowed)}.")


def _allowed(name: str) -> tuple[str, ...]:
    return GPU_RUNTIMES if name in ("cuda", "rocm") else CPU_RUNTIMES


def _usable(text: str, allowed: tuple[str, ...], runtime: str, is_here: bool) -> tuple[str, ...]:
    """The runtimes of a target: the one it names, else all that are installed. Raises TargetError if the named one is not installed here."""
    missing = [name for name in allowed if is_here and name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None]
    if runtime in missing:
        raise TargetError(f"{text!r} needs {PACKAGES[runtime]}, which is not installed: pip install {PACKAGES[runtime]}")
    return (runtime,) if runtime else tuple(name for name in allowed if name not in missing)


def _is_here(name: str, device: Device) -> bool:
    if name == "cpu":
        return device.arch == cpu_features()
    if name in ("cuda", "rocm"):
        return torch.cuda.is_available() and _gpu_row(torch.cuda.get_device_name()) == device
    return False


def _device_here(name: str, text: str) -> Device:
    """The device that this machine is. Raises TargetError if a GPU is asked for and none with a row is here."""
    if name == "cpu":
        return _cpu_here(torch.get_num_threads())
    if name in DEVICES:
        return DEVICES[name]
    chips = ", ".join(place for place in _places() if place.startswith(f"{name}:"))
    if not torch.cuda.is_available():
        raise TargetError(f"{text!r} names no chip, and no GPU is here to be found. Name the one to plan for: {chips}.")
    found = _gpu_row(torch.cuda.get_device_name())
    if found is None:
        raise TargetError(f"{text!r}: the GPU here, {torch.cuda.get_device_name()!r}, has no device row. Name the closest: {chips}.")
    return found


def _gpu_row(name: str) -> Device | None:
    """The row of the GPU that the driver calls so: "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090"."""
    plain = name.lower().replace(" ", "")
    return next((device for device in GPUS if device.name.split("-")[0] in plain), None)


@cache
def _cpu_here(threads: int) -> Device:
    row = next(device for device in CPUS if device.arch == cpu_features())
    share = threads / CPU_CORES
    peaks = {dtype: rate * share for dtype, rate in row.peak_flops_per_s.items()}
    cache_bytes = shared_cache_bytes()
    return replace(row, peak_flops_per_s=peaks, cache_bytes=cache_bytes or row.cache_bytes)


@cache
def cpu_features() -> str:
    """The richest feature set of a row that this processor has; "avx2" where it cannot be read."""
    flags = set(_cpu_flags())
    if {"amx_tile", "amx_bf16"} <= flags:
        return "amx"
    if "avx512_bf16" in flags:
        return "avx512_bf16"
    return "avx512" if "avx512f" in flags else "avx2"


def _cpu_flags() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux: torch knows at least the vector width
        return ["avx512f"] if "AVX512" in torch.backends.cpu.get_cpu_capability() else []
    return next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@cache
def cache_sizes() -> tuple[float, ...]:
    """Bytes of the caches of the first core, smallest first; empty where the system does not tell."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text and text[:-1].isdigit() and text[-1] in units:
            sizes.append(float(text[:-1]) * units[text[-1]])
    return tuple(sorted(sizes))


def shared_cache_bytes() -> float | None:
    """The size of the largest cache; None where the system does not tell."""
    return cache_sizes()[-1] if cache_sizes() else None


__all__ = ["DEVICES", "Device", "Target", "cache_sizes", "cpu_features", "cpu_model", "known_targets", "shared_cache_bytes"]
