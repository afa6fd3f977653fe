"""The shared base and its roles: building, loading and saving a HydraModel.

From outside: `hydra` (`HydraModel`), `role_model` (its passes, which a simulation watches), `roles` (`Role`, `Stage`),
`answers` (where its answers end), `saving` (reading a saved model back), `manifest` (what a saved model says of itself),
`answer_states`, `fingerprint` (digests), `origin` (what stored states came of), `adapters`, `adapter_options`,
`architecture`, `loading` (a base alone), `whole` (whether files hold all of a model), `probe` (tries the passes of a model
that was just built), `positions` (how long a row may be), `classifier` (backbone and head as a classifier of transformers),
`for_others` (models that other programs load), `quantized_embeddings`, `heads` (which scalar heads there are), `prequantized`
(folders that are stored quantised), `sharding` (a base that several processes share out).

Never: training loops, sampling, run folders.
"""
