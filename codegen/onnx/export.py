"""From a graph to an ONNX model, through torch.onnx.export of the rewritten graph.

Ops of ours that have an emitter are translated by it, the others are composites and reach the exporter as ATen. Inputs keep their names, outputs are
output_0, …; symbolic sizes keep theirs. Large weights stay outside of the protobuf, shared with the graph's tensors, until someone asks for one file.

Measured 2026-11-21 on a 12-layer ViT-S, one thread: 0.4 s to export again, 1.8 s to translate, so an emitter for every row of the op table would
save little. Opset 23 is the default for its RMSNormalization: a norm of f32[1,512,640] with its activations took 1.7 ms against 2.4 ms for the six
ops of opset 20.
"""

from __future__ import annotations

import importlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import sympy
import torch
from torch import Tensor
from torch.fx import Node

from paretorch.codegen.onnx.emitters import EMITTERS
from paretorch.ir.collector import uncollected
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import OPS
from paretorch.ir.types import size_of

OPSETS = (20, 23)
OPSET = 23
SHARED_FROM = 4096  # bytes from which a weight stays outside of the protobuf
LARGEST_INLINE = 1_800_000_000  # bytes of weights beyond which they cannot stand in the same file as the model


@dataclass(frozen=True)
class OnnxModel:
    """A model whose large weights are apart. skeleton: onnx.ModelProto that names them; weights: numpy arrays by name, sharing the graph's memory."""

    skeleton: Any
    weights: dict[str, Any]

    @property
    def weight_bytes(self) -> int:
        return sum(int(array.nbytes) for array in self.weights.values())

    def proto(self) -> Any:
        """The whole model as one onnx.ModelProto. Raises LoweringError if its weights do not fit into one."""
        import onnx

        if self.weight_bytes > LARGEST_INLINE:
            gigabytes = self.weight_bytes / 1e9
            raise LoweringError(f"the weights take {gigabytes:.1f} GB, more than one ONNX file holds; save them beside the model")
        model = onnx.ModelProto()
        model.CopyFrom(self.skeleton)
        for tensor in model.graph.initializer:
            if tensor.name in self.weights:
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")
                tensor.raw_data = self.weights[tensor.name].tobytes()
        return model

    def save(self, path: Path) -> None:
        """Write the model; weights past LARGEST_INLINE go into `<name>.weights` beside it."""
        import onnx

        if self.weight_bytes <= LARGEST_INLINE:
            path.write_bytes(self.proto().SerializeToString())
            return
        model = onnx.ModelProto()
        model.CopyFrom(self.skeleton)
        beside = path.with_name(f"{path.name}.weights")
        with beside.open("wb") as file:
            for tensor in model.graph.initializer:
                if tensor.name in self.weights:
                    start = file.seek(0, 2)
                    file.write(self.weights[tensor.name].tobytes())
                    _place(tensor, beside.name, start, int(self.weights[tensor.name].nbytes))
        path.write_bytes(model.SerializeToString())


def to_onnx(graph: Graph, *, opset: int = OPSET, names: dict[str, str] | None = None) -> OnnxModel:
    """The graph as an ONNX model of opset 20 or 23. names: what to call the graph's symbols ("s77": "batch"). Raises LoweringError.

    None and numbers among the graph's outputs have no ONNX form and are left out.
    """
    if opset not in OPSETS:
        raise LoweringError(f"opset {opset} is not offered; known: {', '.join(map(str, OPSETS))}")
    outputs = [value for value in graph.outputs if isinstance(value, Node)]
    program = _exported(graph, opset, [f"output_{i}" for i in range(len(outputs))])
    weights = _take_weights(program.model)
    skeleton = program.model_proto
    _name_sizes(skeleton, graph, outputs, names or {})
    return OnnxModel(skeleton, weights)


def translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The exporter's table of our emitters, built from the `onnx` column of the op table."""
    from onnxscript import onnx_opset

    emitted = getattr(onnx_opset, f"opset{opset}")

    def bind(emitter: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: emitter(emitted, *args, **kwargs)

    rows = [row for row in OPS.values() if isinstance(row.onnx, str) and row.onnx in EMITTERS]
    return {target: bind(EMITTERS[str(row.onnx)]) for row in rows for target in row.targets}


def _exported(graph: Graph, opset: int, output_names: list[str]) -> Any:
    """torch.onnx's program. Raises LoweringError."""
    graph = _tensors_only(graph)
    with _quiet(), uncollected(), torch.no_grad():
        try:
            return _translated(graph, opset, output_names, sparing=True)
        except Exception:  # a pass of the exporter's may bring ops in that the program did not have
            try:
                return _translated(graph, opset, output_names, sparing=False)
            except Exception as error:  # the exporter raises many kinds; the runtime is left out with this reason
                raise LoweringError(f"torch.onnx cannot export this graph: {_reason(error)}") from error


def _translated(graph: Graph, opset: int, output_names: list[str], *, sparing: bool) -> Any:
    """The graph exported and translated. sparing: see _spared."""
    examples, dims = _examples(graph)
    exported = torch.export.export(graph.module(), examples, dynamic_shapes=dims, strict=False)
    with _ONE_AT_A_TIME, _spared(exported) if sparing else nullcontext():
        program = torch.onnx.export(
            exported,
            dynamo=True,
            optimize=True,
            opset_version=opset,
            verbose=False,
            input_names=[str(node.target) for node in graph.inputs],
            output_names=output_names,
            custom_translation_table=translations(opset),
        )
    assert program is not None  # export without a file returns the program
    return program


def _tensors_only(graph: Graph) -> Graph:
    """The graph with those outputs only that are tensors of their own: an input or a value that is returned twice gets a copy."""
    outputs: list[Any] = []
    other = graph.copy()
    for value in (v for v in other.outputs if isinstance(v, Node)):
        again = value in outputs or value.op != "call_function"
        outputs.append(other.call(torch.ops.aten.clone.default, (value,), before=other.output_node) if again else value)
    other.set_outputs(outputs)
    return other.clean()


def _examples(graph: Graph) -> tuple[tuple[Tensor, ...], Any]:
    """Inputs to export with, and which of their axes vary. Each symbol gets a size of its own, for the exporter takes sizes of 0 and 1 as fixed."""
    values: dict[sympy.Symbol, int] = {}
    examples, dims = [], []
    for node in graph.inputs:
        fake, sizes, varying = node.meta["val"], [], {}
        for axis, size in enumerate(size_of(s) for s in fake.shape):
            if isinstance(size, int):
                sizes.append(size)
                continue
            for symbol in sorted(size.free_symbols, key=str):
                values.setdefault(symbol, _hint(graph, symbol, values))
            sizes.append(int(size.subs(values)))
            varying[axis] = torch.export.Dim.AUTO
        examples.append(torch.zeros(sizes, dtype=fake.dtype, device=fake.device))
        dims.append(varying or None)
    return tuple(examples), tuple(dims) if values else None


def _hint(graph: Graph, symbol: sympy.Symbol, taken: dict[sympy.Symbol, int]) -> int:
    """A size for a symbol: within its range, at least 2, and no other symbol's."""
    environment = graph.fake_mode.shape_env
    bounds = environment.var_to_range.get(symbol) if environment is not None else None
    lower = max(2, int(bounds.lower)) if bounds is not None and bounds.lower.is_finite else 2
    return next(size for size in range(lower + 3, lower + 4 + len(taken)) if size not in taken.values())


def _take_weights(model: Any) -> dict[str, Any]:
    """Replace the large initializers of an onnx_ir model by references; returns their arrays by name."""
    import onnx_ir

    weights = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < SHARED_FROM or tensor.dtype.name.startswith(("FLOAT8", "INT4", "UINT4", "STRING")):
            continue
        weights[name] = numpy.ascontiguousarray(tensor.numpy())  # a transposed weight is a view
        value.const_value = onnx_ir.ExternalTensor(
            location="weights", offset=0, length=tensor.nbytes, dtype=tensor.dtype, shape=tensor.shape, name=name
        )
    return weights


def _place(tensor: Any, location: str, offset: int, length: int) -> None:
    """Point an external initializer at its bytes."""
    tensor.ClearField("external_data")
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def _name_sizes(model: Any, graph: Graph, outputs: list[Node], names: dict[str, str]) -> None:
    """Give the symbolic sizes of inputs and outputs the graph's names for them. Raises LoweringError if one was fixed by the exporter."""
    given = {info.name: info for info in model.graph.input}
    pairs = [(node, given.get(str(node.target))) for node in graph.inputs]
    pairs += list(zip(outputs, model.graph.output, strict=True))
    for node, info in pairs:
        if info is None or not isinstance(node.meta["val"], Tensor):
            continue
        for size, dim in zip(node.meta["val"].shape, info.type.tensor_type.shape.dim, strict=True):
            expression = size_of(size)
            if isinstance(expression, int):
                continue
            if node.op == "placeholder" and dim.HasField("dim_value"):
                raise LoweringError(
                    f"the exporter fixed the size {expression} of the input {node.target} to {dim.dim_value}; it varies in the model"
                )
            dim.dim_param = str(expression.subs({s: sympy.Symbol(names.get(str(s), str(s))) for s in expression.free_symbols}))
    del model.graph.value_info[:]


def _reason(error: BaseException) -> str:
    """The innermost cause's first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


_LIBRARY: list[Any] = []  # the exporter's translations, which are the same for every model
_ONE_AT_A_TIME = threading.Lock()  # the exporter looks its translations up in a module, of which there is one


@contextmanager
def _spared(exported: torch.export.ExportedProgram) -> Iterator[None]:
    """Spare the exporter what it does for every model, most of its time for a small one: it parses its 500 translations, builds the signature of
    each, and traces the program anew to decompose what none translates. Here they are parsed once, a program gets those of its own ops, and is
    traced again only if it has an op that they lack.
    """
    try:
        reader: Any = importlib.import_module("torch.onnx._internal._lazy_import").onnxscript_apis
        _LIBRARY[:] = _LIBRARY or reader.get_torchlib_ops()
        names = {each.qualified_name for each in _LIBRARY}
    except (ImportError, AttributeError):  # a torch that is arranged in another way does all of it
        yield
        return
    ours = {target for row in OPS.values() if isinstance(row.onnx, str) and row.onnx in EMITTERS for target in row.targets}
    targets = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    needed = {target.name() for target in targets if isinstance(target, torch._ops.OpOverload) and target not in ours}
    chosen = list(_LIBRARY)
    if needed <= names:
        chosen = [each for each in chosen if each.qualified_name in needed or not each.qualified_name.startswith("aten::")]
        vars(exported)["run_decompositions"] = lambda table=None: exported
    reader.get_torchlib_ops = lambda: chosen  # found before the one of the module that this stands for
    try:
        yield
    finally:
        del reader.get_torchlib_ops


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of packages that are not installed and logs its progress."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
