"""ONNX forms of our own: attention, for the op table's attention row and for torch's scaled_dot_product_attention.

EMITTERS: the emitters that the op table's `onnx` column may name; each takes an opset of onnxscript and then the op's own arguments.

Without anything that hides or biases scores the form is `Attention` from opset 23 on, else

    scores = MatMul(query, Transpose(key)) * scale;  where hidden: -inf;  MatMul(Softmax(scores), value)

Grouped heads become more rows of one product per key head, so keys are never repeated. torch gives zeros where a row sees nothing, Softmax gives
NaN: such rows are found on the mask, which is smaller than the scores by the number of heads, and only where a mask can hide a whole row.

Measured 2026-11-21, AMD EPYC with AVX-512, one thread, ONNX Runtime 1.31 and OpenVINO, minimum of 15 shuffled rounds, whole blocks of norms,
linears and attention. At f32[4,197,384] with 6 heads all of {scale on the query, on both, on the scores, FusedMatMul; Split, Slice + Squeeze, Gather
of a packed QKV; MatMul + Add, Gemm on two dimensions} were within 1.5 % of each other, Attention-23 the same, MultiHeadAttention of com.microsoft 1 %
faster; at f32[1,1500,384] Attention-23 was 4 % faster than the products under ONNX Runtime and level under OpenVINO. So the plain form, and Attention
where it says all there is to say. torch's own translation takes the square root of the scale, NaN for a negative one, and passes masks of one row on
to Attention, which ONNX Runtime rejects.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy

from paretorch.ir.errors import LoweringError

Emitter = Callable[..., Any]
FLOAT, UINT8, INT8, INT16, INT32, INT64, BOOL = 1, 2, 3, 5, 6, 7, 9  # onnx.TensorProto's numbers
NBITS_GROUPS = (16, 32, 64, 128, 256)  # lengths that MatMulNBits takes


def attention(
    op: Any, query: Any, key: Any, value: Any, mask: Any = None, key_bias: Any = None, *,
    lengths: Any = None, scale: float, left: int = -1, right: int = -1, sinks: int = 0, offset: int = 0, softcap: float = 0.0,
) -> Any:  # fmt: skip
    """paretorch::attention; see the card of `paretorch.ir.ops.attention`."""
    plainly_causal = left < 0 and right == 0 and offset == 0
    unhidden = left < 0 and right < 0
    is_plain = (
        mask is None and key_bias is None and lengths is None and softcap == 0.0 and scale > 0.0
    )  # ONNX Runtime's Attention takes no other scale
    if op.version >= 23 and is_plain and (plainly_causal or unhidden):
        return op.Attention(query, key, value, scale=scale, is_causal=int(plainly_causal))[0]
    form = _Form.of(op, query, key, value)
    scores = form.scores(query, key, scale, softcap)
    allowed = None if unhidden else form.band(query, key, left, right, sinks, offset)
    if lengths is not None:
        first = form.counted(key, lengths)
        allowed = first if allowed is None else op.And(allowed, first)
    bias = None
    if mask is not None and mask.dtype.value == BOOL:
        allowed = mask if allowed is None else op.And(allowed, mask)
    elif mask is not None:
        bias = op.CastLike(mask, query)
    if key_bias is not None:
        per_key = op.Unsqueeze(op.CastLike(key_bias, query), form.integers(1, 2))
        bias = per_key if bias is None else op.Add(bias, per_key)
    return form.mixed(scores, value, allowed, bias)


def scaled_dot_product_attention(
    op: Any, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """aten.scaled_dot_product_attention on [B,H,T,D], or [B,T,D] as one head, without dropout. Raises LoweringError for another rank."""
    ranks = [len(x.shape) for x in (query, key, value)]
    if ranks not in ([4, 4, 4], [3, 3, 3]):
        raise LoweringError(f"scaled_dot_product_attention with operands of {ranks} dimensions; the ONNX form takes three or four each")
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    right = 0 if is_causal else -1
    if ranks[0] == 4:
        return attention(op, query, key, value, attn_mask, scale=scale, right=right)
    query, key, value = (_one_head(op, x) for x in (query, key, value))
    if attn_mask is not None and len(attn_mask.shape) == 3:
        attn_mask = _one_head(op, attn_mask)
    return op.Squeeze(attention(op, query, key, value, attn_mask, scale=scale, right=right), op.Constant(value_ints=[1]))


def _one_head(op: Any, x: Any) -> Any:
    """[B,T,D] as [B,1,T,D], with its type: what emitters make has none of its own."""
    import onnx_ir

    found = op.Unsqueeze(x, op.Constant(value_ints=[1]))
    found.shape, found.dtype = onnx_ir.Shape([x.shape[0], 1, *x.shape[1:]]), x.dtype
    return found


def total(op: Any, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: int = -1) -> Any:
    """aten.sum; dtype: as onnx numbers it. A count of truths is summed in f32 while that is exact.

    OpenVINO 2026.4 loses the count otherwise: of Cast (from bool), ReduceSum, Add it gives the other operand of Add.
    """
    dims = [] if dim is None else [dim] if isinstance(dim, int) else list(dim)
    sizes = [x.shape[d] for d in dims] if dims else list(x.shape)
    is_exact = all(isinstance(size, int) for size in sizes) and math.prod(sizes) < 2**24
    truths = _truths(x)
    if truths is not None and is_exact:
        found = op.ReduceSum(op.Cast(truths, to=FLOAT), _axes(op, dims), keepdims=int(keepdim))
        return op.Cast(found, to=dtype if dtype > 0 else INT64)
    if dtype > 0 or x.dtype.value in (BOOL, INT32, INT16, INT8, UINT8):
        x = op.Cast(x, to=dtype if dtype > 0 else INT64)
    return op.ReduceSum(x, _axes(op, dims), keepdims=int(keepdim))


def _axes(op: Any, dims: list[int]) -> Any:
    return op.Constant(value_ints=dims) if dims else None


def _truths(x: Any) -> Any:
    """The bool value that x is, or is an integer cast of (the exporter casts before a sum); None for any other value."""
    while x.dtype is not None and x.dtype.value in (INT32, INT64) and x.producer() is not None and x.producer().op_type == "Cast":
        x = x.producer().inputs[0]
    return x if x.dtype is not None and x.dtype.value == BOOL else None


def sort(op: Any, x: Any, dim: int = -1, descending: bool = False, *, stable: bool = False) -> Any:
    """aten.sort, stable or not: TopK of all entries keeps the order of equals. Raises LoweringError for a number."""
    if len(x.shape) == 0:
        raise LoweringError("sort of a value without dimensions; the ONNX form takes one or more")
    axis = dim % len(x.shape)
    return op.TopK(x, op.Shape(x, start=axis, end=axis + 1), axis=axis, largest=int(descending), sorted=1)


def int8_linear(op: Any, x: Any, weight: Any, scale: Any, bias: Any = None) -> Any:
    """paretorch::int8_linear as a product with dequantized weights: both runtimes replace these by one product of integers.

    Measured once on 2026-11-22 with one scale a row (no benchmark repeats it), AMD EPYC with AVX-512 VNNI, two threads: f32[1,640] with i8[65536,640]
    4.0 times faster than in f32 on ONNX Runtime, 3.5 times on OpenVINO; f32[512,384] with i8[1536,384] 1.2 and 2.2 times.
    """
    groups, width = int(scale.shape[1]), int(weight.shape[1])
    values, scales = op.Transpose(weight, perm=[1, 0]), op.Transpose(scale, perm=[1, 0])
    if groups == 1:
        wide = op.DequantizeLinear(values, op.Squeeze(scales, op.Constant(value_ints=[0])), axis=1)
    elif op.version >= 21:
        wide = op.DequantizeLinear(values, scales, axis=0, block_size=width // groups)
    else:
        split = op.Reshape(op.CastLike(values, scales), op.Constant(value_ints=[groups, width // groups, -1]))
        wide = op.Reshape(op.Mul(split, op.Unsqueeze(scales, op.Constant(value_ints=[1]))), op.Constant(value_ints=[width, -1]))
    product = op.MatMul(x, wide)
    return product if bias is None else op.Add(product, bias)


def int4_linear(op: Any, x: Any, weight: Any, scale: Any, bias: Any = None) -> Any:
    """paretorch::int4_linear as MatMulNBits of com.microsoft, which takes the packed weights as they lie. Raises LoweringError for other groups.

    Measured once on 2026-11-22 (no benchmark repeats it), AMD EPYC with AVX-512 VNNI, two threads, against f32 of the same runtime, with groups of 64:
    f32[m,640] with 32768 x 640 weights 9.7, 3.7 and 1.6 times faster on ONNX Runtime for m = 1, 4, 16 (of eight bits 5.5, 3.1 and 1.6), f32[m,1024]
    with 4096 x 1024 4.8, 2.3 and 1.8; groups of 128 are up to 1.4 times faster than those of 64, those of 32 up to 1.3 times slower; OpenVINO makes
    compressed weights of it, 2.0 to 2.4 times faster for f32[m,640] with 2048 x 640, whatever the groups. All of it at level 4, which rounds
    each group of x to eight bits (0.5 to 0.7 % of the result); at level 0, which keeps x, ONNX Runtime is faster than in f32 for one row alone and
    slower (0.6 to 0.9) for 4 to 64. DequantizeLinear of UINT4, which both runtimes replace by the same product, would need the weights packed anew.
    """
    width, groups, length = int(weight.shape[0]), int(weight.shape[1]), 2 * int(weight.shape[2])
    if x.dtype.value != FLOAT:
        raise LoweringError(f"int4_linear of {x.dtype}; the ONNX form takes f32")
    if length not in NBITS_GROUPS:
        raise LoweringError(f"int4_linear with groups of {length}; the ONNX form takes {', '.join(map(str, NBITS_GROUPS))}")
    product = _matmul_nbits()(x, weight, scale, K=groups * length, N=width, bits=4, block_size=length, accuracy_level=4)
    return product if bias is None else op.Add(product, bias)


@cache
def _matmul_nbits() -> Any:
    """MatMulNBits of com.microsoft as an op of onnxscript, which knows the schemas of onnx alone."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    tensors = [
        OpSchema.FormalParameter(name, f"tensor({kind})")
        for name, kind in (("A", "float"), ("B", "uint8"), ("scales", "float"), ("Y", "float"))
    ]
    numbers = [OpSchema.Attribute(name, OpSchema.AttrType.INT) for name in ("K", "N", "bits", "block_size", "accuracy_level")]
    schema = OpSchema("MatMulNBits", "com.microsoft", 1, inputs=tensors[:3], outputs=tensors[3:], attributes=numbers)
    return Op(Opset("com.microsoft", 1), "MatMulNBits", schema)


def batch_norm(op: Any, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, *settings: Any) -> Any:
    """aten.batch_norm and its native form without training, which returns two empty statistics too. Raises LoweringError for a batch's own statistics.

    settings: (training, momentum, eps, cudnn_enabled), of the native form (momentum, eps).
    """
    is_native = len(settings) == 2
    if None in (mean, variance) or (not is_native and settings[0]):
        raise LoweringError("batch_norm with the statistics of its batch; the ONNX form takes kept ones, of a model in eval mode")
    scale, shift = (
        op.Expand(op.CastLike(op.Constant(value_float=value), x), op.Shape(mean)) if given is None else given
        for given, value in ((weight, 1.0), (bias, 0.0))
    )
    found = op.BatchNormalization(x, scale, shift, mean, variance, epsilon=float(settings[1 if is_native else 2]))
    nothing = op.Constant(value_floats=[])
    return (found, nothing, nothing) if is_native else found


EMITTERS: dict[str, Emitter] = {
    "batch_norm": batch_norm,
    "int8_linear": int8_linear,
    "int4_linear": int4_linear,
    "attention": attention,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "sum": total,
    "sort": sort,
}


@dataclass(frozen=True)
class _Form:
    """One attention that is being emitted. heads, kv_heads, width (of values): ints; keys: int, or a one-element shape computed in the model."""

    op: Any
    dtype: Any
    heads: int
    kv_heads: int
    width: int
    value_width: int
    keys: Any

    @staticmethod
    def of(op: Any, query: Any, key: Any, value: Any) -> _Form:
        heads, kv_heads, width, value_width = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
        if not all(isinstance(size, int) for size in (heads, kv_heads, width, value_width)):
            raise LoweringError(f"attention of {query.shape} on {key.shape}: the ONNX form needs fixed numbers of heads and channels")
        keys = key.shape[2] if isinstance(key.shape[2], int) else op.Shape(key, start=2, end=3)
        return _Form(op, query.dtype, heads, kv_heads, width, value_width, keys)

    def number(self, value: float) -> Any:
        """A scalar of the operands' dtype."""
        import onnx_ir

        return self.op.Constant(value=onnx_ir.tensor(numpy.asarray(value, dtype=self.dtype.numpy())))

    def integers(self, *values: int) -> Any:
        return self.op.Constant(value_ints=list(values))

    def shaped(self, x: Any, heads: int, width: Any) -> Any:
        """x as [B, heads, rows, width]. All query heads of a key head count as rows where heads is kv_heads."""
        if self.heads == self.kv_heads:
            return x
        if isinstance(width, int):
            return self.op.Reshape(x, self.integers(0, heads, -1, width))
        return self.op.Reshape(x, self.op.Concat(self.integers(0, heads, -1), width, axis=0))

    def scores(self, query: Any, key: Any, scale: float, softcap: float) -> Any:
        """[B,H,Tq,Tk], scaled and capped; before masks."""
        op = self.op
        rows = self.shaped(query, self.kv_heads, self.width)
        scores = self.shaped(op.MatMul(rows, op.Transpose(key, perm=[0, 1, 3, 2])), self.heads, self.keys)
        if softcap == 0.0:
            return op.Mul(scores, self.number(scale))
        return op.Mul(op.Tanh(op.Mul(scores, self.number(scale / softcap))), self.number(softcap))

    def mixed(self, scores: Any, value: Any, allowed: Any, bias: Any) -> Any:
        """Softmax and the product with the values; zeros in rows where nothing is seen."""
        op, sees = self.op, None
        if bias is not None:
            bias = bias if allowed is None else op.Where(allowed, bias, self.number(-math.inf))
            scores = op.Add(scores, bias)
            sees = op.Greater(op.ReduceMax(bias, self.integers(-1), keepdims=1), self.number(-math.inf))
        elif allowed is not None:
            scores = op.Where(allowed, scores, self.number(-math.inf))
            sees = op.Cast(op.ReduceMax(op.Cast(allowed, to=INT32), self.integers(-1), keepdims=1), to=BOOL)
        weights = self.shaped(op.Softmax(scores, axis=-1), self.kv_heads, self.keys)
        mixed = self.shaped(op.MatMul(weights, value), self.heads, self.value_width)
        return mixed if sees is None else op.Where(sees, mixed, self.number(0.0))

    def counted(self, key: Any, lengths: Any) -> Any:
        """bool[B,1,Tq,Tk] or broadcast to it, as `paretorch.ir.ops.attention.counted`."""
        op = self.op
        columns = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(key, start=2, end=3)), op.Constant(value_int=1))
        return op.Less(columns, op.Unsqueeze(op.Cast(lengths, to=INT64), self.integers(1, 3)))

    def band(self, query: Any, key: Any, left: int, right: int, sinks: int, offset: int) -> Any:
        """bool[Tq,Tk] from positions, as `paretorch.ir.ops.attention.band`."""
        op, zero, one = self.op, self.op.Constant(value_int=0), self.op.Constant(value_int=1)
        rows = op.Range(zero, op.Squeeze(op.Shape(query, start=2, end=3)), one)
        columns = op.Range(zero, op.Squeeze(op.Shape(key, start=2, end=3)), one)
        first = op.Sub(op.Unsqueeze(rows, self.integers(1)), op.Constant(value_int=-offset))
        distance = op.Sub(columns, first)
        seen = None
        if left >= 0:
            seen = op.GreaterOrEqual(distance, op.Constant(value_int=-left))
        if left >= 0 and sinks > 0:
            seen = op.Or(seen, op.Less(columns, op.Constant(value_int=sinks)))
        if right >= 0:
            near = op.LessOrEqual(distance, op.Constant(value_int=right))
            seen = near if seen is None else op.And(seen, near)
        return seen
