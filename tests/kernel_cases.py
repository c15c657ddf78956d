"""Graphs for tests of generated kernels: a family of functions for every kind of region, at any rows, width and dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from paretorch.codegen.kernel import Kernel, Region, compile_kernels
from paretorch.codegen.regions import can_compute, region_of
from paretorch.codegen.triton_text import render
from paretorch.ir.builder import build
from paretorch.ir.errors import TargetError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import aten
from paretorch.ir.types import parse_type


def mend_interpreter() -> None:
    """Triton's interpreter multiplies blocks of bf16 by their bits, and takes integers for these; here it widens them first, as matrix units do,
    and rounds. That of triton 3.6 cannot count to a computed number with numpy 2.4, which takes no array of one element for a number."""
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def wide(block: Any) -> Any:
        if block.dtype.scalar != tl.bfloat16:
            return block
        data = interpreter._convert_float(block.data, tl.bfloat16, tl.float32, None).view(numpy.float32)
        return interpreter.TensorHandle(data, tl.float32)

    set_up = interpreter._patch_lang_tensor

    def counting(tensor: Any, scope: Any) -> None:
        set_up(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self: Any, block: Any, to: Any) -> Any:
        is_whole = to.scalar == tl.bfloat16 and not block.dtype.scalar.is_floating()
        return cast(self, cast(self, block, tl.float32) if is_whole else block, to)

    interpreter._patch_lang_tensor = counting
    interpreter.InterpreterBuilder.cast_impl = rounded
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: plain(self, wide(a), wide(b), *rest)


if find_spec("triton") is not None:
    mend_interpreter()

# What computing in f32 and rounding once leaves against f64 rounded once, relative to the largest result: a few units in the last place of each
# type, and more where a sum over thousands of columns is taken in another order.
TOLERANCE = {"f64": 1e-11, "f32": 1e-5, "f16": 4e-3, "bf16": 3e-2}
DTYPES = ("f32", "f16", "bf16")
SHAPES = {"one": (1, 1), "odd": (3, 17), "prime": (7, 127), "power": (4, 256), "more than a block": (5, 1031)}
LONG = (2, 16411)  # rows that take several blocks


@dataclass(frozen=True)
class Family:
    """function: of a builder and values; types: (dtype, rows, width) -> the types of its inputs."""

    function: Callable[..., Any]
    types: Callable[[str, int, int], dict[str, str]]

    def graph(self, dtype: str, rows: int, width: int) -> Graph:
        return graph_of(self.function, **self.types(dtype, rows, width))


def graph_of(function: Any, **types: str) -> Graph:
    return build("one", function, **{name: parse_type(text) for name, text in types.items()})


def region(graph: Graph) -> Region:
    """All that a kernel can compute in this graph, as one region."""
    return region_of([node for node in graph.calls if can_compute(node)])


def kernel(graph: Graph, number: int = 0) -> Kernel:
    return render(region(graph), number)


def read_by(graph: Graph, inputs: list[Tensor]) -> list[Tensor]:
    """The inputs in the order in which the region reads them."""
    return [inputs[graph.inputs.index(node)] for node in region(graph).reads]


def inputs_of(graph: Graph, seed: int = 0, hint: int = 5) -> list[Tensor]:
    """Random inputs; a symbolic size is `hint`."""
    generator, inputs = torch.Generator().manual_seed(seed), []
    for node in graph.inputs:
        fake = node.meta["val"]
        shape = [size if isinstance(size, int) else hint for size in fake.shape]
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        inputs.append(x > 0 if fake.dtype == torch.bool else (x * 3).to(fake.dtype))
    return inputs


def in_f64(function: Any, types: dict[str, str], inputs: list[Tensor]) -> tuple[Any, ...]:
    """The same function with every floating input in f64."""
    wide = {name: f"f64{text[text.index('[') :]}" if text.split("[")[0] in TOLERANCE else text for name, text in types.items()}
    return graph_of(function, **wide).run(*(x.double() if x.is_floating_point() else x for x in inputs))


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    for b, a in zip(found, expected, strict=True):
        assert b.shape == a.shape
        if b.is_floating_point():
            scale = float(a.abs().max()) if a.numel() else 1.0
            torch.testing.assert_close(b.double(), a.double(), rtol=tolerance, atol=tolerance * max(scale, 1.0))
        else:
            assert torch.equal(b, a)


def width_of(x: Any) -> int:
    return x.meta["val"].shape[-1]


# nothing is read or written outside, and what compilers make of kernels


GUARD = 4096
MARK = {torch.bool: True, torch.int8: 101, torch.uint8: 101, torch.int32: 1 << 30, torch.int64: 1 << 30}


def between_guards(x: Tensor, mark: float) -> tuple[Tensor, Tensor]:
    """(the tensor in the middle of a longer one, that one)."""
    whole = torch.full((x.numel() + 2 * GUARD,), MARK.get(x.dtype, mark), dtype=x.dtype)
    whole[GUARD : GUARD + x.numel()] = x.reshape(-1)
    return whole[GUARD : GUARD + x.numel()].view(x.shape), whole


def launched_between_guards(made: Kernel, inputs: list[Tensor]) -> Any:
    """Runs the kernel with guards of NaN around what it reads; guards around what it writes must stay."""
    guards: list[Tensor] = []

    def empty(shape: tuple[int, ...], **options: Any) -> Tensor:
        inner, whole = between_guards(torch.zeros(shape, **options), 7.0)
        guards.append(whole)
        return inner

    module = made.module
    module.torch = SimpleNamespace(**{**vars(torch), "empty": empty})  # type: ignore[attr-defined]
    try:
        found = module.launch(*(between_guards(x, float("nan"))[0] for x in inputs))
    finally:
        module.torch = torch  # type: ignore[attr-defined]
    for whole in guards:
        edges = torch.cat([whole[:GUARD], whole[-GUARD:]])
        assert torch.equal(edges, torch.full_like(edges, MARK.get(edges.dtype, 7.0)))
    return found if isinstance(found, tuple) else (found,)


# bytes that one program may have, by the architecture that kernels are checked for; sm_89 is sm_80 with less shared memory
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}


def check_compiled(kernels: list[Kernel]) -> None:
    """Every kernel compiles for every architecture, without spills, with shared memory that a program may have."""
    try:
        found = compile_kernels(kernels, list(SHARED_BYTES))
    except TargetError as error:
        pytest.skip(str(error))
    assert set(found) == {(made.name, arch) for made in kernels for arch in SHARED_BYTES}
    for (name, arch), binary in found.items():
        assert binary.spills == 0, (name, arch)
        assert 0 < binary.registers <= (512 if arch == "gfx942" else 255)
        assert binary.shared_bytes <= SHARED_BYTES[arch]
        assert binary.binary


def triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in version("triton").split(".")[:2])


def run_alone(made: Kernel, folder: Path) -> None:
    """The kernel's file as a script: it compares itself with torch. Skipped where the interpreter would have to be mended."""
    if "in range(" in made.source and triton_version() < (3, 7) and int(numpy.__version__.split(".")[1]) >= 4:
        pytest.skip("the interpreter of triton 3.6 cannot count to a computed number with numpy 2.4")
    path = folder / f"{made.name}.py"
    path.write_text(made.source)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=environment)
    assert f"{made.name}: agrees with torch" in done.stdout, done.stderr


# functions


def add_layer_norm(b: Any, x: Any, residual: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
    total = b.add(x, residual)
    return total, b.gelu(b.layer_norm(total, [width_of(x)], weight, bias, 1e-5))


def scaled_rms_norm(b: Any, x: Any, weight: Any, scale: Any, gate: Any) -> Any:
    normed = b.rms_norm(b.mul(x, scale), [width_of(x)], weight, 1e-6)
    return b.mul(b.silu(gate), b.call(aten("_to_copy.default"), (normed,), {"dtype": gate.meta["val"].dtype}))


def masked_softmax(b: Any, scores: Any, seen: Any, factor: Any) -> Any:
    return b.softmax(b.call(aten("where.ScalarOther"), (seen, b.mul(scores, factor), -1e4)), -1)


def statistics(b: Any, x: Any) -> tuple[Any, ...]:
    square = b.call(aten("mean.dim"), (b.mul(x, x), [-1], True))
    return b.mul(x, b.rsqrt(b.add(square, 1.0))), b.amax(x, [-1]), b.logsumexp(x, [-1], True)


def spelled_softmax(b: Any, x: Any) -> Any:
    powers = b.exp(b.sub(x, b.amax(x, [-1], True)))
    return b.div(powers, b.call(aten("sum.dim_IntList"), (powers, [-1], True)))


def chain(b: Any, x: Any, channel: Any, number: Any, mask: Any) -> tuple[Any, Any]:
    y = b.mul(b.add(x, channel), number)
    return b.tanh(b.where(mask, b.gelu(y, approximate="tanh"), y)), b.call(aten("gt.Scalar"), (y, 0.5))


def packed_gate(b: Any, packed: Any) -> Any:
    halves = b.split(packed, width_of(packed) // 2, -1)
    return b.mul(b.silu(b.item(halves, 0)), b.item(halves, 1))


def rotary(b: Any, x: Any, cos: Any, sin: Any) -> Any:
    """x: T[B, T, H, D], turned to [B, H, T, D] before."""
    half, heads_first = width_of(x) // 2, b.permute(x, [0, 2, 1, 3])
    left, right = b.slice(heads_first, -1, 0, half), b.slice(heads_first, -1, half)
    return b.add(b.mul(heads_first, cos), b.mul(b.cat([b.neg(right), left], -1), sin))


def vector(dtype: str, *sizes: int) -> str:
    return f"{dtype}[{','.join(map(str, sizes))}]"


FAMILIES: dict[str, Family] = {
    "layer_norm": Family(
        add_layer_norm,
        lambda dtype, rows, width: {
            "x": vector(dtype, rows, width), "residual": vector(dtype, rows, width), "weight": vector(dtype, width), "bias": vector(dtype, width),
        },
    ),
    "rms_norm": Family(
        scaled_rms_norm,
        lambda dtype, rows, width: {
            "x": vector(dtype, 2, rows, width), "weight": vector(dtype, width), "scale": vector(dtype, 2, 1, width),
            "gate": vector(dtype, 2, rows, width),
        },
    ),
    "softmax": Family(
        masked_softmax,
        lambda dtype, rows, width: {"scores": vector(dtype, 2, rows, width), "seen": vector("bool", rows, width), "factor": vector(dtype)},
    ),
    "statistics": Family(statistics, lambda dtype, rows, width: {"x": vector(dtype, rows, width)}),
    "spelled_softmax": Family(spelled_softmax, lambda dtype, rows, width: {"x": vector(dtype, rows, width)}),
    "chain": Family(
        chain,
        lambda dtype, rows, width: {
            "x": vector(dtype, rows, 3, width), "channel": vector(dtype, 3, width), "number": vector(dtype), "mask": vector("bool", rows, 1, width),
        },
    ),
    "packed_gate": Family(packed_gate, lambda dtype, rows, width: {"packed": vector(dtype, rows, 2 * width)}),
    "rotary": Family(
        rotary,
        lambda dtype, rows, width: {
            "x": vector(dtype, 2, rows, 3, 2 * width), "cos": vector(dtype, rows, 2 * width), "sin": vector(dtype, rows, 2 * width),
        },
    ),
}  # fmt: skip
