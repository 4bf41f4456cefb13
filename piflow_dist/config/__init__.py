"""Typed configuration behind configs/: one dataclass per yaml group, and the checks that no yaml file can make.

A wrong key is Hydra's error, a wrong value is raised here as ValueError with the option to change.
"""

from piflow_dist.config.checks import (
    CONFIG_DIR,
    ConfigError,
    require,
    require_choice,
    require_interval,
    require_positive,
)
from piflow_dist.config.composing import (
    changed_keys,
    config_from,
    config_values,
    explain,
    first_line,
    load_config,
    read_config,
    save_config,
)
from piflow_dist.config.distill import BASELINES, DistillConfig, GuidanceConfig, MeanFlowConfig
from piflow_dist.config.model import ARCHITECTURES, LoraConfig, ModelConfig, PolicyConfig, ScheduleConfig
from piflow_dist.config.run import Config
from piflow_dist.config.running import ClusterConfig, EvaluationConfig, LaunchConfig, TrackingConfig, WatchdogConfig
from piflow_dist.config.training import (
    CheckpointConfig,
    DataConfig,
    EmaConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)

__all__ = [
    "ARCHITECTURES",
    "BASELINES",
    "CONFIG_DIR",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DistillConfig",
    "EmaConfig",
    "EvaluationConfig",
    "GuidanceConfig",
    "LaunchConfig",
    "LoraConfig",
    "MeanFlowConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PolicyConfig",
    "ScheduleConfig",
    "TrackingConfig",
    "TrainConfig",
    "WatchdogConfig",
    "changed_keys",
    "config_from",
    "config_values",
    "explain",
    "first_line",
    "load_config",
    "read_config",
    "require",
    "require_choice",
    "require_interval",
    "require_positive",
    "save_config",
]
