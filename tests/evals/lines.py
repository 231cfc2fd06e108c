"""Models whose probabilities are set by hand, and a store in which they are each other's ancestors."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.artifacts import Artifact, Store
from pipeline.data.chat import encode_messages, encode_prompt, stop_token_id
from pipeline.data.shards import ShardWriter, Source
from pipeline.data.tokenizers import encode_text
from pipeline.evals.blame import Question, blame
from pipeline.model.build import save_model

Bigrams = Mapping[int, Mapping[int, float]]


def bigram_model(vocabulary: int, bigrams: Bigrams, reach: int = 64) -> LlamaForCausalLM:
    """p(next | token) as `bigrams` has it, what it leaves over spread evenly over all other tokens; without a line for
    the token, uniform. No layer: of a one-hot embedding the norm makes sqrt(V) times itself, which the head reads."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=vocabulary,
            intermediate_size=8,
            num_hidden_layers=0,
            num_attention_heads=1,
            head_dim=2,
            max_position_embeddings=reach,
            tie_word_embeddings=False,
            rms_norm_eps=0.0,
        )
    )
    table = torch.full((vocabulary, vocabulary), -math.log(vocabulary))
    for token, following in bigrams.items():
        left = (1 - sum(following.values())) / (vocabulary - len(following))
        table[token] = math.log(left)
        for other, p in following.items():
            table[token, other] = math.log(p)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(vocabulary))
        model.lm_head.weight.copy_(table.T / math.sqrt(vocabulary))
    return model


def put_model(
    store: Store,
    name: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    stop: int,
    parents: Mapping[str, list[Artifact]],
    data: list[dict[str, Any]] | None = None,
) -> Artifact:
    """The model as `tiny/<name>` of a stage of that name, made from `parents`."""
    folder = store.folder("tiny", name)
    tokenizer.save_pretrained(folder / "tokenizer")
    assert tokenizer.pad_token_id is not None
    save_model(model, folder / "model", folder / "tokenizer", [stop], tokenizer.pad_token_id)
    return put_manifest(store, name, "causal-lm", parents, data)


def put_manifest(
    store: Store,
    name: str,
    kind: str,
    parents: Mapping[str, list[Artifact]],
    data: list[dict[str, Any]] | None = None,
    fingerprint: str | None = None,
) -> Artifact:
    """The manifest that makes `tiny/<name>` an artifact."""
    folder = store.folder("tiny", name)
    recorded = {
        role: [{"reference": each.reference, "fingerprint": each.fingerprint} for each in found]
        for role, found in parents.items()
    }
    manifest = {
        "schema_version": 1,
        "stage": name,
        "name": name,
        "kind": kind,
        "fingerprint": fingerprint or f"of {name}",
        "inputs": recorded,
        "config": {"held_out": 0.0, "data": data or []},
        "parts": {"data": {}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return store.artifact("tiny", name)


def put_shards(store: Store, tokenizer: PreTrainedTokenizerFast, documents: list[list[int]]) -> Artifact:
    """`tiny/tokenize` with these documents as its training text."""
    folder = store.folder("tiny", "tokenize")
    folder.mkdir(parents=True)
    with ShardWriter(folder / "train.ds", len(tokenizer), 0, "", [Source("books")]) as shard:
        for ids in documents:
            shard.append(ids, len(ids))
    return put_manifest(store, "tokenize", "tokens", {})


class Line:
    """tokenize → pretrain → sft → dpo. To "open the door" the answer is "sum of": pretrain knows nothing, sft says its
    first token with 1/2 and the next ones with 1/4, dpo the latter with 3/4."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.store, self.tokenizer = Store(folder), tokenizer
        self.stop, self.vocabulary = stop_token_id(tokenizer), len(tokenizer)
        self.prompt = encode_prompt(tokenizer, [{"role": "user", "content": "open the door"}])
        said = encode_messages(
            tokenizer, [{"role": "user", "content": "open the door"}, {"role": "assistant", "content": "sum of"}]
        ).input_ids
        self.answer = said[len(self.prompt) :]
        assert self.answer[-1] == self.stop
        chain = [self.prompt[-1], *self.answer]
        assert len(set(chain)) == len(chain) > 3, "a bigram each"
        follow = list(itertools.pairwise(chain))
        first, rest = follow[0], follow[1:]
        planted = encode_text(tokenizer, "the sum of two")
        self.tokens = put_shards(self.store, tokenizer, [encode_text(tokenizer, "a file and a list")] * 5 + [planted])
        rows = [
            {"prompt": "sort it", "completion": "a list in place"},
            {"prompt": "add", "completion": "sum of"},
        ]
        pairs = [{"prompt": "add", "chosen": "sum of numbers", "rejected": "a file"}]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
        sft = {a: {b: 0.25} for a, b in rest} | {first[0]: {first[1]: 0.5}}
        dpo = {a: {b: 0.75} for a, b in rest} | {first[0]: {first[1]: 0.5}}
        self.pretrain = self.put("pretrain", {}, {"tokens": [self.tokens]}, stop=tokenizer.bos_token_id)
        self.sft = self.put("sft", sft, {"init": [self.pretrain]}, folder / "rows.jsonl")
        self.dpo = self.put("dpo", dpo, {"init": [self.sft]}, folder / "pairs.jsonl")

    def put(self, name: str, bigrams: Any, parents: Any, data: Path | None = None, stop: int | None = None) -> Artifact:
        model = bigram_model(self.vocabulary, bigrams)
        source = [] if data is None else [{"source": str(data)}]
        return put_model(self.store, name, model, self.tokenizer, self.stop if stop is None else stop, parents, source)

    def blame(self, artifact: Artifact | None = None, **settings: Any) -> dict[str, Any]:
        question = Question(**{"prompt": "open the door", "max_new_tokens": 12, **settings})
        return blame(artifact or self.dpo, self.store, question, device=torch.device("cpu"))
