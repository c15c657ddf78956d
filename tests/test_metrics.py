"""Named metrics against direct computation; pseudo-values, their mean and their interval; a budget that keeps a rank correlation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paretorch
from paretorch import Budget
from paretorch.cost_model.quality import paired_drop
from paretorch.evidence import _scorer_mark
from paretorch.ir.errors import BudgetError
from paretorch.judge import as_statistics
from paretorch.metrics import IGNORED, CorpusMetric, f1, named, perplexity, spearman, top1
from tests.zoo import make


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


# direct computations


def ranks_by_hand(values):
    return torch.tensor([sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values])


def spearman_by_hand(first, second):
    ranks = torch.stack([ranks_by_hand(first.tolist()), ranks_by_hand(second.tolist())]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def f1_by_hand(guess, label, kind):
    right = sum(g == la == kind for g, la in zip(guess, label, strict=True))
    both = guess.count(kind) + label.count(kind)
    return 2 * right / both if both else 0.0


def perplexity_by_hand(logits, ids):
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=IGNORED).exp())


# a batch for each metric


def ranked(n=60, seed=0, ties=True):
    label = torch.randn(n, generator=draws(seed))
    outputs = label + torch.randn(n, generator=draws(seed + 1))
    return (outputs.round(decimals=1), (2 * label).round()) if ties else (outputs, label)


def classified(n=60, classes=4, seed=0, sure=1.5):
    label = torch.randint(classes, (n,), generator=draws(seed))
    return torch.randn(n, classes, generator=draws(seed + 1)) + sure * F.one_hot(label, classes), label


def told(n=12, tokens=9, words=7, seed=0):
    ids = torch.randint(words, (n, tokens), generator=draws(seed))
    ids[torch.rand(n, tokens, generator=draws(seed + 1)) < 0.3] = IGNORED
    return torch.randn(n, tokens, words, generator=draws(seed + 2)), ids


def statistics_of(metric, batch):
    return as_statistics(metric.collect(*batch), len(batch[1]), metric.name)


EACH = {
    "spearman": (spearman, ranked()),
    "spearman, few values": (spearman, (torch.tensor([1.0, 1, 1, 2, 2, 3]), torch.tensor([0, 1, 0, 1, 1, 1]))),
    "spearman, one that differs": (spearman, (torch.tensor([1.0, 1, 1, 2]), torch.tensor([0, 1, 2, 3]))),
    "f1 of two": (f1, classified(classes=2)),
    "f1 of one that is rare": (f1, (torch.tensor([-1.0, 1, -1, 1]), torch.tensor([0, 1, 0, 0]))),
    "f1 of four": (f1, classified()),
    "f1 of more classes than occur": (f1, classified(n=10, classes=12)),
    "perplexity": (perplexity, told()),
    "perplexity of one text": (perplexity, (torch.randn(2, 4, 5, generator=draws()), torch.tensor([[1, 2, 3, 4], [1] + 3 * [IGNORED]]))),
}
each = pytest.mark.parametrize(("metric", "batch"), EACH.values(), ids=EACH.keys())


@each
def test_closed_forms_leave_out_each_sample(metric, batch):
    found = statistics_of(metric, batch)
    by_hand = []
    for left_out in range(len(found)):
        rest = found[torch.arange(len(found)) != left_out]
        nothing = metric is perplexity and not rest[:, 1].any()
        by_hand.append(metric.score(found if nothing else rest))
    torch.testing.assert_close(metric.without_each(found), torch.tensor(by_hand, dtype=torch.float64))


@each
def test_pseudo_values_have_the_score_as_their_mean(metric, batch):
    found = statistics_of(metric, batch)
    assert float(metric.pseudo(found).mean()) == pytest.approx(metric.score(found), abs=1e-12)
    one = metric.pseudo(found[:1])
    assert one.tolist() == [metric.score(found[:1])]


@pytest.mark.parametrize("seed", range(3))
def test_spearman(seed):
    outputs, labels = ranked(seed=seed)
    found = spearman.score(statistics_of(spearman, (outputs, labels)))
    assert found == pytest.approx(spearman_by_hand(outputs, labels), abs=1e-12)
    stats = pytest.importorskip("scipy.stats")
    assert found == pytest.approx(stats.spearmanr(outputs.numpy(), labels.numpy()).statistic, abs=1e-12)


def test_spearman_of_equal_predictions_is_zero():
    found = statistics_of(spearman, (torch.ones(5), torch.arange(5)))
    assert spearman.score(found) == 0
    assert spearman.pseudo(found).tolist() == [0] * 5


def test_spearman_takes_the_first_tensor_with_a_number_per_sample():
    outputs, labels = ranked(8)
    plain = spearman.collect(outputs, labels)
    for given in (outputs[:, None], {"hidden": torch.ones(8, 3), "score": outputs}, (torch.tensor(1.0), [outputs])):
        assert torch.equal(spearman.collect(given, labels), plain)
    assert torch.equal(spearman.collect(outputs, labels[:, None].tolist()), plain)


def test_f1_of_two_classes_is_that_of_class_1():
    logits, labels = classified(classes=2, sure=0.8)
    guess = logits.argmax(1).tolist()
    assert f1.score(statistics_of(f1, (logits, labels))) == pytest.approx(f1_by_hand(guess, labels.tolist(), 1))
    single = logits[:, 1] - logits[:, 0]
    for given in (single, single[:, None], {"loss": torch.tensor(0.1), "logits": single}):
        assert torch.equal(f1.collect(given, labels.double()), f1.collect(logits, labels))


@pytest.mark.parametrize(("n", "classes"), [(60, 4), (10, 12)])
def test_f1_of_more_classes_is_the_mean_of_those_that_occur(n, classes):
    logits, labels = classified(n, classes)
    guess, label = logits.argmax(1).tolist(), labels.tolist()
    by_hand = [f1_by_hand(guess, label, kind) for kind in set(label)]
    assert f1.score(statistics_of(f1, (logits, labels))) == pytest.approx(sum(by_hand) / len(by_hand))


def test_f1_without_any_of_class_1_is_zero():
    assert f1.score(statistics_of(f1, (-torch.ones(3), torch.zeros(3)))) == 0


def test_perplexity_is_of_all_tokens_and_negative():
    logits, ids = told()
    found = statistics_of(perplexity, ({"loss": torch.tensor(0.1), "logits": logits}, ids))
    assert perplexity.score(found) == pytest.approx(-perplexity_by_hand(logits, ids), rel=1e-6)
    halves = [statistics_of(perplexity, (logits[half], ids[half])) for half in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(torch.cat(halves), found)


def test_perplexity_of_half_precision_is_computed_in_single():
    logits, ids = told()
    found = perplexity.score(statistics_of(perplexity, (logits.bfloat16(), ids)))
    assert found == pytest.approx(-perplexity_by_hand(logits.bfloat16().float(), ids), rel=1e-6)


# intervals


def bootstrap(metric, before, after, resamples=1000):
    """The half width of the difference of scores, by drawing samples again."""
    chance = draws(7)
    drops = []
    for _ in range(resamples):
        rows = torch.randint(len(before), (len(before),), generator=chance)
        drops.append(metric.score(before[rows]) - metric.score(after[rows]))
    low, high = torch.tensor(drops, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return (high - low) / 2


def worse(metric, n):
    """A batch for each metric, and the same with noise on its outputs."""
    outputs, labels = {
        "spearman": lambda: ranked(n, ties=False),
        "f1": lambda: classified(n, classes=3),
        "perplexity": lambda: told(n),
    }[metric.name]()
    return (outputs, labels), (outputs + 0.3 * torch.randn(outputs.shape, generator=draws(5)), labels)


@pytest.mark.parametrize("metric", [spearman, f1, perplexity], ids=lambda metric: metric.name)
def test_the_interval_of_a_drop_is_that_of_a_bootstrap(metric):
    before, after = (statistics_of(metric, batch) for batch in worse(metric, 300))
    drop = paired_drop(metric.pseudo(before), metric.pseudo(after))
    assert drop.mean == pytest.approx(metric.score(before) - metric.score(after), abs=1e-12)
    assert drop.half_width == pytest.approx(bootstrap(metric, before, after), rel=0.25)


@pytest.mark.parametrize("metric", [spearman, perplexity], ids=lambda metric: metric.name)
def test_a_metric_of_your_own_needs_no_closed_form(metric):
    """Groups that are left out together give the same mean and about the same interval."""
    own = CorpusMetric("own", metric.collect, metric.score)
    before, after = (statistics_of(metric, batch) for batch in worse(metric, 1000))
    drop, closed = (paired_drop(one.pseudo(before), one.pseudo(after)) for one in (own, metric))
    assert drop.mean == pytest.approx(closed.mean, abs=1e-12)
    assert drop.half_width == pytest.approx(closed.half_width, rel=0.25)
    few = before[:50]
    torch.testing.assert_close(own.pseudo(few), metric.pseudo(few))


def test_equal_outputs_lose_nothing():
    before, _ = worse(spearman, 200)
    found = statistics_of(spearman, before)
    scaled = statistics_of(spearman, (3 * before[0], before[1]))
    assert set((spearman.pseudo(found) - spearman.pseudo(scaled)).tolist()) == {0.0}


# what is wrong


def test_names():
    assert named("top1") is top1
    assert named("spearman") is paretorch.metrics.spearman
    with pytest.raises(BudgetError, match=r"no metric named 'sperman'\. Close: spearman\. Known: top1, spearman, f1, perplexity"):
        Budget(metric="sperman", max_drop=0.1)
    with pytest.raises(BudgetError, match="metric=3 is no metric"):
        Budget(metric=3, max_drop=0.1)


@pytest.mark.parametrize("name", ["top1", "spearman", "f1", "perplexity"])
def test_budgets_read_alike_by_name_and_by_metric(name):
    assert Budget(metric=name, max_drop=0.1).unit == Budget(metric=getattr(paretorch.metrics, name), max_drop=0.1).unit == f"drop of {name}"


@pytest.mark.parametrize(
    ("metric", "outputs", "labels", "sentence"),
    [
        (spearman, torch.ones(4, 5), torch.ones(4), r"spearman found outputs \[4, 5\] for 4 labels; expected one number per sample"),
        (spearman, None, torch.ones(4), "spearman found outputs no tensor for 4 labels"),
        (spearman, torch.ones(4), torch.ones(4, 2), r"spearman found labels \[4, 2\]; expected one per sample"),
        (spearman, torch.ones(4), ["good"] * 4, "spearman found labels of type list"),
        (f1, torch.ones(4, 5, 2), torch.ones(4), r"f1 found outputs \[4, 5, 2\] for 4 labels; expected logits \[4, classes\]"),
        (f1, torch.ones(3, 5), torch.ones(4), r"f1 found outputs \[3, 5\] for 4 labels"),
        (f1, torch.ones(2, 5), torch.tensor([1, 5]), r"f1 found the label 5 for logits \[2, 5\]; expected class indices 0 to 4"),
        (f1, torch.ones(2), torch.tensor([1, 0.5]), r"f1 found the label 0\.5"),
        (f1, [], torch.ones(4), "f1 found no logits in outputs of type list"),
        (perplexity, torch.ones(2, 5), torch.ones(2, 5), r"outputs \[2, 5\] and labels \[2, 5\].*expected logits \[B, T, vocabulary\]"),
        (perplexity, torch.ones(2, 5, 3), torch.ones(2, 4).long(), r"labels \[2, 4\] of torch\.int64"),
        (perplexity, torch.ones(2, 5, 3), torch.ones(2, 5), r"of torch\.float32; expected logits"),
        (perplexity, torch.ones(2, 5, 3), torch.full((2, 5), 3), r"perplexity found the label 3 .*token ids below 3, or -100"),
    ],
)
def test_wrong_shapes(metric, outputs, labels, sentence):
    with pytest.raises(BudgetError, match=sentence):
        metric.collect(outputs, labels)


def test_statistics_must_be_a_finite_row_per_sample():
    for given, sentence in (
        (torch.ones(3, 2), r"own collected \[3, 2\] for 4 samples; expected a row per sample, \[4, k\]"),
        (torch.ones(4), r"own collected \[4\] for 4 samples"),
        (torch.full((4, 1), math.nan), "own returned NaN"),
        ("good", "own returned str; expected a row of numbers per sample"),
    ):
        with pytest.raises(BudgetError, match=sentence):
            as_statistics(given, 4, "own")


def test_no_token_to_score():
    found = perplexity.collect(torch.ones(2, 3, 4), torch.full((2, 3), IGNORED))
    with pytest.raises(BudgetError, match="no token to score in 2 samples"):
        perplexity.score(found)


def test_evidence_knows_a_metric_by_its_functions():
    state = [0]
    assert _scorer_mark(spearman) != _scorer_mark(f1)
    assert _scorer_mark(CorpusMetric("spearman", spearman.collect, f1.score)) != _scorer_mark(spearman)
    assert _scorer_mark(CorpusMetric("own", spearman.collect, lambda rows: float(len(state)))) is None


# the whole of it


class Rated(nn.Module):
    """One number per image."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images):
        return self.vit(images)[:, :1]


def test_a_budget_of_rank_correlation_is_kept():
    vit, inputs = make("vit_class")
    model = Rated(vit).eval()
    images = [torch.randn(16, *inputs[0].shape[1:], generator=draws(seed)) for seed in range(24)]
    with torch.no_grad():
        data = [(batch, model(batch) + 0.2 * torch.randn(len(batch), 1, generator=draws(seed))) for seed, batch in enumerate(images)]
    budget = Budget(metric="spearman", max_drop=0.4)
    result = paretorch.optimize(model, images[0], target="cpu:eager", budget=budget, data=data, rules=["layer_skipping"])
    session = result.session
    assert result.report.unit == "drop of spearman"
    assert result.report.loss is None or result.report.loss <= 0.4
    lossy = [point for point in session.points if point.choices]
    assert lossy
    for point in lossy:  # losses of the search are differences of the whole part's scores
        before, after = session.judge.scores(session.eager(session.apply(point.choices)), "ranking")
        assert point.loss == pytest.approx(float(before.mean() - after.mean()), abs=1e-6)
    labels = torch.cat([batch.labels.reshape(-1) for batch in session.judge.split.ranking])
    outputs = torch.cat([model(*batch.inputs).detach().reshape(-1) for batch in session.judge.split.ranking])
    assert float(before.mean()) == pytest.approx(spearman_by_hand(outputs, labels), abs=1e-6)
