"""From a graph to an ONNX model: torch.onnx.export of the rewritten graph, with emitters of our own where the form matters."""

from paretorch.codegen.onnx.check import check_onnx
from paretorch.codegen.onnx.emitters import EMITTERS
from paretorch.codegen.onnx.export import OPSET, OnnxModel, to_onnx

__all__ = ["EMITTERS", "OPSET", "OnnxModel", "check_onnx", "to_onnx"]
