"""Weights of eight bits: what is rounded and how far, what stays, that every runtime computes it, and what it is predicted to take."""

import pytest
import torch

from paretorch.capture import capture
from paretorch.codegen.reduced import with_wide_weights
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.cost_model.curves import Calibration, Curve, Rates
from paretorch.cost_model.device_rows import FAKES
from paretorch.cost_model.price import Prices
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import is_op, op_of
from paretorch.ir.ops.quantized import LARGEST, coarse_share, quantized_int8
from paretorch.rewrites.apply import apply_choice, sites_of
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.precision import bf16
from paretorch.rewrites.precision.int8 import RULE
from paretorch.rewrites.precision.linears import LEAST
from paretorch.rewrites.rule import MODEL
from tests.zoo import make

DRIFT = 0.05  # a few layers of random weights, each rounded to 1/127 of its row's largest, and on some runtimes its input too
WIDE = Sizes(2, 9, width=32)


def rounded(graph: Graph, site: str = MODEL) -> Graph:
    return apply_choice(RULE, graph, site, "int8")


def count(graph: Graph, name: str) -> int:
    return sum(1 for node in graph.calls if is_op(node, name))


def drift(before: Graph, after: Graph, *inputs: torch.Tensor) -> float:
    pairs = [(a, b) for a, b in zip(before.run(*inputs), after.run(*inputs), strict=True) if a.is_floating_point()]
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)
    return max(float((a - b).norm() / a.norm()) for a, b in pairs)


def test_every_weight_is_within_half_a_step() -> None:
    for width, groups in ((33, 1), (192, 3), (48, 3)):
        weight = torch.randn(7, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 7)[:, None]
        weight[3] = 0.0
        values, scale = quantized_int8(weight)
        assert (values.dtype, values.shape, scale.shape) == (torch.int8, weight.shape, (7, groups))
        assert int(values.abs().max()) == LARGEST
        steps = scale.repeat_interleave(width // groups, 1)
        assert bool((values * steps - weight).abs().le(steps * 0.5001).all())
        assert not bool(values[3].any())
        assert bool(scale.isfinite().all())


@pytest.mark.parametrize("name", ["vit_registers", "bert", "llama", "encoder_decoder", "convnext", "swin"])
def test_whole_models(name: str) -> None:
    model, inputs = make(name)
    program = capture(model, inputs)
    graph = normalize(program.graph)
    after = rounded(graph)
    assert 0 < drift(graph, after, *program.example) < DRIFT
    assert count(graph, "linear") == count(after, "linear") + count(after, "int8_linear")
    left = [node for node in after.calls if is_op(node, "linear")]
    assert all((held := after.constant(node.args[1])) is None or held.numel() < LEAST for node in left)  # type: ignore[arg-type]


def test_a_block_alone() -> None:
    graph = transformer(WIDE)
    sites, _ = sites_of(RULE, graph)
    block = next(site.name for site in sites if site.name != MODEL)
    after = rounded(graph, block)
    assert 0 < count(after, "int8_linear") < count(graph, "linear")
    with pytest.raises(PlanError, match=r"int8: no linear with weights of f32 is left at "):
        rounded(after, block)
    assert count(rounded(after), "int8_linear") == count(rounded(graph), "int8_linear")


def test_nothing_to_round() -> None:
    graph = normalize(capture(torch.nn.Conv2d(3, 4, 3).eval(), (torch.randn(1, 3, 8, 8),)).graph)
    _, refusals = sites_of(RULE, graph)
    assert [(refusal.site, refusal.reason) for refusal in refusals] == [
        (MODEL, "none of its 0 linears has 256 constant weights in f32 or more, of sizes that go with one another")
    ]


def test_a_linear_in_which_one_number_dwarfs_the_others_stays() -> None:
    """As in a probe on features that were scaled by their deviations, of which one is next to zero."""
    head, plain = torch.nn.Linear(384, 2).eval(), torch.nn.Linear(384, 2).eval()
    with torch.no_grad():
        head.weight[:, 7] = 1e4
    for linear, share, offered in ((head, 1 / 6, []), (plain, 0.0, [MODEL])):
        assert coarse_share(linear.weight.detach()) == pytest.approx(share)
        sites, _ = sites_of(RULE, normalize(capture(linear, (torch.randn(4, 384),)).graph))
        assert [site.name for site in sites] == offered


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime", "openvino"])
def test_runtimes(runtime: str) -> None:
    after = rounded(transformer(WIDE))
    refusal = RUNTIMES[runtime].refuses(after)
    if refusal is not None:
        pytest.skip(refusal)
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    (expected,), (found,) = after.run(x), RUNTIMES[runtime].compile(after, (x,))(x)
    assert float((expected - found).norm() / expected.norm()) < DRIFT


@pytest.mark.parametrize("half", [False, True])
def test_weights_multiplied_out_give_the_same_numbers(half: bool) -> None:
    after = rounded(transformer(WIDE))
    after = apply_choice(bf16.RULE, after, MODEL, "bf16") if half else after
    wide, x = with_wide_weights(after), torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    assert (count(wide, "int8_linear"), count(wide, "linear")) == (0, count(after, "int8_linear"))
    assert torch.equal(after.run(x)[0], wide.run(x)[0])
    assert with_wide_weights(wide) is wide


def test_what_is_left_may_be_cast() -> None:
    graph = transformer(WIDE)
    both = apply_choice(bf16.RULE, rounded(graph), MODEL, "bf16")
    products = [node for node in both.calls if op_of(node).kind in ("matrix", "attention")]  # type: ignore[union-attr]
    assert {node.meta["val"].dtype for node in products} == {torch.bfloat16}
    assert {both.constant(node.args[2]).dtype for node in both.calls if is_op(node, "int8_linear")} == {torch.float32}  # type: ignore[arg-type, union-attr]
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    assert drift(graph, both, x) < DRIFT
    if RUNTIMES["openvino"].refuses(both) is None:
        (expected,), (found,) = graph.run(x), RUNTIMES["openvino"].compile(both, (x,))(x)
        assert float((expected - found).norm() / expected.norm()) < DRIFT


def test_prices() -> None:
    """Where the op was measured it costs that; elsewhere what it is defined by, which is more than the product alone."""
    passes, products = {"elementwise": Curve.constant(1e9)}, {"matrix": Curve.constant(1e12)}
    measured = Rates({**passes, **products, "int8_linear": Curve.constant(4e12)}, 0.0)
    calibration = Calibration("here", {("known", "f32"): measured, ("eager", "f32"): Rates({**passes, **products}, 0.0)}, float("inf"))
    prices, graph = Prices(calibration, FAKES[0]), transformer(Sizes(64, 64, width=256))
    plain, after = (next(node for node in g.calls if is_op(node, "linear", "int8_linear")) for g in (graph, rounded(graph)))
    assert prices.node_cost(after, "known").seconds < prices.node_cost(plain, "known").seconds
    assert prices.node_cost(after, "eager").seconds > prices.node_cost(plain, "eager").seconds
