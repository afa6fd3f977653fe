"""Every setting of the two trainers, as frozen dataclasses, found here by name.

Each field carries its help text in ``metadata["help"]``; the command line, ``--print-config`` and the
docs all read it from there. Checks that involve one dataclass stand in its ``__post_init__``. This package
imports neither torch nor transformers, so that ``hydra-ppo --help`` answers at once.
"""

from hydra_ppo.config.data import ROW_COLUMNS as ROW_COLUMNS
from hydra_ppo.config.data import TEMPLATE_OPTIONS as TEMPLATE_OPTIONS
from hydra_ppo.config.data import DataSettings as DataSettings
from hydra_ppo.config.model import LoraSettings as LoraSettings
from hydra_ppo.config.model import ModelSettings as ModelSettings
from hydra_ppo.config.monitor import MonitorSettings as MonitorSettings
from hydra_ppo.config.ppo import KLSettings as KLSettings
from hydra_ppo.config.ppo import PPOConfig as PPOConfig
from hydra_ppo.config.practice import PtxSettings as PtxSettings
from hydra_ppo.config.practice import RehearsalSettings as RehearsalSettings
from hydra_ppo.config.rewards import RewardSettings as RewardSettings
from hydra_ppo.config.rewards import RewardSource as RewardSource
from hydra_ppo.config.rollout import RolloutSettings as RolloutSettings
from hydra_ppo.config.running import OptimizerSettings as OptimizerSettings
from hydra_ppo.config.running import RunSettings as RunSettings
from hydra_ppo.config.sft import FloorKind as FloorKind
from hydra_ppo.config.sft import SFTConfig as SFTConfig
from hydra_ppo.config.vllm import VLLMSettings as VLLMSettings
