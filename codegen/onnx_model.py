"""From a graph to an ONNX model, through torch.onnx.export of the rewritten graph.

Our own ops are composites, so they reach the exporter as ATen and need no translation. Measured on a 12-layer ViT-S: 2 to 3 seconds.
The attention op of opset 23 is not the faster one on CPU at these lengths, so the default opset is 20.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import Graph
from paretorch.ir.types import size_of

OPSET = 20
LARGEST_INLINE = 1_800_000_000  # bytes of weights beyond which they are written beside the model


def to_onnx(graph: Graph, example_inputs: Sequence[Tensor], *, opset: int = OPSET) -> Any:
    """An onnx.ModelProto with inputs input_0, … and outputs output_0, …; symbolic sizes keep names. Raises LoweringError."""
    with _quiet(), torch.no_grad():
        try:
            exported = torch.export.export(graph.module(), tuple(example_inputs), dynamic_shapes=_dims(graph), strict=False)
            program = torch.onnx.export(
                exported,
                dynamo=True,
                optimize=True,
                opset_version=opset,
                verbose=False,
                input_names=[f"input_{i}" for i in range(len(graph.inputs))],
                output_names=[f"output_{i}" for i in range(len(graph.outputs))],
            )
        except Exception as error:  # the exporter raises many kinds; the runtime is left out with this reason
            raise LoweringError(f"torch.onnx cannot export this graph: {(str(error).strip().splitlines() or ['no message'])[0]}") from error
    assert program is not None  # export without a file returns the program
    return program.model_proto


def _dims(graph: Graph) -> Any:
    """One named Dim per symbol; None if every size is fixed."""
    names: dict[str, Any] = {}

    def dim(size: Any) -> Any:
        expression = size_of(size)
        if isinstance(expression, int):
            return None
        return names.setdefault(str(expression), torch.export.Dim.DYNAMIC)

    shapes = [{axis: d for axis, size in enumerate(node.meta["val"].shape) if (d := dim(size)) is not None} for node in graph.inputs]
    return tuple(shapes) if any(shapes) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of packages that are not installed and prints its progress."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def serialise(model: Any) -> bytes | Path:
    """The model's bytes; for more than LARGEST_INLINE of weights a file in a temporary folder with the weights beside it."""
    import onnx

    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= LARGEST_INLINE:
        return model.SerializeToString()  # type: ignore[no-any-return]
    path = Path(tempfile.mkdtemp(prefix="paretorch-")) / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin")
    return path
