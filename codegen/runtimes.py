"""Runtimes: what executes a graph. Each compiles a graph to a callable from flat tensors to a flat tuple.

Nothing here changes global state beyond the call: threads are torch's, options are passed to sessions, inductor's settings are patched locally.
No op has a form for one runtime alone: of those measured on 2026-11-21 none was faster by more than the spread (`onnx/emitters.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from paretorch.codegen.onnx_runtimes import OnnxRuntime, OpenVino
from paretorch.codegen.triton_runtime import TritonRuntime
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import Graph
from paretorch.ir.protocols import Executable, Runtime


class Eager:
    """Plain torch, node by node, under no_grad: tensors made under inference_mode could not be written to by the caller.

    The generated forward reads its weights from a plain namespace, since a module's attribute lookup takes as long as a small op's dispatch:
    on a 2-layer model of width 32, 0.40 ms as a module and 0.37 ms so (2026-11-21, one thread).
    """

    name = "eager"

    def refuses(self, graph: Graph | None = None) -> str | None:
        return None

    def compile(self, graph: Graph, example_inputs: Sequence[Tensor]) -> Executable:
        forward = plain_forward(graph)

        def execute(*inputs: Tensor) -> tuple[Any, ...]:
            with torch.no_grad():
                return tuple(forward(*inputs))

        return execute


def plain_forward(graph: Graph) -> Callable[..., tuple[Any, ...]]:
    """The graph's generated forward, bound to its constants."""
    module = graph.module()
    names = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    if any("." in name for name in names):
        return module.forward
    return type(module).forward.__get__(SimpleNamespace(**{name: getattr(module, name) for name in names}))  # type: ignore[no-any-return]


class Inductor:
    """torch.compile with weights frozen, so that they can be packed for their products.

    Fixed sizes need none of Dynamo's guards, whose check took half of a small model's time (0.50 and 0.23 ms, 2 layers of width 32); varying sizes keep
    them. Measured 2026-11-21 on a 12-layer ViT-S, one thread of a busy machine: 25 s to compile; frozen 399 ms a call, not frozen 408 ms.
    """

    name = "inductor"

    def refuses(self, graph: Graph | None = None) -> str | None:
        return None

    def compile(self, graph: Graph, example_inputs: Sequence[Tensor]) -> Executable:
        """Raises LoweringError with inductor's reason."""
        module = graph.module()
        examples = [_marked(x.detach(), node.meta["val"]) for x, node in zip(example_inputs, graph.inputs, strict=True)]
        varies = is_dynamic(graph)
        options: Any = None if varies else {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        try:
            with torch._inductor.config.patch(freezing=True), torch.no_grad():
                compiled = torch.compile(module, fullgraph=True, dynamic=None if varies else False, options=options)
                compiled(*examples)
        except Exception as error:  # inductor and the compiler that it calls raise many kinds
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            raise LoweringError(f"inductor cannot compile this graph: {type(error).__name__}: {reason}") from error

        def execute(*inputs: Tensor) -> tuple[Any, ...]:
            with torch.no_grad():
                return tuple(compiled(*(x.detach().contiguous() for x in inputs)))

        return execute


def is_dynamic(graph: Graph) -> bool:
    """Whether an input has a symbolic size."""
    return any(isinstance(size, torch.SymInt) for node in graph.inputs for size in getattr(node.meta["val"], "shape", ()))


def _marked(example: Tensor, fake: Any) -> Tensor:
    """The example, contiguous, with those axes marked that vary in the graph."""
    example = example.contiguous().view(example.shape)  # a new tensor object: marks must not reach the caller's
    for axis, size in enumerate(fake.shape):
        if isinstance(size, torch.SymInt):
            torch._dynamo.maybe_mark_dynamic(example, axis)
    return example


RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (Eager(), Inductor(), OnnxRuntime(), OpenVino(), TritonRuntime())}
