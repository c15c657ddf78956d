"""RXNMapper's ALBERT: 12 layers that share one set of weights; a small masked language model of chemical reactions.

Weights: rxnmapper 0.4.3 (MIT). Its vocabulary is 591 pieces of reaction SMILES.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.fetch import fetch
from benchmarks.workloads.base import Case, Workload

BATCH, LENGTH = 8, 64
REACTIONS = (
    "CC(=O)O.OCC>>CC(=O)OCC",
    "c1ccccc1Br.OB(O)c1ccccc1>>c1ccc(-c2ccccc2)cc1",
    "CC(=O)Cl.Nc1ccccc1>>CC(=O)Nc1ccccc1",
    "O=Cc1ccccc1.CC(=O)C>>CC(=O)C=Cc1ccccc1",
    "CCO>>CC=O",
    "C=C.BrBr>>BrCCBr",
    "CC(C)=O.[BH4-]>>CC(C)O",
    "OCC.Cl>>CCCl",
)
PIECES = re.compile(r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|\%[0-9]{2}|[0-9])")


class Masked(nn.Module):
    """ids, mask: i64[B, T] -> logits f32[B, T, 591]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def cases() -> Sequence[Case]:
    from transformers import AlbertForMaskedLM

    folder = fetch("rxnmapper") / "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"
    vocabulary = {piece: i for i, piece in enumerate((folder / "vocab.txt").read_text().splitlines())}
    ids = torch.full((BATCH, LENGTH), vocabulary["[PAD]"])
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    for row, reaction in enumerate(REACTIONS):
        pieces = ["[CLS]", *PIECES.findall(reaction), "[SEP]"]
        found = [vocabulary.get(piece, vocabulary["[UNK]"]) for piece in pieces][:LENGTH]
        ids[row, : len(found)], mask[row, : len(found)] = torch.tensor(found), 1
    model = Masked(AlbertForMaskedLM.from_pretrained(folder).eval()).eval()
    return [Case(f"albert, batch {BATCH} x {LENGTH}", model, (ids, mask))]


WORKLOAD = Workload("albert", __doc__ or "", cases, None, "MIT")
