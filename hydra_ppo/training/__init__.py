"""The two loops, joint SFT and PPO, with their state, metrics and optimizer.

From outside: `joint_sft` (`JointSFTTrainer`), `ppo` (`PPOTrainer`), `ppo_update` (the updates of a step), `optim`.

Never: text, tokenizers, files.
"""
