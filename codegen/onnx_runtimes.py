"""The two runtimes that take an ONNX model: ONNX Runtime and OpenVINO, both on the CPU and both on the same model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import local
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from paretorch.codegen.onnx.export import LARGEST_INLINE, SHARED_FROM, OnnxModel, to_onnx
from paretorch.codegen.reduced import covers_products, half_node, without_reduced
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import Graph
from paretorch.ir.hash import structural_hash
from paretorch.ir.protocols import Executable
from paretorch.ir.text import constants_in_order
from paretorch.ir.types import DTYPE_NAMES


class OnnxRuntime:
    """ONNX Runtime's CPU provider."""

    name = "onnxruntime"

    def refuses(self, graph: Graph | None = None) -> str | None:
        if find_spec("onnxruntime") is None or find_spec("onnxscript") is None:
            return "onnxruntime or onnxscript is not installed: pip install onnxruntime onnxscript"
        if graph is not None and (half := half_node(graph)) is not None:
            return f"ONNX Runtime has no products in half precision on CPU; {half.name} is {_dtype(half)}"
        return _no_onnx_form(graph)

    def compile(self, graph: Graph, example_inputs: Sequence[Tensor]) -> Executable:
        """Raises LoweringError."""
        from paretorch.codegen.onnx.session import OnnxSession

        session = OnnxSession(_model(graph))
        return _refilled(graph, lambda inputs: session(inputs))


class OpenVino:
    """OpenVINO's CPU plugin, at f32; at bf16 if all matrix products of the graph are, with the graph's own casts taken out.

    bf16 is a switch for the whole model there, so what the graph keeps in f32 between its products may be computed in bf16 too.
    """

    name = "openvino"

    def refuses(self, graph: Graph | None = None) -> str | None:
        if find_spec("openvino") is None or find_spec("onnxscript") is None:
            return "openvino is not installed: pip install 'paretorch[openvino]'"
        if graph is None:
            return None
        double = next((node for node in graph.nodes if _dtype(node) == "f64"), None)
        if double is not None:
            return f"OpenVINO computes f64 in f32; {double.name} is f64"
        half = half_node(graph)
        if half is not None and not covers_products(graph):
            return f"OpenVINO takes one precision for the whole model; {half.name} is {_dtype(half)} but some matrix products are f32"
        if half is not None and _dtype(half) != "bf16":
            return f"OpenVINO has no {_dtype(half)} on CPU; {half.name} has that type"
        if half is not None and not torch.backends.mkldnn.is_available():
            return "this CPU has no bf16 products"
        return _no_onnx_form(graph)

    def compile(self, graph: Graph, example_inputs: Sequence[Tensor]) -> Executable:
        """Raises LoweringError."""
        import openvino

        reduced = half_node(graph) is not None
        plain = without_reduced(graph) if reduced else graph
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if reduced else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        model, folder = _model(plain), None
        core = openvino.Core()
        try:
            if model.weight_bytes > LARGEST_INLINE:
                folder = TemporaryDirectory(prefix="paretorch-")
                model.save(Path(folder.name) / "model.onnx")
                read = core.read_model(str(Path(folder.name) / "model.onnx"))
            else:
                read = core.read_model(model.proto().SerializeToString())
            compiled = core.compile_model(read, "CPU", settings)
        except Exception as error:  # openvino raises RuntimeError and kinds of its own
            raise LoweringError(f"OpenVINO refuses the model: {(str(error).strip().splitlines() or ['no message'])[-1]}") from error
        return _refilled(graph, _requests(compiled, [str(node.target) for node in graph.inputs], folder))


def _requests(compiled: Any, names: list[str], folder: Any) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Run a compiled OpenVINO model: a request per thread, inputs read in place, outputs copied out of the request's buffers.

    Inputs are set one by one: `infer(list)` looks at what kind of thing it was given, for 2 % of a call of 5 ms.
    """
    from openvino import Tensor as Shared

    places = [
        next(i for i, name in enumerate(names) if name in given.get_names()) for given in compiled.inputs
    ]  # a tensor may have several names
    outputs, mine = [f"output_{i}" for i in range(len(compiled.outputs))], local()
    order = [next(i for i, found in enumerate(compiled.outputs) if name in found.get_names()) for name in outputs]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        if not hasattr(mine, "request"):
            mine.request = compiled.create_infer_request()
        request = mine.request
        arrays = [inputs[place].detach().contiguous().numpy() for place in places]  # shared memory is not kept alive by what shares it
        for number, array in enumerate(arrays):
            request.set_input_tensor(number, Shared(array, shared_memory=True))
        request.infer(None, share_outputs=True)
        return [torch.from_numpy(request.get_output_tensor(place).data.copy()) for place in order]

    run.folder = folder  # type: ignore[attr-defined]  # the weights' file is mapped for as long as the model lives
    return run


def _refilled(graph: Graph, run: Callable[[Sequence[Tensor]], list[Tensor]]) -> Executable:
    """A callable that returns all of the graph's outputs, given one that returns the tensors among them, perhaps in another dtype."""
    dtypes = [value.meta["val"].dtype if isinstance(value, Node) else None for value in graph.outputs]
    if None not in dtypes:
        return lambda *inputs: tuple(x if x.dtype is dtype else x.to(dtype) for x, dtype in zip(run(inputs), dtypes, strict=True))
    constants = graph.outputs

    def execute(*inputs: Tensor) -> tuple[Any, ...]:
        found = iter(run(inputs))
        return tuple(constant if dtype is None else next(found).to(dtype) for constant, dtype in zip(constants, dtypes, strict=True))

    return execute


_RECENT: list[tuple[weakref.ref[Graph], Hashable, OnnxModel]] = []


def _model(graph: Graph) -> OnnxModel:
    """The graph's ONNX model; the last two are kept while their graphs live, since both runtimes take the same one and exporting takes seconds."""
    key = _key(graph)
    for reference, known, model in _RECENT:
        if reference() is not None and known == key:
            return model
    model = to_onnx(graph)
    _RECENT[:] = [entry for entry in _RECENT if entry[0]() is not None][-1:]
    _RECENT.append((weakref.ref(graph), key, model))
    return model


def _key(graph: Graph) -> Hashable:
    """Equal for graphs of the same function, over the same constants, with inputs of the same names.

    A model shares the memory of large constants and has copies of the others, so what these hold now counts: training edits weights in place.
    """
    constants = [graph.constants[name] for name in constants_in_order(graph)]
    held = tuple((tensor.data_ptr(), tensor.stride(), _copied(tensor)) for tensor in constants)
    return structural_hash(graph), held, tuple(str(node.target) for node in graph.inputs)


def _copied(tensor: Tensor) -> bytes:
    """A digest of what a constant holds of which the model has a copy: a small one, or one in another order. Empty for one that is shared."""
    if not tensor.numel() or tensor.is_meta or (tensor.nbytes >= SHARED_FROM and tensor.is_contiguous()):
        return b""
    return sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).digest()


def _no_onnx_form(graph: Graph | None) -> str | None:
    """Why a graph cannot be an ONNX model at all."""
    if graph is None:
        return None
    if not any(isinstance(value, Node) for value in graph.outputs):
        return "the graph returns no tensor"
    for value in graph.outputs:
        if isinstance(value, Node) and not isinstance(value.meta["val"], Tensor):
            return f"the output {value.name} is a number that is computed from sizes; an ONNX model returns tensors"
    for node in graph.inputs:
        if not isinstance(node.meta["val"], Tensor):
            return f"the input {node.target} is a number; an ONNX model takes tensors"
        if _dtype(node) in ("bf16", "c64", "c128"):
            return f"the input {node.target} is {_dtype(node)}, which numpy cannot hold"
    odd = next((node for node in graph.nodes if _dtype(node) in ("c64", "c128")), None)
    return None if odd is None else f"{odd.name} is complex; the ONNX forms are for real numbers"


def _dtype(node: Node) -> str:
    value = node.meta.get("val")
    return DTYPE_NAMES[value.dtype] if isinstance(value, Tensor) else ""
