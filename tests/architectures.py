"""Architectures for the legality matrix: models of the transformers library from their configurations, with random weights, and our own zoo.

Two layers, 16 wide, 33 to 41 tokens: enough that tokens can be merged and windows leave something out. Every row names a model class, what
its configuration differs in from the family's, and the inputs to call it with. Inputs come in the batch that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests import token_models, zoo
from tests.tiny_transformers import IMAGE, TEXT, WIDTHS

Inputs = dict[str, Any]
Row = tuple[str, dict[str, Any], Callable[[int], Inputs]]
TOKENS, SIDE, WORDS = 40, 24, 40  # 24 x 24 pixels in patches of 4 x 4 are 36 tokens
IMAGES = {**IMAGE, "image_size": SIDE}
WRITTEN = {**TEXT, "max_position_embeddings": 64}
LANGUAGE = {**WRITTEN, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
HALVES = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "vocab_size": WORDS, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
SOUND = {
    **WIDTHS, "vocab_size": WORDS, "conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 4], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "layerdrop": 0.0, "apply_spec_augment": False,
}  # fmt: skip
STAGES = {
    "depths": [2, 2], "hidden_sizes": [8, 16], "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
    "num_encoder_blocks": 2, "num_channels": 3, "image_size": SIDE, "drop_path_rate": 0.0,
}  # fmt: skip


def words(batch: int, tokens: int = TOKENS, **more: Any) -> Inputs:
    """ids with padding at the end of the first row."""
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, -5:] = 0
    return {"input_ids": torch.randint(3, WORDS, (batch, tokens)), "attention_mask": mask, **more}


def uncached(batch: int) -> Inputs:
    return words(batch, use_cache=False)


def ids(batch: int) -> Inputs:
    return {"input_ids": words(batch)["input_ids"], "use_cache": False}


def both(batch: int) -> Inputs:
    """For encoder and decoder."""
    return words(batch, decoder_input_ids=torch.randint(3, WORDS, (batch, 5)), use_cache=False)


def pixels(size: int = SIDE, *frames: int, **more: Any) -> Callable[[int], Inputs]:
    return lambda batch: {"pixel_values": torch.randn(batch, *frames, 3, size, size), **more}


def wave(samples: int = 760) -> Callable[[int], Inputs]:
    return lambda batch: {"input_values": torch.randn(batch, samples)}


def spectrum(steps: int, bins: int) -> Callable[[int], Inputs]:
    return lambda batch: {"input_features": torch.randn(batch, steps, bins)}


TEXT_ROWS: dict[str, Row] = {
    "bert": ("BertForSequenceClassification", WRITTEN, words),
    "bert, all hidden states": ("BertModel", WRITTEN, lambda batch: words(batch, output_hidden_states=True)),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", WRITTEN, words),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": WORDS, "max_position_embeddings": 64}, words,
    ),
    "albert": ("AlbertForSequenceClassification", {**WRITTEN, "embedding_size": 8}, words),
    "deberta": ("DebertaForSequenceClassification", {**WRITTEN, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, words),
    "deberta-v2": ("DebertaV2ForSequenceClassification", {**WRITTEN, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, words),
    "electra": ("ElectraForSequenceClassification", {**WRITTEN, "embedding_size": 8}, words),
    "mpnet": ("MPNetForSequenceClassification", WRITTEN, words),
    "modernbert": ("ModernBertForSequenceClassification", {**WRITTEN, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}, words),
    "longformer": ("LongformerModel", {**WRITTEN, "attention_window": 8}, words),
    "bigbird": ("BigBirdModel", {**WRITTEN, "attention_type": "original_full"}, words),
    "fnet": ("FNetForSequenceClassification", WRITTEN, lambda batch: {"input_ids": words(batch)["input_ids"]}),
    "funnel": (
        "FunnelModel",
        {"vocab_size": WORDS, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32}, words,
    ),
    "convbert": ("ConvBertModel", {**WRITTEN, "embedding_size": 16, "conv_kernel_size": 3}, words),
    "roformer": ("RoFormerForSequenceClassification", {**WRITTEN, "embedding_size": 16}, words),
    "mobilebert": (
        "MobileBertForSequenceClassification",
        {**WRITTEN, "embedding_size": 16, "intra_bottleneck_size": 8, "num_feedforward_networks": 2}, words,
    ),
    "esm": ("EsmForSequenceClassification", {**WRITTEN, "mask_token_id": 3, "position_embedding_type": "rotary"}, words),
    "xlm": ("XLMModel", {"vocab_size": WORDS, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64}, words),
    "perceiver, text": (
        "PerceiverForSequenceClassification",
        {
            "num_latents": 12, "d_latents": 16, "d_model": 16, "num_self_attends_per_block": 2, "num_self_attention_heads": 2,
            "num_cross_attention_heads": 2, "vocab_size": WORDS, "max_position_embeddings": TOKENS,
        },
        lambda batch: {"inputs": words(batch)["input_ids"], "attention_mask": words(batch)["attention_mask"]},
    ),
    "siglip text": ("SiglipTextModel", WRITTEN, words),
    "xlnet": ("XLNetModel", {"vocab_size": WORDS, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "use_mems_eval": False}, words),
}  # fmt: skip

IMAGE_ROWS: dict[str, Row] = {
    "vit": ("ViTForImageClassification", IMAGES, pixels()),
    "vit, attentions": ("ViTModel", IMAGES, pixels(output_hidden_states=True)),
    "deit": ("DeiTForImageClassificationWithTeacher", IMAGES, pixels()),
    "beit": ("BeitForImageClassification", {**IMAGES, "use_relative_position_bias": True}, pixels()),
    "dinov2": ("Dinov2ForImageClassification", {**IMAGES, "mlp_ratio": 2}, pixels()),
    "dinov2, registers": ("Dinov2WithRegistersForImageClassification", {**IMAGES, "mlp_ratio": 2}, pixels()),
    "dinov3": ("DINOv3ViTModel", {**IMAGES, "num_register_tokens": 2}, pixels()),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}, pixels(16),
    ),
    "swinv2": (
        "Swinv2ForImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}, pixels(16),
    ),
    "convnext": ("ConvNextForImageClassification", {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2, "patch_size": 2}, pixels()),
    "clip vision": ("CLIPVisionModelWithProjection", {**IMAGES, "projection_dim": 8}, pixels()),
    "siglip vision": ("SiglipVisionModel", IMAGES, pixels()),
    "segformer": ("SegformerForSemanticSegmentation", {**STAGES, "sr_ratios": [2, 1], "decoder_hidden_size": 16}, pixels()),
    "pvt-v2": ("PvtV2ForImageClassification", {**STAGES, "sr_ratios": [2, 1]}, pixels()),
    "mobilevit": (
        "MobileViTForImageClassification",
        {
            "image_size": 64, "hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16], "num_attention_heads": 2,
            "expand_ratio": 2.0, "patch_size": 2,
        },
        pixels(64),
    ),
    "mobilevitv2": ("MobileViTV2ForImageClassification", {"image_size": 64, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1]}, pixels(64)),
    "yolos": ("YolosForObjectDetection", {**IMAGES, "image_size": [SIDE, SIDE], "num_detection_tokens": 5}, pixels()),
    "vit-mae": (
        "ViTMAEForPreTraining",
        {
            **IMAGES, "decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 32,
            "mask_ratio": 0.5,
        },
        lambda batch: {**pixels()(batch), "noise": torch.rand(batch, 36)},
    ),
    "poolformer": (
        "PoolFormerForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [2, 2], "patch_sizes": [3, 3], "strides": [2, 2], "padding": [1, 1], "num_encoder_blocks": 2}, pixels(),
    ),
    "hiera": (
        "HieraForImageClassification",
        {
            "image_size": [32, 32], "patch_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1], "embed_dim": 8, "depths": [1, 1],
            "num_heads": [1, 2], "mask_unit_size": [4, 4], "masked_unit_size": [4, 4], "query_stride": [2, 2], "num_query_pool": 1,
        },
        pixels(32),
    ),
    "vitdet": (
        "VitDetBackbone",
        {**IMAGES, "num_hidden_layers": 2, "window_block_indices": [0], "window_size": 3, "use_relative_position_embeddings": True}, pixels(),
    ),
    "resnet": ("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}, pixels()),
    "efficientnet": (
        "EfficientNetForImageClassification",
        {
            "width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 32, "in_channels": [8, 8], "out_channels": [8, 16],
            "kernel_sizes": [3, 3], "strides": [1, 2], "num_block_repeats": [2, 2], "expand_ratios": [1, 2], "hidden_dim": 32,
        },
        pixels(32),
    ),
    "swiftformer": ("SwiftFormerForImageClassification", {"depths": [1, 1], "embed_dims": [8, 16], "downsamples": [True, True]}, pixels(32)),
    "timesformer": ("TimesformerForVideoClassification", {**IMAGES, "image_size": 12, "num_frames": 4}, pixels(12, 4)),
}  # fmt: skip

DETR: dict[str, Any] = {
    **HALVES, "num_queries": 6, "num_channels": 3, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
}  # fmt: skip
SPEECH = {
    **HALVES,
    "max_source_positions": TOKENS,
    "max_target_positions": 16,
    "num_mel_bins": 4,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}

SOUND_ROWS: dict[str, Row] = {
    "whisper": (
        "WhisperForConditionalGeneration", SPEECH,
        lambda batch: {"input_features": torch.randn(batch, 4, 80), "decoder_input_ids": torch.randint(3, WORDS, (batch, 5)), "use_cache": False},
    ),
    "whisper, classes": ("WhisperForAudioClassification", SPEECH, lambda batch: {"input_features": torch.randn(batch, 4, 80)}),
    "wav2vec2": ("Wav2Vec2ForCTC", SOUND, wave()),
    "wav2vec2, classes": ("Wav2Vec2ForSequenceClassification", SOUND, wave()),
    "hubert": ("HubertForSequenceClassification", SOUND, wave()),
    "wavlm": ("WavLMModel", {**SOUND, "num_buckets": 8, "max_bucket_distance": 16}, wave()),
    "wav2vec2-conformer": ("Wav2Vec2ConformerModel", {**SOUND, "position_embeddings_type": "rotary"}, wave()),
    "ast": (
        "ASTForAudioClassification",
        {**WIDTHS, "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 48, "num_mel_bins": 12},
        lambda batch: {"input_values": torch.randn(batch, 48, 12)},
    ),
    "speech-to-text": (
        "Speech2TextModel", {**HALVES, "max_source_positions": 64, "max_target_positions": 16, "input_feat_per_channel": 8, "conv_channels": 16},
        lambda batch: {"input_features": torch.randn(batch, 160, 8), "decoder_input_ids": torch.randint(3, WORDS, (batch, 5)), "use_cache": False},
    ),
    "encodec": (
        "EncodecModel",
        {"hidden_size": 8, "num_filters": 4, "upsampling_ratios": [2, 2], "codebook_size": 16, "num_lstm_layers": 1, "sampling_rate": 240},
        lambda batch: {"input_values": torch.randn(batch, 1, 160)},
    ),
}  # fmt: skip

ROLLED: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": WORDS, "n_positions": 64},
    "GPTJForCausalLM": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": WORDS, "n_positions": 64, "rotary_dim": 4},
    "GPTNeoForCausalLM": {
        "hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "vocab_size": WORDS, "window_size": 8,
        "max_position_embeddings": 64,
    },
    "BloomForCausalLM": {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": WORDS},
    "OPTForCausalLM": {**WIDTHS, "ffn_dim": 32, "vocab_size": WORDS, "max_position_embeddings": 64, "word_embed_proj_dim": 16},
    "RwkvForCausalLM": {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": WORDS, "attention_hidden_size": 16, "intermediate_size": 32},
    "MambaForCausalLM": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": WORDS, "pad_token_id": 0},
    "Mamba2ForCausalLM": {
        "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": WORDS, "num_heads": 4, "head_dim": 8, "n_groups": 1,
        "chunk_size": 8, "pad_token_id": 0,
    },
}  # fmt: skip

DECODER_ROWS: dict[str, Row] = {
    "gpt2": ("GPT2LMHeadModel", ROLLED["GPT2LMHeadModel"], uncached),
    "gpt-neo": ("GPTNeoForCausalLM", ROLLED["GPTNeoForCausalLM"], uncached),
    "gpt-neox": ("GPTNeoXForCausalLM", WRITTEN, uncached),
    "gptj": ("GPTJForCausalLM", ROLLED["GPTJForCausalLM"], uncached),
    "bloom": ("BloomForCausalLM", ROLLED["BloomForCausalLM"], uncached),
    "falcon": ("FalconForCausalLM", {**WRITTEN, "bos_token_id": 1, "eos_token_id": 2}, uncached),
    "opt": ("OPTForCausalLM", ROLLED["OPTForCausalLM"], uncached),
    "llama": ("LlamaForCausalLM", LANGUAGE, uncached),
    "llama, cache": ("LlamaForCausalLM", LANGUAGE, lambda batch: words(batch, use_cache=True)),
    "llama, classes": ("LlamaForSequenceClassification", LANGUAGE, uncached),
    "mistral": ("MistralForCausalLM", {**LANGUAGE, "sliding_window": 8}, uncached),
    "qwen3": ("Qwen3ForCausalLM", LANGUAGE, uncached),
    "gemma2": ("Gemma2ForCausalLM", {**LANGUAGE, "sliding_window": 8, "query_pre_attn_scalar": 8}, uncached),
    "gemma3": (
        "Gemma3ForCausalLM",
        {**LANGUAGE, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}, uncached,
    ),
    "phi": ("PhiForCausalLM", {**WRITTEN, "bos_token_id": 1, "eos_token_id": 2}, uncached),
    "cohere": ("CohereForCausalLM", {**WRITTEN, "bos_token_id": 1, "eos_token_id": 2}, uncached),
    "mixtral": ("MixtralForCausalLM", {**LANGUAGE, "num_local_experts": 4, "num_experts_per_tok": 2}, uncached),
    "rwkv": ("RwkvForCausalLM", ROLLED["RwkvForCausalLM"], ids),
    "mamba": ("MambaForCausalLM", ROLLED["MambaForCausalLM"], ids),
    "mamba2": ("Mamba2ForCausalLM", ROLLED["Mamba2ForCausalLM"], ids),
}  # fmt: skip

T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": WORDS, "decoder_start_token_id": 0}

PAIR_ROWS: dict[str, Row] = {
    "t5": ("T5ForConditionalGeneration", T5, both),
    "t5, encoder": ("T5EncoderModel", T5, words),
    "switch": ("SwitchTransformersForConditionalGeneration", {**T5, "num_experts": 2}, both),
    "bart": ("BartForConditionalGeneration", HALVES, both),
    "bart, classes": (
        "BartForSequenceClassification", HALVES,
        lambda batch: {"input_ids": torch.cat([torch.randint(3, WORDS, (batch, TOKENS - 1)), torch.full((batch, 1), 2)], 1), "use_cache": False},
    ),
    "m2m-100": ("M2M100ForConditionalGeneration", HALVES, both),
    "longt5": ("LongT5ForConditionalGeneration", {**T5, "local_radius": 7}, both),
    "led": (
        "LEDForConditionalGeneration",
        {**HALVES, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 8}, both,
    ),
    "prophetnet": (
        "ProphetNetModel",
        {
            "hidden_size": 16, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2,
            "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": WORDS, "max_position_embeddings": 64, "pad_token_id": 0,
        },
        both,
    ),
    "detr": ("DetrForObjectDetection", DETR, pixels(64, pixel_mask=None)),
    "patchtst": (
        "PatchTSTForClassification",
        {
            "num_input_channels": 2, "context_length": 72, "patch_length": 2, "patch_stride": 2, "num_hidden_layers": 2, "d_model": 16,
            "num_attention_heads": 2, "ffn_dim": 32, "use_cls_token": True,
        },
        lambda batch: {"past_values": torch.randn(batch, 72, 2)},
    ),
    "patchtsmixer": (
        "PatchTSMixerForTimeSeriesClassification",
        {"num_input_channels": 2, "context_length": 72, "patch_length": 2, "patch_stride": 2, "num_layers": 2, "d_model": 16},
        lambda batch: {"past_values": torch.randn(batch, 72, 2)},
    ),
    "decision transformer": (
        "DecisionTransformerModel",
        {"state_dim": 5, "act_dim": 3, "hidden_size": 16, "n_layer": 2, "n_head": 2, "max_ep_len": 20, "n_positions": 64},
        lambda batch: {
            "states": torch.randn(batch, 12, 5), "actions": torch.randn(batch, 12, 3), "rewards": torch.randn(batch, 12, 1),
            "returns_to_go": torch.randn(batch, 12, 1), "timesteps": torch.arange(12).repeat(batch, 1), "attention_mask": torch.ones(batch, 12),
        },
    ),
    "vilt": (
        "ViltModel", {**WRITTEN, **IMAGES, "max_image_length": 36},
        lambda batch: {**words(batch, 8, token_type_ids=torch.zeros(batch, 8, dtype=torch.long)), **pixels()(batch)},
    ),
}  # fmt: skip

ROWS: dict[str, Row] = {**TEXT_ROWS, **IMAGE_ROWS, **SOUND_ROWS, **DECODER_ROWS, **PAIR_ROWS}
OWN = {f"zoo: {name}": name for name in zoo.NAMES}
SYNTHETIC = {f"own: {name}": name for name in token_models.NAMES}
NAMES = (*ROWS, *OWN, *SYNTHETIC)


def make(name: str, batch: int = 2) -> tuple[nn.Module, Any]:
    """One architecture in eval mode, seeded, with inputs: keywords, or a tuple for our own."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        if name in OWN:
            model, inputs = zoo.make(OWN[name], T=36, C=16, H=2, B=batch)
        elif name in SYNTHETIC:
            model, inputs = token_models.make(SYNTHETIC[name], batch)
        else:
            model, inputs = _of_library(*ROWS[name], batch)
    finally:
        torch.set_rng_state(state)
    return model.eval(), inputs


def _of_library(kind: str, settings: dict[str, Any], inputs: Callable[[int], Inputs], batch: int) -> tuple[nn.Module, Inputs]:
    import transformers

    model_class = getattr(transformers, kind)
    if settings is DETR:
        small = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
        )
        settings = {**settings, "backbone_config": small}
    model = model_class(model_class.config_class(**settings))
    model.config._attn_implementation = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    given = {key: value for key, value in inputs(batch).items() if value is not None}
    return _spread(model), given


def _spread(model: nn.Module) -> nn.Module:
    """Parameters and statistics that libraries start at one number (norms, biases, tables of positions, scales of layers) differ by entry."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
                value = float(tensor.flatten()[0])
                tensor.copy_((0.5 if 0 < value < 0.5 else value) + 0.2 * torch.rand_like(tensor))
    return model


def rows_of(inputs: Any, pick: Callable[[Tensor], Tensor]) -> Any:
    """The inputs with every tensor replaced by what `pick` makes of it."""
    if isinstance(inputs, dict):
        return {key: pick(value) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return tuple(pick(value) for value in inputs)
