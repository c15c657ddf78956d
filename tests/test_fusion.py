"""Fusion planning: regions by price, whole models through them, and the kernels that `optimize` hands out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paretorch
from paretorch.artifact import load
from paretorch.capture import capture
from paretorch.codegen.regions import is_schedulable
from paretorch.codegen.triton_runtime import with_kernels
from paretorch.cost_model.calibrate import analytic
from paretorch.cost_model.devices import DEVICES
from paretorch.cost_model.price import Prices
from paretorch.fusion import Fusion
from paretorch.generated import Generated
from paretorch.ir.errors import ArtifactError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import aten
from paretorch.ir.parse import parse_graph
from paretorch.ir.text import print_graph
from paretorch.rewrites.normalize import normalize
from tests import tiny_transformers
from tests.kernel_cases import graph_of

pytest.importorskip("triton")


def fusion(device: str = "h100-sxm") -> Fusion:
    return Fusion(Prices(analytic(DEVICES[device]), DEVICES[device]))


def regions(graph: Graph, device: str = "h100-sxm") -> list[str]:
    return [str(fused.region) for fused in fusion(device).plan(graph).regions]


class Gated(nn.Module):
    """A convolution whose channels are scaled by what was learnt about each of them, then a feed-forward part with a residual and a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.filter, self.gate = nn.Conv2d(3, width, 3), nn.Linear(width, width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.filter(x)
        x = torch.relu(x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None])
        x = x.flatten(2).transpose(1, 2)
        left, right = self.up(self.norm(x)).chunk(2, -1)
        return self.norm(x + self.down(nn.functional.silu(left) * right))


@pytest.mark.parametrize("device", ["fake-bandwidth", "fake-compute"])
def test_plan(device: str, golden: Callable[[str], None]) -> None:
    """Where bytes are dear the gate is computed for each of a channel's elements, where operations are, once for each channel."""
    golden(f"{fusion(device).plan(gated_graph())}\n")


def gated_graph() -> Graph:
    torch.manual_seed(0)
    return normalize(capture(Gated(16).eval(), torch.randn(2, 3, 18, 18)).graph)


def test_plans_of_two_devices_differ() -> None:
    assert set(regions(gated_graph(), "fake-bandwidth")) != set(regions(gated_graph(), "fake-compute"))


def test_a_value_with_other_users_is_written() -> None:
    def residual(b: Any, x: Any, y: Any, weight: Any) -> Any:
        total = b.add(x, y)
        return b.linear(b.layer_norm(total, [8]), weight), total

    (fused,) = fusion().plan(graph_of(residual, x="f32[4,8]", y="f32[4,8]", weight="f32[8,8]")).regions
    assert str(fused.region) == "row(add, layer_norm)"
    assert [node.name for node in fused.region.writes] == ["add", "layer_norm"]
    assert fused.apart.launches - fused.cost.launches == 1
    assert fused.apart.bytes_moved - fused.cost.bytes_moved == 4 * 4 * 8


def test_readers_of_one_value_share_a_kernel() -> None:
    graph = graph_of(lambda b, x: (b.relu(x), b.exp(x)), x="f32[400,80]")
    assert regions(graph) == ["elementwise(relu, exp)"]
    other = graph_of(lambda b, x: (b.relu(x), b.exp(b.permute(x, [1, 0]))), x="f32[400,80]")
    assert regions(other) == []


def test_no_way_leads_around_a_region() -> None:
    """The sum needs the product of what it is added to, so that neither can wait for the other."""
    graph = graph_of(lambda b, x, w: b.add(b.exp(x), b.linear(b.exp(x), w)), x="f32[8,8]", w="f32[8,8]")
    crossed = graph_of(lambda b, x, w: _crossed(b, x, w), x="f32[8,8]", w="f32[8,8]")
    for one in (graph, crossed):
        chosen = [fused.region for fused in fusion().plan(one).regions]
        assert is_schedulable(one, chosen)
    assert regions(crossed) == []


def _crossed(b: Any, x: Any, w: Any) -> Any:
    start = b.exp(x)
    return b.add(start, b.call(aten("cumsum.default"), (start, 0)))


ATTENTION = dict.fromkeys(("q", "k", "v"), "bf16[8,12,1024,64]")


def test_attention_that_torch_has_no_kernel_for() -> None:
    """A bias of keys, a window or a mask make a kernel; plain and causal attention are the library's. A window is priced by what it sees."""
    biased = graph_of(lambda b, q, k, v, s: b.attention(q, k, v, None, s, scale=0.1), **ATTENTION, s="f32[8,1024]")
    assert regions(biased) == ["attention(attention)"]
    for options in ({}, {"right": 0}):
        assert regions(graph_of(lambda b, q, k, v, options=options: b.attention(q, k, v, scale=0.1, **options), **ATTENTION)) == []
    options = {"left": 63, "right": 0, "block": 64}
    local = graph_of(lambda b, q, k, v: b.local_attention(q, k, v, scale=0.1, **options), **ATTENTION)
    (fused,) = fusion().plan(local).regions
    assert str(fused.region) == "attention(local_attention)"
    assert fused.cost.flops == 2 * 8 * 12 * 1024 * 64 * (64 + 64)
    assert fused.cost.seconds < fused.apart.seconds
    followed = graph_of(lambda b, q, k, v, s: b.relu(b.mul(b.attention(q, k, v, None, s, scale=0.1), 2.0)), **ATTENTION, s="f32[8,1024]")
    assert regions(followed) == ["attention(attention)", "elementwise(mul, relu)"]


def check_model(name: str) -> None:
    model, inputs = tiny_transformers.make(name)
    program = capture(model, inputs)
    graph = normalize(program.graph)
    plan = fusion().plan(graph)
    assert plan.regions
    assert all(fused.cost.seconds <= fused.apart.seconds for fused in plan.regions)
    module, kernels = with_kernels(graph, plan.priced)
    assert len(kernels) < len(plan.regions), "equal layers share kernels"
    expected = graph.run(*(x.clone() for x in program.example))
    found = module(*(x.clone() for x in program.example))
    for a, b in zip(expected, found, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "whisper", "modernbert", "bert"])
def test_models(name: str) -> None:
    check_model(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in tiny_transformers.NAMES if name not in ("convnext",)])
def test_all_models(name: str) -> None:
    check_model(name)


# what `optimize` hands out


@pytest.fixture(scope="module")
def planned() -> paretorch.Optimized:
    model, inputs = tiny_transformers.make("llama")
    return paretorch.optimize(model, inputs, target="cuda:h100")


def test_kernels_of_a_device_that_is_not_here(planned: paretorch.Optimized) -> None:
    kernels = planned.kernels
    assert planned.plan.runtime == "triton"
    assert [kernel.name for kernel in kernels] == sorted(kernel.name for kernel in kernels)
    for kernel in kernels:
        assert kernel.region
        assert kernel.schedule["num_warps"] > 0
        assert kernel.predicted_s is not None
        assert f"predicted {kernel.predicted_s * 1e6:.1f} us on h100-sxm" in kernel.source
    assert any(line.strip().startswith("fusion plan for h100-sxm") for line in planned.report.plan_lines)
    binary = kernels[0].compile("sm_90")
    assert (binary.arch, binary.spills) == ("sm_90", 0)


def test_gates_of_a_model(planned: paretorch.Optimized) -> None:
    """One kernel for those of all layers, with the products that they are halves of."""
    (made,) = [kernel for kernel in planned.kernels if "silu" in kernel.name]
    assert (made.template, made.uses) == ("product", 2)
    assert "total_1 = tl.dot(left, right_1, total_1" in made.source
    assert made.compile("sm_90").spills == 0


def test_the_same_sources_without_weights(planned: paretorch.Optimized) -> None:
    model, inputs = tiny_transformers.make("llama")
    with torch.device("meta"):
        meta = tiny_transformers._entries()["llama"]()[0].eval()
    again = paretorch.optimize(model, inputs, target="cuda:h100")
    assert [kernel.source for kernel in again.kernels] == [kernel.source for kernel in planned.kernels]
    assert paretorch.optimize(meta, inputs, target="cuda:h100").kernels


def test_no_kernels_for_a_processor() -> None:
    model, inputs = tiny_transformers.make("bert")
    assert paretorch.optimize(model, inputs, target="fake-bandwidth").kernels == ()


def test_saved_kernels(planned: paretorch.Optimized, tmp_path: Any) -> None:
    path = tmp_path / "fast.paretorch"
    planned.save(path)
    if not torch.cuda.is_available():
        with pytest.raises(ArtifactError, match="made for the runtime triton, which cannot be used here"):
            load(path)
    graph, generated = planned.graph, planned.generated
    again = parse_graph(print_graph(graph), graph.constants, planned.program.example)
    members = generated.members(graph)
    read = Generated.from_members(members, again)
    assert read.kernels == generated.kernels
    assert {"kernels.json", *(f"kernels/{kernel.name}.py" for kernel in generated.kernels)} == members.keys()
    module = with_kernels(again, read.regions)[0]
    for a, b in zip(graph.run(*planned.program.example), module(*planned.program.example), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
