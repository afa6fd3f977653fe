"""Maths on tensors and layers, without a model: log-probs, LoRA, packing, recompute, KV cache, drawing.

From outside: `products`, `bases`, `lora`, `gated_mlp`, `tiled_mlp`, `tiled_norm` (layers as they run), `lm_head`,
`quantized_rows` (the vocabulary's matrices), `logprobs`, `packing`, `padding`, `flash`, `trunk`, `recompute` (forward passes),
`rates` (of this machine), `int8` (rounding), `kv_cache`, `kv_int8`, `copied_linear`, `drawing` (decoding).

Never: roles, settings, text, files.
"""
