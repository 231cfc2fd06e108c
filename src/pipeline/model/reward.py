"""Reward models: a language model's trunk with one number on top, read at the last token of a row.

A reward model is a Hugging Face `*ForSequenceClassification` folder with `reward.json` beside the weights:

    mean, std       of the raw score over the sft demonstrations; a score is given as (raw - mean) / std
    pooling         "last": the number is read at a row's last token, found by its length, never by "not pad"
    suffix_ids      what every row it was trained on ends with: the stop token
    tokenizer_hash, template_hash     of the tokens and the chat template it was trained on
    adapter_base    where it was trained by adapters: the fingerprint of the model they stand on. They and the head then
                    also lie in `adapter/` as peft writes them

Without these a score means nothing, so a folder that lacks them is refused. An artifact may hold an ensemble: `model/`
is its first member, `member-1/`, `member-2/`, … are the others, each such a folder with a normaliser of its own.

Letters of shapes: B rows, T tokens (padded on the right), D width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from pipeline.artifacts import Artifact, runs_code_of, write_json
from pipeline.errors import MismatchError
from pipeline.model.adapters import add_saved_adapter, headed, worn
from pipeline.model.build import copy_tokenizer
from pipeline.runtime import Runtime

FILE = "reward.json"
ADAPTER = "adapter"
POOLING = "last"
RETRAIN = "train it again with `llmpipe reward` from the same sft model that the policy starts from"


@dataclass(frozen=True)
class RewardModel:
    """A loaded reward model. `model` is its trunk and head, for a critic to start from."""

    model: PreTrainedModel
    mean: float
    std: float
    suffix_ids: tuple[int, ...]
    tokenizer_hash: str
    template_hash: str
    bf16: bool = False
    adapter: tuple[PeftModel, str] | None = None
    """Where it stands on another model's trunk: that one's adapters, and the name of its own among them."""

    @torch.no_grad()
    def raw(self, input_ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """The number the model gives each row, float32 [B]. Padding on the right, of any id."""
        device = self.model.device
        wearing = nullcontext() if self.adapter is None else worn(*self.adapter)
        with wearing, torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return last_scores(self.model, input_ids_BT.to(device), lengths_B.to(device))

    def score(self, input_ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """(raw - mean) / std of each row, float32 [B]: 0 is what a demonstration gets, 1 a deviation above."""
        return (self.raw(input_ids_BT, lengths_B) - self.mean) / self.std

    def check_fits(self, policy: Artifact) -> None:
        """MismatchError where `policy` writes other tokens, or another chat template, than this model reads."""
        for what, own, theirs in (
            ("tokenizer", self.tokenizer_hash, policy.tokenizer_hash),
            ("chat template", self.template_hash, policy.template_hash),
        ):
            if own != theirs:
                raise MismatchError(
                    f"the reward model was trained on another {what} than {policy.reference} has", mend=RETRAIN
                )


@dataclass(frozen=True)
class Ensemble:
    """Several reward models that read the same rows, each with its own normaliser."""

    members: tuple[RewardModel, ...]

    @property
    def suffix_ids(self) -> tuple[int, ...]:
        """What every row ends with."""
        return self.members[0].suffix_ids

    def score(self, input_ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """The mean of the members' normalised scores, float32 [B]."""
        return torch.stack([member.score(input_ids_BT, lengths_B) for member in self.members]).mean(dim=0)


def last_scores(model: PreTrainedModel, input_ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """The head's number at each row's last token, float32 [B]; with gradients. The head works in float32 always."""
    is_real_BT = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device) < lengths_B[:, None]
    hidden_BTD = model.base_model(
        input_ids=input_ids_BT, attention_mask=is_real_BT.long(), use_cache=False
    ).last_hidden_state
    rows_B = torch.arange(len(lengths_B), device=input_ids_BT.device)
    with torch.autocast(input_ids_BT.device.type, enabled=False):
        scores_B: Tensor = model.score(hidden_BTD[rows_B, lengths_B - 1].to(model.score.weight.dtype))[:, 0]
    return scores_B.float()


def build_reward_model(folder: Path, pad_id: int, seed: int, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The trunk of the language model in `folder` with a new head.

    The head is drawn from N(0, 1 / (D + 1)) by `seed` (Stiennon et al. 2020, appendix B.1), so that the first scores
    have a deviation of about one whatever the width. `pad_id` must not be an id that a row can end with: transformers
    reads the score at the last token that is not it.
    """
    if runs_code_of(folder):
        raise MismatchError(
            "a model class of your own has no reward head",
            where=str(folder),
            mend="take an architecture of transformers for reward and ppo",
        )
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=dtype, attn_implementation="sdpa"
    )
    assert isinstance(model, PreTrainedModel)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        drawn = torch.randn(model.score.weight.shape, generator=generator)
        model.score.weight.copy_(drawn / math.sqrt(drawn.shape[1] + 1))
    model.config.get_text_config().pad_token_id = pad_id
    return model


def pooling_pad_id(tokenizer: PreTrainedTokenizerFast, stop_id: int) -> int:
    """An id to pad with that no row ends with: the tokenizer's pad, or another special token where pad is the stop."""
    candidates = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids]
    usable = [token for token in candidates if isinstance(token, int) and token != stop_id]
    return usable[0] if usable else int(stop_id == 0)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapters of a reward model in training, and its head, into its folder."""
    (config,) = model.peft_config.values()
    config.base_model_name_or_path = None  # where it lay on this machine
    model.save_pretrained(folder / ADAPTER)


def save_reward_model(
    model: PreTrainedModel, folder: Path, init: Artifact, *, mean: float, std: float, suffix_ids: Sequence[int]
) -> None:
    """Write the model's folder: weights, the tokenizer's files of `init`, reward.json last. What `save_adapter` has
    written there counts as trained on `init`."""
    model.save_pretrained(folder)
    copy_tokenizer(init.model, folder)
    base = {"adapter_base": init.fingerprint} if (folder / ADAPTER).exists() else {}
    write_json(
        folder / FILE,
        {
            "mean": mean,
            "std": std,
            "pooling": POOLING,
            "suffix_ids": list(suffix_ids),
            "tokenizer_hash": init.tokenizer_hash,
            "template_hash": init.template_hash,
            **base,
        },
    )


def member_folder(path: Path, member: int) -> Path:
    """Where an artifact at `path` holds a member, counted from 0."""
    return path / (f"member-{member}" if member else "model")


def members_of(artifact: Artifact) -> list[Artifact]:
    """The reward models of an artifact, each as one by itself: several of an ensemble, else the artifact alone."""
    count = 1 + len(list(artifact.path.glob("member-*"))) if artifact.manifest else 1
    if count == 1:
        return [artifact]
    folders = [member_folder(artifact.path, member) for member in range(count)]
    return [replace(artifact, path=folder, manifest={}) for folder in folders]


def load_scorer_of(artifact: Artifact, runtime: Runtime) -> RewardModel | Ensemble:
    """What an artifact scores rows with: its reward model, or its ensemble's mean. Raises as `load_reward_model`."""
    members = tuple(load_reward_model(member, runtime) for member in members_of(artifact))
    return members[0] if len(members) == 1 else Ensemble(members)


def load_reward_model(artifact: Artifact, runtime: Runtime) -> RewardModel:
    """The reward model of an artifact, on the runtime's device, for scoring.

    Raises MismatchError where reward.json is missing or lacks its normaliser, says another pooling, or speaks of
    another tokenizer or chat template than lie in the folder; and where the artifact holds an ensemble.
    """
    if len(members_of(artifact)) > 1:
        what = f"{artifact.reference} holds an ensemble, and one reward model is needed here"
        raise MismatchError(what, where=str(artifact.path), mend="train one: `ensemble: 1`")
    model = AutoModelForSequenceClassification.from_pretrained(
        artifact.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    return _of(artifact, model.to(runtime.device).eval(), runtime.bf16, None)


def stands_on(artifact: Artifact, base: Artifact) -> bool:
    """Whether the reward model was trained by adapters on `base`, and they were kept."""
    return (artifact.model / ADAPTER).exists() and read_settings(artifact).get("adapter_base") == base.fingerprint


def reward_model_on(adapters: PeftModel, artifact: Artifact, name: str, *, bf16: bool) -> RewardModel:
    """The reward model of an artifact that `stands_on` the model that has these adapters, as further ones of them.

    It holds no trunk of its own. Raises as `load_reward_model`.
    """
    head = add_saved_adapter(adapters, name, artifact.model / ADAPTER)
    trunk = adapters.get_base_model()
    assert isinstance(trunk, PreTrainedModel)
    return _of(artifact, headed(trunk, head), bf16, (adapters, name))


def _of(artifact: Artifact, model: PreTrainedModel, bf16: bool, adapter: tuple[PeftModel, str] | None) -> RewardModel:
    settings = read_settings(artifact)
    return RewardModel(
        model=model,
        mean=settings["mean"],
        std=settings["std"],
        suffix_ids=tuple(settings["suffix_ids"]),
        tokenizer_hash=settings["tokenizer_hash"],
        template_hash=settings["template_hash"],
        bf16=bf16,
        adapter=adapter,
    )


def read_settings(artifact: Artifact) -> dict[str, Any]:
    """The checked contents of reward.json."""
    path = artifact.model / FILE
    if not path.exists():
        raise MismatchError(
            f"{artifact.reference} has no {FILE}: its scores have no scale", where=str(artifact.model), mend=RETRAIN
        )
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name in ("mean", "std"):
        if not isinstance(settings.get(name), int | float) or not math.isfinite(settings[name]):
            raise MismatchError(f"the normaliser's `{name}` is missing", where=str(path), mend=RETRAIN)
    if settings["std"] <= 0:
        raise MismatchError(f"the normaliser's `std` is {settings['std']}", where=str(path), mend=RETRAIN)
    if settings.get("pooling") != POOLING:
        raise MismatchError(
            f"the score is read by pooling {settings.get('pooling')!r}, not {POOLING!r}", where=str(path), mend=RETRAIN
        )
    for name, found in (("tokenizer_hash", artifact.tokenizer_hash), ("template_hash", artifact.template_hash)):
        if settings.get(name) != found:
            what = name.removesuffix("_hash").replace("template", "chat template")
            raise MismatchError(
                f"the {what} in the folder is not the one it was trained with", where=str(path), mend=RETRAIN
            )
    if not settings.get("suffix_ids"):
        raise MismatchError("`suffix_ids` is missing", where=str(path), mend=RETRAIN)
    return settings
