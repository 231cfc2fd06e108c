"""The methods that share PPO's loop, each as what it sets differently. Knows no torch: a recipe is checked with it."""

from __future__ import annotations

from typing import Any, Literal

Algorithm = Literal["ppo", "grpo", "dr_grpo", "dapo", "rloo", "reinforce++", "remax", "gspo"]
Estimator = Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce++", "remax"]

NO_CRITIC: dict[str, Any] = {"whiten_advantages": False, "missing_eos_rule": "keep"}
"""What the methods without a critic have in common; they came up with rewards that know themselves what to do with an
answer that is cut off."""

PRESETS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "grpo": {  # Shao et al. 2024 (DeepSeekMath)
        **NO_CRITIC,
        "advantage_estimator": "grpo",
        "num_generations": 8,
        "loss_aggregation": "sequence",
        "kl_loss": "k3",
        "kl_coef": 0.04,
    },
    "dr_grpo": {  # Liu et al. 2025 (Understanding R1-Zero-Like Training)
        **NO_CRITIC,
        "advantage_estimator": "dr_grpo",
        "num_generations": 8,
        "loss_aggregation": "constant",
        "kl_coef": 0.0,
    },
    "dapo": {  # Yu et al. 2025
        **NO_CRITIC,
        "advantage_estimator": "grpo",
        "num_generations": 16,
        "clip_higher": 0.28,
        "dynamic_sampling": True,
        "overlong_buffer": 0.2,
        "kl_coef": 0.0,
    },
    "rloo": {  # Ahmadian et al. 2024 (Back to Basics)
        **NO_CRITIC,
        "advantage_estimator": "rloo",
        "num_generations": 4,
        "loss_aggregation": "constant",
    },
    "reinforce++": {  # Hu et al. 2025
        "advantage_estimator": "reinforce++",
        "missing_eos_rule": "keep",
        "kl_coef": 0.01,
    },
    "remax": {  # Li et al. 2024
        **NO_CRITIC,
        "advantage_estimator": "remax",
    },
    "gspo": {  # Zheng et al. 2025
        **NO_CRITIC,
        "advantage_estimator": "grpo",
        "num_generations": 8,
        "importance_sampling_level": "sequence",
        "loss_aggregation": "sequence",
        "cliprange": 3e-4,
        "clip_higher": 4e-4,
        "num_mini_batches": 4,
        "kl_coef": 0.0,
    },
}
"""What each algorithm sets that the recipe does not."""


def needs_a_group(estimator: Estimator) -> bool:
    """Whether it compares the answers to one prompt with each other."""
    return estimator in ("grpo", "dr_grpo", "rloo")
