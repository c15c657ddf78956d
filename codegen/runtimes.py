"""Runtimes: what executes a graph. Each compiles a graph to a callable from flat tensors to a flat tuple.

Nothing here changes global state beyond the call: threads are torch's, options are passed to sessions, inductor's settings are patched locally.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paretorch.codegen.onnx_model import serialise, to_onnx
from paretorch.codegen.reduced import covers_products, without_reduced
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import Graph
from paretorch.ir.protocols import Executable, Runtime
from paretorch.ir.types import DTYPES

HALF = (torch.bfloat16, torch.float16)


def has_half(graph: Graph) -> bool:
    """Whether any value has half precision."""
    return any(isinstance(node.meta.get("val"), Tensor) and node.meta["val"].dtype in HALF for node in graph.nodes)


class Eager:
    """Plain torch, node by node."""

    name = "eager"

    def refuses(self, graph: Graph | None = None) -> str | None:
        return None

    def compile(self, graph: Graph, example_inputs: Sequence[Tensor]) -> Executable:
        module = graph.module()

        def execute(*inputs: Tensor) -> tuple[Any, ...]:
            with torch.inference_mode():
                return tuple(module(*inputs))

        return execute


class Inductor:
    """torch.compile with weights frozen."""

    name = "inductor"

    def refuses(self, graph: Graph | None = None) -> str | None:
        return None

    def compile(self, graph: Graph, example_inputs: Sequence[Tensor]) -> Executable:
        """Raises LoweringError with inductor's first line."""
        module = graph.module()
        try:
            with torch._inductor.config.patch(freezing=True), torch.no_grad():
                compiled = torch.compile(module, fullgraph=True, dynamic=None if _is_dynamic(graph) else False)
                compiled(*example_inputs)
        except Exception as error:  # inductor and the compiler it calls raise many kinds
            raise LoweringError(f"inductor: {type(error).__name__}: {_first_line(error)}") from error

        def execute(*inputs: Tensor) -> tuple[Any, ...]:
            with torch.no_grad():
                return tuple(compiled(*inputs))

        return execute


class OnnxRuntime:
    """ONNX Runtime's CPU provider, threads as torch's, without spin-waiting (which slows whoever runs beside it)."""

    name = "onnxruntime"

    def refuses(self, graph: Graph | None = None) -> str | None:
        if find_spec("onnxruntime") is None:
            return "onnxruntime is not installed: pip install onnxruntime"
        if graph is not None and has_half(graph):
            return "ONNX Runtime has no bf16 products on CPU"
        return _opaque(graph)

    def compile(self, graph: Graph, example_inputs: Sequence[Tensor]) -> Executable:
        """Raises LoweringError."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        model = serialise(to_onnx(graph, example_inputs))
        try:
            session = ort.InferenceSession(str(model) if isinstance(model, Path) else model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise LoweringError(f"ONNX Runtime refuses the model: {_first_line(error)}") from error
        names = [f"input_{i}" for i in range(len(graph.inputs))]
        used = {given.name for given in session.get_inputs()}

        def execute(*inputs: Tensor) -> tuple[Any, ...]:
            feeds = {name: x.detach().contiguous().numpy() for name, x in zip(names, inputs, strict=True) if name in used}
            return tuple(torch.from_numpy(found) for found in session.run(None, feeds))

        return execute


class OpenVino:
    """OpenVINO's CPU plugin on the same ONNX model, at f32, or at bf16 if the graph's matrix products are."""

    name = "openvino"

    def refuses(self, graph: Graph | None = None) -> str | None:
        if find_spec("openvino") is None:
            return "openvino is not installed: pip install 'paretorch[openvino]'"
        if graph is not None and has_half(graph) and not covers_products(graph):
            return "OpenVINO takes one precision for the whole model; this plan has bf16 in some regions only"
        return _opaque(graph)

    def compile(self, graph: Graph, example_inputs: Sequence[Tensor]) -> Executable:
        """Raises LoweringError."""
        import openvino as ov

        reduced = has_half(graph)
        plain = without_reduced(graph) if reduced else graph
        model = serialise(to_onnx(plain, example_inputs))
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if reduced else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        core = ov.Core()
        try:
            read = core.read_model(model)
            compiled = core.compile_model(read, "CPU", settings)
        except Exception as error:  # openvino raises RuntimeError and kinds of its own
            raise LoweringError(f"OpenVINO refuses the model: {_first_line(error)}") from error
        request = compiled.create_infer_request()
        places = [int(given.get_any_name().removeprefix("input_")) for given in compiled.inputs]
        dtypes = [node.meta["val"].dtype for node in graph.outputs]

        def execute(*inputs: Tensor) -> tuple[Any, ...]:
            found = request.infer([inputs[place].detach().contiguous().numpy() for place in places], share_inputs=True)
            return tuple(torch.from_numpy(found[i].copy()).to(dtype) for i, dtype in enumerate(dtypes))

        return execute


def _opaque(graph: Graph | None) -> str | None:
    """Why a graph cannot be an ONNX model at all."""
    if graph is None:
        return None
    if any(not isinstance(value, torch.fx.Node) for value in graph.outputs):
        return "an output is no tensor"
    types = {str(node.meta["val"].dtype) for node in graph.inputs if isinstance(node.meta["val"], Tensor)}
    odd = types & {str(DTYPES[name]) for name in ("bf16", "c64", "c128")}
    return f"an input has dtype {sorted(odd)[0]}, which numpy cannot hold" if odd else None


def _is_dynamic(graph: Graph) -> bool:
    return any(isinstance(size, torch.SymInt) for node in graph.inputs for size in getattr(node.meta["val"], "shape", ()))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (Eager(), Inductor(), OnnxRuntime(), OpenVino())}
