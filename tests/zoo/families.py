"""Tiny random models of the zoos, one a family: Hugging Face class names and settings. Window 8, length 40."""
W = 8
B = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
         num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
FAMILIES = {
 "mistral": ("MistralConfig", "MistralForCausalLM", dict(B, sliding_window=W)),
 "mixtral": ("MixtralConfig", "MixtralForCausalLM", dict(B, sliding_window=W, num_local_experts=2)),
 "ministral": ("MinistralConfig", "MinistralForCausalLM", dict(B, sliding_window=W, layer_types=["sliding_attention","full_attention"]*2, head_dim=8)),
 "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", dict(B, sliding_window=W, use_sliding_window=True, max_window_layers=2)),
 "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", dict(B, sliding_window=W, use_sliding_window=True, max_window_layers=2, head_dim=8)),
 "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", dict(B, sliding_window=W, use_sliding_window=True, max_window_layers=2, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16)),
 "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", dict(B, sliding_window=W, use_sliding_window=True, max_window_layers=0, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, head_dim=8)),
 "phi3": ("Phi3Config", "Phi3ForCausalLM", dict(B, sliding_window=W)),
 "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", dict(B, sliding_window=W, num_local_experts=2)),
 "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", dict(B, sliding_window=W)),
 "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", dict(B, sliding_window=W, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=2.0)),
 "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", dict(B, sliding_window=W, head_dim=8, query_pre_attn_scalar=8, layer_types=["sliding_attention"]*3+["full_attention"])),
 "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", dict(B, sliding_window=W)),
 "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", dict(B, sliding_window=W, head_dim=8, num_local_experts=2, num_experts_per_tok=1, rope_scaling=None)),
 "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=256, local_attention=W, global_attn_every_n_layers=3, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2, reference_compile=False)),
 "modernbert_decoder": ("ModernBertDecoderConfig", "ModernBertDecoderForCausalLM", dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=256, local_attention=W, global_attn_every_n_layers=3, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)),
 "longformer": ("LongformerConfig", "LongformerForMaskedLM", dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256, attention_window=[W,W], pad_token_id=0)),
 "gpt_neo": ("GPTNeoConfig", "GPTNeoForCausalLM", dict(vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global","local"],2]], window_size=W, max_position_embeddings=256, bos_token_id=1, eos_token_id=2)),
}
