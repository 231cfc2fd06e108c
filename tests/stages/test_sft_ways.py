"""sft's ways to train: last blocks, adapters, four bits, a teacher, noise, mixtures; each resumes to the same bits."""

import hashlib
import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from pipeline.artifacts import outside_model
from pipeline.data.chat import stop_token_id
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import ConfigError, MachineError, MismatchError, Stopped
from pipeline.model.build import load_causal_lm
from pipeline.recipe import DataEntry, PeftConfig
from pipeline.schedule import schedule
from stages import sft
from tests.stages.conftest import make_model

pytestmark = pytest.mark.slow


@pytest.fixture
def config(small_run: dict[str, Any], demonstrations: Path) -> Callable[..., sft.SFTConfig]:
    """A small run; keywords change fields."""

    def make(**changed: Any) -> sft.SFTConfig:
        return sft.SFTConfig(
            **(small_run | {"data": (DataEntry(source=str(demonstrations)),), "max_steps": 4} | changed)
        )

    return make


@pytest.fixture(scope="session")
def taught_by(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Another model of the same tokenizer."""
    return outside_model(make_model(tmp_path_factory.mktemp("teacher"), seed=5))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_causal_lm(folder).named_parameters())


def sha(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def moved(init: Any, out: Path) -> set[str]:
    before, after = weights(init.model), weights(out / "model")
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


WAYS: dict[str, dict[str, Any]] = {
    "noise on the embeddings": {"trainer": {"neftune_noise_alpha": 5.0}},
    "noise, packed, adapters with dropout": {
        "trainer": {"neftune_noise_alpha": 5.0},
        "packing": True,
        "max_length": 64,
        "per_device_train_batch_size": 1,
        "peft": PeftConfig(r=4, lora_dropout=0.2),
    },
    "dora": {"peft": PeftConfig(r=4, use_dora=True)},
    "last blocks": {"train_last_layers": 1},
    "adafactor": {"trainer": {"optim": "adafactor"}},
    "sgd": {"trainer": {"optim": "sgd", "optim_args": "momentum=0.9"}},
    "fused adamw": {"trainer": {"optim": "adamw_torch_fused", "adam_beta2": 0.95}},
    "a teacher, accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_stopped_it_goes_on_to_the_same_bits(
    name: str, init: Any, taught_by: Any, runtime: Any, config: Any, lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"init": init, "teacher": taught_by if "teacher" in name else None}
    settings = config(**WAYS[name], save_steps=100, logging_steps=3)
    out, here = runtime("undisturbed")
    sft.run(settings, inputs, out, here)
    stopped, here = runtime("stopped")
    steps = iter(range(100))
    monkeypatch.setattr(here, "stop_requested", lambda: next(steps) == 2)
    with pytest.raises(Stopped, match="stopped at step 3"):
        sft.run(settings, inputs, stopped, here)
    stopped, here = runtime("stopped")
    sft.run(settings, inputs, stopped, here)
    assert here.checkpoints.resumed_from == 3
    assert sha(stopped) == sha(out)
    kept = [
        [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second", "mfu")} for line in lines(folder)]
        for folder in (out, stopped)
    ]
    assert kept[0] == kept[1]


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="the package is there")
def test_a_package_that_an_option_needs_is_named(init: Any, runtime: Any, config: Any) -> None:
    with pytest.raises(MachineError, match="bitsandbytes") as caught:
        sft.run(config(trainer={"optim": "paged_adamw_8bit"}), {"init": init}, *runtime("paged"))
    assert caught.value.where == "trainer"


def test_noise_changes_what_is_learnt_and_not_what_is_measured(init: Any, runtime: Any, config: Any) -> None:
    """NEFTune's noise is there in training alone: the held-out loss before it is that of the bare model."""
    found = {}
    for name, trainer in (("plain", {}), ("noise", {"neftune_noise_alpha": 5.0})):
        out, here = runtime(name)
        found[name] = sft.run(config(trainer=trainer), {"init": init}, out, here), sha(out)
    assert found["noise"][0]["held_out_loss_before"] == found["plain"][0]["held_out_loss_before"]
    assert found["noise"][1] != found["plain"][1]


def test_last_blocks_move_and_the_others_stay(init: Any, runtime: Any, config: Any) -> None:
    """Two blocks, a tied head: the second block and the final norm, all of them; FLOPs without the frozen backward."""
    out, here = runtime("last")
    part = sft.run(config(train_last_layers=1), {"init": init}, out, here)
    assert moved(init, out) == {
        name for name in weights(init.model) if name.startswith(("model.layers.1.", "model.norm."))
    }
    out, here = runtime("whole")
    whole = sft.run(config(), {"init": init}, out, here)
    assert moved(init, out) == set(weights(init.model))
    assert 1 / 3 < part["flops"] / whole["flops"] < 1
    with pytest.raises(ConfigError, match="3 of 2 blocks"):
        sft.run(config(train_last_layers=3), {"init": init}, *runtime("more"))


def test_dora_is_merged_as_it_was_trained(
    init: Any, runtime: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merged folder says what the adapted model said; rows of a weight change in length and in direction."""
    from pipeline import trainer as adapter

    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    said = []
    merge = adapter.trained_model

    def spy(trainer: Any, plain: Any = None) -> Any:
        with torch.no_grad():
            said.append(trainer.model.eval()(input_ids=ids).logits)
        return merge(trainer, plain)

    monkeypatch.setattr(adapter, "trained_model", spy)
    out, here = runtime("dora")
    sft.run(config(peft=PeftConfig(r=4, use_dora=True), learning_rate=1e-2), {"init": init}, out, here)
    with torch.no_grad():
        merged = load_causal_lm(out / "model").eval()(input_ids=ids).logits
        bare = load_causal_lm(init.model).eval()(input_ids=ids).logits
    torch.testing.assert_close(merged, said[0], rtol=0, atol=2e-5)
    assert float((merged - bare).abs().max()) > 0.05
    assert moved(init, out) == {name for name in weights(init.model) if name.endswith("proj.weight")}


def test_four_bits_are_refused_where_they_cannot_be(init: Any, runtime: Any, config: Any) -> None:
    with pytest.raises(MachineError, match="need a CUDA device, and this one is cpu") as caught:
        sft.run(config(load_in_4bit=True, peft=PeftConfig()), {"init": init}, *runtime("four"))
    assert caught.value.where == "sft.load_in_4bit"
    with pytest.raises(ValueError, match="add peft"):
        config(load_in_4bit=True)
    with pytest.raises(ValueError, match="exclude each other"):
        config(train_last_layers=1, peft=PeftConfig())


@pytest.mark.parametrize("peft", [PeftConfig(r=4), PeftConfig(r=4, use_dora=True)], ids=("lora", "dora"))
def test_adapters_on_four_bits_are_added_to_the_plain_weights(
    peft: PeftConfig, init: Any, runtime: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The road of QLoRA with a loader that leaves the weights as they are: the same model as LoRA's own road."""
    out, here = runtime("plain")
    sft.run(config(peft=peft), {"init": init}, out, here)
    monkeypatch.setattr("pipeline.model.four_bit.check_four_bit", lambda device, where: None)
    monkeypatch.setattr(
        "pipeline.model.four_bit.load_four_bit", lambda folder, device, *, bf16: load_causal_lm(folder).to(device)
    )
    four, here = runtime("four")
    found = sft.run(config(peft=peft, load_in_4bit=True), {"init": init}, four, here)
    own = weights(four / "model")
    for name, parameter in weights(out / "model").items():
        torch.testing.assert_close(parameter, own[name], rtol=0, atol=1e-6, msg=name)
    whole, here = runtime("whole")
    assert found["flops"] == pytest.approx(2 / 3 * sft.run(config(), {"init": init}, whole, here)["flops"])


def test_the_loss_beside_a_teacher_is_the_equation(
    init: Any, taught_by: Any, runtime: Any, config: Any, lines: Any
) -> None:
    """α·KL(teacher ‖ student)·T² + (1 − α)·CE over the trained tokens of a step, two micro-steps of it, by torch."""
    settings = config(
        max_steps=1, held_out=0.0, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        distill_alpha=0.3, distill_temperature=2.0,
    )  # fmt: skip
    out, here = runtime("taught")
    figures = sft.run(settings, {"init": init, "teacher": taught_by}, out, here)
    tokenizer = load_tokenizer(init.model)
    rows = sft._fit(sft._encode(settings, tokenizer, "train", here), stop_token_id(tokenizer), 96, here.say)
    student, teacher = load_causal_lm(init.model).eval(), load_causal_lm(taught_by.model).eval()
    order = schedule([len(row["input_ids"]) for row in rows], settings, here).order.tolist()
    kl = ce = count = 0.0
    with torch.no_grad():
        for row in (rows[i] for i in order):
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            for at in (labels[1:] != -100).nonzero().flatten().tolist():
                p, q = (model(input_ids=ids).logits[0, at] for model in (student, teacher))
                kl += float(F.kl_div((p / 2).log_softmax(-1), (q / 2).softmax(-1), reduction="sum")) * 4
                ce += float(F.cross_entropy(p, labels[at + 1]))
                count += 1
    line = lines(out)[0]
    assert line["cross_entropy"] == pytest.approx(ce / count, abs=2e-6)
    assert line["teacher_kl"] == pytest.approx(kl / count, abs=2e-6)
    assert line["loss"] == pytest.approx((0.3 * kl + 0.7 * ce) / count, abs=2e-6)
    alone, here = runtime("alone")
    assert figures["flops"] == pytest.approx(4 / 3 * sft.run(settings, {"init": init}, alone, here)["flops"])


def test_a_teacher_draws_the_student_to_it(init: Any, taught_by: Any, runtime: Any, config: Any, lines: Any) -> None:
    out, here = runtime("taught")
    settings = config(max_steps=30, learning_rate=3e-3, distill_alpha=1.0, save_steps=100)
    sft.run(settings, {"init": init, "teacher": taught_by}, out, here)
    told = [line["teacher_kl"] for line in lines(out) if "teacher_kl" in line]
    assert told[-1] < 0.5 * told[0]


def test_a_teacher_of_other_tokens_is_refused(init: Any, tmp_path: Path, runtime: Any, config: Any) -> None:
    other = tmp_path / "other"
    shutil.copytree(init.model, other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MismatchError, match="has another tokenizer than") as caught:
        sft.run(config(), {"init": init, "teacher": outside_model(other)}, *runtime("other"))
    assert caught.value.where == "sft.teacher"


@pytest.mark.parametrize("option", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_another_loss_beside_a_teacher_is_refused(config: Any, option: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"the loss is its own: no trainer.{next(iter(option))}"):
        config(teacher="pretrain", trainer=option)
    assert config(trainer=option).trainer == option


def test_a_mixture_is_drawn_by_its_weights_and_said(
    init: Any, tmp_path: Path, runtime: Any, config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """40 rows three times and 100 rows at a half: 120 of them, and as many of the 100 as their hashes say."""
    for name, count in (("sums", 40), ("animals", 100)):
        rows = [
            {"messages": [{"role": "user", "content": f"{name} {i}"}, {"role": "assistant", "content": name}]}
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config(
        data=(
            DataEntry(source=str(tmp_path / "sums.jsonl"), weight=3.0),
            DataEntry(source=str(tmp_path / "animals.jsonl"), weight=0.5),
        ),
        held_out=0.0,
        max_steps=1,
    )
    said: list[str] = []
    out, here = runtime("mixture")
    here.say = said.append  # type: ignore[method-assign]
    found = sft.run(settings, {"init": init}, out, here)
    halved = int(found["rows"]) - 120
    assert 35 <= halved <= 65
    share = 120 / (120 + halved)
    told = next(line for line in said if line.startswith("mixture: "))
    assert f"sums.jsonl × 3: 120 rows, {share:.0%}" in told
    assert f"animals.jsonl × 0.5: {halved} rows, {1 - share:.0%}" in told
