"""Sampling on vLLM servers, which get the actor's adapter as it changes, over HTTP and a folder that both see.

From outside: `sampler` (`VLLMSampler`, called as `sampling.sample` is), `look` (what a server says of itself, `Needs`),
`launch` (the command that starts one, and which adapters it can serve).

Never: an import of vllm, which has an environment of its own; `launch`, `look` and `asking` import no torch either.
"""
