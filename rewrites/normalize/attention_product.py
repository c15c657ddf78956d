"""Products of two tensors as axes: which dimensions of the operands and of the result are the same axis, and which are summed over.

matmul, mm, bmm, baddbmm, addmm, linear and einsum of two operands all become one description.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from paretorch.ir.graph import arguments, shape_of
from paretorch.rewrites.normalize.heads import Axis, Dim, Dims, is_tensor, leaves, spelled

Label = str | None  # None: the operand has size 1 there and is broadcast


@dataclass(frozen=True)
class Product:
    """left and right multiplied over the labels that the result lacks, times alpha, plus beta times `added` (baddbmm, addmm)."""

    node: Node
    left: Node
    right: Node
    left_labels: tuple[Label, ...]
    right_labels: tuple[Label, ...]
    labels: tuple[str, ...]
    alpha: float = 1.0
    added: Node | None = None
    beta: float = 1.0

    @property
    def summed(self) -> set[str]:
        return {label for label in self.left_labels + self.right_labels if label is not None and label not in self.labels}


def product_of(node: Node) -> Product | None:
    """How this node multiplies two tensors; None if it does not, or not as a plain product."""
    name, given = spelled(node), node.args
    if name == "einsum":
        return _einsum(node)
    if name in ("matmul", "mm", "bmm"):
        return _product(node, given[0], given[1])
    if name in ("baddbmm", "addmm"):
        found = arguments(node)
        beta, alpha = found["beta"], found["alpha"]
        if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)):
            return None
        product = _product(node, given[1], given[2])
        return _with_added(product, given[0], float(alpha), float(beta)) if product is not None else None
    if name == "linear":
        found = arguments(node)
        is_layer = found["bias"] is not None or not isinstance(found["weight"], Node) or found["weight"].op == "get_attr"
        return None if is_layer else _product(node, found["input"], found["weight"], transposed=True)
    return None


def _with_added(product: Product, added: Any, alpha: float, beta: float) -> Product:
    given = (product.left, product.right, product.left_labels, product.right_labels, product.labels)
    return Product(product.node, *given, alpha, added if beta != 0.0 else None, beta)


def _product(node: Node, left: Any, right: Any, *, transposed: bool = False) -> Product | None:
    """matmul's rules: leading dimensions broadcast from the right."""
    rows, columns = shape_of(left), shape_of(right)
    if len(rows) < 2 or len(columns) < 2:
        return None
    sizes = shape_of(node)
    batch = [f"b{place}" for place in range(len(sizes) - 2)]
    left_labels = (*_batch_labels(batch, rows[:-2], sizes[:-2]), "m", "k")
    last = ("n", "k") if transposed else ("k", "n")
    right_labels = _batch_labels(batch, columns[:-2], sizes[:-2]) + last
    return Product(node, left, right, left_labels, right_labels, (*batch, "m", "n"))


def _batch_labels(batch: list[str], sizes: Sequence[Any], result: Sequence[Any]) -> tuple[Label, ...]:
    skipped = len(result) - len(sizes)
    pairs = zip(batch[skipped:], sizes, result[skipped:], strict=True)
    return tuple(None if size == 1 and full != 1 else label for label, size, full in pairs)


def _einsum(node: Node) -> Product | None:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if not isinstance(operands, (list, tuple)) or len(operands) != 2 or not all(is_tensor(operand) for operand in operands):
        return None
    left, right = operands
    terms, arrow, result = equation.partition("->")
    first, _, second = terms.partition(",")
    ranks = len(shape_of(left)), len(shape_of(right))  # type: ignore[arg-type]
    spread = max(_ellipsis_rank(first, ranks[0]), _ellipsis_rank(second, ranks[1]))
    if not arrow:
        letters = sorted(letter for letter in set(terms) - set(",.") if terms.count(letter) == 1)
        result = ("..." if spread else "") + "".join(letters)
    labels = [_letters(first, ranks[0], spread), _letters(second, ranks[1], spread), _letters(result, None, spread)]
    if any(len(set(found)) != len(found) for found in labels):
        return None  # a label twice is a diagonal
    lonely = set(labels[0]) ^ set(labels[1])
    if lonely - set(labels[2]):
        return None  # a sum over one operand alone
    sizes: dict[str, Any] = {}
    for found, operand in zip(labels[:2], operands, strict=True):
        for label, size in zip(found, shape_of(operand), strict=True):
            sizes[label] = size if sizes.get(label, 1) == 1 else sizes[label]
    shrunk = [
        tuple(None if size == 1 and sizes[label] != 1 else label for label, size in zip(found, shape_of(operand), strict=True))
        for found, operand in zip(labels[:2], operands, strict=True)
    ]
    return Product(node, left, right, shrunk[0], shrunk[1], tuple(labels[2]))  # type: ignore[arg-type]


def _ellipsis_rank(term: str, rank: int) -> int:
    return rank - len(term.replace("...", "")) if "..." in term else 0


def _letters(term: str, rank: int | None, spread: int) -> list[str]:
    """The labels of one term with its ellipsis written out as .0, .1, …; the ellipses line up on the right."""
    before, dots, after = term.partition("...")
    if not dots:
        return list(term)
    here = spread if rank is None else rank - len(before) - len(after)
    return [*before, *(f".{place}" for place in range(spread - here, spread)), *after]


def operand_dims(product: Product, dims: Dims) -> tuple[Dims, Dims, Dim] | None:
    """The dimensions of left, right and the summed axes, given those of the result; None if nothing or too much is summed."""
    known: dict[str, Dim] = dict(zip(product.labels, dims, strict=True))
    for label in sorted(product.summed):
        known[label] = (Axis(_label_size(product, label)),)
    left = [() if label is None else known[label] for label in product.left_labels]
    right = [() if label is None else known[label] for label in product.right_labels]
    if len(product.summed) == 0:
        return None
    return left, right, tuple(axis for label in sorted(product.summed) for axis in known[label])


def _label_size(product: Product, label: str) -> Any:
    for labels, operand in ((product.left_labels, product.left), (product.right_labels, product.right)):
        if label in labels:
            return shape_of(operand)[labels.index(label)]
    raise KeyError(label)


@dataclass(frozen=True)
class Weighted:
    """A product with the attention weights: the value, its dimensions and width, and the dimensions of the result."""

    node: Node
    value: Node
    value_dims: Dims
    width: Dim
    dims: Dims


def weighted_by(product: Product, weights: Node, dims: Dims, keys: Dim) -> Weighted | str:
    """The other operand of a product with weights of these dimensions, or a sentence if the sum is not over the keys alone."""
    if product.left is product.right or product.added is not None or product.alpha != 1.0:
        return f"the product {product.node.name} after the softmax is not weights times value alone"
    is_left = product.left is weights
    mine, theirs = (product.left_labels, product.right_labels) if is_left else (product.right_labels, product.left_labels)
    value = product.right if is_left else product.left
    known: dict[str, Dim] = {label: dim for label, dim in zip(mine, dims, strict=True) if label is not None}
    summed = tuple(axis for label in mine if label in product.summed for axis in leaves(known.get(str(label), ())))
    if summed != leaves(keys):
        return f"the softmax normalises over another axis than the one that {product.node.name} sums over"
    width: Dim = ()
    for label, size in zip(theirs, shape_of(value), strict=True):
        if label is not None and label not in known:
            known[label] = (Axis(size),)
            width = (*width, *known[label])
    value_dims = [() if label is None else known[label] for label in theirs]
    return Weighted(product.node, value, value_dims, width, [known[label] for label in product.labels])
