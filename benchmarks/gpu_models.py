"""The whole models that `benchmarks/gpu.py` times: architectures of transformers with random weights, in bf16 on the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Loaded = tuple[nn.Module, tuple[Any, ...]]


def _ready(model: nn.Module) -> nn.Module:
    return model.eval().to("cuda", torch.bfloat16)


class First(nn.Module):
    """A model of transformers that takes tensors and gives its first output."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor) -> Any:
        return self.model(**{self.name: x}, return_dict=False)[0]


def vit() -> Loaded:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    return _ready(First(ViTForImageClassification(config), "pixel_values")), (torch.randn(64, 3, 224, 224, device="cuda").bfloat16(),)


def bert(batch: int = 32, tokens: int = 512) -> Loaded:
    from transformers import BertConfig, BertModel

    return _ready(First(BertModel(BertConfig()), "input_ids")), (torch.randint(0, 30000, (batch, tokens), device="cuda"),)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000
    )
    config.use_cache = False
    return LlamaForCausalLM(config)


def llama_prefill() -> Loaded:
    return _ready(First(_llama(), "input_ids")), (torch.randint(0, 32000, (1, 2048), device="cuda"),)


class Decode(nn.Module):
    """One token after a cache, whose keys and values are inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, token: Tensor, *past: Tensor) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        return self.model(input_ids=token, past_key_values=cache, use_cache=True, return_dict=False)[0]


def llama_decode() -> Loaded:
    past = tuple(torch.randn(8, 8, 1023, 64, device="cuda").bfloat16() for _ in range(32))
    return _ready(Decode(_llama())), (torch.randint(0, 32000, (8, 1), device="cuda"), *past)
