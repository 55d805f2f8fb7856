"""Every setting of Jackpot: parsed once, strictly, before anything heavy loads. Imports neither torch nor vllm."""

from jackpot.config.algorithm import (
    AdvantageConfig,
    AlgorithmConfig,
    CorrectionConfig,
    DistillationConfig,
    KlPenaltyConfig,
)
from jackpot.config.job import JobSpec
from jackpot.config.learner import LearnerConfig, ScheduleConfig
from jackpot.config.loading import InvalidJobError, job_json_schema, load_job, parse_job
from jackpot.config.models import ActorConfig, ModelConfig
from jackpot.config.run import AlarmsConfig, RunConfig
from jackpot.config.sampling import EvaluationConfig, SamplingConfig, TaskConfig
from jackpot.config.service_sections import (
    BusConfig,
    OrchestratorConfig,
    RolloutConfig,
    ScorerConfig,
    WeightStoreConfig,
)
from jackpot.config.vllm import VllmConfig

__all__ = [
    "ActorConfig",
    "AdvantageConfig",
    "AlarmsConfig",
    "AlgorithmConfig",
    "BusConfig",
    "CorrectionConfig",
    "DistillationConfig",
    "EvaluationConfig",
    "InvalidJobError",
    "JobSpec",
    "KlPenaltyConfig",
    "LearnerConfig",
    "ModelConfig",
    "OrchestratorConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "ScorerConfig",
    "TaskConfig",
    "VllmConfig",
    "WeightStoreConfig",
    "job_json_schema",
    "load_job",
    "parse_job",
]
