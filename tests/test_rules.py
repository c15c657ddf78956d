"""Contracts of every rule, generic over the table, so that a new rule is tested the day it is added."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paretorch.ir.builder import Builder
from paretorch.ir.errors import PlanError, RuleError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import op_of
from paretorch.ir.ops.costs import zero
from paretorch.ir.parse import parse_graph
from paretorch.ir.verify import verify
from paretorch.rewrites import RULES, rules_named
from paretorch.rewrites.apply import apply_choice, apply_rule, nearest_miss, propose, sites_of
from paretorch.rewrites.block_fusion import fold_shift
from paretorch.rewrites.rule import FAMILIES, PROPERTIES, Rule

EXACT = [rule for rule in RULES if rule.is_exact]
LOSSY = [rule for rule in RULES if not rule.is_exact]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
every_exact_rule = pytest.mark.parametrize("rule", EXACT, ids=lambda rule: rule.name)
every_lossy_rule = pytest.mark.parametrize("rule", LOSSY, ids=lambda rule: rule.name)
EXACT_ERROR = 1e-9  # float64, relative; rounding of a few products in another order stays far below
READS_NO_WEIGHTS = {"drop_key_bias", "hoist_scale"}  # legal whatever the weights are


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


def check_contract(rule: Rule, rows: int = 2, width: int = 8, seed: int = 0) -> None:
    """What every exact rule promises, on its example at these sizes. Raises AssertionError or an error of ours."""
    before = doubled(rule.example(rows, width))
    text = str(before)
    after, applied, _ = apply_rule(rule, before)
    assert applied, "the rule matches its own example"
    assert str(before) == text, "the graph that was given is unchanged"
    verify(after, rule.name)
    assert error(before, after, seed) <= EXACT_ERROR, "the function is the same"
    assert apply_rule(rule, after)[1] == [], "a second application changes nothing"
    assert str(apply_rule(rule, before)[0]) == str(after), "twice the same text"
    kept = {node.name for node in before.nodes} & {node.name for node in after.nodes if "rule" not in node.meta}
    assert {node.name for node in before.inputs} <= kept, "inputs keep their names"
    new = [node for node in after.calls if node.name not in {old.name for old in before.nodes}]
    assert new, "something is new"
    assert {node.meta.get("rule") for node in new} == {rule.name}, "new nodes carry the rule"


def broken(rule: Rule) -> Rule:
    """A twin of the rule that loses the sign of a value that it makes."""

    def spoil(b: Builder, made: object) -> object:
        first, *rest = made if isinstance(made, tuple) else (made,)
        spoiled = b.abs(first)
        return (spoiled, *rest) if rest else spoiled

    def spoiled_rewrite(graph: Graph, site: object, knob: object) -> Graph:
        after = rule.rewrite(graph, site, knob)
        node = next(node for node in reversed(after.calls) if node.meta.get("rule") == rule.name and node.meta.get("site") == site.name)
        after.replace(node, Builder(after, node.next, rule=rule.name, site=site.name).abs(node))
        return after

    if rule.pattern is not None:
        return replace(rule, replacement=lambda b, m: spoil(b, rule.replacement(b, m)))
    return replace(rule, rewrite=spoiled_rewrite)


def totals(graph: Graph) -> dict[str, int]:
    rows = [(node, op_of(node)) for node in graph.calls]
    return {
        "flops": sum(op.flops(node) for node, op in rows),
        "bytes": sum(op.bytes(node) for node, op in rows),
        "launches": sum(op.bytes is not zero for _, op in rows),
    }


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
    assert (rule in rules_named([rule.family])) == (rule in RULES)


@every_exact_rule
@settings(max_examples=4, deadline=None, derandomize=True)
@given(rows=st.integers(1, 4), width=st.integers(1, 6), seed=st.integers(0, 9))
def test_contract(rule, rows, width, seed):
    check_contract(rule, rows, 2 * width, seed)


@every_exact_rule
def test_a_broken_twin_is_caught(rule):
    with pytest.raises(AssertionError):
        check_contract(broken(rule))


@every_exact_rule
def test_it_saves_what_it_says(rule):
    before = rule.example()
    start, end = totals(before), totals(apply_rule(rule, before)[0])
    assert [what for what in rule.saves if what != "memory" and end[what] >= start[what]] == []


@every_exact_rule
def test_text_of_the_result_parses_back(rule):
    after = apply_rule(rule, rule.example())[0]
    assert str(parse_graph(str(after), after.constants)) == str(after)


@every_exact_rule
def test_fuel(rule):
    before = rule.example()
    after, applied, _ = apply_rule(rule, before, limit=0)
    assert applied == []
    assert str(after) == str(before)


@every_exact_rule
def test_a_site_that_is_gone_or_refused_is_a_plan_error(rule):
    before = rule.example()
    site = sites_of(rule, before)[0][0].name
    once = apply_choice(rule, before, site, None)
    with pytest.raises(PlanError, match=f"{rule.name} cannot act at"):
        apply_choice(rule, once, site, None)


@every_exact_rule
def test_weights_that_may_change_are_not_folded(rule):
    """With every weight an input, as torch.compile passes them, a rule that folds weights finds no site, and says why where it looked."""
    graph = rule.example().copy()
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        graph.replace(node, graph.input(f"given_{node.target}", node.meta["val"]))
    sites, refusals = sites_of(rule, graph.clean())
    if rule.name in READS_NO_WEIGHTS:
        assert sites
    else:
        assert sites == []
        assert all("no constant" in refusal.reason for refusal in refusals)


@every_exact_rule
def test_a_graph_without_anything_to_do_is_left_alone(rule):
    graph = next(r for r in RULES if r.name == "hoist_scale").example().copy()
    node = graph.node("mul")
    graph.replace(node, node.args[0])
    graph.clean()
    assert apply_rule(rule, graph) == (graph, [], [])


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


def test_propose_leaves_out_the_identity():
    graph = LOSSY[-1].example()
    candidates, _ = propose(graph, _facts(graph), LOSSY)
    assert {candidate.rule.name for candidate in candidates} >= {"bf16"}
    assert all(candidate.rule.knobs[0] not in candidate.knobs for candidate in candidates)


def _facts(graph):
    from paretorch.ir.analyze import analyze

    return analyze(graph)


def test_a_wrong_name_is_answered_with_close_ones():
    with pytest.raises(RuleError, match="Close: tome"):
        rules_named(["tomee"])


def test_a_rule_that_feeds_itself_is_stopped():
    endless = replace(fold_shift.RULE, name="endless", replacement=lambda b, m: b.add(b.linear(m.x, m.weight, m.bias), m.shift))
    with pytest.raises(RuleError, match="endless still finds sites after 50 rounds"):
        apply_rule(endless, fold_shift.example())


def test_a_rule_that_changes_a_type_is_a_fault():
    wrong = replace(fold_shift.RULE, replacement=lambda b, m: b.unsqueeze(m.x, 0))
    with pytest.raises(RuleError, match=r"fold_shift puts f32\[1,2,3,8\] where add is f32\[2,3,6\]"):
        apply_rule(wrong, fold_shift.example())


def test_nearest_miss_says_what_stands_where():
    graph = next(r for r in RULES if r.name == "bf16").example()
    assert str(nearest_miss(fold_shift.RULE, graph)).startswith(
        "2 of 2 ops of the pattern fit at add: x (placeholder) in add cannot stand for shift"
    )
    assert nearest_miss(fold_shift.RULE, fold_shift.example()) is None
