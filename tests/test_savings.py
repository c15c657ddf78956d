"""Savings are priced at a few sites and values and are a line between them."""

from paretorch.ir.errors import PlanError
from paretorch.savings import Savings
from tests.test_search import candidate


def priced(candidates, alike=lambda c: 0, fails=()):
    asked = []

    def saved(choice):
        asked.append((choice.site, choice.knob))
        if choice.site in fails:
            raise PlanError(f"{choice.site} cannot be changed")
        return float(choice.knob) * (10 - int(choice.site))

    return Savings(candidates, alike, saved), asked


def test_equal_layers_are_priced_at_three_of_them():
    layers = [candidate("merge", str(place), 1, 2, 3, 4, 5) for place in range(9)]
    savings, asked = priced(layers)
    for place, layer in enumerate(layers):
        assert savings.of(layer) == ([(knob, float(knob) * (10 - place)) for knob in (1, 2, 3, 4, 5)], "")
    assert {site for site, _ in asked} == {"0", "4", "8"}
    assert {knob for _, knob in asked} == {1, 3, 5}
    assert len(asked) == 9


def test_what_is_not_alike_is_priced_by_itself():
    layers = [candidate("merge", str(place), 1) for place in range(6)]
    savings, asked = priced(layers, alike=lambda c: c.site.name)
    for layer in layers:
        savings.of(layer)
    assert len(asked) == 6


def test_a_site_that_fails_is_no_end_of_a_line():
    layers = [candidate("merge", str(place), 1) for place in range(6)]
    savings, _ = priced(layers, fails=("0",))
    assert savings.of(layers[0]) == ([], "0 cannot be changed")
    assert savings.of(layers[1]) == ([(1, 9.0)], "")
