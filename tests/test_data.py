"""Items of data: what is an input, by which name, and what is a label."""

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paretorch.budget import Budget
from paretorch.capture import Program, capture
from paretorch.data import prepare
from paretorch.ir.errors import InputError
from paretorch.metrics import top1

FIRST, SECOND, LABELS = torch.randn(2, 4), torch.randn(2, 4), torch.tensor([0, 1])


class Two(nn.Module):
    def forward(self, first: Tensor, second: Tensor, third: Tensor | None = None, doubled: bool = False) -> Tensor:
        return first - (2 if doubled else 1) * second + (0 if third is None else third)


def two() -> Program:
    return capture(Two().eval(), UserDict(first=FIRST, second=SECOND, doubled=True))


def inputs_of(program: Program, item: Any, **budget: Any) -> tuple[Tensor, ...]:
    split = prepare(program, [item] * 4, Budget(**(budget or {"drift": 0.1})), 0)
    batch = split.ranking[0]
    found: tuple[Tensor, ...] = batch.inputs
    return found


@pytest.mark.parametrize(
    "item",
    [
        {"first": FIRST, "second": SECOND, "doubled": True},
        {"second": SECOND, "first": FIRST},
        {"second": SECOND, "third": None, "first": FIRST},
        (FIRST, SECOND),
        ({"second": SECOND, "first": FIRST}, LABELS),
        UserDict(second=SECOND, first=FIRST),  # what tokenizers of transformers give
        (UserDict(second=SECOND, first=FIRST), LABELS),
        ((FIRST, SECOND), LABELS),
        ((FIRST, SECOND), ["cat", "dog"]),
    ],
)
def test_tensors_go_where_their_names_say(item: Any) -> None:
    program = two()
    first, second = inputs_of(program, item)
    assert torch.equal(first, FIRST)
    assert torch.equal(second, SECOND)


def test_a_pair_for_a_model_of_one_input_has_labels() -> None:
    program = capture(nn.Linear(4, 4).eval(), FIRST)
    (found,) = inputs_of(program, (FIRST, LABELS))
    assert torch.equal(found, FIRST)


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        ({"first": FIRST}, "an item of data lacks 'second'; it has first"),
        (
            {"first": FIRST, "second": SECOND, "labels": LABELS},
            "an item of data has 'labels'; the model was captured with first, second, doubled",
        ),
        ({"first": FIRST, "second": SECOND, "third": SECOND}, "has 'third'"),
        ((FIRST, SECOND, LABELS), "holds 3 tensors; the captured model takes 2"),
    ],
)
def test_an_item_that_does_not_fit_is_named(item: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        inputs_of(two(), item)


@pytest.mark.parametrize("labels", [torch.arange(5), list(range(5)), {"class": torch.arange(5), "name": list("abcde")}])
def test_labels_are_cut_with_the_inputs(labels: Any) -> None:
    program = capture(nn.Linear(4, 4).eval(), FIRST)
    split = prepare(program, [(torch.randn(5, 4), labels)], Budget(metric=top1, max_drop=0.1), 0)
    batches = sorted((*split.ranking, *split.held_out), key=lambda batch: int(_classes(batch.labels)[0]))
    assert [batch.count for batch in batches] == [2, 2, 1]
    assert [int(label) for batch in batches for label in _classes(batch.labels)] == [0, 1, 2, 3, 4]


def _classes(labels: Any) -> Any:
    return labels["class"] if isinstance(labels, dict) else labels
