"""Answers of several turns: which token is whose, what is asked, where a row is cut, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.data.chat import encode_prompt, stop_token_id
from pipeline.data.tokenizers import train_bpe
from pipeline.errors import TrainingError
from pipeline.model.generation import Sampling, draw_uniforms, generate
from pipeline.rl.forwards import Reading
from pipeline.rl.learners import Learner
from pipeline.rl.rollouts import Experience, assemble, closed_rows, last_turns, rollout_of, turns
from pipeline.rl.scoring import Responses
from pipeline.rl.turns import Environment, converse
from pipeline.rl.updates import Objective, policy_part
from tests.rl.talking import DOT, ONE, PAD, TWO, ZERO, A, E, P, Q, R, Script, T, U, X, environment_of

PROMPT = [{"role": "user", "content": "p"}]
ROW = {"prompt": PROMPT, "reference": ""}


def tool(content: str) -> dict[str, str]:
    return {"role": "tool", "content": content}


def test_what_the_environment_said_is_not_the_policys_token_by_token():
    """Row 0: three turns, the tool's and a user's words between; row 1 is over after its first; row 2 is cut off."""
    heard = []

    def reply(conversations: list[Any], rows: list[Any]) -> list[Any]:
        heard.append((copy.deepcopy(conversations), [row["reference"] for row in rows]))
        conversations[0].clear()  # its own copy
        if len(heard) == 1:
            return [tool("1 2"), None]
        return [{"role": "user", "content": "r"}]

    script = Script([[Q, E], [R, R, E], [Q, Q, Q, Q, Q, Q, Q, Q, Q, Q, Q, Q]], [[X, E]], [[ONE, TWO]])
    rows = [ROW, ROW | {"reference": "b"}, ROW]
    uniforms_BT = torch.arange(36, dtype=torch.float64).view(3, 12) / 36
    written, is_policys_BT, said = converse(
        script, [[U, P, A]] * 3, rows, uniforms_BT, environment_of(reply), longest=12, pad_id=PAD
    )
    assert written.ids_BT.tolist() == [
        [Q, E, T, ONE, TWO, DOT, A, X, E, U, R, A],
        [R, R, E, *[PAD] * 9],
        [Q] * 12,
    ]
    yes, no = True, False
    assert is_policys_BT.tolist() == [
        [yes, yes, no, no, no, no, no, yes, yes, no, no, no],
        [yes, yes, yes, *[no] * 9],
        [yes] * 12,
    ]
    # The log-probs as the script gave them, zero for what was not drawn.
    expected = [-Q / 10, -E / 10, 0, 0, 0, 0, 0, -X / 10, -E / 10, 0, 0, 0]
    assert written.logprobs_BT[0].tolist() == pytest.approx(expected)
    assert written.lengths_B.tolist() == [12, 3, 12]
    assert written.is_ended_B.tolist() == [False, True, False]  # the user's words of row 0 filled it to its end

    # What was asked: the ids as drawn, and the random numbers of the places that they are for.
    assert [asked[0] for asked in script.asked] == [
        [[U, P, A]] * 3,
        [[U, P, A, Q, E, T, ONE, TWO, DOT, A]],
    ]
    assert [asked[2] for asked in script.asked] == [12, 5]
    assert script.asked[1][1].tolist() == uniforms_BT[:1, 7:].tolist()  # type: ignore[union-attr]

    first = [*PROMPT, {"role": "assistant", "content": "q"}]
    second = [*first, tool("1 2"), {"role": "assistant", "content": "x"}]
    assert heard == [([first, [*PROMPT, {"role": "assistant", "content": "r r"}]], ["", "b"]), ([second], [""])]
    assert [row["messages"] for row in said] == [
        second,
        [*PROMPT, {"role": "assistant", "content": "r r"}],
        [*PROMPT, {"role": "assistant", "content": " ".join("q" * 12)}],
    ]
    assert "messages" not in ROW

    rollout = rollout_of([[U, P, A]] * 3, written, PAD, torch.device("cpu"), is_policys_BT)
    assert last_turns(rollout) == [[X], [R, R], [Q] * 12]
    assert turns(rollout.response_mask_BT).tolist() == [2, 1, 1]
    assert rollout.targets_N.tolist() == [Q, E, X, E, R, R, E, *[Q] * 12]
    assert closed_rows(rollout, [E])[0] == [U, P, A, Q, E, T, ONE, TWO, DOT, A, X, E, U, R, A, E]


def test_turns_are_counted_and_the_last_one_is_the_response():
    environment = environment_of(lambda conversations, rows: [tool("0")] * len(conversations), max_turns=2)
    script = Script([[Q, E]], [[ONE, TWO, E]])
    written, is_policys_BT, said = converse(script, [[U, P, A]], [ROW], None, environment, longest=20, pad_id=PAD)
    assert written.ids_BT.tolist() == [[Q, E, T, ZERO, DOT, A, ONE, TWO, E]]  # and no third turn
    assert written.is_ended_B.tolist() == [True]
    rollout = rollout_of([[U, P, A]], written, PAD, torch.device("cpu"), is_policys_BT)
    responses = Responses(rollout, said, environment.tokenizer)
    assert (responses.texts, responses.prompts) == (["1 2"], ["p"])
    assert responses.conversations == [[*PROMPT, {"role": "assistant", "content": "q"}, tool("0")]]


def test_a_reply_that_leaves_no_room_cuts_the_row_off_and_is_no_part_of_the_conversation():
    environment = environment_of(lambda conversations, rows: [tool("0 1 2")] * len(conversations))
    for longest, ids in ((8, [Q, E, T, ZERO, ONE, TWO, DOT, A]), (5, [Q, E, T, ZERO, ONE])):
        written, is_policys_BT, said = converse(
            Script([[Q, E]]), [[U, P, A]], [ROW], None, environment, longest=longest, pad_id=PAD
        )
        assert written.ids_BT.tolist() == [ids]
        assert is_policys_BT.tolist() == [[True, True, *[False] * (longest - 2)]]
        assert written.is_ended_B.tolist() == [False]
        assert said[0]["messages"] == [*PROMPT, {"role": "assistant", "content": "q"}]
        rollout = rollout_of([[U, P, A]], written, PAD, torch.device("cpu"), is_policys_BT)
        assert last_turns(rollout) == [[Q]]
    # With room for one token it goes on.
    script = Script([[Q, E]], [[R, R]])
    written, *_ = converse(script, [[U, P, A]], [ROW], None, environment, longest=9, pad_id=PAD)
    assert written.ids_BT.tolist() == [[Q, E, T, ZERO, ONE, TWO, DOT, A, R]]


def test_what_the_policy_says_is_kept_as_it_was_drawn_and_typed_specials_are_letters():
    """Ids that no text gives ("the" in single letters, a special token) stay; a typed <|im_end|> ends nothing."""
    tokenizer = train_bpe(iter(["the names of the files are in the list"] * 8), 300)
    stop, odd = stop_token_id(tokenizer), [tokenizer.convert_tokens_to_ids(letter) for letter in "the"]
    assert tokenizer.encode("the") != odd
    environment = Environment(
        lambda conversations, rows: [tool("the <|im_end|> names")], "/tools.py:reply", tokenizer, 2, None
    )
    odd = [*odd, tokenizer.convert_tokens_to_ids("<|im_start|>"), *odd]
    script, prompt = Script([[*odd, stop]], [[*odd, stop]]), encode_prompt(tokenizer, PROMPT)
    written, is_policys_BT, said = converse(script, [prompt], [ROW], None, environment, longest=200, pad_id=0)
    ids = written.ids_BT[0].tolist()
    assert ids[: len(odd) + 1] == ids[-len(odd) - 1 :] == [*odd, stop]
    assert script.asked[1][0] == [prompt + ids[: -len(odd) - 1]]
    between = ids[len(odd) + 1 : -len(odd) - 1]
    assert is_policys_BT[0].tolist() == [True] * 8 + [False] * len(between) + [True] * 8
    assert between.count(stop) == 1  # the template's own
    assert tokenizer.decode(between) == ("\n<|im_start|>tool\nthe <|im_end|> names<|im_end|>\n<|im_start|>assistant\n")
    assert said[0]["messages"][1]["content"] == "the<|im_start|>the"


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=14, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.slow
def test_a_row_depends_on_no_other_and_none_outgrows_the_context():
    """The model's own turns: all together, one by one, and where the context lets fewer be written side by side."""
    model, steps = tiny(), []

    def write(prompts: Any, uniforms_BT: Any, count: int, samples: int) -> Any:
        assert all(len(prompt) + count <= 24 for prompt in prompts)
        steps.append((len(prompts), count))
        return generate(
            model, prompts, max_new_tokens=count, stop_ids=[E], pad_id=PAD, sampling=Sampling(1.0),
            uniforms_BT=uniforms_BT, batch_size=3, samples_per_prompt=samples,
        )  # fmt: skip

    rows = [{"prompt": [{"role": "user", "content": "p " * (1 + i % 5)}]} for i in range(24)]
    prompts = [[U, *[P] * (1 + i % 5), A] for i in range(24)]
    uniforms_BT = draw_uniforms(24, 17, torch.Generator().manual_seed(1))
    environment = environment_of(lambda conversations, rows: [tool("0")] * len(conversations), context=24)
    whole = converse(write, prompts, rows, uniforms_BT, environment, longest=17, pad_id=PAD)
    assert len(steps) > 3  # more calls than turns: not all could be written side by side
    assert turns(whole[1]).max() == 3
    for i in range(24):
        ids = slice(i, i + 1)
        alone = converse(write, prompts[ids], rows[ids], uniforms_BT[ids], environment, longest=17, pad_id=PAD)
        length = int(alone[0].lengths_B)
        assert length == whole[0].lengths_B[i]
        assert alone[0].ids_BT[0].tolist() == whole[0].ids_BT[i, :length].tolist()
        assert alone[1][0].tolist() == whole[1][i, :length].tolist()
        torch.testing.assert_close(alone[0].logprobs_BT[0], whole[0].logprobs_BT[i, :length])


def test_the_environments_tokens_have_no_gradient_of_their_own():
    """The policy's gradients are those of a naive loop over its own tokens; with the tool's they would be others."""
    ids = [Q, E, T, ONE, TWO, DOT, A, X, E]
    own = [0, 1, 7, 8]
    mask_BT = torch.zeros(1, 9, dtype=torch.bool)
    mask_BT[0, own] = True
    rollout = assemble(
        [[U, P, A]], torch.tensor([ids]), torch.tensor([9]), torch.tensor([True]), PAD, response_mask_BT=mask_BT
    )
    advantages_BT = torch.tensor([[1.0, -2.0, 9.0, 9.0, 9.0, 9.0, 9.0, 0.5, 3.0]])

    def naive(places: list[int]) -> dict[str, torch.Tensor]:
        model = tiny()
        logprobs = model(input_ids=rollout.ids_BL).logits[0].log_softmax(dim=-1)
        loss = sum(-advantages_BT[0, t] * logprobs[3 + t - 1, ids[t]] for t in places) / len(own)
        loss.backward()  # type: ignore[union-attr]
        return {name: parameter.grad for name, parameter in model.named_parameters()}  # type: ignore[misc]

    model = tiny()
    with torch.no_grad():
        logprobs_TV = model(input_ids=rollout.ids_BL).logits[0].log_softmax(dim=-1)
    old_BT = torch.tensor([[logprobs_TV[2 + t, token].item() for t, token in enumerate(ids)]]) * mask_BT
    zeros_BT = torch.zeros(1, 9)
    experience = Experience(rollout, mask_BT, old_BT, old_BT, advantages_BT, zeros_BT, zeros_BT)
    objective = Objective(
        Reading(1.0, False), "token", 9, "token", 0.2, None, None, None, 0.0, None, 0.0, None, 0.1, 0.0, 1.0, None
    )
    policy_part(Learner(model, 1e-5, 0.0, 1.0), experience, objective, mask_BT.float() / 4, False)
    right, wrong = naive(own), naive(list(range(9)))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, right[name], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(right["lm_head.weight"], wrong["lm_head.weight"], atol=1e-2)


@pytest.mark.parametrize(
    ("reply", "what"),
    [
        (lambda c, r: 1 / 0, "raised ZeroDivisionError"),
        (lambda c, r: [], "gave 0 replies for 1 conversations"),
        (lambda c, r: ["more"], "gave 'more' for a message"),
        (lambda c, r: [{"role": "assistant", "content": "x"}], "for a message"),
        (lambda c, r: [{"role": "tool", "content": 42}], "for a message"),
        (lambda c, r: [{"role": "tool", "content": "1", "id": "2"}], "for a message"),
        (lambda c, r: 3, "raised TypeError"),
    ],
)
def test_an_environment_that_is_wrong_is_named(reply: Any, what: str):
    with pytest.raises(TrainingError, match=what) as caught:
        converse(Script([[Q, E]]), [[U, P, A]], [ROW], None, environment_of(reply), longest=20, pad_id=PAD)
    assert caught.value.where == "/tools.py:reply"
    assert "its contract: reply(conversations" in caught.value.mend


@pytest.mark.parametrize(
    ("branch", "what"),
    [
        ("{% else %}{{ raise_exception('only user and assistant') }}{% endif %}", "only user and assistant"),
        ("{% endif %}", "writes the content of message 3 \\(role tool\\) 0 times"),
    ],
)
def test_a_role_that_the_template_lacks_is_named(branch: str, what: str):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% elif m.role == 'assistant' %}"
        "<a>{{ m.content }}<e>" + branch + "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    environment = environment_of(lambda conversations, rows: [tool("0")], template=template)
    with pytest.raises(TrainingError, match=f"role tool that does not go.*{what}"):
        converse(Script([[Q, E]]), [[U, P, A]], [ROW], None, environment, longest=20, pad_id=PAD)
