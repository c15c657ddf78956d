"""Checking an ONNX model: well formed, loads, and computes what its graph computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paretorch.codegen.onnx.export import OnnxModel
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import Graph


def check_onnx(model: OnnxModel, graph: Graph, inputs: Sequence[Tensor], tolerance: float = 1e-4) -> float:
    """The largest relative error of any floating output against the graph run as torch. Raises LoweringError if the model is not well formed, does
    not load in ONNX Runtime, or differs by more than the tolerance."""
    import onnx

    from paretorch.codegen.onnx.session import OnnxSession

    try:
        onnx.checker.check_model(_bare(model))
    except onnx.checker.ValidationError as error:
        raise LoweringError(f"the ONNX model is not well formed: {str(error).splitlines()[0]}") from error
    found = OnnxSession(model)(inputs)
    expected = [value for value in graph.run(*inputs) if isinstance(value, Tensor)]
    errors = [_error(number, a, b) for number, (a, b) in enumerate(zip(expected, found, strict=True))]
    worst = max(errors, default=0.0)
    if not worst <= tolerance:
        raise LoweringError(
            f"output {errors.index(worst)} of the ONNX model differs from torch by {worst:.2g} (relative); {tolerance:.0e} is allowed"
        )
    return worst


def _bare(model: OnnxModel) -> Any:
    """The model without weights' bytes, for the checker would look for their file: they become inputs."""
    import onnx

    bare = onnx.ModelProto()
    bare.CopyFrom(model.skeleton)
    kept = [tensor for tensor in bare.graph.initializer if tensor.name not in model.weights]
    for tensor in bare.graph.initializer:
        if tensor.name in model.weights:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(kept)
    return bare


def _error(number: int, expected: Tensor, found: Tensor) -> float:
    """Norm of the difference over the norm; inf where shape, dtype or finiteness differ."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        raise LoweringError(
            f"output {number} is {found.dtype} {list(found.shape)} in ONNX; torch gives {expected.dtype} {list(expected.shape)}"
        )
    if not expected.dtype.is_floating_point:
        return 0.0 if torch.equal(expected, found) else float("inf")
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found)):
        return float("inf")
    a, b = expected[finite].double(), found[finite].double()
    norm = float(a.norm())
    return float((a - b).norm()) / (norm or 1.0)
