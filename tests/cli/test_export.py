"""A plain folder of a model; adapters merged into their base."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.artifacts import Store, outside_model
from pipeline.cli.export import export, push, say_exported
from pipeline.errors import ConfigError, MismatchError, MissingInputError
from pipeline.model.adapters import lora
from pipeline.model.build import load_causal_lm
from pipeline.recipe import PeftConfig
from tests.stages.conftest import make_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def adapter(base: Path, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, torch.Tensor]:
    """An adapter folder as peft saves it, whose base is named by its path, and what the adapted model says."""
    adapted = get_peft_model(load_causal_lm(base), lora(PeftConfig(r=4, use_dora=request.param), "CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(adapted)


def test_an_adapter_is_merged_into_the_base_that_it_names(
    adapter: tuple[Path, torch.Tensor], base: Path, tmp_path: Path
) -> None:
    folder, said = adapter
    out = tmp_path / "merged"
    export(Store(tmp_path), str(folder), to="merged", out=out, base=None)
    merged = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(merged), said, rtol=0, atol=2e-5)
    assert float((said - logits(load_causal_lm(base))).abs().max()) > 0.1
    assert not list(out.glob("adapter*"))
    assert not (tmp_path / ".merged.partial").exists()
    made = outside_model(out)
    assert made.tokenizer_hash == outside_model(base).tokenizer_hash
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_the_base_can_be_named(adapter: tuple[Path, torch.Tensor], base: Path, tmp_path: Path) -> None:
    folder, said = adapter
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/nowhere/at/all"}))
    with pytest.raises(MissingInputError, match="'/nowhere/at/all' as its base, which is not there") as caught:
        export(Store(tmp_path), str(folder), to="merged", out=tmp_path / "merged", base=None)
    assert caught.value.mend == "--base REF"
    export(Store(tmp_path), str(folder), to="merged", out=tmp_path / "merged", base=str(base))
    torch.testing.assert_close(logits(load_causal_lm(tmp_path / "merged")), said, rtol=0, atol=2e-5)


def test_an_adapter_is_no_init_and_says_what_to_do(adapter: tuple[Path, torch.Tensor]) -> None:
    with pytest.raises(MissingInputError, match="an adapter without the model it stands on") as caught:
        outside_model(adapter[0])
    assert caught.value.mend.startswith(f"llmpipe export {adapter[0]} --to merged --out ")


def test_a_model_is_copied_byte_for_byte(base: Path, tmp_path: Path) -> None:
    export(Store(tmp_path), str(base), to="merged", out=tmp_path / "copy", base=None)
    names = sorted(path.name for path in base.iterdir())
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == names
    assert all((base / name).read_bytes() == (tmp_path / "copy" / name).read_bytes() for name in names)


def test_what_is_refused(base: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ConfigError, match="there is something already"):
        export(store, str(base), to="merged", out=base, base=None)
    with pytest.raises(ConfigError, match="no such form: 'onnx'"):
        export(store, str(base), to="onnx", out=tmp_path / "x", base=None)
    with pytest.raises(ConfigError, match="is no adapter"):
        export(store, str(base), to="merged", out=tmp_path / "x", base=str(base))


def test_an_adapter_of_another_shape_is_refused(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).save_pretrained(tmp_path / "wide")
    with pytest.raises(MismatchError, match="the adapter does not go into"):
        export(Store(tmp_path), str(adapter[0]), to="merged", out=tmp_path / "x", base=str(tmp_path / "wide"))
    assert not (tmp_path / "x").exists()


def evaluated(folder: Path, fingerprint: str, value: float) -> None:
    """An evaluation of a run that measured one model on two tasks, and could say nothing of a third."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"kind": "evaluation"}))
    row = {"model": "m", "fingerprint": fingerprint, "task": "bits_per_byte", "metric": "bits_per_byte", "value": value}
    alone = {"task": "greedy", "metric": "length", "value": 3 * value, "low": 3 * value, "high": 3 * value, "n": 1}
    unknown = {"task": "sampled", "value": None, "low": None, "high": None, "n": 0}
    lines = [row | {"low": value - 0.1, "high": value + 0.1, "n": 50}, row | alone, row | unknown]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_card_says_what_was_measured_on_this_very_model(trained: Path, tmp_path: Path) -> None:
    """Of two evaluations of the run, one is of another fingerprint; the hub's own reader takes the header."""
    from huggingface_hub import ModelCard

    store = Store(tmp_path / "artifacts")
    artifact = store.artifact("tiny", "pretrain")
    evaluated(tmp_path / "artifacts" / "tiny" / "eval", artifact.fingerprint, 2.5)
    evaluated(tmp_path / "artifacts" / "tiny" / "other", "0" * 64, 9.5)
    export(store, "tiny/pretrain", to="hf", out=tmp_path / "hf", base=None)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").num_parameters() > 0
    card = ModelCard.load(tmp_path / "hf" / "README.md")
    header = card.data.to_dict()
    assert header["library_name"] == "transformers"
    assert header["pipeline_tag"] == "text-generation"
    assert (header["license"], header["license_name"]) == ("other", "not-yet-chosen")
    read = [(each.metric_type, each.metric_value, each.dataset_name) for each in card.data.eval_results]
    assert read == [
        ("bits_per_byte", 2.5, "held out (eval, bits_per_byte)"),
        ("length", 7.5, "held out (eval, greedy)"),
    ]
    assert card.data.eval_results[1].metric_name == "greedy length"
    assert "| greedy | length | 7.5 | – | 1 |" in card.text
    assert "2.4 to 2.6" in card.text
    assert "| bits_per_byte | bits_per_byte | 2.5 | 2.4 to 2.6 | 50 |" in card.text
    assert "9.5" not in card.text
    assert "pretrained from scratch on text" in card.text
    assert "- `corpus` (tokenize)" in card.text  # its name, and not where it lies
    assert str(tmp_path) not in card.content
    rows = [line for line in card.text.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["tokenize", "pretrain"]


def test_an_outside_model_has_a_card_too(base: Path, tmp_path: Path) -> None:
    export(Store(tmp_path), str(base), to="hf", out=tmp_path / "hf", base=None, name="mine")
    text = (tmp_path / "hf" / "README.md").read_text()
    assert "# mine" in text
    assert "no evaluation of its run has measured this model" in text


class StandInForTheHub:
    """What of HfApi is used; remembers the calls."""

    calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repository: str, **options: Any) -> str:
        self.calls.append((repository, options))
        return f"https://hub/{repository}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))


def test_pushing_is_dry_unless_it_is_meant(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", StandInForTheHub)
    monkeypatch.setattr(StandInForTheHub, "calls", [])
    assert push(base, "me/model", really=False) == "would upload to me/model (a private repository); --yes does"
    assert StandInForTheHub.calls == []
    assert push(base, "me/model", really=True) == "uploaded to https://hub/me/model"
    (repository, made), (_, sent) = StandInForTheHub.calls
    assert (repository, made) == ("me/model", {"private": True, "exist_ok": True})
    assert (sent["repo_id"], sent["folder_path"]) == ("me/model", base)
    for name in ("model", "a/b/c", "a b/c"):
        with pytest.raises(ConfigError) as caught:
            push(base, name, really=True)
        assert caught.value.mend == "--push org/name"


def test_what_the_hub_refuses_is_told_with_what_mends_it(base: Path) -> None:
    """HF_HUB_OFFLINE=1 stands for a hub that is not there."""
    with pytest.raises(MissingInputError, match="the hub did not take it") as caught:
        push(base, "me/model", really=True)
    assert "hf auth login" in caught.value.mend


def test_forms_and_names_go_together(base: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    for to, out, dtype, words in (
        ("gguf", "model", "f32", "a file that ends in .gguf"),
        ("hf", "model.gguf", "f32", "anything else a folder"),
        ("merged", "model", "f16", "a GGUF alone has it"),
    ):
        with pytest.raises(ConfigError, match=words):
            export(store, str(base), to=to, out=tmp_path / out, base=None, dtype=dtype)
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


@pytest.mark.slow
def test_a_gguf_is_written_and_compared(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    notes = export(Store(tmp_path), str(base), to="gguf", out=tmp_path / "m.gguf", base=None)
    assert notes == ["read back: the same greedy tokens on 3 texts"]
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert "it/s" not in capfd.readouterr().err  # a bar is for a terminal


def test_a_reward_model_is_no_gguf(base: Path, tmp_path: Path) -> None:
    """By its folder's architecture; as a plain folder it can be had."""
    scorer = tmp_path / "scorer"
    shutil.copytree(base, scorer)
    config = json.loads((scorer / "config.json").read_text())
    (scorer / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(ConfigError, match="is a LlamaForSequenceClassification, and a GGUF holds a language") as caught:
        export(Store(tmp_path), str(scorer), to="gguf", out=tmp_path / "m.gguf", base=None)
    assert caught.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["scorer"]
    export(Store(tmp_path), str(scorer), to="merged", out=tmp_path / "copy", base=None)
    assert (tmp_path / "copy" / "config.json").exists()


def test_where_nothing_can_be_written(base: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"t\.txt is a file, no folder"):
        export(Store(tmp_path), str(base), to="merged", out=tmp_path / "t.txt" / "foo", base=None)


def test_pushing_is_looked_at_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    for repository, really, where in (("bad name!!/x", False, "--push"), ("x", True, "--push"), (None, True, "--yes")):
        with pytest.raises(ConfigError) as caught:
            say_exported(
                Store(tmp_path), str(base), to="hf", out=tmp_path / "hf", base=None, dtype="f32", repository=repository,
                really=really, as_json=False,
            )  # fmt: skip
        assert caught.value.where == where
    assert not [*tmp_path.iterdir()]
