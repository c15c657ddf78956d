"""Atoms while they are being found: which are the same axis (union-find), which are factors of another, which come from another.

A dimension is a tuple of atom numbers, outermost first; () has size 1. Two atoms become one only because values meet in an op,
never because their sizes are equal. An atom may be split into an outer and an inner factor; the pair collapses to the atom again when
it is merged. A weak atom comes from a constant or from a broadcast: it gives way to a strong one, without becoming the same axis,
since one constant may serve several axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import sympy

from paretorch.ir.types import Size

Dim = tuple[int, ...]
Dims = list[Dim]


@lru_cache(maxsize=65536)
def quotient(size: Size, factor: Size) -> Size | None:
    """size / factor if that is whole for all values of the symbols, else None."""
    if factor == 0:
        return None
    if isinstance(size, int) and isinstance(factor, int):
        return size // factor if size % factor == 0 else None
    top, bottom = sympy.fraction(sympy.cancel(sympy.sympify(size) / factor))
    if bottom != 1:
        return None
    return int(top) if top.is_Integer else top


class Atoms:
    """The store of all atoms of one graph."""

    def __init__(self) -> None:
        self.sizes: list[Size] = []
        self.born: list[str] = []
        self.weak: list[bool] = []
        self.derived: list[list[int]] = []  # atoms whose length depends on this one's
        self._root: list[int] = []
        self._splits: list[dict[Size, tuple[int, int]]] = []  # outer size -> outer and inner factor
        self._pairs: dict[tuple[int, int], int] = {}  # two factors -> the atom they make
        self._pairs_of: list[list[tuple[int, int]]] = []

    def new(self, size: Size, born: str, *, weak: bool = False, parents: Iterable[int] = ()) -> int:
        """A new atom; its length depends on those of its parents."""
        number = len(self.sizes)
        self.sizes.append(size)
        self.born.append(born)
        self.weak.append(weak)
        self.derived.append([])
        self._root.append(number)
        self._splits.append({})
        self._pairs_of.append([])
        for parent in parents:
            self.derived[self.find(parent)].append(number)
        return number

    def dim(self, size: Size, born: str, *, weak: bool = False, parents: Iterable[int] = ()) -> Dim:
        """A dimension of one new atom, or () if its size is 1."""
        return () if size == 1 else (self.new(size, born, weak=weak, parents=parents),)

    def find(self, atom: int) -> int:
        while self._root[atom] != atom:
            self._root[atom] = self._root[self._root[atom]]
            atom = self._root[atom]
        return atom

    def size(self, dim: Dim) -> Size:
        """The product of the atoms' sizes."""
        total: Size = 1
        for atom in dim:
            total = total * self.sizes[atom]
        return total

    def resolve(self, dim: Dim) -> Dim:
        """The same dimension in the fewest atoms known now: roots, factors collapsed."""
        found: list[int] = []
        for atom in dim:
            found.append(self.find(atom))
            while len(found) > 1 and (found[-2], found[-1]) in self._pairs:
                inner, outer = found.pop(), found.pop()
                found.append(self.find(self._pairs[outer, inner]))
        return tuple(found)

    def split(self, atom: int, outer: Size) -> tuple[int, int] | None:
        """The factors of an atom whose outer one has this size; None if it does not divide the atom."""
        atom = self.find(atom)
        if outer not in self._splits[atom]:
            inner = quotient(self.sizes[atom], outer)
            if inner is None or inner == 1 or outer == 1:
                return None
            born, weak = self.born[atom], self.weak[atom]
            pair = self.new(outer, born, weak=weak, parents=(atom,)), self.new(inner, born, weak=weak, parents=(atom,))
            self._splits[atom][outer] = pair
            self._register(pair, atom)
        left, right = self._splits[atom][outer]
        return self.find(left), self.find(right)

    def fuse(self, dim: Dim, born: str) -> int:
        """One atom for a product of several: from now on they collapse to it."""
        dim = self.resolve(dim)
        while len(dim) > 1:
            left, right = dim[-2], dim[-1]
            atom = self.new(self.size((left, right)), born, weak=self.weak[left] and self.weak[right])
            self._splits[atom][self.sizes[left]] = (left, right)
            self.derived[atom] += [left, right]
            self._register((left, right), atom)
            dim = (*dim[:-2], atom)
        return dim[0]

    def _register(self, pair: tuple[int, int], atom: int) -> None:
        self._pairs[pair] = atom
        for factor in set(pair):
            self._pairs_of[factor].append(pair)

    def unify(self, left: int, right: int) -> int:
        """The atom of an axis on which two values meet: the strong one; two of equal strength become one."""
        left, right = self.find(left), self.find(right)
        if self.weak[left] != self.weak[right]:
            return right if self.weak[left] else left
        self._union(left, right)
        return self.find(left)

    def _union(self, left: int, right: int) -> None:
        todo = [(left, right)]
        while todo:
            keep, gone = sorted(self.find(atom) for atom in todo.pop())
            if keep == gone:
                continue
            self._root[gone] = keep
            self.weak[keep] = self.weak[keep] and self.weak[gone]
            self.derived[keep] += self.derived[gone]
            for outer, factors in self._splits[gone].items():
                todo += list(zip(self._splits[keep].setdefault(outer, factors), factors, strict=True))
            for pair in self._pairs_of[gone]:
                parent = self._pairs.pop(pair, None)
                if parent is None:
                    continue
                renamed = self.find(pair[0]), self.find(pair[1])
                if renamed in self._pairs:
                    todo.append((self._pairs[renamed], parent))
                else:
                    self._register(renamed, parent)

    def meet(self, left: Dim, right: Dim) -> Dim:
        """The dimension in which two broadcast values meet: factor by factor, splitting where one side is finer."""
        left, right = self.resolve(left), self.resolve(right)
        if not left or not right or left == right:
            return left or right
        met: list[int] = []
        ours, theirs = list(reversed(left)), list(reversed(right))
        while ours and theirs:
            one, other = ours.pop(), theirs.pop()
            if self.sizes[one] == self.sizes[other]:
                met.append(self.unify(one, other))
                continue
            finer = self._split_to_fit(one, other)
            if finer is None:  # the factors do not line up: what is stronger stands for both
                return right if all(self.weak[self.find(atom)] for atom in left) else left
            (one_outer, *one_rest), (other_outer, *other_rest) = finer
            ours += [*one_rest, one_outer]
            theirs += [*other_rest, other_outer]
        return self.resolve(tuple(met))

    def _split_to_fit(self, one: int, other: int) -> tuple[Sequence[int], Sequence[int]] | None:
        pair = self.split(one, self.sizes[other])
        if pair:
            return pair, (other,)
        pair = self.split(other, self.sizes[one])
        return ((one,), pair) if pair else None

    def family(self, atom: int) -> set[int]:
        """The atom and all atoms whose length depends on it: factors, slices, concatenations, windows."""
        found, todo = set(), [self.find(atom)]
        while todo:
            current = self.find(todo.pop())
            if current not in found:
                found.add(current)
                todo += self.derived[current]
        return found
