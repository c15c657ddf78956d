"""Contracts of every rule, generic over the table, so that a new rule is tested the day it is added."""

import pytest
import torch

from paretorch.ir.graph import Graph
from paretorch.ir.ops import is_op
from paretorch.rewrites import RULES, rules_named
from paretorch.rewrites.apply import apply_choice, apply_rule, sites_of
from paretorch.rewrites.rule import FAMILIES, PROPERTIES

EXACT = [rule for rule in RULES if rule.is_exact]
LOSSY = [rule for rule in RULES if not rule.is_exact]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
every_exact_rule = pytest.mark.parametrize("rule", EXACT, ids=lambda rule: rule.name)
every_lossy_rule = pytest.mark.parametrize("rule", LOSSY, ids=lambda rule: rule.name)
EXACT_ERROR = 1e-9  # float64, relative; rounding of a few products in another order stays far below


def doubled(graph: Graph) -> Graph:
    """The same graph in float64."""
    graph = graph.copy()
    for name, tensor in graph.constants.items():
        graph.constants[name] = tensor.double() if tensor.dtype == torch.float32 else tensor
    for node in graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = graph.fake(graph.constants[node.target])
        elif node.op == "placeholder" and node.meta["val"].dtype == torch.float32:
            with graph.fake_mode:
                node.meta["val"] = torch.empty(node.meta["val"].shape, dtype=torch.float64)
    return graph.retype()


def inputs_of(graph: Graph, seed: int = 0) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return [torch.randn([int(s) for s in n.meta["val"].shape], generator=chance, dtype=n.meta["val"].dtype) for n in graph.inputs]


def error(before: Graph, after: Graph, seed: int = 0) -> float:
    given = inputs_of(before, seed)
    pairs = zip(before.run(*given), after.run(*given), strict=True)
    return max(float((a - b).double().norm() / a.double().norm()) for a, b in pairs)


def strongest(rule, graph):
    site = sites_of(rule, graph)[0][0]
    values = site.values or rule.knobs
    return apply_choice(rule, graph, site.name, values[-1]), site


@every_rule
def test_rewrite(rule, golden):
    before = rule.example()
    after = apply_rule(rule, before)[0] if rule.is_exact else strongest(rule, before)[0]
    golden(f"{before}\n# {rule.name}\n{after}")


@every_rule
def test_card(rule):
    assert rule.family in FAMILIES
    assert rule.source
    assert rule.reads | rule.invalidates <= set(PROPERTIES)
    assert set(rule.saves) <= {"flops", "bytes", "launches", "memory"}
    assert rules_named([rule.name]) == (rule,)
    assert rule in rules_named([rule.family])


@every_exact_rule
@pytest.mark.parametrize("seed", range(3))
def test_exact_rules_keep_the_function(rule, seed):
    before = doubled(rule.example(3, 12) if seed else rule.example())
    after, applied, _ = apply_rule(rule, before)
    assert applied
    assert error(before, after, seed) <= EXACT_ERROR


@every_exact_rule
def test_a_second_application_changes_nothing(rule):
    once, applied, _ = apply_rule(rule, rule.example())
    assert applied
    assert apply_rule(rule, once)[1] == []


@every_exact_rule
def test_a_broken_twin_is_caught(rule):
    """The contract can fail: one folded constant off by a thousandth is seen."""
    before = doubled(rule.example())
    after = apply_rule(rule, before)[0].copy()
    new = [name for name in after.constants if name not in before.constants] or list(after.constants)
    after.constants[new[0]] = after.constants[new[0]] * 1.001
    assert error(before, after) > EXACT_ERROR


@every_exact_rule
def test_fuel(rule):
    before = rule.example()
    after, applied, _ = apply_rule(rule, before, limit=0)
    assert applied == []
    assert str(after) == str(before)


@every_exact_rule
def test_weights_that_may_change_are_not_folded(rule):
    """With every weight an input, as torch.compile passes them, a rule that folds weights finds no site, and says why where it looked."""
    graph = rule.example().copy()
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        graph.replace(node, graph.input(f"given_{node.target}", node.meta["val"]))
    sites, refusals = sites_of(rule, graph.clean())
    if rule.name != "drop_key_bias":  # it folds nothing: the bias has no effect whatever it is
        assert sites == []
        assert all("no constant" in refusal.reason or "are no constants" in refusal.reason for refusal in refusals)


@every_lossy_rule
def test_the_first_knob_value_is_the_identity(rule):
    before = rule.example()
    site = sites_of(rule, before)[0][0]
    after = apply_choice(rule, before, site.name, rule.knobs[0])
    given = inputs_of(before)
    assert all(torch.equal(a, b) for a, b in zip(before.run(*given), after.run(*given), strict=True))


@every_lossy_rule
def test_the_strongest_knob_value_changes_something(rule):
    before = rule.example()
    after, site = strongest(rule, before)
    assert error(before, after) > 0
    assert str(after) != str(before)
    marked = [node for node in after.calls if node.meta.get("rule") == rule.name]
    assert marked or rule.family == "layer_skipping"
    assert site.name


def test_a_wrong_name_is_answered_with_close_ones():
    from paretorch.ir.errors import RuleError

    with pytest.raises(RuleError, match="Close: tome"):
        rules_named(["tomee"])


def test_bf16_keeps_the_outputs_dtype_and_shares_casts_between_blocks():
    rule = next(r for r in RULES if r.name == "bf16")
    graph = rule.example()
    whole = apply_choice(rule, graph, "model", "bf16")
    assert whole.outputs[0].meta["val"].dtype == torch.float32
    assert sum(is_op(node, "to") for node in whole.calls) <= 3
    blocks = [site for site in sites_of(rule, graph)[0] if site.name != "model"]
    for site in blocks:
        graph = apply_choice(rule, graph, site.name, "bf16")
    assert error(rule.example(), graph) < 0.05
