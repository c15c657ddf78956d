"""Saved results: one zip file without pickle. Weights as safetensors, the rest JSON, text and ONNX, each member with its sha256.

manifest.json   format, hashes of all members, runtime, and where those weights and example inputs lie that are not on the CPU
plan.json, report.json
graph.txt       the rewritten graph as text
weights.safetensors
signature.json  the original's parameters and output structure
kernels.json    for a GPU: the generated kernels beside their sources, kernels/*.py, and the calls of the graph that each region holds
example.safetensors
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from paretorch.capture import Program
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.codegen.triton_runtime import TritonRuntime
from paretorch.contest import Contender
from paretorch.fusion import RUNTIME
from paretorch.generated import Generated
from paretorch.ir.errors import ArtifactError
from paretorch.ir.parse import parse_graph
from paretorch.ir.protocols import Runtime
from paretorch.ir.text import print_graph
from paretorch.ledger import Entry
from paretorch.plan import Plan
from paretorch.report import Report, Timing
from paretorch.tuning import tuner_here

if TYPE_CHECKING:
    from paretorch.optimized import Optimized

FORMAT = 2
MEMBERS = frozenset(("plan.json", "report.json", "graph.txt", "weights.safetensors", "example.safetensors", "signature.json"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write whole or not at all: to a neighbour first, then renamed. Raises ArtifactError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror}; choose a path in a folder that exists and can be written") from error


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`."""
    write_bytes(path, text.encode())


def save(result: Optimized, path: Path) -> None:
    """Write the artifact. Raises ArtifactError if the path cannot be written."""
    import io

    contender = result.contender
    assert contender is not None  # Optimized.save refuses the original
    example = {f"input_{i}": tensor.contiguous() for i, tensor in enumerate(result.program.example)}
    members = {
        "plan.json": result.plan.to_json().encode(),
        "report.json": result.report.to_json().encode(),
        "graph.txt": print_graph(contender.graph).encode(),
        "weights.safetensors": save_tensors({name: t.contiguous().clone() for name, t in contender.graph.constants.items()}),
        "example.safetensors": save_tensors(example),
        "signature.json": result.program.signature_json().encode(),
    }
    if result.kernels:
        members |= result.generated.members(contender.graph)
    manifest = {
        "format": FORMAT,
        "runtime": contender.runtime,
        "variant": contender.variant,
        "predicted": contender.predicted,
        "devices": {"weights.safetensors": _elsewhere(contender.graph.constants), "example.safetensors": _elsewhere(example)},
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in members.items()},
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {"manifest.json": json.dumps(manifest, indent=1, sort_keys=True).encode(), **members}.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    write_bytes(path, buffer.getvalue())


def load(path: str | Path) -> Optimized:
    """Read an artifact, verify its hashes, and compile it for its runtime on this machine, with each weight on the kind of device that it was on.

    Raises ArtifactError for what is no artifact, is damaged, or needs a runtime or a device that is not here.
    """
    from paretorch.optimized import Optimized

    members, manifest = _read(Path(path))
    weights, example = (_tensors(path, member, members, manifest) for member in ("weights.safetensors", "example.safetensors"))
    inputs = tuple(example[f"input_{i}"] for i in range(len(example)))
    graph = parse_graph(members["graph.txt"].decode(), weights, inputs)
    program = Program.from_signature(members["signature.json"].decode(), graph, inputs)
    runtime: Runtime | None = RUNTIMES.get(str(manifest.get("runtime")))
    generated = Generated.from_members(members, graph)
    if runtime is not None and runtime.name == RUNTIME:
        runtime = TritonRuntime(lambda graph: generated.regions, tuner_here())
    if runtime is None:
        raise ArtifactError(f"{path} was made for the runtime {manifest.get('runtime')}, which this version does not have")
    refusal = runtime.refuses(graph)
    if refusal is not None:
        raise ArtifactError(f"{path} was made for the runtime {runtime.name}, which cannot be used here: {refusal}")
    contender = Contender(manifest["variant"], runtime.name, graph, runtime.compile(graph, inputs), manifest["predicted"])
    plan = Plan.from_json(members["plan.json"].decode())
    return Optimized(program, contender, plan, report_from_json(members["report.json"].decode()), None, generated)


def _devices_here() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def _elsewhere(tensors: dict[str, Tensor]) -> dict[str, str]:
    """The kind of device of each tensor that is not on the CPU."""
    return {name: tensor.device.type for name, tensor in tensors.items() if tensor.device.type != "cpu"}


def _tensors(path: str | Path, member: str, members: dict[str, bytes], manifest: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of a member by name, on their devices."""
    devices = manifest.get("devices", {}).get(member, {})
    for device in sorted(set(devices.values()) - set(_devices_here())):
        raise ArtifactError(
            f"{path} holds tensors for {device}, which is not on this machine: load it where one is, or optimize for this machine"
        )
    return {name: tensor.to(devices.get(name, "cpu")) for name, tensor in load_tensors(members[member]).items()}


def _read(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        manifest = json.loads(members.pop("manifest.json"))
    except FileNotFoundError as error:
        raise ArtifactError(f"no file {path}") from error
    except (OSError, KeyError, ValueError, RuntimeError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path} is not a saved result of paretorch, or it is damaged: {error}") from error
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{path} is not a saved result of paretorch: its manifest is a {type(manifest).__name__}; expected an object")
    if manifest.get("format") != FORMAT:
        raise ArtifactError(f"{path} has format {manifest.get('format')}; this version reads format {FORMAT}: optimize the model again")
    for name in MEMBERS - dict(manifest.get("sha256", {})).keys():
        raise ArtifactError(f"{path} is damaged: its manifest has no sha256 of {name}; copy or save it again")
    for name, expected in manifest["sha256"].items():
        if name not in members or hashlib.sha256(members[name]).hexdigest() != expected:
            raise ArtifactError(f"{path} is damaged: {name} is missing or its sha256 is not {expected[:12]}…; copy or save it again")
    return members, manifest


def report_from_json(text: str) -> Report:
    """The inverse of `Report.to_json`."""
    body = json.loads(text)
    body["timings"] = tuple(Timing(**row) for row in body["timings"])
    body["entries"] = tuple(Entry(**row) for row in body["entries"])
    body["notes"], body["plan_lines"] = tuple(body["notes"]), tuple(body["plan_lines"])
    return Report(**{field.name: body[field.name] for field in fields(Report)})
