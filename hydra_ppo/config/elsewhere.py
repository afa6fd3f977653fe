"""What settings of other trainers (TRL, OpenRLHF, verl, LLaMA-Factory) are called here."""

from __future__ import annotations

from collections.abc import Collection

NAMES: dict[str, tuple[str, ...]] = {
    # what is trained on, and where to
    **dict.fromkeys(("model_name_or_path", "model_name", "model_path", "pretrain", "sft_model_path"), ("model.name_or_path",)),
    **dict.fromkeys(("adapter_name_or_path", "sft_adapter", "lora_path"), ("model.adapter",)),
    **dict.fromkeys(("reward_model", "reward_model_path", "reward_model_name_or_path", "reward_pretrain"), ("reward.sources",)),
    **dict.fromkeys(("dataset", "dataset_name", "dataset_path", "prompt_data", "train_file", "train_files"), ("data.train",)),
    **dict.fromkeys(("eval_dataset", "validation_file", "val_files", "test_file"), ("data.eval",)),
    **dict.fromkeys(("output_dir", "output_path", "save_path", "ckpt_path", "default_local_dir"), ("run.output",)),
    "overwrite_output_dir": ("run.overwrite",),
    "dataset_train_split": ("data.split",),
    "dataset_test_split": ("data.eval_split",),
    # how much at once
    **dict.fromkeys(("per_device_train_batch_size", "micro_train_batch_size", "micro_batch_size"), ("microbatch_size",)),
    "ppo_micro_batch_size_per_gpu": ("microbatch_size",),
    **dict.fromkeys(("mini_batch_size", "ppo_mini_batch_size", "train_batch_size"), ("minibatch_size", "batch_size")),
    **dict.fromkeys(("per_device_eval_batch_size", "local_rollout_forward_batch_size"), ("rollout.score_batch_size",)),
    **dict.fromkeys(("num_generations", "n_samples_per_prompt"), ("rollout.samples_per_prompt",)),
    "rollout_batch_size": ("rollout.batch_size",),
    # how long
    **dict.fromkeys(("num_ppo_epochs", "max_epochs"), ("ppo_epochs", "epochs")),
    **dict.fromkeys(("total_episodes", "num_episodes", "max_steps", "total_training_steps"), ("steps", "max_steps")),
    **dict.fromkeys(("max_prompt_length", "prompt_max_len", "max_query_length"), ("data.max_prompt_tokens",)),
    # the optimizer
    **dict.fromkeys(("lr", "actor_learning_rate", "actor_lr"), ("optimizer.learning_rate",)),
    **dict.fromkeys(("critic_lr", "value_learning_rate"), ("critic_learning_rate",)),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), ("optimizer.schedule",)),
    **dict.fromkeys(("warmup_ratio", "lr_warmup_ratio", "warmup_steps", "lr_warmup_steps"), ("optimizer.warmup_fraction",)),
    "adam_beta1": ("optimizer.beta1",),
    "adam_beta2": ("optimizer.beta2",),
    "adam_epsilon": ("optimizer.eps",),
    "max_norm": ("optimizer.max_grad_norm",),
    **dict.fromkeys(("optim", "optimizer_name", "optimizer_type"), ("optimizer.name",)),
    **dict.fromkeys(("optimizer_offload", "offload_optimizer"), ("optimizer.name", "optimizer.offload_in_rollout")),
    # the algorithm
    **dict.fromkeys(("beta", "kl_coef", "init_kl_coef", "kl_coefficient", "kl_penalty_coef", "kl_loss_coef"), ("kl.coef",)),
    "adaptive_kl": ("kl.adaptive",),
    **dict.fromkeys(("cliprange", "clip_eps", "eps_clip", "clip_ratio", "epsilon"), ("clip_range",)),
    **dict.fromkeys(("cliprange_value", "value_clip", "cliprange_value_loss"), ("value_clip_range",)),
    **dict.fromkeys(("lam", "lambd", "lambda"), ("gae_lambda",)),
    **dict.fromkeys(("stop_token", "stop_token_id", "eos_token", "eos_token_id"), ("data.end_of_turn",)),
    # the base
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_bit"), ("model.quantization",)),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype"), ("model.dtype",)),
    **dict.fromkeys(("attn_implementation", "flash_attn", "use_flash_attention_2"), ("model.attention",)),
    **dict.fromkeys(("lora_r", "lora_rank"), ("model.lora.r",)),
    "lora_alpha": ("model.lora.alpha",),
    **dict.fromkeys(("lora_target", "lora_target_modules"), ("model.lora.target_modules",)),
    **dict.fromkeys(("use_peft", "finetuning_type"), ("method",)),
    # the run
    "logging_steps": ("run.log_every",),
    **dict.fromkeys(("save_steps", "save_freq"), ("run.save_every",)),
    **dict.fromkeys(("save_total_limit", "max_ckpt_num"), ("run.keep_last",)),
    **dict.fromkeys(("eval_steps", "test_freq"), ("eval_every",)),
    **dict.fromkeys(("report_to", "use_wandb", "use_tensorboard"), ("run.trackers",)),
}
"""By the name elsewhere: what serves the same end here. Of several, those that a command has."""

SENTENCES: dict[str, tuple[tuple[str, str], ...]] = {
    "gradient_accumulation_steps": (
        ("minibatch_size", "it follows from minibatch_size / microbatch_size, set those"),
        ("batch_size", "it follows from batch_size / microbatch_size, set those"),
    ),
    **dict.fromkeys(
        ("num_train_epochs", "num_epochs", "total_epochs"),
        (
            ("ppo_epochs", "here it is epochs, over the prompts, or ppo_epochs, over each rollout"),
            ("epochs", "here it is epochs"),
        ),
    ),
    **dict.fromkeys(
        ("max_length", "max_seq_length", "max_seq_len", "max_len", "cutoff_len", "block_size"),
        (
            ("rollout.max_new_tokens", "here it is data.max_prompt_tokens and rollout.max_new_tokens"),
            ("data.max_response_tokens", "here it is data.max_prompt_tokens and data.max_response_tokens"),
        ),
    ),
    **dict.fromkeys(
        ("response_length", "max_response_length", "max_completion_length", "generate_max_len"),
        (
            ("rollout.max_new_tokens", "here it is rollout.max_new_tokens"),
            ("data.max_response_tokens", "here it is data.max_response_tokens"),
        ),
    ),
    **dict.fromkeys(
        ("resume", "resume_from_checkpoint"), (("run.output", "the option --resume goes on with what run.output holds"),)
    ),
    "lora_dropout": (("run.output", "dropout would add noise to the ratio of PPO, leave it out"),),
}
"""Where a name needs more than another name: the first sentence whose setting a command has."""


def called_here(name: str, known: Collection[str]) -> str | None:
    """Return what to write instead of a setting of another trainer; None where it is no name of theirs.

    Args:
        name: as it was given, with groups before it or without.
        known: the settings of the command.
    """
    leaf = name.rsplit(".", 1)[-1].replace("-", "_").lower()
    for setting, sentence in SENTENCES.get(leaf, ()):
        if setting in known:
            return f"{sentence}."
    names = NAMES.get(leaf, ())
    if not names:
        return None
    found = [setting for setting in names if setting in known]
    other = "sft" if "ppo_epochs" in known else "ppo"
    return f"did you mean {' or '.join(found)}?" if found else f"{names[0]} is a setting of hydra-ppo {other}."
