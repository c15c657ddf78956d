"""Who recognises which spelling of attention: paretorch, inductor, ONNX Runtime. Writes docs/spellings.md.

    python -m benchmarks.spellings

A spelling counts as recognised if, after the optimiser's own passes, one attention op is left and no softmax: paretorch.attention here, one of
aten's scaled_dot_product kernels in inductor's graph (its passes run, code is not generated), an attention op in the model that
an ONNX Runtime session saves after its optimisations, or in the model that onnxruntime.transformers.optimizer writes.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from paretorch.capture import capture
from paretorch.rewrites.normalize import normalize
from tests.spellings import Case, D, H, handwritten

PAGE = Path(__file__).parent.parent / "docs" / "spellings.md"
ONNX_ATTENTION = {"Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention", "PackedMultiHeadAttention"}
OPSET = 20


def ours(case: Case, folder: Path) -> bool:
    graph = normalize(capture(case.module, case.inputs, case.dynamic).graph)
    names = [str(node.target) for node in graph.calls]
    return sum("paretorch.attention" in name for name in names) == 1 and not any("softmax" in name for name in names)


def inductor(case: Case, folder: Path) -> bool:
    """Inductor's graph passes; what they leave is looked at in place of being compiled."""
    from torch._inductor.compile_fx import compile_fx

    left: list[str] = []

    def look(module: torch.fx.GraphModule, inputs: Any, **_: Any) -> Callable[..., Any]:
        left.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(case.module, backend=lambda module, inputs: compile_fx(module, inputs, inner_compile=look))(*case.inputs)
    return any("scaled_dot_product" in name for name in left) and not any("softmax" in name for name in left)


def exported(case: Case, folder: Path) -> list[Path]:
    """The model as each of torch's two exporters writes it; the older one is tried too, since ONNX Runtime's fusions were made for it."""
    paths: list[Path] = []
    failure: Exception | None = None
    for export in (export_dynamo, export_torchscript):
        path = folder / f"{export.__name__}.onnx"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                export(case, path)
            paths.append(path)
        except Exception as error:
            failure = failure or error
    if not paths and failure is not None:
        raise failure
    return paths


def export_dynamo(case: Case, path: Path) -> None:
    torch.onnx.export(
        case.module,
        case.inputs,
        str(path),
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=case.dynamic,
        external_data=False,
        verbose=False,
    )


def export_torchscript(case: Case, path: Path) -> None:
    names = [f"x{place}" for place in range(len(case.inputs))]
    dims: Any = case.dynamic or ({},) * len(names)
    axes = {name: {axis: str(dim.__name__) for axis, dim in named.items()} for name, named in zip(names, dims, strict=True)}
    torch.onnx.export(case.module, case.inputs, str(path), dynamo=False, opset_version=17, input_names=names, dynamic_axes=axes)


def has_attention(model: onnx.ModelProto) -> bool:
    kinds = [node.op_type for node in model.graph.node]
    return any(kind in ONNX_ATTENTION for kind in kinds) and "Softmax" not in kinds


def onnx_runtime(case: Case, folder: Path) -> bool:
    """The session's own optimiser, all levels."""
    return any(has_attention(optimized_by_session(path)) for path in exported(case, folder))


def optimized_by_session(path: Path) -> onnx.ModelProto:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath)


def onnx_transformers(case: Case, folder: Path) -> bool:
    """The Python optimiser for transformers, told the number of heads and the width."""
    from onnxruntime.transformers.optimizer import optimize_model

    paths = exported(case, folder)
    return any(
        has_attention(optimize_model(str(path), model_type="bert", num_heads=H, hidden_size=H * D, opt_level=0).model) for path in paths
    )


PEERS: dict[str, Callable[[Case, Path], bool]] = {
    "paretorch": ours, "inductor": inductor, "ONNX Runtime session": onnx_runtime, "onnxruntime.transformers": onnx_transformers,
}  # fmt: skip


def verdict(peer: Callable[[Case, Path], bool], case: Case) -> str:
    """yes, no, or the kind of error that the peer (or its exporter) ended with."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return "yes" if peer(case, Path(folder)) else "no"
        except Exception as error:
            return f"fails ({type(error).__name__})"


def in_float32() -> dict[str, Case]:
    """The spellings in float32, the type that all peers support."""
    cases = {}
    for name, case in handwritten().items():
        inputs = tuple(x.float() if x.is_floating_point() else x for x in case.inputs)
        cases[name] = Case(case.module.float().eval(), inputs, case.dynamic)
    return cases


def page(rows: dict[str, dict[str, str]]) -> str:
    import onnxscript

    totals = {peer: sum(row[peer] == "yes" for row in rows.values()) for peer in PEERS}
    versions = (
        f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, onnx {onnx.__version__}, onnxscript {onnxscript.__version__}"
    )
    lines = [
        "# Spellings of attention",
        "",
        "Written by `python -m benchmarks.spellings`; do not edit. The spellings are those of `tests/spellings.py`, in float32 on CPU;",
        "each is one attention. A peer recognises one if its own passes leave one attention op and no softmax. Calls of",
        "`scaled_dot_product_attention` (also inside `nn.MultiheadAttention`) are one op for inductor from the start; exporting to ONNX",
        f"spells them out. For ONNX Runtime both of torch's exporters are tried (opset {OPSET}, and the older one at opset 17) and a yes from",
        "either counts; its fusions look for blocks with their projections, which most of these spellings leave out, so read its columns as",
        "what it makes of the bare mathematics, not of whole models. `fails` is an exception in the peer or its exporter. Beside this list,",
        "the test suite checks 360 generated combinations of scale, mask, layout, key heads and casts, and near misses that must stay.",
        "",
        f"{versions}; {datetime.date.today().isoformat()}.",
        "",
        "| spelling | " + " | ".join(PEERS) + " |",
        "|---" * (len(PEERS) + 1) + "|",
        *(f"| {name} | " + " | ".join(row[peer] for peer in PEERS) + " |" for name, row in rows.items()),
        f"| **recognised, of {len(rows)}** | " + " | ".join(f"**{totals[peer]}**" for peer in PEERS) + " |",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    rows: dict[str, dict[str, str]] = {}
    for name, case in in_float32().items():
        rows[name] = {peer: verdict(run, case) for peer, run in PEERS.items()}
        print(name, rows[name], flush=True)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
