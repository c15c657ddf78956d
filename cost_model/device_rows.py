"""The device rows: datasheet figures, dense (never "with sparsity"), each with its source.

f32 of a GPU is its vector rate; its matrix units at tf32 are a row of their own dtype. Base units: flops per second, bytes per second, bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Device:
    """Numbers that describe hardware.

    kind: "cpu", "cuda", "rocm" or "fake"; arch: what kernels are compiled for; cache_bytes: last cache level that all cores share.
    launch_s: seconds to start one kernel; units: of a GPU, that run programs of a kernel side by side (streaming multiprocessors, compute units).
    source: where the rates come from; sources: the source of every figure that stands elsewhere.
    """

    name: str
    kind: str
    arch: str
    peak_flops_per_s: dict[str, float]
    bandwidth_bytes_per_s: float
    cache_bytes: float
    memory_bytes: float
    launch_s: float
    source: str
    sources: dict[str, str] = field(default_factory=dict)
    units: int = 1

    def peak(self, dtype: str) -> float:
        """The rate for a dtype; a dtype without a rate runs at that of f32, and f64 at half of it."""
        rates = self.peak_flops_per_s
        return rates[dtype] if dtype in rates else rates["f32"] / (2 if dtype in ("f64", "c128") else 1)


LAUNCH_GPU = "assumption: 3 to 8 microseconds are seen for a launch from Python; 5 is taken"
UNITS = "NVIDIA architecture white paper of the generation, or the product's brief: streaming multiprocessors"
LAUNCH_CPU = "assumption: torch's dispatcher takes 2 to 5 microseconds an op; calibration measures it"
NVIDIA_L2 = "NVIDIA architecture white paper of the generation, level 2 cache"

GPUS = (
    Device(
        name="a100-sxm4-80gb", kind="cuda", arch="sm_80",
        peak_flops_per_s={"f64": 9.7e12, "f32": 19.5e12, "tf32": 156e12, "f16": 312e12, "bf16": 312e12, "i8": 624e12},
        bandwidth_bytes_per_s=2.039e12, cache_bytes=40e6, memory_bytes=80e9, launch_s=5e-6, units=108,
        source="NVIDIA A100 datasheet, SXM 80GB column", sources={"cache_bytes": NVIDIA_L2, "launch_s": LAUNCH_GPU, "units": UNITS},
    ),
    Device(
        name="h100-sxm", kind="cuda", arch="sm_90",
        peak_flops_per_s={"f64": 34e12, "f32": 67e12, "tf32": 494.5e12, "f16": 989.5e12, "bf16": 989.5e12, "i8": 1979e12},
        bandwidth_bytes_per_s=3.35e12, cache_bytes=50e6, memory_bytes=80e9, launch_s=5e-6, units=132,
        source="NVIDIA H100 datasheet, SXM column; half of the figures that are given with sparsity",
        sources={"cache_bytes": NVIDIA_L2, "launch_s": LAUNCH_GPU, "units": UNITS},
    ),
    Device(
        name="h200", kind="cuda", arch="sm_90",
        peak_flops_per_s={"f64": 34e12, "f32": 67e12, "tf32": 494.5e12, "f16": 989.5e12, "bf16": 989.5e12, "i8": 1979e12},
        bandwidth_bytes_per_s=4.8e12, cache_bytes=50e6, memory_bytes=141e9, launch_s=5e-6, units=132,
        source="NVIDIA H200 datasheet, SXM column; half of the figures that are given with sparsity",
        sources={"cache_bytes": NVIDIA_L2, "launch_s": LAUNCH_GPU, "units": UNITS},
    ),
    Device(
        name="l4", kind="cuda", arch="sm_89",
        peak_flops_per_s={"f32": 30.3e12, "tf32": 60e12, "f16": 121e12, "bf16": 121e12, "i8": 242.5e12},
        bandwidth_bytes_per_s=300e9, cache_bytes=48e6, memory_bytes=24e9, launch_s=5e-6, units=58,
        source="NVIDIA L4 datasheet; half of the figures that are given with sparsity",
        sources={"cache_bytes": NVIDIA_L2, "launch_s": LAUNCH_GPU, "units": UNITS},
    ),
    Device(
        name="rtx4090", kind="cuda", arch="sm_89",
        peak_flops_per_s={"f32": 82.6e12, "tf32": 82.6e12, "f16": 165.2e12, "bf16": 165.2e12, "i8": 660.6e12},
        bandwidth_bytes_per_s=1.008e12, cache_bytes=72e6, memory_bytes=24e9, launch_s=5e-6, units=128,
        source="NVIDIA Ada GPU architecture white paper, appendix A, GeForce RTX 4090 (f16 and bf16 with f32 accumulation)",
        sources={"launch_s": LAUNCH_GPU, "units": UNITS},
    ),
    Device(
        name="mi300x", kind="rocm", arch="gfx942",
        peak_flops_per_s={"f64": 81.7e12, "f32": 163.4e12, "tf32": 653.7e12, "f16": 1307.4e12, "bf16": 1307.4e12, "i8": 2614.9e12},
        bandwidth_bytes_per_s=5.3e12, cache_bytes=256e6, memory_bytes=192e9, launch_s=5e-6, units=304,
        source="AMD Instinct MI300X data sheet", sources={"launch_s": LAUNCH_GPU},
    ),
)  # fmt: skip

CPU_CORES = 8
CPU_HERTZ = 2.5e9
CPU_SOURCE = (
    "operations per core and cycle from the instruction set (two units; Intel 64 optimization manual; AMX: 1024 bf16 a cycle), "
    "times 8 cores at an assumed 2.5 GHz; calibration measures what is really reached"
)
CPU_SOURCES = {
    "bandwidth_bytes_per_s": "two channels of DDR4-3200, JEDEC JESD79-4",
    "cache_bytes": "assumption: 32 MB shared", "memory_bytes": "assumption: 32 GB", "launch_s": LAUNCH_CPU,
}  # fmt: skip


def _cpu(features: str, per_cycle: dict[str, float]) -> Device:
    """A generic processor with these features. per_cycle: operations per core and cycle, by dtype."""
    peaks = {dtype: count * CPU_CORES * CPU_HERTZ for dtype, count in per_cycle.items()}
    return Device(f"cpu-{features}", "cpu", features, peaks, 51.2e9, 32e6, 32e9, 4e-6, CPU_SOURCE, CPU_SOURCES)


CPUS = (
    _cpu("avx2", {"f64": 16, "f32": 32}),
    _cpu("avx512", {"f64": 32, "f32": 64, "i8": 256}),
    _cpu("avx512_bf16", {"f64": 32, "f32": 64, "bf16": 128, "i8": 256}),
    _cpu("amx", {"f64": 32, "f32": 64, "bf16": 1024, "i8": 2048}),
)

FAKE_SOURCE = "invented for tests: no machine enters a golden file"
FAKES = (
    Device("fake-bandwidth", "fake", "fake", {"f32": 1e12, "bf16": 1e12}, 1e10, 1e6, 1e9, 1e-6, FAKE_SOURCE),
    Device("fake-compute", "fake", "fake", {"f32": 1e10, "bf16": 2e10}, 1e12, 1e6, 1e9, 1e-6, FAKE_SOURCE),
)
