"""What the models say of a rollout: log-probs, entropies and values of its response tokens, and of those only.

Letters: B rows, L prompt and response, T response tokens, N response tokens of all rows in one line, V vocabulary, D
width. Models are transformers' and in eval mode (no dropout); precision is that of the caller's autocast, and what
comes back is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.rl.losses import entropy
from pipeline.rl.rollouts import Rollout, microbatches


def precision(device: torch.device, bf16: bool) -> torch.autocast:
    """bf16 products with the weights as they are, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def response_logits(policy: PreTrainedModel, rollout: Rollout, temperature: float) -> Tensor:
    """logits / temperature at the response tokens, float32 [N, V].

    The hidden states are narrowed to those places on their way into the head: most of a row is prompt and padding,
    and [B, L, V] logits are the largest tensor there is. The model's own forward runs the head, so that whatever it
    does around it (a bias, a scale, a soft cap) is done.
    """
    before_N = rollout.before_N

    def narrow(head: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
        return (arguments[0].flatten(0, 1).index_select(0, before_N)[None],)

    hook = policy.get_output_embeddings().register_forward_pre_hook(narrow)
    try:
        logits_NV: Tensor = policy(input_ids=rollout.ids_BL, use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits_NV.float() if temperature == 1 else logits_NV.float() / temperature


def response_logprobs(policy: PreTrainedModel, rollout: Rollout, temperature: float) -> Tensor:
    """log pi(token | what stands before it) at the sampling temperature, [B, T], zero outside the responses."""
    logits_NV = response_logits(policy, rollout, temperature)
    return rollout.spread(-F.cross_entropy(logits_NV, rollout.targets_N, reduction="none"))


def response_values(critic: PreTrainedModel, rollout: Rollout, mean: float, std: float) -> Tensor:
    """V of the text before each response token, [B, T], zero outside the responses.

    `critic` is a sequence-classification model of one label; its raw number x is read as (x - mean) / std, the units
    of the normalised reward.
    """
    hidden_BLD = critic.base_model(input_ids=rollout.ids_BL, use_cache=False).last_hidden_state
    hidden_ND = hidden_BLD.flatten(0, 1).index_select(0, rollout.before_N)
    return rollout.spread((critic.score(hidden_ND)[:, 0].float() - mean) / std)


@torch.no_grad()
def sweep(rollout: Rollout, batch_size: int, function: Callable[[Rollout], Tensor]) -> Tensor:
    """`function` over all rows, `batch_size` of like length at a time: [rows, T] each, together [B, T]."""
    total = torch.zeros(rollout.response_ids_BT.shape, device=rollout.ids_BL.device)
    for rows in microbatches(rollout.prompt_lengths_B + rollout.lengths_B, batch_size):
        total[rows] = function(rollout.select(rows))
    return total


@torch.no_grad()
def sweep_policy(
    policy: PreTrainedModel, rollout: Rollout, batch_size: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies in nats) of all response tokens, each [B, T], zero outside the responses."""
    entropies_BT = torch.zeros(rollout.response_ids_BT.shape, device=rollout.ids_BL.device)
    logprobs_BT = torch.zeros_like(entropies_BT)
    for rows in microbatches(rollout.prompt_lengths_B + rollout.lengths_B, batch_size):
        part = rollout.select(rows)
        all_NV = response_logits(policy, part, temperature).log_softmax(dim=-1)
        logprobs_BT[rows] = part.spread(all_NV.gather(1, part.targets_N[:, None])[:, 0])
        entropies_BT[rows] = part.spread(entropy(all_NV))
    return logprobs_BT, entropies_BT
