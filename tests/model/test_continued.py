"""Going on from a base: new rows that stand for what their parts said, adapters that merge away."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pipeline.data.extend import add_specials, extend, pieces
from pipeline.data.tokenizers import load_tokenizer, train_bpe
from pipeline.errors import ConfigError, MismatchError
from pipeline.model.adapters import adapt
from pipeline.model.build import save_model
from pipeline.model.continued import fit_vocabulary
from pipeline.model.presets import build_model, shape_of

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"] * 20
Make = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def base() -> PreTrainedTokenizerFast:
    return train_bpe(iter(TEXTS[:1] * 20), 270)


@pytest.fixture(scope="module")
def extended(base: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    base.save_pretrained(folder / "base")
    copy = load_tokenizer(folder / "base")
    add_specials(copy, ["<|tool|>"])
    return extend(copy, iter(TEXTS), 6, folder / "extended")


@pytest.fixture
def make(base: PreTrainedTokenizerFast) -> Make:
    def make(tied: bool = True, rows: int = len(base)) -> PreTrainedModel:
        torch.manual_seed(0)
        given = {"depth": 2, "hidden_size": 32, "num_attention_heads": 2, "tie_word_embeddings": tied}
        model = build_model("llama", shape_of(given, 32, rows), {})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
        return model.eval()

    return make


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 3, 40], ids=["grown", "grown a little", "rows to spare"])
def test_new_rows_are_the_mean_of_their_parts(
    make: Make, base: PreTrainedTokenizerFast, extended: PreTrainedTokenizerFast, tied: bool, spare: int
):
    """`spare`: rows that the base has beyond its tokenizer, as padded vocabularies do."""
    model = make(tied, len(base) + spare)
    before = [
        model.get_input_embeddings().weight.detach().clone(),
        model.get_output_embeddings().weight.detach().clone(),
    ]
    ids = torch.arange(20)[None]
    logits = model(ids).logits.detach()
    assert fit_vocabulary(model, base, extended) == 7
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (tables[0] is tables[1]) == tied
    for table, old in zip(tables, before, strict=True):
        assert len(table) == max(len(extended), len(base) + spare)
        assert torch.equal(table[: len(base)], old[: len(base)])
        parts = pieces(base, extended)
        assert sorted(parts) == list(range(len(base), len(extended)))
        for row, made_of in parts.items():
            expected = old[made_of].mean(dim=0) if made_of else old[: len(base)].mean(dim=0)
            torch.testing.assert_close(table[row], expected)
    assert model.config.vocab_size == len(tables[0])
    torch.testing.assert_close(model(ids).logits[..., : len(base)], logits[..., : len(base)])


def test_the_bases_own_tokenizer_changes_nothing(make: Make, base: PreTrainedTokenizerFast):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert fit_vocabulary(model, base, base) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_another_tokenizer_is_refused(make: Make, base: PreTrainedTokenizerFast):
    with pytest.raises(MismatchError, match="neither the base's own nor an extension"):
        fit_vocabulary(make(), base, train_bpe(iter(TEXTS), 280))


LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.parametrize("train_rows", [False, True])
def test_adapters_alone_are_trained_and_merge_into_a_plain_model(
    make: Make, base: PreTrainedTokenizerFast, tmp_path: Path, train_rows: bool
):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    adapted = adapt(model, LORA, seed=3, train_rows=train_rows)
    ids = torch.arange(20)[None]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == ({"model.embed_tokens.weight"} if train_rows else set())
    assert sum("lora_A" in name for name in trained) == 2 * 7  # every matrix of both blocks, not the head
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    logits = model(ids).logits.detach()
    merged = adapted.merge_and_unload()
    assert merged is model
    assert {name for name, _ in merged.named_parameters()} == set(before)
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-5)
    moved = {name for name, p in merged.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.endswith("_proj.weight") or (train_rows and "embed" in name)}
    base.save_pretrained(tmp_path / "tokenizer")
    save_model(merged, tmp_path / "model", tmp_path / "tokenizer", [0], 3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(loaded(ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_adapters_begin_as_the_seed_says(make: Make):
    states = []
    for seed, draws in ((1, 0), (1, 5), (2, 0)):
        model = make()
        torch.rand(draws)  # what else has been drawn does not matter
        adapt(model, LORA, seed, train_rows=False)
        states.append(model.state_dict()["model.layers.0.mlp.up_proj.lora_A.default.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("modules", [["embed_tokens"], ["q_proj", "lm_head"], ["nonsense"]])
def test_adapters_where_they_would_not_be_trained_as_meant_are_refused(make: Make, modules: list[str]):
    with pytest.raises(ConfigError) as caught:
        adapt(make(), LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM"), 0, train_rows=False)
    assert caught.value.where == "pretrain.peft.target_modules"
