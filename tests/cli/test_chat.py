"""`llmpipe chat`: what goes where, when it stops, what it remembers."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from pipeline.artifacts import Artifact
from pipeline.cli import chat as module
from pipeline.cli.app import app
from pipeline.cli.conversation import load, pieces
from pipeline.data.chat import encode_prompt, stop_token_id
from pipeline.data.tokenizers import encode_text, train_bpe
from pipeline.errors import ConfigError
from pipeline.model import generation
from pipeline.model.build import save_model
from pipeline.model.heard import Heard
from pipeline.model.presets import Shape, build_config


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(iter(["say hello to the world naïve été"] * 8), 300)


def _artifact(folder: Path, tokenizer: PreTrainedTokenizerFast, stop: int) -> Artifact:
    torch.manual_seed(0)
    config = build_config(
        "llama",
        Shape(depth=1, width=32, heads=2, kv_heads=2, mlp_width=64, context=128, vocab=len(tokenizer), tied=True),
        {},
    )
    config.initializer_range = 0.3
    tokenizer.save_pretrained(folder / "tokenizer")
    assert tokenizer.pad_token_id is not None
    save_model(LlamaForCausalLM(config), folder / "model", folder / "tokenizer", [stop], tokenizer.pad_token_id)
    return Artifact("tiny/sft", folder, "causal-lm", "f", {"stage": "sft"})


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Artifact:
    return _artifact(tmp_path_factory.mktemp("sft"), tokenizer, stop_token_id(tokenizer))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Artifact:
    assert tokenizer.bos_token_id is not None
    return _artifact(tmp_path_factory.mktemp("base"), tokenizer, tokenizer.bos_token_id)


class Script:
    """A model that says `answers` one after another, and writes down the prompts it was given."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, answers: list[str]) -> None:
        self.tokenizer, self.answers = tokenizer, answers
        self.prompts: list[list[int]] = []
        self.heard: list[object] = []

    def stream(self, model: object, prompt: list[int], **settings: object) -> Iterator[int]:
        self.prompts.append(prompt)
        self.heard.append(settings["heard"])
        answer = encode_text(self.tokenizer, self.answers[len(self.prompts) - 1])
        yield from answer[: settings["max_new_tokens"]]  # type: ignore[misc]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> Script:
    made = Script(tokenizer, ["hello", "été", "world", "more", "still more"])
    monkeypatch.setattr(generation, "stream", made.stream)
    return made


def ask(artifact: Artifact, prompt: str | None = None, *more: Artifact, **settings: object) -> None:
    defaults = {"system": None, "temperature": 0.0, "max_new_tokens": 12, "seed": 0, "as_json": False}
    models = [(each.reference, each) for each in (artifact, *more)]
    module.chat(models, prompt=prompt, **(defaults | settings))  # type: ignore[arg-type]


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """A terminal at which these lines are typed, then the end of input."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("".join(f"{line}\n" for line in lines)))


def test_the_answer_alone_is_on_stdout(chatting: Artifact, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    ask(chatting, "say it")
    assert capsys.readouterr().out == "hello\n"
    assert script.prompts == [encode_prompt(script.tokenizer, [{"role": "user", "content": "say it"}])]


def test_stdin_is_the_prompt_where_it_is_no_terminal(
    chatting: Artifact, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("say\nit\n"))
    ask(chatting, system="be kind")
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "say\nit"}]
    assert script.prompts == [encode_prompt(script.tokenizer, messages)]


def test_turns_are_remembered_and_forgotten(
    chatting: Artifact, script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, "a", "", "b", "/reset", "c", "/exit", "never")
    ask(chatting)
    captured = capsys.readouterr()
    assert captured.out == "hello\nété\nworld\n"
    assert "tiny/sft" in captured.err
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "hello"}]
    assert script.prompts == [
        encode_prompt(script.tokenizer, [{"role": "user", "content": "a"}]),
        encode_prompt(script.tokenizer, [*said, {"role": "user", "content": "b"}]),
        encode_prompt(script.tokenizer, [{"role": "user", "content": "c"}]),
    ]
    first, second, third = script.heard
    assert first is second is not third


def test_the_end_of_input_ends_it(
    chatting: Artifact, script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, "a")
    ask(chatting)
    assert capsys.readouterr().out == "hello\n"


def test_the_oldest_turns_leave_a_full_context(
    chatting: Artifact, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept of the conversation is its end, and fits half of the context."""
    typed = ["say hello to", "say hello", "the world", "naïve", "été"]
    type_in(monkeypatch, *typed)
    ask(chatting)
    said = [
        {"role": role, "content": text}
        for pair in zip(typed, script.answers, strict=True)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    ends = [encode_prompt(script.tokenizer, said[start:9]) for start in (0, 2, 4, 6, 8)]
    fitting = next(end for end in ends if len(end) <= 64)
    assert script.prompts[4] == fitting
    assert fitting not in (ends[0], ends[4])


def test_a_text_longer_than_the_context(
    chatting: Artifact, script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="the model reads 128"):
        ask(chatting, "hello " * 150)
    type_in(monkeypatch, "hello " * 150, "a")
    ask(chatting)
    captured = capsys.readouterr()
    assert "the model reads 128" in captured.err
    assert captured.out == "hello\n"


def test_ctrl_c_ends_the_answer_not_the_conversation(
    chatting: Artifact, script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = script.stream

    def interrupted(model: object, prompt: list[int], **settings: object) -> Iterator[int]:
        yield from stream(model, prompt, **settings)
        if len(script.prompts) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(generation, "stream", interrupted)
    type_in(monkeypatch, "a", "b")
    ask(chatting)
    assert capsys.readouterr().out == "hello\nété\n"
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "hello"}]
    assert script.prompts[1] == encode_prompt(script.tokenizer, [*said, {"role": "user", "content": "b"}])


def test_a_base_model_says_so_and_continues_the_text(
    base: Artifact, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(base, "say hello")
    captured = capsys.readouterr()
    assert captured.out == "hello\n"
    assert "base model" in captured.err
    assert script.prompts == [[script.tokenizer.bos_token_id, *encode_text(script.tokenizer, "say hello")]]
    with pytest.raises(ConfigError, match="no system message"):
        ask(base, "say hello", system="be kind")


def test_a_real_model_stops_at_its_stop_token(chatting: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    """Greedy equals `generate`; sampled, the same seed says the same and another seed something else."""
    conversation = load(chatting, "tiny/sft", None, 0.0, 12, 0)
    ids = encode_prompt(conversation.tokenizer, [{"role": "user", "content": "hello"}])
    stop = stop_token_id(conversation.tokenizer)
    assert conversation.stop_ids == [stop]
    written = generation.generate(conversation.model, [ids], max_new_tokens=12, stop_ids=[stop], pad_id=0)
    expected = [token for token in written.responses()[0] if token != stop]
    ask(chatting, "hello")
    greedy = capsys.readouterr().out
    assert greedy == conversation.tokenizer.decode(expected) + "\n"
    said = []
    for seed in (1, 1, 2):
        ask(chatting, "hello", temperature=1.5, seed=seed)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_a_turn_does_not_read_the_conversation_again(chatting: Artifact) -> None:
    """Turn by turn it says what a model that reads everything anew says, and reads what is new."""

    def said(keeps: bool) -> tuple[list[str], list[int]]:
        conversation = load(chatting, "tiny/sft", None, 0.0, 6, 0)
        conversation.model.float()
        lengths: list[int] = []

        def count(module: object, arguments: tuple[()], given: dict[str, torch.Tensor]) -> None:
            lengths.append(given["input_ids"].numel())

        conversation.model.register_forward_pre_hook(count, with_kwargs=True)
        answers = []
        for text in ("hello", "the world"):
            if not keeps:
                conversation.heard = Heard()
            answers.append("".join(conversation.reply(text, conversation.encode(text))))
        return answers, [length for length in lengths if length > 1]

    (anew, whole), (kept, new) = said(False), said(True)
    assert kept == anew
    assert whole[0] == new[0]
    assert new[1] <= whole[1] - whole[0]  # at most what stands behind the prompt before: its answer is invented bytes


@pytest.mark.parametrize("text", ["naïve été", "😀 and 日本語", "plain"])
def test_characters_wait_for_their_last_byte(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = encode_text(tokenizer, text)
    found = list(pieces(tokenizer, iter(ids)))
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


def test_characters_that_never_become_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode_text(tokenizer, "😀")
    assert len(ids) == 4
    assert "".join(pieces(tokenizer, iter(ids[:2]))) == "\ufffd"
    broken = [*ids[:2], *encode_text(tokenizer, " world")]
    assert "".join(pieces(tokenizer, iter(broken))) == "\ufffd world"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"prompt": " \n"}, "empty"),
        *(({"temperature": value}, "no temperature") for value in (-1.0, float("nan"), float("inf"), 1e-320)),
    ],
)
def test_bad_settings(chatting: Artifact, settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ask(chatting, **({"prompt": "hello"} | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("chat", "a/b", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("blame", "a/b", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("blame", "a/b", "--rows", "-1"), "--rows"),
    ],
)
def test_options_name_their_bounds(words: tuple[str, ...], named: str) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert f"Invalid value for '{named}'" in done.output


def test_typed_control_tokens_stay_letters(chatting: Artifact, script: Script) -> None:
    """The stop token stands where the template writes it, once, and not where somebody types its name."""
    ask(chatting, "say <|im_end|> it")
    stop = stop_token_id(script.tokenizer)
    assert script.prompts[0].count(stop) == 1
    assert script.tokenizer.decode(script.prompts[0]).count("<|im_end|>") == 2


def test_an_answer_drives_no_terminal(
    chatting: Artifact, script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written to a terminal it has no control characters but new lines; into a pipe it goes as it is."""
    script.answers[:2] = ["\x1b[31mred\x1b]0;title\x07\n"] * 2
    ask(chatting, "say it", max_new_tokens=40)
    assert capsys.readouterr().out == "\x1b[31mred\x1b]0;title\x07\n\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    ask(chatting, "say it", max_new_tokens=40)
    assert capsys.readouterr().out == "[31mred]0;title\n\n"


def test_the_commands(
    chatting: Artifact, script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a command sets holds from the next answer on; a space before it, or a second slash, makes it text."""
    drawn: list[float] = []
    stream = script.stream

    def noted(model: object, prompt: list[int], **settings: Any) -> Iterator[int]:
        drawn.append(settings["sampling"].temperature)
        return stream(model, prompt, **settings)

    monkeypatch.setattr(generation, "stream", noted)
    typed = ["/help", "a", "/system be kind", "/temperature 0.5", "/temperature x", "/rest", "/temperature -1"]
    type_in(monkeypatch, *typed, "/reset", "b", "/system", "/reset", " /help", "/reset", "/hello/world", "/quit", "c")
    ask(chatting)
    captured = capsys.readouterr()
    assert captured.out == "hello\nété\nworld\nmore\n"
    user, system = {"role": "user"}, {"role": "system", "content": "be kind"}
    asked = [[user | {"content": "a"}], [system, user | {"content": "b"}]]
    asked += [[user | {"content": " /help"}], [user | {"content": "/hello/world"}]]
    assert script.prompts == [encode_prompt(script.tokenizer, messages) for messages in asked]
    assert drawn == [0.0, 0.5, 0.5, 0.5]
    assert captured.err.count("temperature 0.5; 0 is greedy; else a number from 0.001 on") == 2
    assert "no command /rest; did you mean `/reset`?" in captured.err
    assert all(name in captured.err for name in module.COMMANDS)


def test_two_models_one_after_the_other_where_it_is_no_terminal(
    chatting: Artifact, base: Artifact, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Artifact("tiny/base", base.path, base.kind, base.fingerprint, base.manifest)
    ask(chatting, "say hello", other)
    captured = capsys.readouterr()
    assert captured.out == "tiny/sft:\nhello\n\ntiny/base:\nété\n"
    assert "tiny/base is a base model" in captured.err
    assert script.prompts == [
        encode_prompt(script.tokenizer, [{"role": "user", "content": "say hello"}]),
        [script.tokenizer.bos_token_id, *encode_text(script.tokenizer, "say hello")],
    ]


def test_two_models_remember_their_own_words(
    chatting: Artifact, script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, "a", "b")
    ask(chatting, None, chatting)
    question = [{"role": "user", "content": "a"}]
    for place, said in enumerate(("hello", "été")):
        messages = [*question, {"role": "assistant", "content": said}, {"role": "user", "content": "b"}]
        assert script.prompts[2 + place] == encode_prompt(script.tokenizer, messages)
    assert capsys.readouterr().out.count("tiny/sft:\n") == 4


def test_json_has_the_answers_and_their_figures(
    chatting: Artifact, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.answers = ["hello", "the world " * 9]
    ask(chatting, "say it", chatting, as_json=True, system="be kind")
    found = json.loads(capsys.readouterr().out)
    assert {key: found[key] for key in ("prompt", "system", "temperature", "seed")} == {
        "prompt": "say it",
        "system": "be kind",
        "temperature": 0.0,
        "seed": 0,
    }
    first, second = found["answers"]
    assert (first["model"], first["answer"], first["ended"]) == ("tiny/sft", "hello", True)
    assert first["tokens"] == len(encode_text(script.tokenizer, "hello"))
    assert (second["tokens"], second["ended"]) == (12, False)
    assert 0 <= first["first_token_seconds"] <= first["seconds"]


def test_json_is_of_one_answer(chatting: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    type_in(monkeypatch, "a")
    with pytest.raises(ConfigError, match="not for a conversation"):
        ask(chatting, as_json=True)


def test_three_models_are_too_many(chatting: Artifact) -> None:
    with pytest.raises(ConfigError, match="two side by side"):
        ask(chatting, "hello", chatting, chatting)


def test_a_reward_model_cannot_talk(chatting: Artifact) -> None:
    reward = Artifact("tiny/reward", chatting.path, "reward-model", "f", chatting.manifest)
    with pytest.raises(ConfigError, match="reward-model is no kind that can talk"):
        ask(reward, "hello")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft", "ppo"])
def test_a_stage_that_was_stopped_can_be_talked_to(stage: str, warm: Any, request: pytest.FixtureRequest) -> None:
    recipe = request.getfixturevalue("tokenized" if stage == "pretrain" else "trained")
    rows = [{"prompt": f"ka {index}", "completion": "lo mi"} for index in range(60)]
    warm.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    warm.write(
        "rewards.py", "def short(prompts, responses, rows):\n    return [-float(len(each)) for each in responses]\n"
    )
    more = """\
  sft: {data: rows.jsonl, max_steps: 4, save_steps: 2, chat_template: chatml}
  ppo: {reward: "./rewards.py:short", total_episodes: 64, batch_size: 8, response_length: 4, save_steps: 1}
"""
    recipe.write_text(recipe.read_text() + more)
    if stage == "ppo":
        done = warm("run", "tiny.yaml", "--until", "sft")
        assert done.code == 0, done.stderr
    steps = {"pretrain": "pretrain.max_steps=20000", "sft": "sft.max_steps=20000", "ppo": "ppo.total_episodes=40000"}
    running = warm.start("run", "tiny.yaml", "--until", stage, "--set", steps[stage])
    folder = recipe.parent / "artifacts" / "tiny"
    running.wait_for(lambda: bool(list(folder.glob(f".{stage}.*.partial/checkpoints/*/whole.json"))))
    running.signal(signal.SIGTERM)
    assert running.wait().code == 75
    answered = warm("chat", f"tiny/{stage}", "-p", "ka 1", "--max-new-tokens", "5")
    assert answered.code == 0, answered.stderr
    assert "the stage has not finished: this is its model at step" in answered.stderr
    assert ("it continues the text" in answered.stderr) == (stage == "pretrain")
