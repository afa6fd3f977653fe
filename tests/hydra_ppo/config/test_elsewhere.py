"""Names that settings have in other trainers."""

from __future__ import annotations

import pytest

from hydra_ppo.config.elsewhere import NAMES, SENTENCES
from hydra_ppo.config.reading import settings_of, unknown_setting
from hydra_ppo.config.settings import PPOConfig, SFTConfig

KNOWN = {PPOConfig: settings_of(PPOConfig), SFTConfig: settings_of(SFTConfig)}


@pytest.mark.parametrize(
    ("config", "name", "says"),
    [
        (PPOConfig, "gradient_accumulation_steps", "it follows from minibatch_size / microbatch_size, set those."),
        (SFTConfig, "gradient_accumulation_steps", "it follows from batch_size / microbatch_size, set those."),
        (PPOConfig, "num_train_epochs", "here it is epochs, over the prompts, or ppo_epochs, over each rollout."),
        (SFTConfig, "num_train_epochs", "here it is epochs."),
        (PPOConfig, "output_dir", "did you mean run.output?"),
        (SFTConfig, "training.output-dir", "did you mean run.output?"),
        (SFTConfig, "learning_rate", "did you mean optimizer.learning_rate?"),
        (PPOConfig, "per_device_train_batch_size", "did you mean microbatch_size?"),
        (PPOConfig, "model_name_or_path", "did you mean model.name_or_path?"),
        (PPOConfig, "beta", "did you mean kl.coef?"),
        (SFTConfig, "kl_coef", "kl.coef is a setting of hydra-ppo ppo."),
        (PPOConfig, "max_length", "here it is data.max_prompt_tokens and rollout.max_new_tokens."),
        (SFTConfig, "max_length", "here it is data.max_prompt_tokens and data.max_response_tokens."),
    ],
)
def test_a_setting_of_another_trainer_is_called_by_its_name_here(config, name, says):
    assert str(unknown_setting(name, config)) == f"{name} is not a setting; {says}"


def test_every_name_leads_to_a_setting():
    both = KNOWN[PPOConfig].keys() | KNOWN[SFTConfig].keys()
    wrong = {name for name, found in NAMES.items() if not set(found) <= both}
    assert not wrong
    assert not {name for name, found in SENTENCES.items() if not {setting for setting, _ in found} <= both}


def test_no_name_hides_a_setting():
    """What a command has under that very name needs no translation, and is never asked for one."""
    hidden = [name for name in {*NAMES, *SENTENCES} if name in KNOWN[PPOConfig] and name in KNOWN[SFTConfig]]
    assert not hidden
