"""Which stage taught a model its answer: every token's log-probability under every ancestor.

With log p_s(t) of token t under the model that stage s left (s = 1 … S, the oldest first) and V tokens to choose from,

    gain_s(t) = log p_s(t) - log p_{s-1}(t),        log p_0(t) = -ln V

in nats, so that the gains of a token sum to log p_S(t) + ln V, and those of all stages but the first to
log p_S(t) - log p_1(t). A token belongs to the stage whose gain is the largest, if that is above 0 (of equal ones the
older); to none if every stage lowered it. log p_0 is what a model says that has learnt nothing.

Every model reads the same ids, those the model itself is asked with. A base model was never taught the chat template
that stands in them, and still the difference of two figures is then one of weights alone.

What this shows is correlation: where the probability rose, not which rows raised it. Shapes: S stages, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pipeline.artifacts import Artifact, Store
from pipeline.data.chat import encode_messages, encode_prompt, stop_token_id
from pipeline.data.tokenizers import encode_text, load_tokenizer
from pipeline.errors import ConfigError
from pipeline.evals.ancestors import LeftOut, ancestry
from pipeline.evals.statistics import Floats
from pipeline.evals.subject import is_chat
from pipeline.evals.training_text import Asked, nearest_rows
from pipeline.model.build import load_causal_lm, reach_of
from pipeline.model.generation import generate

CAUTION = (
    "Correlation, not cause: a stage's figure says where the probability rose, not which row raised it, "
    "and the rows are alike, not proven to be the source."
)


@dataclass(frozen=True)
class Attribution:
    """Whose each token is."""

    gains_ST: Floats
    """Nats that stage s added to token t."""
    owner_T: list[int | None]
    """The stage with the largest gain above 0; None where every stage lowered the token."""


def attribute(logprobs_ST: Floats, start: float) -> Attribution:
    """Gains and owners from log p_s(t), float64 [S, T], and log p_0 = `start`, in nats."""
    before_ST = np.vstack([np.full((1, logprobs_ST.shape[1]), start), logprobs_ST[:-1]])
    gains_ST = logprobs_ST - before_ST
    compared_ST = gains_ST.round(6)  # what differs by rounding alone is equal
    owners = zip(compared_ST.argmax(axis=0).tolist(), (compared_ST.max(axis=0) > 0).tolist(), strict=True)
    return Attribution(gains_ST, [owner if is_raised else None for owner, is_raised in owners])


@torch.inference_mode()
def token_logprobs(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> Floats:
    """log p of each token of `answer` behind `prompt` and the tokens before it, float64 [T], in nats: one forward."""
    ids_1L = torch.tensor([[*prompt, *answer]], device=model.device)
    logits_TV = model(input_ids=ids_1L, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    chosen_T = logits_TV.log_softmax(dim=-1).gather(1, ids_1L[0, len(prompt) :, None])[:, 0]
    return np.asarray(chosen_T.cpu(), dtype=np.float64)


@dataclass(frozen=True)
class Question:
    """What is asked, and the answer that is blamed (None: the model's own greedy one)."""

    prompt: str
    system: str | None = None
    answer: str | None = None
    max_new_tokens: int = 128
    rows: int = 3
    """Training rows that are shown of each stage."""


@dataclass(frozen=True)
class Answered:
    """Prompt and answer as the tokens that every model reads; the answer's stop token included where it has one."""

    prompt_ids: list[int]
    answer_ids: list[int]
    text: str
    is_chat: bool
    is_ended: bool
    """Whether the answer's last token ends a turn; otherwise it was cut off, or is a base model's."""


def blame(
    artifact: Artifact,
    store: Store,
    question: Question,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The answer, every token under every ancestor, and the nearest training rows of each stage, as plain JSON.

    docs/blame.md lists the fields. Raises ConfigError for what is no language model, for an empty prompt or answer and
    for one that the model's positions do not reach.
    """
    line = ancestry(artifact, store)
    tokenizer = load_tokenizer(artifact.model)
    model = _load(artifact, device, dtype)
    answered = _answer(artifact, model, tokenizer, question)
    ids = (answered.prompt_ids, answered.answer_ids)
    scored = [(artifact, token_logprobs(model, *ids))]
    vocabulary = _vocabulary(model)
    del model
    left_out = list(line.left_out)
    for ancestor in reversed(line.models[:-1]):
        say(f"{ancestor.reference}: scoring")
        model = _load(ancestor, device, dtype)
        reach = reach_of(model.config)
        if reach is not None and reach < sum(map(len, ids)):
            left_out.append(LeftOut(ancestor.reference, f"it reads {reach:,} tokens, and these are more"))
        else:
            scored.insert(0, (ancestor, token_logprobs(model, *ids)))
            vocabulary = _vocabulary(model)
        del model
    start = -float(np.log(vocabulary))
    logprobs_ST = np.stack([logprobs_T for _, logprobs_T in scored])
    found = attribute(logprobs_ST, start)
    models = [each for each, _ in scored]
    return {
        "model": artifact.reference,
        "fingerprint": artifact.fingerprint,
        "prompt": question.prompt,
        "system": question.system,
        "answer": answered.text,
        "generated": question.answer is None,
        "ended": answered.is_ended,
        "asked_in": "its chat template" if answered.is_chat else "plain text",
        "start_logprob": start,
        "stages": _stages(models, logprobs_ST, found, start),
        "left_out": [asdict(each) for each in left_out],
        "tokens": _tokens(tokenizer, answered.answer_ids, logprobs_ST, found),
        "nearest": _nearest(models, answered, found, tokenizer, question.rows, store, say),
        "caution": CAUTION,
    }


def _load(artifact: Artifact, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    return load_causal_lm(artifact.model, dtype=dtype).to(device).eval()


def _vocabulary(model: PreTrainedModel) -> int:
    """Tokens that the model chooses from."""
    return int(model.config.get_text_config().vocab_size)


def _answer(
    artifact: Artifact, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: Question
) -> Answered:
    """The tokens that are looked at: given, or written greedily by the model itself."""
    if not question.prompt.strip():
        raise ConfigError("nothing was asked: the prompt is empty", mend='-p "What does `json.loads` do?"')
    if question.answer is not None and not question.answer.strip():
        raise ConfigError("nothing to blame: the answer is empty", mend="leave --answer out for the model's own")
    chat = is_chat(artifact.model, tokenizer)
    if not chat and question.system is not None:
        raise ConfigError("a base model takes no system message", where=artifact.reference, mend="drop --system")
    messages = [{"role": "system", "content": question.system}] if question.system else []
    messages.append({"role": "user", "content": question.prompt})
    bos = tokenizer.bos_token_id
    plain = [*([] if bos is None else [bos]), *encode_text(tokenizer, question.prompt)]
    prompt = encode_prompt(tokenizer, messages) if chat else plain
    reach = reach_of(model.config)
    room = question.max_new_tokens if reach is None else min(question.max_new_tokens, reach - len(prompt))
    if question.answer is None:
        answer = _written(model, tokenizer, prompt, room, chat) if room > 0 else []
    elif chat:
        answer = encode_messages(tokenizer, [*messages, {"role": "assistant", "content": question.answer}]).input_ids
        answer = answer[len(prompt) :]
    else:
        answer = encode_text(tokenizer, question.answer)
    if reach is not None and (room <= 0 or len(prompt) + len(answer) > reach):
        what = f"prompt and answer have {len(prompt) + len(answer):,} tokens, and the model reads {reach:,}"
        raise ConfigError(what, where=artifact.reference, mend="a shorter text")
    ended = chat and answer[-1] == stop_token_id(tokenizer)
    text = question.answer if question.answer is not None else str(tokenizer.decode(answer[: -1 if ended else None]))
    return Answered(prompt, answer, text, chat, ended)


def _written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: list[int], room: int, chat: bool
) -> list[int]:
    eos = model.generation_config.eos_token_id
    stops = {*(eos if isinstance(eos, list) else [] if eos is None else [eos])}
    stops |= {stop_token_id(tokenizer)} if chat else set()
    return generate(model, [prompt], max_new_tokens=room, stop_ids=sorted(stops), pad_id=0).responses()[0]


def _stages(models: Sequence[Artifact], logprobs_ST: Floats, found: Attribution, start: float) -> list[dict[str, Any]]:
    """Per stage: what it is, and its totals over the answer."""
    return [
        {
            "reference": model.reference,
            "stage": model.stage or "base",
            "fingerprint": model.fingerprint,
            "over": models[place - 1].reference if place else "uniform",
            "logprob": float(logprobs_ST[place].sum()),
            "gain": float(found.gains_ST[place].sum()),
            "tokens": sum(owner == place for owner in found.owner_T),
        }
        for place, model in enumerate(models)
    ]


def _tokens(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], logprobs_ST: Floats, found: Attribution
) -> list[dict[str, Any]]:
    return [
        {
            "id": token,
            "text": str(tokenizer.decode([token])),
            "logprobs": logprobs_ST[:, t].tolist(),
            "gains": found.gains_ST[:, t].tolist(),
            "owner": found.owner_T[t],
        }
        for t, token in enumerate(ids)
    ]


def _nearest(
    models: Sequence[Artifact],
    answered: Answered,
    found: Attribution,
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    store: Store,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Of each stage that raised a word of the answer, the training rows that share most with it. The stop token is no
    word: every row has one."""
    specials = set(tokenizer.all_special_ids)
    words = [t for t, token in enumerate(answered.answer_ids) if token not in specials]
    ids = [answered.answer_ids[t] for t in words]
    shown = []
    for place, model in enumerate(models):
        is_sought = [found.owner_T[t] == place for t in words]
        if count and any(is_sought):
            say(f"{model.reference}: looking for rows")
            text = nearest_rows(model, Asked(ids, is_sought, tokenizer, count), store)
            rows = [asdict(row) for row in text.rows]
            shown.append({"stage": model.reference, "rows": rows, "notes": text.notes})
    return shown
