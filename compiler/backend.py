"""`torch.compile(model, backend="paretorch")`: exact rewrites on what Dynamo captured, then inductor.

Dynamo passes all weights as inputs, so rules that fold weights cannot prove that they stay the same: they refuse themselves, since a weight is
then no constant of the graph. With gradients, the graph goes to inductor as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from paretorch.capture import graph_of_traced
from paretorch.ir.errors import CaptureError, ParetorchError
from paretorch.rewrites import RULES
from paretorch.rewrites.apply import apply_rule
from paretorch.rewrites.normalize import normalize

LAST_NOTES: list[str] = []  # why the last graphs, newest last, were passed on unchanged


def paretorch(module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """A backend for torch.compile. Raises nothing of its own: a graph that cannot be rewritten goes to inductor unchanged, with a note."""
    from torch._inductor.compile_fx import compile_fx

    rewritten = module
    if _wants_gradients(example_inputs):
        _note("the graph needs gradients; rewrites are for inference (torch.no_grad or inference_mode)")
    else:
        try:
            rewritten = rewrite(module, example_inputs)
        except ParetorchError as error:
            _note(str(error))
    compiled: Any = compile_fx(rewritten, list(example_inputs))
    return compiled  # type: ignore[no-any-return]


def rewrite(module: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """The same function after normalize and the exact rules. Raises ParetorchError."""
    mode = torch._guards.detect_fake_mode(example_inputs)
    if mode is None:
        raise CaptureError("the graph came without fake inputs; it goes to inductor as it is")
    fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) and not _is_fake(x) else x for x in example_inputs]
    try:
        with torch.no_grad(), mode:
            traced = make_fx(module, tracing_mode="real", pre_dispatch=True)(*fakes)
    except Exception as error:  # tracing raises many kinds; inductor gets what Dynamo captured
        raise CaptureError(f"the graph could not be traced to ATen: {(str(error).splitlines() or ['no message'])[0]}") from error
    traced.graph.eliminate_dead_code()
    graph = normalize(graph_of_traced(traced, fakes, mode))
    for rule in RULES:
        if rule.is_exact:
            graph = apply_rule(rule, graph)[0]
    return graph.module()


def _is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)


def _wants_gradients(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def _note(text: str) -> None:
    LAST_NOTES.append(text)
    del LAST_NOTES[:-16]
