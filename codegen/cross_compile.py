"""Compile kernels for architectures that are not here. Run as a script: JSON jobs on standard input, JSON results as the last line of output.

A process of its own, since triton decides on its interpreter when it is first imported; it starts more where there is much to do. Imports nothing of
ours.
NVIDIA: registers and spilled bytes as ptxas reports them; AMD: from the metadata in the assembly.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import Any

JOBS_OF_A_WORKER = 6  # at least: a worker first imports triton, which takes as long as a few kernels


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """One kernel for one architecture; with "error" or "no_backend" instead of figures if that fails."""
    import triton
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    about = {"kernel": job["kernel"], "arch": job["arch"]}
    is_nvidia = job["arch"].startswith("sm_")
    if ("nvidia" if is_nvidia else "amd") not in backends:
        return {**about, "no_backend": "it was built without that backend"}
    target = GPUTarget("cuda", int(job["arch"][3:]), 32) if is_nvidia else GPUTarget("hip", job["arch"], 64)
    constants = {name: value for name, value in job["schedule"].items() if name.isupper()}
    options = {name: value for name, value in job["schedule"].items() if not name.isupper()}
    signature = {name: kind.removesuffix(":16") for name, kind in job["parameters"]} | dict.fromkeys(constants, "constexpr")
    multiples = [place for place, (_, kind) in enumerate(job["parameters"]) if kind.startswith("*") or kind.endswith(":16")]
    aligned = {(place,): [["tt.divisibility", 16]] for place in multiples}
    try:
        function = getattr(_load(job["path"], job["kernel"]), job["kernel"])
        compiled = triton.compile(ASTSource(function, signature, constants, aligned), target=target, options=options)
        figures = _nvidia(compiled, job["arch"]) if is_nvidia else _amd(compiled)
    except Exception as error:  # triton's stages raise many kinds; the parent turns this into one of ours
        return {**about, "error": f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[-1]}"}
    return {**about, **figures, "shared_bytes": compiled.metadata.shared}


def _load(path: str, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _nvidia(compiled: Any, arch: str) -> dict[str, Any]:
    """ptxas -v on the PTX: "Used 24 registers", "0 bytes spill stores, 0 bytes spill loads"."""
    from triton import knobs

    ptxas = knobs.nvidia.ptxas.path
    named = re.search(r"\.target (\w+)", compiled.asm["ptx"])
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        run = subprocess.run(
            [ptxas, "-v", f"--gpu-name={named[1] if named else arch}", file.name, "-o", "/dev/null"], capture_output=True, text=True
        )
    if run.returncode != 0:
        raise RuntimeError(run.stderr.strip() or "ptxas failed")
    registers = re.search(r"Used (\d+) registers", run.stderr)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", run.stderr)
    return {
        "registers": int(registers[1]) if registers else 0,
        "spills": sum(map(int, spills)),
        "binary": base64.b64encode(compiled.asm["cubin"]).decode(),
    }


def _amd(compiled: Any) -> dict[str, Any]:
    """Vector registers, spilled registers and private memory, from the kernel's metadata in the assembly."""

    def count(name: str) -> int:
        return sum(map(int, re.findall(rf"\.{name}:\s+(\d+)", compiled.asm["amdgcn"])))

    spills = count("vgpr_spill_count") + count("sgpr_spill_count") + count("private_segment_fixed_size")
    return {"registers": count("vgpr_count"), "spills": spills, "binary": base64.b64encode(compiled.asm["hsaco"]).decode()}


def compile_jobs(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results in the order of the jobs; many jobs are spread over the cores."""
    workers = min(len(jobs) // JOBS_OF_A_WORKER, os.cpu_count() or 1)
    if workers < 2:
        return [compile_job(job) for job in jobs]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(compile_job, jobs))


if __name__ == "__main__":
    print(json.dumps(compile_jobs(json.load(sys.stdin))))
