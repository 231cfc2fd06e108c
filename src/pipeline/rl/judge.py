"""A judge: a language model that grades an answer by a written constitution, in this process or behind an address.

It reads the constitution, the question and the answer and is asked for a grade from 1 to 9. The score is
(grade - 1) / 8, so 0.0 to 1.0. In process the grade is the expected one, over the probabilities of the nine digits as
the next token (as G-Eval weighs its grades, Liu et al. 2023): nothing is sampled, and a judge that hesitates says so.
Nine grades and not ten, since a digit is one token to every tokenizer and "10" is not.

Letters: B answers, L tokens of a prompt, V vocabulary, G grades (9), K ids that write one digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pipeline.artifacts import Artifact
from pipeline.data.chat import encode_prompt
from pipeline.data.tokenizers import encode_text, load_tokenizer, plain_text
from pipeline.errors import MismatchError, TrainingError
from pipeline.model.build import check_vocabulary, load_causal_lm, reach_of
from pipeline.rl.rollouts import microbatches, pad_right
from pipeline.runtime import Runtime

GRADES = range(1, 10)
ASKED = (
    "{constitution}\n\n"
    "Question:\n{question}\n\n"
    "Answer:\n{answer}\n\n"
    "Grade the answer by the rules above, from 1 (worst) to 9 (best). Write the number and nothing else.\n"
)


def judge_text(constitution: str, prompt: Sequence[dict[str, str]], answer: str) -> str:
    """What a judge is asked. `prompt` is a conversation; a single message stands without its role."""
    return ASKED.format(constitution=constitution.strip(), question=question_of(prompt), answer=answer)


def question_of(prompt: Sequence[dict[str, str]]) -> str:
    """A conversation as a judge reads it; a single message stands without its role."""
    lines = [message["content"] for message in prompt]
    if len(lines) > 1:
        lines = [f"{message['role']}: {line}" for message, line in zip(prompt, lines, strict=True)]
    return "\n".join(lines)


def score_of(grade: float) -> float:
    """A grade from 1 to 9 as a score from 0.0 to 1.0."""
    return (grade - GRADES[0]) / (GRADES[-1] - GRADES[0])


def expected_scores(logits_BV: Tensor, ids_GK: Tensor) -> Tensor:
    """sum_g g p(g) / sum_g p(g) as a score from 0 to 1, where p(g) is all that the ids of grade g get. [B]"""
    chances_BG = logits_BV.float()[:, ids_GK].logsumexp(dim=-1).softmax(dim=-1)
    grades_G = torch.tensor([score_of(grade) for grade in GRADES], device=logits_BV.device)
    return chances_BG @ grades_G


@dataclass(frozen=True)
class Judge:
    """A judge in this process."""

    reference: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    constitution: str
    ids_GK: Tensor
    batch_size: int
    bf16: bool

    def score(self, prompts: Sequence[Sequence[dict[str, str]]], answers: Sequence[str]) -> Tensor:
        """The scores of `answers` to the conversations `prompts`, float32 [B].

        TrainingError where one does not fit the judge's context.
        """
        texts = [judge_text(self.constitution, *both) for both in zip(prompts, answers, strict=True)]
        rows = [self.encode(text) for text in texts]
        lengths_B, reach = torch.tensor([len(row) for row in rows]), reach_of(self.model.config)
        if reach is not None and int(lengths_B.max()) > reach:
            raise TrainingError(
                f"the judge {self.reference} reads {reach} tokens, and constitution, question and answer are "
                f"{int(lengths_B.max())}",
                mend="a shorter constitution, ppo.max_prompt_length, or a judge of a longer context",
            )
        scores_B = torch.zeros(len(rows))
        for part in microbatches(lengths_B, self.batch_size):
            ids_BL = pad_right([rows[row] for row in part.tolist()], 0)
            logits_BV = last_logits(self.model, ids_BL.to(self.model.device), lengths_B[part], self.bf16)
            scores_B[part] = expected_scores(logits_BV, self.ids_GK).cpu()
        return scores_B

    def encode(self, text: str) -> list[int]:
        """The ids the judge reads."""
        return judge_ids(self.tokenizer, text)


def judge_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids a judge reads: a user's turn where it has a chat template, else the text behind its bos."""
    if tokenizer.chat_template:
        return encode_prompt(tokenizer, [{"role": "user", "content": text}])
    bos = tokenizer.bos_token_id
    return [*([bos] if isinstance(bos, int) else []), *encode_text(tokenizer, text)]


@torch.no_grad()
def last_logits(model: PreTrainedModel, ids_BL: Tensor, lengths_B: Tensor, bf16: bool) -> Tensor:
    """The logits after each row's last token, float32 [B, V]. Padding stands on the right, where nothing sees it.

    Only these places go through the head, and through the model's own forward, so that a scale or a cap is done.
    """
    rows_B = torch.arange(len(lengths_B), device=ids_BL.device)
    last_B = lengths_B.to(ids_BL.device) - 1

    def narrow(head: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
        return (arguments[0][rows_B, last_B][None],)

    hook = model.get_output_embeddings().register_forward_pre_hook(narrow)
    try:
        with torch.autocast(ids_BL.device.type, dtype=torch.bfloat16, enabled=bf16):
            logits_BV: Tensor = model(input_ids=ids_BL, use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits_BV.float()


def load_judge(artifact: Artifact, constitution: str, *, batch_size: int, bf16: bool, runtime: Runtime) -> Judge:
    """The language model of `artifact` as a judge; any tokenizer. MismatchError where that has no digits as tokens."""
    tokenizer = load_tokenizer(artifact.model)
    model = load_causal_lm(artifact.model).to(runtime.device).eval().requires_grad_(False)
    check_vocabulary(model, len(tokenizer), "ppo.reward")
    ids_GK = grade_ids(tokenizer).to(runtime.device)
    return Judge(artifact.reference, model, tokenizer, constitution, ids_GK, batch_size, bf16)


def grade_ids(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The ids that write each grade, [G, K]."""
    return word_ids(tokenizer, [str(grade) for grade in GRADES], "each digit")


def word_ids(tokenizer: PreTrainedTokenizerFast, words: Sequence[str], what: str) -> Tensor:
    """The ids that write each word, [words, K]: K is 2 where a word's first piece is another (SentencePiece), else 1.

    MismatchError where one is not a token of its own; `what` is what it calls them.
    """
    plain = plain_text(tokenizer)
    found = []
    for word in words:
        written = [backend.encode(word, add_special_tokens=False).ids for backend in (plain.bare, plain.prefixed)]
        pieces = [ids[0] for ids in written if len(ids) == 1 and ids[0] != tokenizer.unk_token_id]
        found.append(list(dict.fromkeys(pieces)))
    width = max(map(len, found))
    if not width or len({i for ids in found for i in ids}) != width * len(words):
        raise MismatchError(
            f"the judge's tokenizer does not write {what} as a token of its own, so it can say nothing",
            where=tokenizer.name_or_path,
            mend="a judge of another tokenizer, or judge_url",
        )
    return torch.tensor(found)
