"""Each role as the Hugging Face model that other people's PPO code expects; logits that are never made whole.

From outside: `views` (`role_views` and the views), `view` (what they share), `passes`, `lazy`, `lazy_logits`, `sampled_logits`.

Never: optimizers, knowledge of one host.
"""
