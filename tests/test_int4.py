"""Weights of four bits: what is rounded and how far, what stays, that every runtime computes it, how it is saved, and what it is predicted to take."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load as load_tensors
from torch import Tensor

import paretorch
from paretorch import Choice, Plan
from paretorch.capture import capture
from paretorch.codegen.onnx.check import check_onnx
from paretorch.codegen.onnx.export import OPSETS, to_onnx
from paretorch.codegen.reduced import with_wide_weights
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.contest import Contender
from paretorch.cost_model.curves import Calibration, Curve, Rates
from paretorch.cost_model.device_rows import FAKES
from paretorch.cost_model.memory import weight_bytes
from paretorch.cost_model.price import Prices
from paretorch.cost_model.work import work_of
from paretorch.ir.builder import build
from paretorch.ir.errors import LoweringError, PlanError
from paretorch.ir.graph import Graph
from paretorch.ir.hash import structural_hash
from paretorch.ir.ops import is_op, op_of
from paretorch.ir.ops.quantized import SHARES, ZERO, coarse_share, quantized_int4, widened_int4
from paretorch.ir.types import parse_type
from paretorch.optimized import Optimized
from paretorch.report import Report
from paretorch.rewrites.apply import apply_choice, sites_of
from paretorch.rewrites.example_models import Sizes, transformer
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.precision import bf16, int8
from paretorch.rewrites.precision.int4 import GROUPS, RULE, STEPS
from paretorch.rewrites.rule import MODEL
from tests.test_int8 import count, drift
from tests.zoo import make

DRIFT = 0.35  # a few layers of random weights, each rounded to one of 16 steps
ROUNDED_INPUT = 0.03  # what runtimes that round x to eight bits add in a few layers
WIDE = Sizes(2, 9, width=64)


def rounded(graph: Graph, length: int = 32, site: str = MODEL) -> Graph:
    return apply_choice(RULE, graph, site, length)


def linear_of(weight: Tensor, rows: str = "f32[4,{}]") -> Graph:
    return build("one", lambda b, x: b.linear(x, b.constant("w", weight)), x=parse_type(rows.format(weight.shape[1])))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unpacked(values: Tensor) -> Tensor:
    """i64[N, G, L] of u8[N, G, L / 2], one number at a time."""
    found = torch.empty(*values.shape[:2], 2 * values.shape[2], dtype=torch.int64)
    for place in range(found.shape[2]):
        byte = values[:, :, place // 2].long()
        found[:, :, place] = (byte % 16 if place % 2 == 0 else byte // 16) - 8
    return found


@pytest.mark.parametrize("length", GROUPS)
def test_every_weight_is_within_half_a_step_of_its_group_or_at_its_end(length: int) -> None:
    weight = draw(7, 384) * torch.logspace(-6, 6, 7)[:, None]
    weight[3] = 0.0
    values, scale = quantized_int4(weight, length)
    assert (values.dtype, values.shape, scale.shape) == (torch.uint8, (7, 384 // length, length // 2), (7, 384 // length))
    numbers, grouped = unpacked(values), weight.reshape(7, -1, length)
    apart = (numbers * scale[:, :, None].double() - grouped).abs()
    within = apart <= scale.abs()[:, :, None] * 0.5001
    assert bool((within | (numbers == -ZERO) | (numbers == ZERO - 1)).all())
    assert bool(within.double().mean() > 0.95)
    assert not bool(numbers[3].any())
    assert bool(scale.isfinite().all())
    assert torch.equal(widened_int4(values, scale, torch.float64), (numbers * scale[:, :, None].double()).reshape(7, 384))


def test_a_share_of_the_largest_number_is_taken_where_it_leaves_less_error() -> None:
    """Against steps that always reach the largest number; and a group is never worse for it."""
    grouped = draw(64, 4, 64)
    values, scale = quantized_int4(grouped.reshape(64, 256), 64)
    errors = (unpacked(values) * scale[:, :, None] - grouped).square().sum(2)
    widest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True)) / -ZERO
    plain = ((grouped / widest).round().clamp(-ZERO, ZERO - 1) * widest - grouped).square().sum(2)
    assert bool((errors <= plain * 1.0001).all())
    assert float(errors.sum()) < 0.93 * float(plain.sum())
    shares = (scale / widest[..., 0]).unique()
    assert all(min(abs(float(share) - known) for known in SHARES) < 1e-5 for share in shares)


def test_the_op_is_the_product_in_f64() -> None:
    """Against each number of the weight by itself, with a bias and without."""
    x, bias = draw(3, 5, 128).double(), draw(6).double()
    values, scale = quantized_int4(draw(6, 128, seed=1), 32)
    wide = (unpacked(values) * scale.double()[:, :, None]).reshape(6, 128)
    for given in (bias, None):
        found = torch.ops.paretorch.int4_linear(x, values, scale, given)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, F.linear(x, wide, given), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["vit_registers", "bert", "llama", "encoder_decoder", "convnext", "swin"])
def test_whole_models(name: str) -> None:
    model, inputs = make(name)
    program = capture(model, inputs)
    graph = normalize(program.graph)
    sites, refusals = sites_of(RULE, graph)
    if not sites:
        assert [refusal.site for refusal in refusals] == [MODEL]
        return
    after = rounded(graph)
    assert 0 < drift(graph, after, *program.example) < DRIFT
    assert count(graph, "linear") == count(after, "linear") + count(after, "int4_linear")


def test_groups_that_divide_the_width_of_a_linear_there_are_offered() -> None:
    graph = transformer(WIDE)
    sites, _ = sites_of(RULE, graph)
    assert sites[0].values == ("f32", 32, 64, 128)  # the products that shrink are 128 wide
    assert [site.values for site in sites[1:]] == [("f32", 32, 64), ("f32", 32, 64, 128)] * 2
    after = rounded(graph, 128)
    assert {after.constant(node.args[1]).shape for node in after.calls if is_op(node, "int4_linear")} == {(64, 1, 64)}  # type: ignore[union-attr]
    assert (count(after, "int4_linear"), count(after, "linear")) == (2, 10)
    assert count(rounded(graph, 64), "linear") == 0


def test_a_block_alone() -> None:
    graph = transformer(WIDE)
    block = sites_of(RULE, graph)[0][1].name
    after = rounded(graph, 32, block)
    assert 0 < count(after, "int4_linear") < count(graph, "linear")
    with pytest.raises(PlanError, match=r"int4: no linear with weights of f32 is left at "):
        rounded(after, 32, block)
    with pytest.raises(PlanError, match=r"int4: no linear with weights of f32 is left at "):
        rounded(graph, 128, block)
    both = apply_choice(int8.RULE, after, MODEL, "int8")
    assert (count(both, "int4_linear"), count(both, "int8_linear")) == (count(after, "int4_linear"), count(after, "linear"))


def reason(graph: Graph) -> str:
    sites, (refusal,) = sites_of(RULE, graph)
    assert not sites
    assert refusal.site == MODEL
    return refusal.reason


def test_refusals() -> None:
    sentence = (
        "none of its 1 linears has 256 constant weights in f32 or more, of a width that 32, 64 or 128 divides and of sizes that go with {}"
    )
    sentence = sentence.format("one another")
    assert reason(linear_of(draw(64, 48))) == sentence
    assert reason(linear_of(draw(4, 32))) == sentence
    assert reason(linear_of(draw(64, 64).double(), "f64[4,{}]")) == sentence
    given = build("given", lambda b, x, w: b.linear(x, w), x=parse_type("f32[4,64]"), w=parse_type("f32[64,64]"))
    assert reason(given) == sentence
    assert reason(build("sum", lambda b, x: b.add(x, x), x=parse_type("f32[4]"))) == sentence.replace("1 linears", "0 linears")


def test_a_linear_in_which_one_number_dwarfs_the_others_stays() -> None:
    """As in a probe on features that were scaled by their deviations, of which one is next to zero."""
    spiked = draw(8, 384)
    spiked[:, 7] = 1e4
    for weight, share, offered in ((spiked, 1 / 6, []), (draw(8, 384), 0.0, [MODEL])):
        assert coarse_share(weight, 64, ZERO, STEPS) == pytest.approx(share)
        assert [site.name for site in sites_of(RULE, linear_of(weight))[0]] == offered


def test_a_weight_that_several_read_is_packed_once_and_stays_for_others() -> None:
    weight = draw(96, 64)

    def tied(b: Any, ids: Any, x: Any) -> Any:
        table = b.constant("table", weight)
        return b.add(b.linear(x, table), b.linear(b.add(x, b.embedding(table, ids)), table))

    graph = build("tied", tied, ids=parse_type("i64[5]"), x=parse_type("f32[5,64]"))
    after = rounded(graph)
    assert count(after, "int4_linear") == 2
    assert sorted(after.constants) == ["table", "table_int4", "table_scale"]
    assert weight_bytes(after) == weight.nbytes + 96 * 64 // 2 + 96 * 2 * 4


@pytest.mark.parametrize("length", GROUPS)
@pytest.mark.parametrize("runtime", ["eager", "inductor", "onnxruntime", "openvino"])
def test_runtimes(runtime: str, length: int) -> None:
    """OpenVINO and ONNX Runtime round x to eight bits as well; an odd number of groups is among them."""
    weight, bias = draw(96, 384), draw(96)
    graph = build("one", lambda b, x: b.gelu(b.linear(x, b.constant("w", weight), b.constant("bias", bias))), x=parse_type("f32[2,m,384]"))
    after = rounded(graph, length)
    refusal = RUNTIMES[runtime].refuses(after)
    if refusal is not None:
        pytest.skip(refusal)
    for rows in (3, 17):
        x = draw(2, rows, 384, seed=1)
        (expected,), (found,) = after.run(x), RUNTIMES[runtime].compile(after, (x,))(x)
        allowed = 1e-5 if runtime in ("eager", "inductor") else ROUNDED_INPUT
        assert float((expected - found).norm() / expected.norm()) < allowed


@pytest.mark.parametrize("opset", OPSETS)
def test_onnx_form(opset: int) -> None:
    """The packed weights lie in the model as they lie in the graph."""
    graph = linear_of(draw(256, 128), "f32[m,{}]")
    after = rounded(graph, 64)
    model = to_onnx(after, opset=opset)
    (node,) = model.skeleton.graph.node
    assert (node.domain, node.op_type) == ("com.microsoft", "MatMulNBits")
    (held,) = (array for array in model.weights.values() if array.dtype == "uint8")
    assert held.ctypes.data == after.constants["w_int4"].data_ptr()
    pytest.importorskip("onnxruntime")
    assert check_onnx(model, after, (draw(3, 128),), ROUNDED_INPUT) > 0


def test_what_has_no_onnx_form() -> None:
    types = {"x": "f32[3,24]", "w": "u8[8,1,12]", "s": "f32[8,1]"}
    odd = build("odd", lambda b, x, w, s: b.int4_linear(x, w, s), **{name: parse_type(text) for name, text in types.items()})
    with pytest.raises(LoweringError, match="int4_linear with groups of 24; the ONNX form takes 16, 32, 64, 128, 256"):
        to_onnx(odd)
    wide = {**types, "x": "f64[3,32]", "w": "u8[8,1,16]"}
    double = build("double", lambda b, x, w, s: b.int4_linear(x, w, s), **{name: parse_type(text) for name, text in wide.items()})
    with pytest.raises(LoweringError, match="int4_linear of DOUBLE; the ONNX form takes f32"):
        to_onnx(double)


@pytest.mark.parametrize("half", [False, True])
def test_weights_multiplied_out_give_the_same_numbers(half: bool) -> None:
    after = rounded(transformer(WIDE))
    after = apply_choice(bf16.RULE, after, MODEL, "bf16") if half else after
    wide, x = with_wide_weights(after), draw(2, 9, 64, seed=1)
    assert (count(wide, "int4_linear"), count(wide, "linear")) == (0, count(after, "int4_linear"))
    assert torch.equal(after.run(x)[0], wide.run(x)[0])


def test_what_is_left_may_be_cast() -> None:
    graph = transformer(WIDE)
    both = apply_choice(bf16.RULE, rounded(graph), MODEL, "bf16")
    products = [node for node in both.calls if op_of(node).kind in ("matrix", "attention")]  # type: ignore[union-attr]
    assert {node.meta["val"].dtype for node in products} == {torch.bfloat16}
    assert {both.constant(node.args[2]).dtype for node in both.calls if is_op(node, "int4_linear")} == {torch.float32}  # type: ignore[arg-type, union-attr]
    assert drift(graph, both, draw(2, 9, 64, seed=1)) < DRIFT


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime", "openvino"])
def test_it_is_saved_as_it_is_packed(runtime: str, tmp_path: Path) -> None:
    """The plan that named the rule applies again; the file has the packed bytes; what is loaded gives the same numbers, and its plan the same graph."""
    model, x = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 64)).eval(), draw(4, 256)
    program = capture(model, (x,))
    graph = normalize(program.graph)
    after = rounded(graph, 64)
    if RUNTIMES[runtime].refuses(after) is not None:
        pytest.skip("not installed")
    plan = Plan((Choice("int4", MODEL, 64),), (), runtime, structural_hash(graph))
    report = Report(
        "cpu", runtime, predicted_seconds=1e-3, measured_seconds=2e-3, original_seconds=3e-3, peak_memory_bytes=None, unit="drift", limit=0.5, loss=0.1,
        half_width=0.0, samples=8, attention=0, plan_lines=("int4 at model",), entries=(), notes=(), timings=(), stages={}, environment={},
    )  # fmt: skip
    made = Optimized(program, Contender("plan", runtime, after, RUNTIMES[runtime].compile(after, (x,)), 1e-3), plan, report, None)
    path = tmp_path / "small.paretorch"
    made.save(path)
    loaded = paretorch.load(path)
    assert torch.equal(loaded(x), made(x))
    assert loaded.plan == plan
    (choice,) = Plan.from_json(plan.to_json()).choices
    assert str(apply_choice(RULE, graph, choice.site, choice.knob)) == str(after)
    with zipfile.ZipFile(path) as archive:
        kept = load_tensors(archive.read("weights.safetensors"))
    packed = [tensor for tensor in kept.values() if tensor.dtype == torch.uint8]
    assert sorted(tensor.numel() for tensor in packed) == [512 * 64 // 2, 256 * 512 // 2]


def test_prices() -> None:
    """Where the op was measured it costs that; elsewhere what it is defined by, which is more than the product: weights are unpacked in each call."""
    passes, products = {"elementwise": Curve.constant(1e9)}, {"matrix": Curve.constant(1e12)}
    measured = Rates({**passes, **products, "int4_linear": Curve.constant(4e12)}, 0.0)
    calibration = Calibration("here", {("known", "f32"): measured, ("eager", "f32"): Rates({**passes, **products}, 0.0)}, float("inf"))
    prices, graph = Prices(calibration, FAKES[0]), transformer(Sizes(64, 64, width=256))
    plain, after = (next(node for node in g.calls if is_op(node, "linear", "int4_linear")) for g in (graph, rounded(graph)))
    assert prices.node_cost(after, "known").seconds < prices.node_cost(plain, "known").seconds
    assert prices.node_cost(after, "eager").seconds > prices.node_cost(plain, "eager").seconds


def test_work() -> None:
    """The bytes are those of packed weights and their scales; the flops and the place on price curves those of the plain product."""
    graph = transformer(Sizes(3, 7, width=64))
    plain, after = (work_of(next(node for node in g.calls if is_op(node, "linear", "int4_linear"))) for g in (graph, rounded(graph, 64)))
    assert (after.flops, after.at, after.curves) == (plain.flops, plain.at, ("int4_linear", "matrix"))
    assert after.constant_bytes == 64 * 64 // 2 + 64 * 4 + 64 * 4
    assert plain.constant_bytes - after.constant_bytes == plain.bytes_moved - after.bytes_moved == 64 * 64 * 4 - 64 * 64 // 2 - 64 * 4
