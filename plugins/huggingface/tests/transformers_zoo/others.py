"""Encoders, encoder-decoders and vision models of transformers, tiny and from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers as tf
from torch import Generator, nn

from tracing_zoo.entry import Entry, Inputs, image, tokens
from transformers_zoo.decoders import COMMON, VOCAB

__all__ = ["OTHERS"]

ENCODER: dict[str, Any] = {
    **COMMON,
    "hidden_size": 24,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "num_labels": 5,
}
VIT: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 5,
}
PIXELS = image(8, name="pixel_values")
LARGE = image(32, name="pixel_values")


def text(name: str, model: type, config: type, **options: Any) -> Entry:
    return Entry(name, lambda: model(config(**options)), tokens(VOCAB))


def vision(
    name: str,
    model: type,
    config: type,
    inputs: Inputs = PIXELS,
    **options: Any,
) -> Entry:
    return Entry(name, lambda: model(config(**options)), inputs)


def both(name: str, model: type, config: type, **options: Any) -> Entry:
    inputs = tokens(VOCAB, 7, "input_ids", "decoder_input_ids", use_cache=False)
    return Entry(name, lambda: model(config(**options)), inputs)


def whisper(generator: Generator) -> Mapping[str, Any]:
    return {
        "input_features": torch.randn(2, 6, 16, generator=generator, dtype=torch.float64),
        "decoder_input_ids": torch.randint(3, VOCAB, (2, 5), generator=generator),
        "use_cache": False,
    }


def clip_inputs(generator: Generator) -> Mapping[str, Any]:
    return {**tokens(VOCAB)(generator), **PIXELS(generator)}


def waves(generator: Generator) -> Mapping[str, Any]:
    return {"input_values": torch.randn(2, 400, generator=generator, dtype=torch.float64)}


def clip() -> nn.Module:
    parts = {k: v for k, v in ENCODER.items() if k != "num_labels"}
    seen = {k: v for k, v in VIT.items() if k != "num_labels"}
    return tf.CLIPModel(
        tf.CLIPConfig(
            text_config=parts,
            vision_config={**seen, "hidden_size": 20, "intermediate_size": 26},
            projection_dim=14,
        )
    )


def detr() -> nn.Module:
    backbone = tf.ResNetConfig(
        embedding_size=6, hidden_sizes=[16, 28], depths=[1, 1], out_features=["stage2"]
    )
    return tf.DetrForObjectDetection(
        tf.DetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
            backbone_config=backbone, d_model=24, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=22,
            decoder_ffn_dim=26, num_queries=9, num_labels=5,
        )
    )  # fmt: skip


OTHERS = (
    text("bert", tf.BertForSequenceClassification, tf.BertConfig, **ENCODER),
    text("bert_mlm", tf.BertForMaskedLM, tf.BertConfig, **ENCODER),
    text("distilbert", tf.DistilBertForSequenceClassification, tf.DistilBertConfig,
         **COMMON, dim=24, hidden_dim=22, n_layers=2, n_heads=4, max_position_embeddings=32),
    text("albert", tf.AlbertForSequenceClassification, tf.AlbertConfig,
         **ENCODER, embedding_size=14),
    text("electra", tf.ElectraForSequenceClassification, tf.ElectraConfig,
         **ENCODER, embedding_size=14),
    text("deberta_v2", tf.DebertaV2ForSequenceClassification, tf.DebertaV2Config,
         **ENCODER, relative_attention=True, position_buckets=5, pos_att_type=["p2c", "c2p"]),
    text("modernbert", tf.ModernBertForSequenceClassification, tf.ModernBertConfig,
         **ENCODER, global_attn_every_n_layers=2, local_attention=4),
    both("t5", tf.T5ForConditionalGeneration, tf.T5Config,
         **COMMON, d_model=28, d_ff=22, d_kv=10, num_layers=2, num_heads=6,
         relative_attention_num_buckets=8),
    both("t5_gated", tf.T5ForConditionalGeneration, tf.T5Config,
         **COMMON, d_model=28, d_ff=22, d_kv=10, num_layers=1, num_heads=6,
         relative_attention_num_buckets=8, feed_forward_proj="gated-gelu",
         tie_word_embeddings=False),
    both("bart", tf.BartForConditionalGeneration, tf.BartConfig,
         **COMMON, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
         decoder_attention_heads=4, encoder_ffn_dim=22, decoder_ffn_dim=26,
         max_position_embeddings=32),
    Entry("whisper", lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(
        **COMMON, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=22, decoder_ffn_dim=26, num_mel_bins=6,
        max_source_positions=8, max_target_positions=16, decoder_start_token_id=1)), whisper),
    vision("resnet", tf.ResNetForImageClassification, tf.ResNetConfig, LARGE,
           embedding_size=6, hidden_sizes=[16, 24], depths=[1, 2], num_labels=5),
    vision("mobilenet_v2", tf.MobileNetV2ForImageClassification, tf.MobileNetV2Config,
           PIXELS, depth_multiplier=0.125, min_depth=4, num_labels=5),
    vision("convnext", tf.ConvNextForImageClassification, tf.ConvNextConfig,
           image(16, name="pixel_values"), patch_size=2, num_stages=2, hidden_sizes=[6, 10],
           depths=[1, 2], num_labels=5),
    vision("convnextv2", tf.ConvNextV2ForImageClassification, tf.ConvNextV2Config,
           image(16, name="pixel_values"), patch_size=2, num_stages=2,
           hidden_sizes=[6, 10], depths=[1, 1], num_labels=5),
    vision("vit", tf.ViTForImageClassification, tf.ViTConfig, **VIT),
    vision("dinov2", tf.Dinov2ForImageClassification, tf.Dinov2Config,
           **VIT, mlp_ratio=2),
    vision("beit", tf.BeitForImageClassification, tf.BeitConfig,
           **VIT, use_relative_position_bias=True),
    vision("swin", tf.SwinForImageClassification, tf.SwinConfig, image(16, name="pixel_values"),
           image_size=16, patch_size=2, embed_dim=12, depths=[2, 1], num_heads=[2, 4],
           window_size=4, mlp_ratio=1.5, num_labels=5),
    vision("segformer", tf.SegformerForImageClassification, tf.SegformerConfig,
           LARGE, num_encoder_blocks=2, depths=[1, 1],
           sr_ratios=[2, 1], hidden_sizes=[10, 24], patch_sizes=[3, 3], strides=[2, 2],
           num_attention_heads=[1, 4], mlp_ratios=[2, 2], decoder_hidden_size=14, num_labels=5),
    vision("regnet", tf.RegNetForImageClassification, tf.RegNetConfig,
           LARGE, embedding_size=6, hidden_sizes=[12, 24],
           depths=[1, 1], groups_width=4, layer_type="y", num_labels=5),
    vision("efficientnet", tf.EfficientNetForImageClassification, tf.EfficientNetConfig,
           LARGE, width_coefficient=0.1, in_channels=[32, 16], out_channels=[16, 24],
           kernel_sizes=[3, 3], strides=[1, 2], num_block_repeats=[1, 2], expand_ratios=[1, 3],
           depth_coefficient=0.1, image_size=32, hidden_dim=128, num_labels=5),
    text("fnet", tf.FNetForSequenceClassification, tf.FNetConfig,
         **{k: v for k, v in ENCODER.items() if k != "num_attention_heads"}),
    Entry("detr", detr, LARGE),
    Entry("clip", clip, clip_inputs),
    Entry("wav2vec2", lambda: tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(
        **{**ENCODER, "num_hidden_layers": 1}, conv_dim=(6, 10), conv_kernel=(10, 3),
        conv_stride=(5, 2), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=3,
        num_feat_extract_layers=2, feat_extract_norm="group")), waves),
)  # fmt: skip
