"""Rows of elementwise ops: one output element from one element of each operand, broadcast."""

from paretorch.ir.ops.costs import inputs_and_output, per_element
from paretorch.ir.ops.table import Missing, Op, aten, define


def _elementwise(name: str, overloads: str, flops: int, triton: str | Missing, onnx: str, *, commutative: bool = False) -> Op:
    return define(Op(
        name=name, targets=tuple(aten(f"{overload}") for overload in overloads.split()), kind="elementwise",
        flops=per_element(flops), bytes=inputs_and_output, axes="pointwise", elementwise=True, commutative=commutative,
        triton=triton, onnx=onnx,
    ))  # fmt: skip


_elementwise("add", "add.Tensor add.Scalar", 1, "{0} + {1}", "Add", commutative=True)
_elementwise("sub", "sub.Tensor sub.Scalar", 1, "{0} - {1}", "Sub")
_elementwise("rsub", "rsub.Scalar rsub.Tensor", 1, "{1} - {0}", "Sub")
_elementwise("mul", "mul.Tensor mul.Scalar", 1, "{0} * {1}", "Mul", commutative=True)
_elementwise("div", "div.Tensor div.Scalar", 1, "{0} / {1}", "Div")
_elementwise("pow", "pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar", 1, Missing("a power is spelled out by its exponent"), "Pow")
_elementwise("maximum", "maximum.default", 1, "tl.maximum({0}, {1})", "Max", commutative=True)
_elementwise("minimum", "minimum.default", 1, "tl.minimum({0}, {1})", "Min", commutative=True)
_elementwise("neg", "neg.default", 1, "-{0}", "Neg")
_elementwise("abs", "abs.default", 1, "tl.abs({0})", "Abs")
_elementwise("exp", "exp.default", 1, "tl.exp({0})", "Exp")
_elementwise("log", "log.default", 1, "tl.log({0})", "Log")
_elementwise("log1p", "log1p.default", 2, "tl.log(1.0 + {0})", "Log")
_elementwise("sqrt", "sqrt.default", 1, "tl.sqrt({0})", "Sqrt")
_elementwise("rsqrt", "rsqrt.default", 2, "tl.rsqrt({0})", "Sqrt")
_elementwise("reciprocal", "reciprocal.default", 1, "1.0 / {0}", "Reciprocal")
_elementwise("sin", "sin.default", 1, "tl.sin({0})", "Sin")
_elementwise("cos", "cos.default", 1, "tl.cos({0})", "Cos")
_elementwise("tanh", "tanh.default", 1, "2.0 * tl.sigmoid(2.0 * {0}) - 1.0", "Tanh")
_elementwise("sigmoid", "sigmoid.default", 4, "tl.sigmoid({0})", "Sigmoid")
_elementwise("erf", "erf.default", 1, "tl.erf({0})", "Erf")
_elementwise("relu", "relu.default", 1, "tl.maximum({0}, 0.0)", "Relu")
_elementwise("gelu", "gelu.default", 8, "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))", "Gelu")
_elementwise("silu", "silu.default", 5, "{0} * tl.sigmoid({0})", "Swish")
_elementwise("hardswish", "hardswish.default", 4, "{0} * tl.minimum(tl.maximum({0} + 3.0, 0.0), 6.0) / 6.0", "HardSwish")
_elementwise("hardsigmoid", "hardsigmoid.default", 3, "tl.minimum(tl.maximum({0} + 3.0, 0.0), 6.0) / 6.0", "HardSigmoid")
_elementwise("hardtanh", "hardtanh.default", 2, "tl.minimum(tl.maximum({0}, {1}), {2})", "Clip")
_elementwise("clamp", "clamp.default clamp_min.default clamp_max.default clamp.Tensor", 2, Missing("its limits may be absent"), "Clip")
_elementwise("leaky_relu", "leaky_relu.default", 2, "tl.where({0} > 0, {0}, {0} * {1})", "LeakyRelu")
_elementwise("elu", "elu.default", 3, Missing("three parameters"), "Elu")
_elementwise("softplus", "softplus.default", 3, Missing("has a threshold"), "Softplus")
_elementwise("where", "where.self where.ScalarOther where.ScalarSelf where.Scalar", 1, "tl.where({0}, {1}, {2})", "Where")
_elementwise("masked_fill", "masked_fill.Scalar masked_fill.Tensor", 1, "tl.where({1}, {2}, {0})", "Where")
_elementwise("eq", "eq.Tensor eq.Scalar", 1, "{0} == {1}", "Equal", commutative=True)
_elementwise("ne", "ne.Tensor ne.Scalar", 1, "{0} != {1}", "Equal", commutative=True)
_elementwise("lt", "lt.Tensor lt.Scalar", 1, "{0} < {1}", "Less")
_elementwise("le", "le.Tensor le.Scalar", 1, "{0} <= {1}", "LessOrEqual")
_elementwise("gt", "gt.Tensor gt.Scalar", 1, "{0} > {1}", "Greater")
_elementwise("ge", "ge.Tensor ge.Scalar", 1, "{0} >= {1}", "GreaterOrEqual")
_elementwise("logical_not", "logical_not.default bitwise_not.default", 1, "not {0}", "Not")
_elementwise("logical_and", "logical_and.default bitwise_and.Tensor __and__.Tensor", 1, "{0} & {1}", "And", commutative=True)
_elementwise("logical_or", "logical_or.default bitwise_or.Tensor __or__.Tensor", 1, "{0} | {1}", "Or", commutative=True)
_elementwise("floor", "floor.default", 1, "tl.floor({0})", "Floor")
_elementwise("round", "round.default", 1, Missing("triton has no round to even"), "Round")
_elementwise("floor_divide", "floor_divide.default div.Tensor_mode", 1, Missing("rounds"), "Div")
_elementwise("remainder", "remainder.Scalar remainder.Tensor", 1, Missing("integers"), "Mod")

define(Op(
    name="to", targets=(aten("_to_copy.default"), aten("to.dtype"), aten("to.dtype_layout"), aten("to.device"), aten("type_as.default")),
    kind="elementwise", flops=lambda node: 0, bytes=inputs_and_output, axes="pointwise", onnx="Cast",
))  # fmt: skip
