"""Merged tokens brought back: dense outputs, hidden states, grids and all else that needs every token in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretorch.capture import capture
from paretorch.ir.analyze import analyze
from paretorch.ir.graph import Graph, tensor_type
from paretorch.ir.ops import is_op
from paretorch.ir.verify import verify
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.rule import Refusal, Site
from paretorch.rewrites.token_merging.tome import rewrite, sites
from tests.zoo import Block, make

EXACT = {"rtol": 0.0, "atol": 1e-10}  # float64: the same function, other orders of summation
TOKENS = 13


def graph_of(model: nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: Any = None) -> Graph:
    return normalize(capture(model.double().eval(), inputs, dynamic_shapes).graph)


def offered(graph: Graph) -> tuple[list[Site], list[Refusal]]:
    found = list(sites(graph, analyze(graph)))
    return [site for site in found if isinstance(site, Site)], [refusal for refusal in found if isinstance(refusal, Refusal)]


def equal_pairs(batch: int = 2, tokens: int = TOKENS, width: int = 8) -> Tensor:
    """Tokens of which neighbours are equal: alternate dealing puts one of each pair into either half."""
    x = torch.randn(batch, (tokens + 1) // 2, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x.repeat_interleave(2, 1)[:, :tokens]


def count(graph: Graph, name: str) -> int:
    return sum(is_op(node, name) for node in graph.calls)


def check(graph: Graph, inputs: tuple[Tensor, ...], counts: tuple[int, ...] = (4, 1)) -> Graph:
    """Merge equal tokens at every site; the outputs are what they were. Returns the merged graph."""
    found, refusals = offered(graph)
    assert found, refusals
    after = graph
    for site, merged in zip(found, counts, strict=False):
        after = rewrite(after, site, merged)
        verify(after, "tome")
    assert count(after, "match_tokens") == len(found[: len(counts)])
    for new, old in zip(after.run(*inputs), graph.run(*inputs), strict=True):
        torch.testing.assert_close(new, old, **EXACT)
    for new, old in zip(after.outputs, graph.outputs, strict=True):
        assert tensor_type(new) == tensor_type(old)
    return after


class Dense(nn.Module):
    """x: [B, T, C] through blocks, then `read` of the hidden states, the last one normed."""

    def __init__(self, read: Callable[..., Any], depth: int = 2, **block: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.norm, self.read = nn.ModuleList(Block(8, 2, **block) for _ in range(depth)), nn.LayerNorm(8), read
        self.conv, self.head = nn.Conv2d(8, 4, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        hidden = [x]
        for block in self.blocks:
            x = block(x)
            hidden.append(x)
        hidden[-1] = self.norm(x)
        return self.read(self, hidden, *others)


def grid(model: Any, hidden: list[Tensor]) -> Tensor:
    """The head of a dense model: without the first token, as a grid, through a convolution."""
    return model.conv(hidden[-1][:, 1:].transpose(1, 2).unflatten(2, (3, 4))).flatten(2)


READS: dict[str, Callable[..., Any]] = {
    "tokens": lambda model, hidden: hidden[-1],
    "logits": lambda model, hidden: model.head(hidden[-1]),
    "spans": lambda model, hidden: model.head(hidden[-1])[..., 0],
    "hidden states": lambda model, hidden: {"last": hidden[-1], "all": tuple(hidden), "pooled": hidden[-1][:, 0]},
    "middle": lambda model, hidden: (hidden[1], hidden[-1].mean(1)),
    "grid": grid,
    "pyramid": lambda model, hidden: tuple(grid(model, [state]) for state in hidden[1:]),
    "later token": lambda model, hidden: hidden[-1][:, 9],
    "order": lambda model, hidden: hidden[-1].cumsum(1).mean(1),
    "pairs": lambda model, hidden: hidden[-1] @ hidden[-1].transpose(1, 2),
    "positions": lambda model, hidden: (hidden[-1] * torch.linspace(0, 1, TOKENS, dtype=torch.float64)[:, None]).mean(1),
    "residual": lambda model, hidden: model.head(hidden[0] + hidden[-1]),
    "argmax": lambda model, hidden: model.head(hidden[-1]).max(1)[0],
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_equal_tokens_come_back_exactly(name: str) -> None:
    x = equal_pairs()
    check(graph_of(Dense(READS[name]), (x,)), (x,))


@pytest.mark.parametrize("layout", ["post", "parallel"])
def test_layouts(layout: str) -> None:
    x = equal_pairs()
    check(graph_of(Dense(READS["hidden states"], layout=layout), (x,)), (x,))


def test_a_second_input_meets_all_tokens() -> None:
    x, y = equal_pairs(), torch.randn(2, TOKENS, 8, dtype=torch.float64)
    check(graph_of(Dense(lambda model, hidden, y: model.head(hidden[-1] + y)), (x, y)), (x, y))


def test_work_after_the_last_mixing_is_done_on_merged_tokens() -> None:
    """The head runs on fewer tokens, and one composed map brings back the last output."""
    x = equal_pairs()
    after = check(graph_of(Dense(READS["logits"]), (x,)), (x,))
    assert count(after, "unmerge_tokens") == 1
    assert count(after, "source_map") == 2
    head = next(node for node in reversed(after.calls) if is_op(node, "linear"))
    assert head.meta["val"].shape[1] == TOKENS - 5
    assert is_op(after.outputs[0], "unmerge_tokens")


@pytest.mark.parametrize(("batch", "tokens"), [(1, 13), (7, 12)])
def test_batches_and_odd_counts_with_a_dynamic_batch(batch: int, tokens: int) -> None:
    size = torch.export.Dim("batch", min=1, max=64)
    graph = graph_of(Dense(READS["hidden states"]), (equal_pairs(3, tokens),), ({0: size},))
    after = check(graph, (equal_pairs(batch, tokens),))
    x = torch.randn(batch, tokens, 8, dtype=torch.float64)
    together = after.run(x)
    for row in {0, batch - 1}:
        for whole, alone in zip(together, after.run(x[row : row + 1]), strict=True):
            torch.testing.assert_close(alone[0], whole[row], **EXACT)


def test_the_order_of_choices_does_not_matter() -> None:
    x = torch.randn(2, 26, 8, dtype=torch.float64)
    graph = graph_of(Dense(READS["hidden states"], depth=3), (x,))
    found = offered(graph)[0]
    forward, backward = graph, graph
    for site in found:
        forward = rewrite(forward, site, 4)
    for site in found[::-1]:
        backward = rewrite(backward, site, 4)
    for one, other in zip(forward.run(x), backward.run(x), strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    assert not torch.allclose(forward.run(x)[0], graph.run(x)[0])


class Padded(nn.Module):
    """A text encoder that returns every token and a masked mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(8, 2, layout="post") for _ in range(2))

    def forward(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        mask = (1.0 - seen[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for block in self.blocks:
            x = block(x, mask)
        weight = seen[..., None].to(x.dtype)
        return x, (x * weight).sum(1) / weight.sum(1)


def test_padding() -> None:
    x, seen = equal_pairs(3, 12), (torch.arange(12) < torch.tensor([[12], [8], [6]])).long()
    graph = graph_of(Padded(), (x, seen))
    after = rewrite(graph, offered(graph)[0][0], 4)
    for old, new in zip(graph.run(x, seen), after.run(x, seen), strict=True):
        real = seen.bool() if old.dim() == 3 else slice(None)  # what stands at padding is nobody's
        torch.testing.assert_close(new[real], old[real], **EXACT)
    other = torch.where(seen[..., None] == 1, x, x + 3)
    for one, two in zip(after.run(x, seen), after.run(other, seen), strict=True):
        real = seen.bool() if one.dim() == 3 else slice(None)
        torch.testing.assert_close(one[real], two[real], **EXACT)


@pytest.mark.parametrize("name", ["vit_dense", "whisper"])
def test_dense_models_of_the_zoo(name: str) -> None:
    model, inputs = make(name, T=13 if name == "vit_dense" else 14)
    graph = graph_of(model, tuple(x.double() for x in inputs))
    after = graph
    for site in offered(graph)[0]:
        after = rewrite(after, site, 4)
    old, new = (g.run(*(x.double() for x in inputs))[0] for g in (graph, after))
    assert old.shape == new.shape
    assert 0 < (old - new).norm() / old.norm() < 0.9
    assert count(after, "unmerge_tokens") == 1


class Returning(nn.Module):
    """An encoder-decoder that also returns what its encoder says."""

    def __init__(self) -> None:
        super().__init__()
        self.model, _ = make("encoder_decoder", T=16)

    def forward(self, spectrum: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(spectrum, ids), self.model.encoder(spectrum)


def test_an_encoder_that_is_read_and_returned() -> None:
    _, (spectrum, ids) = make("encoder_decoder", T=16)
    graph = graph_of(Returning(), (spectrum.double(), ids))
    after = graph
    for site in offered(graph)[0]:
        after = rewrite(after, site, 4)
    assert count(after, "unmerge_tokens") == 1
    biased = [node for node in after.calls if is_op(node, "attention") and node.kwargs.get("key_bias") is not None]
    assert len(biased) == 3  # the encoder's second attention and both looks at its memory
    assert all(
        new.shape == old.shape for new, old in zip(after.run(spectrum.double(), ids), graph.run(spectrum.double(), ids), strict=True)
    )


class Frames(nn.Module):
    """Attention in each frame of [B, F, T, C], then from frame to frame, or the mean over frames at each place."""

    def __init__(self, over_time: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.space, self.time, self.over_time = nn.ModuleList(Block(8, 2) for _ in range(2)), Block(8, 2), over_time

    def forward(self, x: Tensor) -> Tensor:
        batch, frames, tokens, width = x.shape
        for block in self.space:
            x = block(x.reshape(batch * frames, tokens, width)).reshape(batch, frames, tokens, width)
        if self.over_time:
            x = self.time(x.transpose(1, 2).reshape(batch * tokens, frames, width)).reshape(batch, tokens, frames, width).transpose(1, 2)
        return x.mean(1)


@pytest.mark.parametrize("over_time", [False, True])
def test_places_that_frames_share_are_whole(over_time: bool) -> None:
    x = equal_pairs(6, 12).reshape(2, 3, 12, 8)
    check(graph_of(Frames(over_time), (x,)), (x,))


class Turned(nn.Module):
    """Blocks whose attention adds positions to queries and keys, as detectors do."""

    def __init__(self, feeds: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.position, self.feeds = nn.ModuleList(Block(8, 2) for _ in range(3)), nn.Parameter(torch.randn(TOKENS, 8)), feeds

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block.norms[0](x)
            query, key, value = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (y + self.position, y + self.position, y))
            x = x + block.mix.project(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
            x = x + block.feed(block.norms[1](x)) if self.feeds else x
        return x


def test_positions_in_every_layer_leave_the_feed_forward_merged() -> None:
    x = equal_pairs()
    graph = graph_of(Turned(True), (x,))
    found, _ = offered(graph)
    after = graph
    for site in found:
        after = rewrite(after, site, 4)
    assert len(found) == 3
    assert count(after, "unmerge_tokens") == 3
    assert {node.args[0].meta["val"].shape[2] for node in after.calls if is_op(node, "attention")} == {TOKENS}
    one = rewrite(graph, found[-1], 4)
    torch.testing.assert_close(one.run(x)[0].shape, graph.run(x)[0].shape)


class Biased(nn.Module):
    """Relative positions: something for each pair of places in the scores of the last layer alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.bias = nn.ModuleList(Block(8, 2) for _ in range(2)), nn.Parameter(torch.randn(1, 2, TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x), self.bias)[:, 0]


def test_biases_for_pairs_of_places_see_all_tokens() -> None:
    x = equal_pairs()
    graph = graph_of(Biased(), (x,))
    after = check(graph, (x,), (4,))
    assert [node.args[0].meta["val"].shape[2] for node in after.calls if is_op(node, "attention")] == [TOKENS, TOKENS]
    assert len(offered(graph)[0]) == 2


def test_nothing_to_save_is_refused() -> None:
    found, refusals = offered(graph_of(Turned(False), (equal_pairs(),)))
    assert [site.name for site in found] == ["attention", "attention_1"]  # for the projections behind the later attentions
    assert "the model returns" in refusals[-1].reason
    assert refusals[-1].reason.endswith("would run on fewer tokens")


def test_golden(golden: Callable[[str], None]) -> None:
    x = equal_pairs()
    before = graph_of(Dense(READS["middle"]), (x,))
    first, second = offered(before)[0]
    golden(f"{before}\n# tome r=4 at {first.name}, {second.name}\n{rewrite(rewrite(before, first, 4), second, 4)}")
