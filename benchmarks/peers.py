"""The peers that every speed is measured against, each as its user would run it: eager, inductor, ONNX Runtime, OpenVINO, at f32."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Call = Callable[[], Any]


def eager(model: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    def call() -> Any:
        with torch.inference_mode():
            return model(*inputs)

    return call


def own_code(model: nn.Module, name: str) -> Callable[..., Any]:
    """The model's call under a code object of its own: Dynamo keeps what it compiled by code object, so two settings would share one."""

    def forward(*inputs: Tensor) -> Any:
        return model(*inputs)

    forward.__code__ = forward.__code__.replace(co_name=f"forward_{name}")
    return forward


def inductor(model: nn.Module, inputs: tuple[Tensor, ...], *, freezing: bool = False) -> Call:
    with torch._inductor.config.patch(freezing=freezing), torch.no_grad():
        compiled = torch.compile(own_code(model, f"freezing_{freezing}"), dynamic=False)
        compiled(*inputs)

    def call() -> Any:
        with torch.no_grad():
            return compiled(*inputs)

    return call


def inductor_freezing(model: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    return inductor(model, inputs, freezing=True)


def _onnx(model: nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
    with torch.no_grad():
        program = torch.onnx.export(torch.export.export(model, inputs, strict=False), dynamo=True, optimize=True, verbose=False)
    assert program is not None  # export without a file returns the program
    buffer = io.BytesIO()
    program.save(buffer)
    return buffer.getvalue()


def onnxruntime(model: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = ort.InferenceSession(_onnx(model, inputs), options, providers=["CPUExecutionProvider"])
    feeds = {given.name: x.numpy() for given, x in zip(session.get_inputs(), tree_leaves(inputs), strict=False)}
    return lambda: session.run(None, feeds)


def openvino(model: nn.Module, inputs: tuple[Tensor, ...]) -> Call:
    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(core.read_model(_onnx(model, inputs)), "CPU", settings)
    request, feeds = compiled.create_infer_request(), [x.numpy() for x in tree_leaves(inputs)]
    return lambda: list(request.infer(feeds, share_inputs=True).values())


PEERS: dict[str, Callable[[nn.Module, tuple[Tensor, ...]], Call]] = {
    "eager": eager,
    "inductor": inductor,
    "inductor freezing": inductor_freezing,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}
