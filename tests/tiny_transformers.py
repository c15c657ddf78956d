"""Models of the transformers library with random weights, about 16 wide and two layers deep, each with inputs to call it with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Entry = tuple[nn.Module, dict[str, Any]]
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**WIDTHS, "vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0}
IMAGE = {**WIDTHS, "image_size": 8, "patch_size": 4, "num_channels": 3}
DECODER = {**TEXT, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}


def ids(batch: int = 2, tokens: int = 7) -> dict[str, Tensor]:
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, -2:] = 0
    return {"input_ids": torch.randint(3, 40, (batch, tokens)), "attention_mask": mask}


def pixels(size: int = 8) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def _entries() -> dict[str, Callable[[], Entry]]:
    return {**_encoders(), **_decoders()}


def _encoders() -> dict[str, Callable[[], Entry]]:
    import transformers as t

    return {
        "bert": lambda: (t.BertModel(t.BertConfig(**TEXT)), ids()),
        "roberta": lambda: (t.RobertaModel(t.RobertaConfig(**TEXT)), ids()),
        "distilbert": lambda: (
            t.DistilBertModel(t.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=40, max_position_embeddings=32)),
            ids(),
        ),
        "albert": lambda: (t.AlbertModel(t.AlbertConfig(embedding_size=8, **TEXT)), ids()),
        "modernbert": lambda: (t.ModernBertModel(t.ModernBertConfig(local_attention=4, **TEXT)), ids()),
        "vit": lambda: (t.ViTModel(t.ViTConfig(**IMAGE)), pixels()),
        "dinov2": lambda: (t.Dinov2Model(t.Dinov2Config(mlp_ratio=2, **IMAGE)), pixels()),
        "swin": lambda: (
            t.SwinModel(t.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4)),
            pixels(16),
        ),
        "convnext": lambda: (
            t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2)),
            pixels(16),
        ),
        "clip_text": lambda: (t.CLIPTextModel(t.CLIPTextConfig(**TEXT, eos_token_id=2, bos_token_id=1)), ids()),
    }


def _decoders() -> dict[str, Callable[[], Entry]]:
    """Decoders, and encoders with them."""
    import transformers as t

    plain = {"use_cache": False}
    whisper = t.WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, vocab_size=40, max_source_positions=8, max_target_positions=16, num_mel_bins=4, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    t5 = t.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=40, decoder_start_token_id=0)
    return {
        "gpt2": lambda: (
            t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32)),
            {**ids(), **plain},
        ),
        "llama": lambda: (t.LlamaForCausalLM(t.LlamaConfig(**DECODER)), {**ids(), **plain}),
        "llama_cache": lambda: (t.LlamaForCausalLM(t.LlamaConfig(**DECODER)), {**ids(), "use_cache": True}),
        "qwen3": lambda: (t.Qwen3ForCausalLM(t.Qwen3Config(**DECODER)), {**ids(), **plain}),
        "gemma3": lambda: (
            t.Gemma3ForCausalLM(
                t.Gemma3TextConfig(
                    sliding_window=4, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8, **DECODER
                )
            ),
            {**ids(), **plain},
        ),
        "mixtral": lambda: (
            t.MixtralForCausalLM(t.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **DECODER)),
            {**ids(), **plain},
        ),
        "t5": lambda: (t.T5ForConditionalGeneration(t5), {**ids(), "decoder_input_ids": torch.randint(3, 40, (2, 5)), **plain}),
        "whisper": lambda: (
            t.WhisperModel(whisper),
            {"input_features": torch.randn(2, 4, 16), "decoder_input_ids": torch.randint(3, 40, (2, 5)), **plain},
        ),
        "mamba": lambda: (
            t.MambaForCausalLM(t.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=40, pad_token_id=0)),
            {"input_ids": ids()["input_ids"], **plain},
        ),
    }


NAMES = (
    "bert", "roberta", "distilbert", "albert", "modernbert", "vit", "dinov2", "swin", "convnext", "clip_text", "gpt2", "llama", "llama_cache",
    "qwen3", "gemma3", "mixtral", "t5", "whisper", "mamba",
)  # fmt: skip


def make(name: str, attention: str = "sdpa") -> Entry:
    """One model in eval mode, with keyword inputs; attention: "sdpa" or "eager" where the model has both."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model, inputs = _entries()[name]()
    torch.set_rng_state(state)
    if attention == "eager":
        model.set_attn_implementation("eager")  # type: ignore[operator]
    return model.eval(), inputs
