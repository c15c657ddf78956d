"""Masks that count keys: every spelling becomes lengths where kernels run, near misses stay masks, and caches are read up to what they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paretorch
from paretorch.capture import capture
from paretorch.codegen.regions import region_of
from paretorch.codegen.triton_runtime import with_kernels
from paretorch.ir.graph import Graph, arguments, shape_of
from paretorch.ir.ops import is_op
from paretorch.ir.ops.attention import attention
from paretorch.ir.verify import verify
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.normalize.count_keys import count_keys
from paretorch.rewrites.sparse_attention.key_bias import mask_by_pairs
from tests.kernel_cases import assert_close

BATCH, HEADS, QUERIES, KEYS, WIDTH = 3, 2, 4, 9, 8
MOST = torch.iinfo(torch.int64).max


class Masked(nn.Module):
    """Attention under the mask that a function of numbers makes."""

    def __init__(self, mask: Callable[..., Tensor]) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *numbers: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask(*numbers))


def places() -> Tensor:
    return torch.arange(KEYS)


SAMPLES = torch.tensor([0, 5, 11])
ROWS = torch.tensor([[0, 1, 2, 3], [4, 9, 1, 2], [8, 3, 0, 7]])
SPELLINGS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[int, int]]] = {
    "lengths": (lambda n: (places() < n[:, None])[:, None, None, :], (SAMPLES,), (BATCH, 1)),
    "the other way": (lambda n: n.view(-1, 1, 1, 1) > places(), (SAMPLES.int(),), (BATCH, 1)),
    "not beyond": (lambda n: ~(places() >= n[:, None]).view(BATCH, 1, 1, KEYS), (SAMPLES,), (BATCH, 1)),
    "filled": (
        lambda n: torch.zeros(BATCH, 1, 1, KEYS).masked_fill((places()[None] >= n[:, None])[:, None, None], -torch.inf),
        (SAMPLES,),
        (BATCH, 1),
    ),
    "from the second": (lambda n: (places() + 1 < n[:, None])[:, None, None, :], (SAMPLES,), (BATCH, 1)),
    "up to a position": (lambda at: (places() <= (at + torch.arange(QUERIES))[:, None])[None, None], (torch.tensor(3),), (1, QUERIES)),
    "up to positions": (lambda at: places()[None, None, None] <= at[:, None, :, None], (ROWS,), (BATCH, QUERIES)),
    "the largest number": (lambda n: (places() <= n[:, None])[:, None, None], (torch.tensor([-1, 2, MOST]),), (BATCH, 1)),
    "two numbers": (
        lambda n, at: (places() < n[:, None])[:, None, None, :] & (places() <= at[:, :, None])[:, None],
        (SAMPLES, ROWS),
        (BATCH, QUERIES),
    ),
    "and a mask": (
        lambda n, kept: (places() < n[:, None])[:, None, None, :] & kept[:, None, None, :],
        (SAMPLES, torch.rand(BATCH, KEYS, generator=torch.Generator().manual_seed(0)) > 0.3),
        (BATCH, 1),
    ),
    "slots of a ring that are written": (
        lambda n: (places() < torch.clamp(n, max=KEYS)[:, None])[:, None, None],
        (torch.tensor([2, 9, 40]),),
        (BATCH, 1),
    ),
}
MISSES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "by head": (lambda n: (places() < n[:, :, None])[:, :, None], (torch.tensor([[1, 2], [3, 4], [5, 6]]),)),
    "real numbers": (lambda n: (places() < n[:, None])[:, None, None], (torch.tensor([1.5, 2.0, 4.0]),)),
    "every other": (lambda n: (2 * places() < n[:, None])[:, None, None], (SAMPLES + 1,)),
    "the last ones": (lambda n: (places() >= n[:, None])[:, None, None], (SAMPLES - 3,)),
    "by key": (lambda n: (places() < n)[None, None, None], (torch.arange(KEYS).flip(0),)),
    "a value that a row without keys would see": (
        lambda n: torch.zeros(BATCH, 1, 1, KEYS).masked_fill((places() >= n[:, None])[:, None, None], torch.finfo(torch.float32).min),
        (SAMPLES,),
    ),
    "age of a slot in a ring": (lambda head: ((head - 1 - places()) % KEYS < 4)[None, None, None], (torch.tensor(2),)),
}


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((QUERIES, WIDTH), (KEYS, WIDTH), (KEYS, WIDTH))
    return [torch.randn(BATCH, HEADS, *size, generator=generator) for size in sizes]


def both(mask: Callable[..., Tensor], numbers: tuple[Tensor, ...]) -> tuple[Graph, Graph, list[Tensor], Tensor]:
    """(the normalized graph, the same with counts, inputs, what the model says)."""
    inputs = [*tensors(), *numbers]
    model = Masked(mask).eval()
    graph = normalize(capture(model, tuple(inputs)).graph)
    return graph, count_keys(graph), inputs, model(*inputs)


def attentions(graph: Graph) -> list[Any]:
    return [node for node in graph.calls if is_op(node, "attention")]


def run_with_kernels(graph: Graph, inputs: list[Tensor]) -> Any:
    pytest.importorskip("triton")
    return with_kernels(graph, [(region_of([node]), None) for node in attentions(graph)])[0](*inputs)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    mask, numbers, shape = SPELLINGS[name]
    graph, counted, inputs, expected = both(mask, numbers)
    (node,) = attentions(counted)
    assert shape_of(arguments(node)["lengths"]) == shape
    assert (arguments(node)["mask"] is not None) == (name == "and a mask")
    verify(counted)
    assert count_keys(counted) is counted
    assert arguments(attentions(graph)[0])["lengths"] is None, "the graph that was given stays"
    assert_close(counted.run(*inputs), [expected], 1e-6)
    assert_close(run_with_kernels(counted, inputs), [expected], 1e-5)


@pytest.mark.parametrize("name", MISSES)
def test_near_misses(name: str) -> None:
    """Masks that a number of keys does not say; the kernel reads them as they are."""
    mask, numbers = MISSES[name]
    graph, counted, inputs, expected = both(mask, numbers)
    assert counted is graph
    assert_close(run_with_kernels(counted, inputs), [expected], 1e-5)


@pytest.mark.parametrize("mask", [None, torch.rand(BATCH, 1, QUERIES, KEYS) > 0.2, torch.randn(HEADS, 1, KEYS)])
def test_meaning(mask: Tensor | None) -> None:
    """Lengths hide what a mask of the same numbers hides; a row without keys is zeros."""
    query, key, value = tensors()
    found = attention(query, key, value, mask, lengths=ROWS, scale=0.3, right=6)
    seen = places() < ROWS[:, None, :, None]
    joined = seen if mask is None else seen & mask if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
    assert_close([found], [attention(query, key, value, joined, scale=0.3, right=6)], 1e-6)
    assert torch.equal(found[0, :, 0], torch.zeros(HEADS, WIDTH))


def test_rules_of_tokens_refuse_counts() -> None:
    _, counted, _, _ = both(*SPELLINGS["lengths"][:2])
    reason = mask_by_pairs(attentions(counted)[0])
    assert reason is not None
    assert reason.endswith("i64[3,1], says by their places which are seen")


# caches of transformers


class Decoder(nn.Module):
    """A language model with the cache as its input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, cache: Any) -> Tensor:
        return self.model(input_ids=input_ids, past_key_values=cache, use_cache=True).logits  # type: ignore[no-any-return]


def decoder(filled: int, tokens: int, slots: int = 16, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    config = transformers.MistralConfig(**sizes, num_key_value_heads=1, max_position_embeddings=64, **options)
    model = Decoder(transformers.MistralForCausalLM(config)).eval()
    cache = transformers.StaticCache(config=config, max_cache_len=slots)
    for token in range(filled):
        with torch.no_grad():
            model(torch.tensor([[token]]), cache)
    return model, {"input_ids": torch.arange(tokens)[None] + 3, "cache": cache}


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_static_cache_is_counted(tokens: int) -> None:
    """One position in the model is a number of keys for each query of a step."""
    model, inputs = decoder(filled=5, tokens=tokens, sliding_window=None)
    program = capture(model, inputs)
    counted = count_keys(normalize(program.graph))
    (node,) = attentions(counted)
    assert shape_of(arguments(node)["lengths"]) == (1, tokens)
    assert arguments(node)["mask"] is None
    expected = program.run_original(*program.example)
    assert_close(run_with_kernels(counted, list(program.example)), expected, 1e-5)


@pytest.mark.parametrize("filled", [2, 7])
def test_a_sliding_cache_needs_no_form_of_its_own(filled: int) -> None:
    """transformers rolls the slots of a full window, so that all of them are seen; before, it counts those that are filled."""
    model, inputs = decoder(filled=filled, tokens=1, sliding_window=4)
    program = capture(model, inputs)
    graph = normalize(program.graph)
    (node,) = attentions(count_keys(graph))
    given = arguments(node)
    assert given["mask"] is None or graph.known(given["mask"]) is not None
    assert_close(run_with_kernels(count_keys(graph), list(program.example)), program.run_original(*program.example), 1e-5)


def test_a_plan_for_a_gpu_reads_lengths() -> None:
    pytest.importorskip("triton")
    model, inputs = decoder(filled=5, tokens=1, slots=600, sliding_window=None)
    result = paretorch.optimize(model, inputs, target="cuda:h100")
    made = [kernel for kernel in result.kernels if kernel.template == "attention"]
    assert [len(kernel.parts) for kernel in made] == [1], "keys are divided"
    assert "keys = tl.minimum(tl.maximum(tl.load(lengths_ptr), 0), keys)" in made[0].source
    contender = result.contender
    assert contender is not None
    assert attentions(contender.graph)[0].kwargs["lengths"] is not None
    assert count_keys(contender.graph) is contender.graph
