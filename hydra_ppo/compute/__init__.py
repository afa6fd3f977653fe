"""Maths on tensors and layers, without a model: log-probs, LoRA, packing, recompute, KV cache, drawing.

From outside: `products`, `bases`, `lora`, `gated_mlp` (linear layers and MLPs as they run), `logprobs`, `packing`, `padding`,
`trunk`, `recompute` (forward passes), `kv_cache`, `kv_int8`, `drawing` (decoding).

Never: roles, settings, text, files.
"""
