"""Rows of elementwise ops: one output element from one element of each operand, broadcast.

flops: each arithmetic operation, comparison and choice counts one, and so does each function that a processor or its library computes at once
(exp, log, sqrt, sin, erf, tanh, a power); what is spelled by them counts as it is spelled: sigmoid is 1 / (1 + exp(-x)), four.
"""

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from paretorch.ir.graph import arguments
from paretorch.ir.ops.costs import inputs_and_output, output, per_element
from paretorch.ir.ops.table import Missing, Op, aten, define

_BY_TORCH = Missing("runs as torch: too rare for a text of its own")


def gelu_flops(node: Node) -> Any:
    """x / 2 * (1 + erf(x * c)) is five; x / 2 * (1 + tanh(c * (x + d * x * x * x))) is nine."""
    return (9 if arguments(node).get("approximate") == "tanh" else 5) * output(node).numel


def clamp_flops(node: Node) -> Any:
    """One comparison for each limit that is given."""
    given = arguments(node)
    return sum(given.get(limit) is not None for limit in ("min", "max")) * output(node).numel


def _elementwise(
    name: str, overloads: str, flops: int | Callable[[Node], Any], triton: str | dict[str, str] | Missing, onnx: str | Missing, *,
    commutative: bool = False,
) -> Op:  # fmt: skip
    return define(Op(
        name=name, targets=tuple(aten(overload) for overload in overloads.split()), kind="elementwise",
        flops=per_element(flops) if isinstance(flops, int) else flops, bytes=inputs_and_output, axes="pointwise", elementwise=True,
        commutative=commutative, triton=triton, onnx=onnx,
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
_elementwise("relu", "relu.default", 1, "tl.where({0} < 0.0, 0.0, {0})", "Relu")  # tl.maximum would turn NaN into 0
_elementwise("gelu", "gelu.default", gelu_flops, {
    "none": "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))",
    "tanh": "{0} * tl.sigmoid(1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0}))",  # (1 + tanh(z)) / 2 = sigmoid(2 z)
}, "Gelu")  # fmt: skip
_elementwise("silu", "silu.default", 5, "{0} * tl.sigmoid({0})", "Swish")
_elementwise("hardswish", "hardswish.default", 5, "{0} * tl.minimum(tl.maximum({0} + 3.0, 0.0), 6.0) / 6.0", "HardSwish")
_elementwise("hardsigmoid", "hardsigmoid.default", 4, "tl.minimum(tl.maximum({0} + 3.0, 0.0), 6.0) / 6.0", "HardSigmoid")
_elementwise("hardtanh", "hardtanh.default", 2, "tl.minimum(tl.maximum({0}, {1}), {2})", "Clip")
_elementwise("clamp", "clamp.default clamp.Tensor", clamp_flops, {  # of limits in the wrong order the upper one holds; NaN stays
    "min and max": "tl.where(tl.where({0} < {1}, {1}, {0}) > {2}, {2}, tl.where({0} < {1}, {1}, {0}))",
    "min": "tl.where({0} < {1}, {1}, {0})",
    "max": "tl.where({0} > {2}, {2}, {0})",
}, "Clip")  # fmt: skip
_elementwise("clamp_min", "clamp_min.default", 1, "tl.where({0} < {1}, {1}, {0})", "Clip")
_elementwise("clamp_max", "clamp_max.default", 1, "tl.where({0} > {1}, {1}, {0})", "Clip")
_elementwise("leaky_relu", "leaky_relu.default", 3, "tl.where({0} > 0, {0}, {0} * {1})", "LeakyRelu")
_elementwise("elu", "elu.default", 5, Missing("three parameters"), "Elu")
_elementwise("softplus", "softplus.default", 5, Missing("has a threshold"), "Softplus")
_elementwise("where", "where.self where.ScalarOther where.ScalarSelf where.Scalar", 1, "tl.where({0}, {1}, {2})", "Where")
_elementwise("masked_fill", "masked_fill.Scalar masked_fill.Tensor", 1, "tl.where({1}, {2}, {0})", "Where")
_elementwise("eq", "eq.Tensor eq.Scalar", 1, "{0} == {1}", "Equal", commutative=True)
_elementwise("ne", "ne.Tensor ne.Scalar", 1, "{0} != {1}", "Equal", commutative=True)
_elementwise("lt", "lt.Tensor lt.Scalar", 1, "{0} < {1}", "Less")
_elementwise("le", "le.Tensor le.Scalar", 1, "{0} <= {1}", "LessOrEqual")
_elementwise("gt", "gt.Tensor gt.Scalar", 1, "{0} > {1}", "Greater")
_elementwise("ge", "ge.Tensor ge.Scalar", 1, "{0} >= {1}", "GreaterOrEqual")
_elementwise("logical_not", "logical_not.default bitwise_not.default", 1, "{0} == 0", "Not")
_elementwise("logical_and", "logical_and.default bitwise_and.Tensor __and__.Tensor", 1, "{0} & {1}", "And", commutative=True)
_elementwise("logical_or", "logical_or.default bitwise_or.Tensor __or__.Tensor", 1, "{0} | {1}", "Or", commutative=True)
_elementwise("floor", "floor.default", 1, "tl.floor({0})", "Floor")
_elementwise("round", "round.default", 1, (  # halves to even: triton has no function for it
    "tl.floor({0}) + tl.where(({0} - tl.floor({0}) > 0.5) | (({0} - tl.floor({0}) == 0.5) & "
    "(tl.floor({0}) * 0.5 != tl.floor(tl.floor({0}) * 0.5))), 1.0, 0.0)"
), "Round")  # fmt: skip
_elementwise("floor_divide", "floor_divide.default div.Tensor_mode", 1, Missing("rounds"), "Div")
_elementwise("remainder", "remainder.Scalar remainder.Tensor", 1, Missing("integers"), "Mod")

_elementwise("logical_xor", "logical_xor.default bitwise_xor.Tensor __xor__.Tensor", 1, "{0} ^ {1}", "Xor", commutative=True)
_elementwise("square", "square.default", 1, "{0} * {0}", "Mul")
_elementwise("exp2", "exp2.default", 1, "tl.exp2({0})", "Pow")
_elementwise("log2", "log2.default", 1, "tl.log2({0})", "Log")
_elementwise("log10", "log10.default", 1, _BY_TORCH, "Log")
_elementwise("expm1", "expm1.default", 2, _BY_TORCH, "Exp")
_elementwise("erfc", "erfc.default", 2, _BY_TORCH, "Erf")
_elementwise("tan", "tan.default", 1, _BY_TORCH, "Tan")
_elementwise("asin", "asin.default", 1, _BY_TORCH, "Asin")
_elementwise("acos", "acos.default", 1, _BY_TORCH, "Acos")
_elementwise("atan", "atan.default", 1, _BY_TORCH, "Atan")
_elementwise("atan2", "atan2.default", 1, _BY_TORCH, "Atan")
_elementwise("sinh", "sinh.default", 1, _BY_TORCH, "Sinh")
_elementwise("cosh", "cosh.default", 1, _BY_TORCH, "Cosh")
_elementwise("ceil", "ceil.default", 1, "tl.ceil({0})", "Ceil")
_elementwise("trunc", "trunc.default fix.default", 1, _BY_TORCH, Missing("no ONNX op rounds to zero"))
_elementwise("sign", "sign.default sgn.default", 2, _BY_TORCH, "Sign")
_elementwise("isnan", "isnan.default", 1, _BY_TORCH, "IsNaN")
_elementwise("isinf", "isinf.default", 1, _BY_TORCH, "IsInf")
_elementwise("isfinite", "isfinite.default", 1, _BY_TORCH, Missing("no ONNX op asks for finite numbers"))
_elementwise("nan_to_num", "nan_to_num.default", 3, _BY_TORCH, "Where")
_elementwise("relu6", "relu6.default", 2, "tl.minimum(tl.maximum({0}, 0.0), 6.0)", "Clip")
_elementwise("mish", "mish.default", 5, _BY_TORCH, "Mish")
_elementwise("selu", "selu.default", 6, _BY_TORCH, "Selu")
_elementwise("celu", "celu.default", 6, _BY_TORCH, "Celu")
_elementwise("prelu", "prelu.default", 3, _BY_TORCH, "PRelu")
_elementwise("log_sigmoid", "log_sigmoid.default", 5, _BY_TORCH, "Log")
_elementwise("hardshrink", "hardshrink.default", 3, _BY_TORCH, "Shrink")
_elementwise("softshrink", "softshrink.default", 3, _BY_TORCH, "Shrink")
_elementwise("threshold", "threshold.default", 2, _BY_TORCH, "ThresholdedRelu")
_elementwise("logit", "logit.default", 3, _BY_TORCH, "Log")
_elementwise("fmod", "fmod.Tensor fmod.Scalar", 1, _BY_TORCH, "Mod")
_elementwise("fmax", "fmax.default max.other", 1, _BY_TORCH, "Max", commutative=True)
_elementwise("fmin", "fmin.default min.other", 1, _BY_TORCH, "Min", commutative=True)
_elementwise("addcmul", "addcmul.default", 3, _BY_TORCH, Missing("spelled out: products and a sum"))
_elementwise("addcdiv", "addcdiv.default", 3, _BY_TORCH, Missing("spelled out: a product, a quotient and a sum"))
_elementwise("lerp", "lerp.Scalar lerp.Tensor", 3, _BY_TORCH, Missing("spelled out: a difference, a product and a sum"))
_elementwise("logaddexp", "logaddexp.default", 4, _BY_TORCH, Missing("spelled out: exponentials and a logarithm"), commutative=True)
_elementwise("bit_and", "bitwise_and.Scalar __and__.Scalar", 1, _BY_TORCH, "BitwiseAnd")
_elementwise("bit_or", "bitwise_or.Scalar __or__.Scalar", 1, _BY_TORCH, "BitwiseOr")
_elementwise("shift_left", "bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar __lshift__.Scalar", 1, _BY_TORCH, "BitShift")
_elementwise("shift_right", "bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar __rshift__.Scalar", 1, _BY_TORCH, "BitShift")

define(Op(
    name="to", targets=(aten("_to_copy.default"), aten("to.dtype"), aten("to.dtype_layout"), aten("to.device"), aten("type_as.default")),
    kind="elementwise", flops=lambda node: 0, bytes=inputs_and_output, axes="pointwise", onnx="Cast",
))  # fmt: skip
define(Op(
    name="copy", targets=(aten("copy.default"), aten("fill.Tensor"), aten("fill.Scalar")), kind="copy", flops=lambda node: 0,
    bytes=inputs_and_output, axes="pointwise", onnx="Expand",
))  # fmt: skip
define(Op(
    name="glu", targets=(aten("glu.default"),), kind="elementwise", flops=per_element(5), bytes=inputs_and_output,
    onnx=Missing("spelled out: halves, a sigmoid and a product"),
))  # fmt: skip
