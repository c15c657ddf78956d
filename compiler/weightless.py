"""Models without weights, on the meta device: they can be planned for, whatever their size.

Tensors on the meta device become torch's fake tensors of the host. What a model computes from sizes alone, masks and positions, then still has
values, so that its graph is the one that the same model with weights gives, and a plan made for the one fits the other.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree


def is_weightless(model: nn.Module) -> bool:
    """Whether a parameter or buffer lies on the meta device."""
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def on_host(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A twin of the model and its inputs, with fake tensors of the host in place of those on the meta device; tied weights stay tied."""
    # what torch.export would make itself, since it takes the mode of the tensors that it finds
    mode = FakeTensorMode(shape_env=ShapeEnv(tracked_fakes=[], trace_asserts=True), allow_non_fake_inputs=True, export=True)
    made: dict[int, Tensor] = {}

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_meta:
            return leaf
        if id(leaf) not in made:
            twin = FakeTensor(mode, leaf.detach(), torch.device("cpu"))
            made[id(leaf)] = nn.Parameter(twin, requires_grad=False) if isinstance(leaf, nn.Parameter) else twin
        return made[id(leaf)]

    host = copy.deepcopy(model)
    for module in host.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            held.update({name: fake(value) for name, value in held.items() if isinstance(value, Tensor)})
    return (host, *pytree.tree_map(fake, (args, kwargs)))
