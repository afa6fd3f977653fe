"""Sampling from the actor, and scoring what was sampled in the other roles.

From outside: `collect` (`collect_experience`, `score`), `sampling` (`sample`, `Samples`), `decoder` (`Decoder`), `scoring`
(`reward_scores` of given responses), `lean_decoding`, `vllm` (servers that sample in place of this process).

Never: optimizers, rewards of other sources than the base.
"""
