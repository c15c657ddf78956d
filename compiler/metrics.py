"""Metrics for budgets, higher is better: functions with a score per sample, and statistics of all samples together.

`top1` gives one score per sample, as a function of your own may. `spearman`, `f1` and `perplexity` are no means over samples: each is a
`CorpusMetric`. All four may be given by name. One of your own, here minus the word error rate:

    minus_wer = CorpusMetric("minus_wer", errors_and_words, lambda counts: float(-counts[:, 0].sum() / counts[:, 1].sum()))

where `errors_and_words(outputs, labels)` gives two numbers per sample, T[B, 2].
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paretorch.ir.errors import BudgetError

GROUPS = 128  # of samples that are left out together where a metric has no closed form
ROWS = 64  # samples that are compared with all others at once
IGNORED = -100  # the label of a token that is not scored


@dataclass(frozen=True)
class CorpusMetric:
    """A statistic of all samples together, higher is better.

    collect: (outputs, labels) of a batch -> T[B, k], what the statistic needs to know of each sample.
    score: f64[n, k] -> the metric over these samples.
    without_each: f64[n, k] -> f64[n], the metric without each of them; if None, groups of samples are left out by calling `score`
    up to 128 times. The score should change little with any one sample, as ratios of sums and correlations do and a median does not.
    """

    name: str
    collect: Callable[[Any, Any], Any]
    score: Callable[[Tensor], float]
    without_each: Callable[[Tensor], Tensor] | None = None

    def pseudo(self, statistics: Tensor) -> Tensor:
        """f64[n]: jackknife pseudo-values, n * score - (n - 1) * score without sample i, shifted so that their mean is the score.

        So the mean of two models' differences is the difference of their scores, and its standard error is that of the mean.
        statistics: f64[n, k]. Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 11.
        """
        score, n = float(self.score(statistics)), len(statistics)
        if n < 2:
            return torch.full((n,), score, dtype=torch.float64)
        away = self._groups(statistics, score) if self.without_each is None else (n - 1) * (score - self.without_each(statistics))
        return score + away - away.mean()

    def _groups(self, statistics: Tensor, score: float) -> Tensor:
        """f64[n]: pseudo-values minus the score, where every 128th sample is left out together.

        The mean of m samples spreads 1 / sqrt(m) as far as one sample, so a group's value is spread by sqrt(m) for each of its samples.
        """
        n = len(statistics)
        group = torch.arange(n) % min(n, GROUPS)
        without = torch.tensor([float(self.score(statistics[group != g])) for g in range(min(n, GROUPS))], dtype=torch.float64)
        size = group.bincount().double()
        return ((n - size) / size.sqrt() * (score - without))[group]


Metric = Callable[[Any, Any], Any] | CorpusMetric


def named(name: str) -> Metric:
    """The metric of this name. Raises BudgetError."""
    if name in METRICS:
        return METRICS[name]
    close = difflib.get_close_matches(name.lower(), METRICS, n=1)
    hint = f" Close: {close[0]}." if close else ""
    raise BudgetError(f"no metric named {name!r}.{hint} Known: {', '.join(METRICS)}; or give a function of (outputs, labels).")


def top1(outputs: Any, labels: Any) -> Tensor:
    """1 where the largest entry of the last axis is the label, else 0. outputs: logits T[B, classes], or a structure that has them first."""
    logits = _first_tensor(outputs, "top1")
    right: Tensor = logits.argmax(-1) == labels.to(logits.device)
    return right.double()


# spearman: the correlation of ranks


def _predictions(outputs: Any, labels: Any) -> Tensor:
    """f64[B, 2]: prediction and label of each sample."""
    given = _one_label_each(labels, "spearman")
    n, tensors = len(given), list(_tensors(outputs))
    found = next((tensor for tensor in tensors if tensor.shape in ((n,), (n, 1))), None)
    if found is None:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors) or "no tensor"
        raise BudgetError(f"spearman found outputs {shapes} for {n} labels; expected one number per sample, [{n}] or [{n}, 1]")
    return torch.stack([found.detach().reshape(-1).double().cpu(), given], 1)


def _spearman(statistics: Tensor) -> float:
    n = len(statistics)
    (first, first_spread, _), (second, second_spread, _) = (_ranked(column) for column in statistics.T)
    return float(_correlation((first * second).sum() - n * ((n + 1) / 2) ** 2, first_spread, second_spread))


def _spearman_without_each(statistics: Tensor) -> Tensor:
    """f64[n]. Without sample i the rank of sample j is lower by above(i, j): 1 if it was above i, 1/2 if level with it, else 0.

    So the products of ranks sum to sum(first * second) - sum(first * above2) - sum(second * above1) + sum(above1 * above2), less sample i's
    own term; the mean of the ranks that stay is n / 2.
    """
    n = len(statistics)
    (first, first_spread, first_level), (second, second_spread, second_level) = (_ranked(column) for column in statistics.T)
    products = (first * second).sum() - _sum_above(second, first) - _sum_above(first, second) + _above_in_both(first, second)
    products -= (first - 0.5) * (second - 0.5) + (n - 1) * (n / 2) ** 2
    spreads = (
        spread - 3 * (n * (n - 1) - level * (level - 1)) for spread, level in ((first_spread, first_level), (second_spread, second_level))
    )
    return _correlation(products, *spreads)


def _ranked(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f64[n] ranks from 1 on, equal values sharing their average rank; 12 times the squared distance of the ranks from their mean; f64[n]
    samples at each one's rank. That sum is n^3 - n less t^3 - t for every t equal values: Kendall 1948, Rank Correlation Methods."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    count = counts.double()
    ranks, n = count.cumsum(0) - (count - 1) / 2, len(values)
    return ranks[place], n**3 - n - (count**3 - count).sum(), count[place]


def _correlation(products: Tensor, first_spread: Tensor, second_spread: Tensor) -> Tensor:
    """12 * products over the root of both spreads; 0 where all ranks of one side are equal."""
    scale = first_spread.sqrt() * second_spread.sqrt()
    return torch.where(scale > 0, 12 * products / scale, 0.0)


def _sum_above(ranks: Tensor, values: Tensor) -> Tensor:
    """f64[n]: per sample, the sum of the values of those ranked above it and half of that of those level with it, itself included."""
    _, place = ranks.unique(return_inverse=True)
    level = torch.zeros(int(place.max()) + 1, dtype=torch.float64).index_add(0, place, values)
    return (values.sum() - level.cumsum(0) + level / 2)[place]


def _above_in_both(first: Tensor, second: Tensor) -> Tensor:
    """f64[n]: per sample i, the sum of above1(i, j) * above2(i, j) over all j; a few rows at a time, for n * n numbers need not fit."""
    sums = []
    sides = [(2 * ranks).int() for ranks in (first, second)]
    for rows in torch.arange(len(first)).split(ROWS):
        twice_first, twice_second = ((side > side[rows, None]).to(torch.int8) + (side >= side[rows, None]) for side in sides)
        sums.append((twice_first * twice_second).sum(1).double() / 4)
    return torch.cat(sums)


spearman = CorpusMetric("spearman", _predictions, _spearman, _spearman_without_each)
"""Spearman's rank correlation of outputs and labels, one number per sample each.

outputs: T[B] or T[B, 1], or a structure; its first tensor of such a shape is taken. labels: T[B] or T[B, 1]. Equal values share their
average rank. 0 if all outputs, or all labels, are equal.
"""


# f1: of class 1 of two, or the mean over classes


def _guesses(outputs: Any, labels: Any) -> Tensor:
    """f64[B, 3]: predicted class, label, number of classes."""
    logits = _first_tensor(outputs, "f1").detach().cpu()
    given = _one_label_each(labels, "f1")
    n = len(given)
    single = logits.shape in ((n,), (n, 1))
    if not single and (logits.ndim != 2 or len(logits) != n):
        raise BudgetError(f"f1 found outputs {list(logits.shape)} for {n} labels; expected logits [{n}, classes], or [{n}] for two classes")
    classes = 2 if single else logits.shape[1]
    wrong = given[(given != given.round()) | (given < 0) | (given >= classes)]
    if len(wrong):
        raise BudgetError(f"f1 found the label {wrong[0]:g} for logits {list(logits.shape)}; expected class indices 0 to {classes - 1}")
    guess = logits.reshape(-1) > 0 if single else logits.argmax(-1)
    return torch.stack([guess.double(), given, torch.full((n,), float(classes), dtype=torch.float64)], 1)


def _counts(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """i64[n] guess and label of each sample; i64[classes]: how often each was guessed rightly, was guessed, is the label."""
    guess, label, classes = statistics.long().T
    right, guessed, there = (x.bincount(minlength=int(classes[0])) for x in (label[guess == label], guess, label))
    return guess, label, right, guessed, there


def _f1_of(right: Tensor, guessed: Tensor, there: Tensor) -> Tensor:
    """Twice the right ones over guesses and labels of a class; 0 if there are neither."""
    return 2 * right.double() / (guessed + there).clamp_min(1)


def _f1(statistics: Tensor) -> float:
    _, _, right, guessed, there = _counts(statistics)
    scores = _f1_of(right, guessed, there)
    return float(scores[1] if len(there) == 2 else scores[there > 0].mean())


def _f1_without_each(statistics: Tensor) -> Tensor:
    """f64[n]. Without a sample only the counts of its guess and of its label change, each by one."""
    guess, label, right, guessed, there = _counts(statistics)
    hit = (guess == label).long()
    if len(there) == 2:
        return _f1_of(right[1] - hit * label, guessed[1] - guess, there[1] - label)
    scores = _f1_of(right, guessed, there) * (there > 0)
    of_label = _f1_of(right[label] - hit, guessed[label] - hit, there[label] - 1) * (there[label] > 1)
    of_guess = _f1_of(right[guess], guessed[guess] - 1, there[guess]) * (there[guess] > 0)
    change = of_label - scores[label] + (1 - hit) * (of_guess - scores[guess])
    classes = (there > 0).sum() - (there[label] == 1).long()
    return (scores.sum() + change) / classes.clamp_min(1)


f1 = CorpusMetric("f1", _guesses, _f1, _f1_without_each)
"""F1, the harmonic mean of precision and recall: of class 1 where there are two classes, else the mean over the classes among the labels.

outputs: logits T[B, classes], or T[B] or T[B, 1] where above 0 means class 1; or a structure that has them first, or as "logits".
labels: class indices, T[B] or T[B, 1]. 0 for a class that is neither guessed nor a label.
"""


# perplexity: of tokens


def _token_losses(outputs: Any, labels: Any) -> Tensor:
    """f64[B, 2]: sum of -log p over the scored tokens of each sample, and their number."""
    logits = _first_tensor(outputs, "perplexity").detach()
    ids = _as_tensor(labels, "perplexity")
    if logits.ndim != 3 or ids.shape != logits.shape[:2] or ids.is_floating_point():
        found = f"outputs {list(logits.shape)} and labels {list(ids.shape)} of {ids.dtype}"
        raise BudgetError(f"perplexity found {found}; expected logits [B, T, vocabulary] and token ids [B, T]")
    wrong = ids[(ids != IGNORED) & ((ids < 0) | (ids >= logits.shape[2]))]
    if len(wrong):
        raise BudgetError(
            f"perplexity found the label {int(wrong[0])} for logits {list(logits.shape)}; expected token ids below {logits.shape[2]}, "
            f"or {IGNORED} for tokens that are not scored"
        )
    return torch.stack([_token_loss(one, following) for one, following in zip(logits[:, :-1], ids[:, 1:].long(), strict=True)])


def _token_loss(logits: Tensor, following: Tensor) -> Tensor:
    """f64[2] of one sample, so that the logits of one at a time are in f32. logits: T[T - 1, V]; following: i64[T - 1], the next tokens."""
    scored = following != IGNORED
    ids = following[scored, None].to(logits.device)
    likely = logits[scored.to(logits.device)].float().log_softmax(-1).gather(-1, ids)
    return torch.tensor([-float(likely.double().sum()), len(ids)], dtype=torch.float64)


def _minus_perplexity(statistics: Tensor) -> float:
    loss, tokens = statistics.sum(0)
    if tokens == 0:
        raise BudgetError(f"perplexity found no token to score in {len(statistics)} samples: every label after the first is {IGNORED}")
    return -float((loss / tokens).exp())


def _minus_perplexity_without_each(statistics: Tensor) -> Tensor:
    """f64[n]; a sample that holds all the tokens cannot be left out and changes nothing."""
    total = statistics.sum(0)
    rest = torch.where(statistics[:, 1:] < total[1], total - statistics, total)
    return -(rest[:, 0] / rest[:, 1]).exp()


perplexity = CorpusMetric("perplexity", _token_losses, _minus_perplexity, _minus_perplexity_without_each)
"""Minus the perplexity, exp of the mean of -log p over all tokens, so that a drop of 0.1 is 0.1 of perplexity more.

outputs: logits T[B, T, V], or a structure that has them as "logits", or first. labels: token ids i64[B, T], aligned with the inputs: position
t predicts label t + 1, as in transformers; -100 is not scored.
"""

METRICS: dict[str, Metric] = {"top1": top1, "spearman": spearman, "f1": f1, "perplexity": perplexity}


# what models and data give


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (dict, tuple, list)):
        for part in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from _tensors(part)


def _first_tensor(outputs: Any, name: str) -> Tensor:
    """The logits: under that name in a dict, else the first tensor."""
    inner = outputs["logits"] if isinstance(outputs, dict) and "logits" in outputs else outputs
    found = next(_tensors(inner), None)
    if found is None:
        raise BudgetError(f"{name} found no logits in outputs of type {type(outputs).__name__}; write a metric for this model")
    return found


def _as_tensor(labels: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise BudgetError(f"{name} found labels of type {type(labels).__name__}; expected a tensor, or numbers") from error


def _one_label_each(labels: Any, name: str) -> Tensor:
    """f64[B] from T[B] or T[B, 1]. Raises BudgetError."""
    found = _as_tensor(labels, name)
    if found.ndim not in (1, 2) or found.shape[1:] not in ((), (1,)):
        raise BudgetError(f"{name} found labels {list(found.shape)}; expected one per sample, [B] or [B, 1]")
    return found.reshape(-1).double()
