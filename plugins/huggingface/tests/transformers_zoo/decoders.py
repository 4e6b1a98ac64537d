"""Causal language models of transformers, tiny and from scratch.

The sizes of one model differ from each other, so that a number in a module says what it counts: 12
heads on 4 key heads of 10, hidden 36, intermediate 22, 7 experts of 20 (which
have to be multiples of 4).
"""

from __future__ import annotations

from typing import Any

import transformers as tf

from tracing_zoo.entry import Entry, tokens

__all__ = ["DECODERS", "VOCAB", "WIDTHS"]

VOCAB = 37
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDTHS: dict[str, Any] = {
    **COMMON,
    "hidden_size": 36,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
NARROW: dict[str, Any] = {  # for those whose heads make up the hidden size
    **COMMON,
    "hidden_size": 24,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}


def decoder(name: str, model: type, config: type, **options: Any) -> Entry:
    inputs = tokens(VOCAB, use_cache=False)
    return Entry(name, lambda: model(config(**options)), inputs)


DECODERS = (
    decoder("llama", tf.LlamaForCausalLM, tf.LlamaConfig, **WIDTHS),
    decoder("llama_tied", tf.LlamaForCausalLM, tf.LlamaConfig,
            **{**WIDTHS, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    decoder("qwen2", tf.Qwen2ForCausalLM, tf.Qwen2Config,
            **{**WIDTHS, "hidden_size": 120, "num_hidden_layers": 1}),
    decoder("qwen3", tf.Qwen3ForCausalLM, tf.Qwen3Config, **WIDTHS),
    decoder("qwen3_moe", tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig,
            **WIDTHS, **EXPERTS, num_experts=7, norm_topk_prob=True, mlp_only_layers=[1]),
    decoder("mixtral", tf.MixtralForCausalLM, tf.MixtralConfig,
            **{**WIDTHS, "intermediate_size": 20}, num_local_experts=7, num_experts_per_tok=2),
    decoder("gpt_oss", tf.GptOssForCausalLM, tf.GptOssConfig,
            **{**WIDTHS, "intermediate_size": 20}, num_local_experts=7, num_experts_per_tok=2,
            sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    decoder("deepseek_v3", tf.DeepseekV3ForCausalLM, tf.DeepseekV3Config,
            **{**NARROW, "num_key_value_heads": 4, "first_k_dense_replace": 1,
               "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
               "num_experts_per_tok": 2, "moe_intermediate_size": 20,
               "q_lora_rank": 15, "kv_lora_rank": 17, "qk_nope_head_dim": 7,
               "qk_rope_head_dim": 6, "v_head_dim": 11}),
    decoder("gemma3", tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, **{
        **WIDTHS, "tie_word_embeddings": True, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"]}),
    decoder("falcon", tf.FalconForCausalLM, tf.FalconConfig,
            **COMMON, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
            new_decoder_architecture=False, multi_query=True, ffn_hidden_size=22),
    decoder("falcon_new", tf.FalconForCausalLM, tf.FalconConfig,
            **COMMON, hidden_size=120, num_hidden_layers=1, num_attention_heads=12,
            num_kv_heads=4, new_decoder_architecture=True, ffn_hidden_size=22),
    decoder("gpt2", tf.GPT2LMHeadModel, tf.GPT2Config,
            **COMMON, n_embd=24, n_layer=2, n_head=4, n_positions=32, n_inner=22),
    decoder("llama4", tf.Llama4ForCausalLM, tf.Llama4TextConfig,
            **WIDTHS, intermediate_size_mlp=26, num_local_experts=7, num_experts_per_tok=1,
            interleave_moe_layer_step=2),
    # What nobody tuned a tracer for.
    decoder("opt", tf.OPTForCausalLM, tf.OPTConfig,
            **COMMON, hidden_size=24, ffn_dim=22, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=14, max_position_embeddings=32),
    decoder("phi", tf.PhiForCausalLM, tf.PhiConfig, **{
        **NARROW, "hidden_size": 30, "num_attention_heads": 3, "partial_rotary_factor": 0.4}),
    decoder("phi3", tf.Phi3ForCausalLM, tf.Phi3Config, **{
        **WIDTHS, "hidden_size": 120, "num_hidden_layers": 1}),
    decoder("bloom", tf.BloomForCausalLM, tf.BloomConfig,
            **COMMON, hidden_size=24, n_layer=2, n_head=4),
    decoder("gpt_neox", tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig, **{
        **NARROW, "hidden_size": 30, "num_attention_heads": 3, "rotary_pct": 0.4,
        "use_parallel_residual": True}),
    decoder("cohere", tf.CohereForCausalLM, tf.CohereConfig, **{
        **WIDTHS, "hidden_size": 120, "num_hidden_layers": 1, "use_qk_norm": True}),
    decoder("olmo2", tf.Olmo2ForCausalLM, tf.Olmo2Config, **{
        **WIDTHS, "hidden_size": 120, "num_hidden_layers": 1}),
    decoder("mamba", tf.MambaForCausalLM, tf.MambaConfig,
            **COMMON, hidden_size=12, state_size=5, num_hidden_layers=2, conv_kernel=4, expand=2,
            time_step_rank=3),
    decoder("mamba2", tf.Mamba2ForCausalLM, tf.Mamba2Config,
            **COMMON, hidden_size=12, state_size=5, num_hidden_layers=1, conv_kernel=4, expand=2,
            num_heads=3, head_dim=8, n_groups=1, chunk_size=4),
    decoder("gpt_neo", tf.GPTNeoForCausalLM, tf.GPTNeoConfig,
            **COMMON, hidden_size=24, num_layers=2, num_heads=4, intermediate_size=22,
            attention_types=[[["global", "local"], 1]], window_size=4, max_position_embeddings=32),
    decoder("gptj", tf.GPTJForCausalLM, tf.GPTJConfig,
            **COMMON, n_embd=30, n_layer=2, n_head=3, n_positions=32, n_inner=22, rotary_dim=4),
    decoder("starcoder2", tf.Starcoder2ForCausalLM, tf.Starcoder2Config, **{
        **WIDTHS, "hidden_size": 120, "num_hidden_layers": 1}),
    decoder("granite_moe", tf.GraniteMoeForCausalLM, tf.GraniteMoeConfig, **{
        **WIDTHS, "hidden_size": 120, "intermediate_size": 20, "num_hidden_layers": 1,
        "num_local_experts": 7, "num_experts_per_tok": 2}),
    decoder("glm4", tf.Glm4ForCausalLM, tf.Glm4Config,
            **{**WIDTHS, "num_attention_heads": 6, "num_key_value_heads": 3,
               "partial_rotary_factor": 0.4, "num_hidden_layers": 1}),
    decoder("nemotron", tf.NemotronForCausalLM, tf.NemotronConfig,
            **{**WIDTHS, "num_hidden_layers": 1}),
    decoder("lfm2", tf.Lfm2ForCausalLM, tf.Lfm2Config,
            **{**NARROW, "num_key_value_heads": 2, "hidden_size": 60, "num_attention_heads": 6,
               "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    decoder("rwkv", tf.RwkvForCausalLM, tf.RwkvConfig,
            **COMMON, hidden_size=24, intermediate_size=22, num_hidden_layers=2,
            context_length=16),
    decoder("qwen3_next", tf.Qwen3NextForCausalLM, tf.Qwen3NextConfig,
            **{**WIDTHS, **EXPERTS, "num_experts": 7, "shared_expert_intermediate_size": 24,
               "decoder_sparse_step": 2, "layer_types": ["linear_attention", "full_attention"],
               "linear_num_value_heads": 6, "linear_num_key_heads": 2, "linear_key_head_dim": 7,
               "linear_value_head_dim": 11}),
)  # fmt: skip
