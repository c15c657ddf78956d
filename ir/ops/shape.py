"""Rows that move or re-describe data without arithmetic."""

from __future__ import annotations

from paretorch.ir.ops.costs import inputs_and_output, zero
from paretorch.ir.ops.table import Missing, Op, aten, define


def _shape(name: str, overloads: str, axes: str | None, onnx: str | Missing, kind: str = "view") -> None:
    define(Op(
        name=name, targets=tuple(aten(overload) for overload in overloads.split()), kind=kind, flops=zero,
        bytes=zero if kind == "view" else inputs_and_output, axes=axes, onnx=onnx,
    ))  # fmt: skip


_shape("view", "view.default reshape.default _unsafe_view.default flatten.using_ints unflatten.int", "view", "Reshape")
_shape("permute", "permute.default", "permute", "Transpose")
_shape("transpose", "transpose.int t.default", "transpose", "Transpose")
_shape("unsqueeze", "unsqueeze.default", "unsqueeze", "Unsqueeze")
_shape("squeeze", "squeeze.dim squeeze.dims squeeze.default", "squeeze", "Squeeze")
_shape("expand", "expand.default", "expand", "Expand")
_shape("select", "select.int", "select", "Gather")
_shape("slice", "slice.Tensor narrow.default", "slice", "Slice")
_shape("split", "split.Tensor split_with_sizes.default chunk.default", "split", "Split")
_shape("unbind", "unbind.int", "unbind", "Split")
_shape("alias", "alias.default detach.default lift_fresh_copy.default", "pointwise", "Identity")
_shape("clone", "clone.default contiguous.default", "pointwise", "Identity", "copy")
_shape("cat", "cat.default", "cat", "Concat", "copy")
_shape("stack", "stack.default", "stack", "Concat", "copy")
_shape("repeat", "repeat.default repeat_interleave.self_int", "repeat", "Tile", "copy")
_shape("pad", "constant_pad_nd.default pad.default", "pad", "Pad", "copy")
_shape("flip", "flip.default", "scan", "Slice", "copy")
_shape("roll", "roll.default", "scan", "Concat", "copy")
_shape("tril", "tril.default triu.default", "scan", "Trilu", "copy")
_shape("unsafe_split", "unsafe_split.Tensor unsafe_split_with_sizes.default unsafe_chunk.default", "split", "Split")
_shape("tensor_split", "tensor_split.sections tensor_split.indices", "split", "Split")
_shape("tile", "tile.default", "repeat", "Tile", "copy")
_shape("expand_as", "expand_as.default", None, "Expand")
_shape("view_as", "view_as.default reshape_as.default", None, "Reshape")
_shape("move_axes", "movedim.int movedim.intlist moveaxis.int moveaxis.intlist", None, "Transpose")
_shape("swap_axes", "swapaxes.default swapdims.default", None, "Transpose")
_shape("windows", "unfold.default", None, Missing("no ONNX op takes windows apart"))
_shape("diagonal", "diagonal.default", None, Missing("spelled out: a lookup"))
_shape("as_strided", "as_strided.default", None, Missing("reads storage, not values"))
_shape("meshgrid", "meshgrid.indexing meshgrid.default", None, "Expand")
_shape("pixel_shuffle", "pixel_shuffle.default", None, "DepthToSpace", "copy")
_shape("pixel_unshuffle", "pixel_unshuffle.default", None, "SpaceToDepth", "copy")
_shape("channel_shuffle", "channel_shuffle.default native_channel_shuffle.default", None, "Transpose", "copy")
