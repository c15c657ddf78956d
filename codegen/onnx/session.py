"""One loaded ONNX model in ONNX Runtime: threads as torch's, without spin-waiting (which slows whoever runs beside it).

Large weights are handed over as they are, so the session and the graph share their memory; what ONNX Runtime packs for its products is its own.
Inputs are read in place, outputs are fresh arrays that become tensors without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paretorch.codegen.onnx.export import OnnxModel
from paretorch.ir.errors import LoweringError


class OnnxSession:
    """Callable from the graph's flat inputs to the tensors among its outputs. Raises LoweringError if ONNX Runtime refuses the model."""

    def __init__(self, model: OnnxModel) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        kinds = {tensor.name: tensor.data_type for tensor in model.skeleton.graph.initializer}
        share = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
        self.weights = model.weights  # kept: the session reads them in place
        options.add_external_initializers(list(self.weights), [share(array, kinds[name]) for name, array in self.weights.items()])
        content = model.skeleton.SerializeToString()
        try:
            self.session: Any = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise LoweringError(f"ONNX Runtime refuses the model: {(str(error).strip().splitlines() or ['no message'])[0]}") from error
        self.names = [given.name for given in self.session.get_inputs()]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        feeds = {name: x.detach().contiguous().numpy() for name, x in zip(self.names, inputs, strict=True)}
        return [torch.from_numpy(found) for found in self.session.run(None, feeds)]
