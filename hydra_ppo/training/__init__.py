"""The two loops, joint SFT and PPO, with their state, metrics and optimizer.

From outside: `joint_sft` (`JointSFTTrainer`), `ppo` (`PPOTrainer`), `ppo_update` (the updates of a step), `ppo_advantages`,
`held_out` (what an evaluation finds), `optim`, `eight_bit` (whether 8-bit optimizers can be had), `away` (moments that leave
the device), `offloaded` (in what pieces they come), `practice`.

Never: text, tokenizers, files.
"""
