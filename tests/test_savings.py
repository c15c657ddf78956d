"""Savings are priced at a few sites and values and are a line between them."""

from paretorch.ir.errors import PlanError
from paretorch.savings import Pricing, Savings
from tests.test_search import candidate


def priced(candidates, alike=lambda c: 0, fails=(), short=None):
    """Savings where each site saves its knob times the sites from it on. short: sites of the graph with fewer layers; None for all of them."""
    asked = []
    kept = [c.site.name for c in candidates] if short is None else list(short)

    def saved(choice, names):
        asked.append((choice.site, choice.knob))
        if choice.site in fails:
            raise PlanError(f"{choice.site} cannot be changed")
        return float(choice.knob) * (len(names) - names.index(choice.site))

    whole = [c.site.name for c in candidates]
    pricing = Pricing(alike, lambda choice: saved(choice, whole), lambda choice: saved(choice, kept), lambda c: c.site.name in kept)
    return Savings(candidates, pricing), asked


def test_equal_layers_are_priced_at_three_of_them():
    layers = [candidate("merge", str(place), 1, 2, 3, 4, 5) for place in range(9)]
    savings, asked = priced(layers)
    for place, layer in enumerate(layers):
        assert savings.of(layer) == ([(knob, float(knob) * (9 - place)) for knob in (1, 2, 3, 4, 5)], "")
    assert {site for site, _ in asked} == {"0", "4", "8"}
    assert {knob for _, knob in asked} == {1, 3, 5}
    assert len(asked) == 9


def test_a_deep_model_is_priced_on_a_short_one():
    """Of twenty layers six stand in the short graph; savings of the others go on along its line."""
    layers = [candidate("merge", str(place), 1, 2) for place in range(20)]
    savings, asked = priced(layers, short=("0", "1", "2", "17", "18", "19"))
    for place, layer in enumerate(layers):
        assert savings.of(layer) == ([(1, 20.0 - place), (2, 2 * (20.0 - place))], "")
    assert {site for site, _ in asked} == {"0", "2", "19"}


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
    assert savings.of(layers[1]) == ([(1, 5.0)], "")
