"""Our generation against transformers' own, against a teacher-forced forward, and against itself."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.model import decode_attention, decoding, generation
from pipeline.model.decoding import pad_left
from pipeline.model.generation import (
    GREEDY,
    Generation,
    Sampling,
    draw_uniforms,
    generate,
    stream,
)
from pipeline.model.heard import Heard
from pipeline.model.rereading import cache_of
from pipeline.model.sampling import choose, probabilities, sample

VOCAB, PAD, STOP = 61, 0, 1

TINY = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "max_position_embeddings": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mistral": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "sliding_window": 5},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 64},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "qwen3": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, 
               "state_size": 8, "n_groups": 1},
    "gemma2": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 2.0},
    "qwen3_next": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
                   "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 0,
                   "layer_types": ["linear_attention", "full_attention"]},
}  # fmt: skip


def tiny(architecture: str) -> PreTrainedModel:
    """A random model that has opinions: spread-out logits make ties and near-ties unlikely."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture, vocab_size=VOCAB, initializer_range=0.3,
        pad_token_id=PAD, bos_token_id=2, eos_token_id=STOP,
        **TINY[architecture],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    cache_of(model)  # tried once, on tokens that tests would count
    return model


def ragged_prompts(rows: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (rows,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def hf_greedy(model: PreTrainedModel, prompts: list[list[int]], new: int) -> list[list[int]]:
    """transformers' own greedy tokens, up to and with the stop token."""
    config = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=PAD, eos_token_id=STOP)
    ids_BP, is_real_BP = pad_left(prompts, PAD)
    output_BL = model.generate(input_ids=ids_BP, attention_mask=is_real_BP.long(), generation_config=config)
    answers = output_BL[:, ids_BP.shape[1] :].tolist()
    return [answer[: answer.index(STOP) + 1] if STOP in answer else answer for answer in answers]


@pytest.mark.parametrize("architecture", TINY)
def test_greedy_is_the_greedy_of_transformers(architecture: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoding, "BLOCK", 8)  # some prompts are longer, and the cache grows three times
    model, prompts = tiny(architecture), ragged_prompts(12)
    ours = generate(model, prompts, max_new_tokens=20, stop_ids=[STOP], pad_id=PAD)
    expected = hf_greedy(model, prompts, 20)
    assert ours.responses() == expected
    assert ours.is_ended_B.tolist() == [answer[-1] == STOP for answer in expected]
    assert len({tuple(answer) for answer in expected}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("batch_size", [64, 5])
def test_samples_that_share_a_prompt_are_those_of_prompts_apart(architecture: str, batch_size: int):
    """Read once and copied, or read for every sample: the same tokens, log-probs up to float order.

    Five rows a batch cut the groups of four apart; ended rows leave; left padding and sliding windows are in it.
    """
    model = tiny(architecture)
    prompts = [prompt for prompt in ragged_prompts(5, seed=4) for _ in range(4)]
    passed = []

    def count(module: torch.nn.Module, arguments: tuple[()], given: dict[str, torch.Tensor]) -> None:
        passed.append(given["input_ids"].numel())

    def answers(group: int) -> Generation:
        passed.clear()
        with model.register_forward_pre_hook(count, with_kwargs=True):
            return generate(
                model, prompts, max_new_tokens=12, stop_ids=[STOP, 5, 9, 13], pad_id=PAD, sampling=Sampling(0.9),
                uniforms_BT=draw_uniforms(20, 12, torch.Generator().manual_seed(8)), batch_size=batch_size,
                samples_per_prompt=group,
            )  # fmt: skip

    apart = answers(1)
    read_apart = passed[0]
    shared = answers(4)
    assert shared.responses() == apart.responses()
    assert shared.is_ended_B.tolist() == apart.is_ended_B.tolist()
    torch.testing.assert_close(shared.logprobs_BT, apart.logprobs_BT, atol=1e-4, rtol=1e-4)
    assert len({tuple(answer) for answer in apart.responses()}) > 12
    if batch_size == 64:
        assert read_apart == 4 * passed[0]  # 20 rows against 5


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize(("batch_size", "group"), [(64, 1), (5, 1), (64, 2)])
def test_what_all_prompts_begin_with_is_read_once(
    architecture: str, batch_size: int, group: int, monkeypatch: pytest.MonkeyPatch
):
    """11 shared tokens, then 1 to 9 of each prompt's own: the same answers as when every row reads all of it.

    Windows of 5 and states cannot be given the padding between both, so there nothing is saved.
    """
    monkeypatch.setattr(decoding, "BLOCK", 8)
    model, begin = tiny(architecture), ragged_prompts(40, seed=7)
    shared = [token for prompt in begin for token in prompt][:11]
    prompts = [shared + prompt for prompt in ragged_prompts(12, seed=5) for _ in range(group)]
    read = []

    def count(module: torch.nn.Module, arguments: tuple[()], given: dict[str, torch.Tensor]) -> None:
        read.append(given["input_ids"].numel())

    def answers(length: int) -> Generation:
        read.clear()
        with model.register_forward_pre_hook(count, with_kwargs=True):
            return generate(
                model, prompts, max_new_tokens=12, stop_ids=[STOP, 5, 9, 13], pad_id=PAD, sampling=Sampling(0.9),
                uniforms_BT=draw_uniforms(len(prompts), 12, torch.Generator().manual_seed(8)), batch_size=batch_size,
                samples_per_prompt=group, shared=length,
            )  # fmt: skip

    apart = answers(0)
    read_apart = sum(read)
    once = answers(11)
    assert once.responses() == apart.responses()
    torch.testing.assert_close(once.logprobs_BT, apart.logprobs_BT, atol=1e-4, rtol=1e-4)
    assert len({tuple(answer) for answer in apart.responses()}) > 8
    batches = 1 if batch_size == 64 else 3
    is_shared = architecture in ("llama", "gpt2", "opt", "qwen3")
    assert read_apart - sum(read) == (11 * (12 - batches) if is_shared else 0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_left_padding_changes_nothing(architecture: str):
    """Each prompt in a batch of its own, where nothing is padded, gives the same answer."""
    model, prompts = tiny(architecture), ragged_prompts(8, seed=1)
    together = generate(model, prompts, max_new_tokens=12, stop_ids=[STOP], pad_id=PAD)
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], max_new_tokens=12, stop_ids=[STOP], pad_id=PAD)
        assert alone.responses()[0] == together.responses()[row]


def test_rows_stop_each_at_its_own_stop_token():
    model, prompts = tiny("llama"), ragged_prompts(24)
    free = generate(model, prompts, max_new_tokens=12, stop_ids=[], pad_id=PAD).responses()
    stops = [3, 4, 5, 6, 7, 8, 9, 10]
    expected = [
        answer[: min([answer.index(stop) for stop in stops if stop in answer], default=11) + 1] for answer in free
    ]
    result = generate(model, prompts, max_new_tokens=12, stop_ids=stops, pad_id=PAD)
    assert result.responses() == expected
    assert result.lengths_B.tolist() == [len(answer) for answer in expected]
    assert result.is_ended_B.tolist() == [answer[-1] in stops for answer in expected]
    assert 0 < sum(result.is_ended_B.tolist()) < 24
    after_BT = torch.arange(12)[None, :] >= result.lengths_B[:, None]
    assert (result.ids_BT[after_BT] == PAD).all()
    assert (result.logprobs_BT[after_BT] == 0).all()


@pytest.mark.slow
def test_the_batch_does_not_change_what_a_row_says(monkeypatch: pytest.MonkeyPatch):
    """Sampled answers are the same in one batch, in small ones, and whether ended rows leave or stay."""
    model, prompts = tiny("llama"), ragged_prompts(20)
    stops = list(range(1, 12))

    def answers(batch_size: int) -> list[list[int]]:
        uniforms_BT = draw_uniforms(20, 16, torch.Generator().manual_seed(7))
        return generate(
            model, prompts, max_new_tokens=16, stop_ids=stops, pad_id=PAD, sampling=Sampling(temperature=1.3),
            uniforms_BT=uniforms_BT, batch_size=batch_size,
        ).responses()  # fmt: skip

    whole = answers(64)
    assert answers(3) == whole
    monkeypatch.setattr(generation, "SHRINK_BELOW", 0.0)  # ended rows stay
    assert answers(64) == whole
    monkeypatch.setattr(generation, "SHRINK_BELOW", 1.0)  # every ended row leaves at once
    assert answers(64) == whole
    assert len({len(answer) for answer in whole}) > 4


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_logprobs_are_those_of_a_forward_over_the_whole_text(architecture: str):
    model, prompts = tiny(architecture), ragged_prompts(10)
    uniforms_BT = draw_uniforms(10, 8, torch.Generator().manual_seed(3))
    result = generate(
        model, prompts, max_new_tokens=8, stop_ids=[STOP, 5, 9], pad_id=PAD,
        sampling=Sampling(temperature=0.7),
        uniforms_BT=uniforms_BT,
    )  # fmt: skip
    for row, (prompt, answer) in enumerate(zip(prompts, result.responses(), strict=True)):
        with torch.no_grad():
            logits_LV = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        logprobs_LV = (logits_LV / 0.7).log_softmax(-1)
        expected = [logprobs_LV[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer)]
        assert result.logprobs_BT[row, : len(answer)].tolist() == pytest.approx(expected, abs=1e-4)


def test_greedy_tells_the_models_own_logprobs():
    model, prompts = tiny("llama"), ragged_prompts(6)
    result = generate(model, prompts, max_new_tokens=8, stop_ids=[STOP, 5, 9], pad_id=PAD)
    assert (result.logprobs_BT == 0).all()  # a greedy choice is certain
    for row, (prompt, answer) in enumerate(zip(prompts, result.responses(), strict=True)):
        with torch.no_grad():
            logprobs_LV = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected = [logprobs_LV[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer)]
        assert result.whole_logprobs_BT[row, : len(answer)].tolist() == pytest.approx(expected, abs=1e-4)
        assert (result.whole_logprobs_BT[row, len(answer) :] == 0).all()


def test_both_logprobs_of_a_cut_distribution():
    """Under the nucleus as transformers' warpers cut it, and under the whole distribution at the temperature."""
    model, prompts = tiny("gpt2"), ragged_prompts(8)
    result = generate(
        model, prompts, max_new_tokens=8, stop_ids=[STOP], pad_id=PAD, sampling=Sampling(1.5, top_k=20, top_p=0.7),
        uniforms_BT=draw_uniforms(8, 8, torch.Generator().manual_seed(3)),
    )  # fmt: skip
    for row, (prompt, answer) in enumerate(zip(prompts, result.responses(), strict=True)):
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        whole_TV = TemperatureLogitsWarper(1.5)(None, logits_TV)
        cut_TV = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(20)(None, whole_TV))
        places = list(range(len(answer)))
        for ours_BT, expected_TV in ((result.logprobs_BT, cut_TV), (result.whole_logprobs_BT, whole_TV)):
            expected = expected_TV.log_softmax(-1)[places, answer].tolist()
            assert ours_BT[row, : len(answer)].tolist() == pytest.approx(expected, abs=1e-4)
    assert (result.whole_logprobs_BT <= result.logprobs_BT + 1e-6).all()
    assert (result.whole_logprobs_BT < result.logprobs_BT - 0.1).any()


def test_a_draw_by_hand():
    """p = 1/2, 1/4, 1/8, 1/8 and u = 0.7: the second token, as 0.5 <= 0.7 < 0.75; of the nucleus 2/3, 1/3 too."""
    logits_BV, u_B = torch.tensor([[4.0, 2.0, 1.0, 1.0]]).log(), torch.tensor([0.7], dtype=torch.float64)
    for sampling, drawn in ((Sampling(), 1 / 4), (Sampling(top_p=0.6), 1 / 3), (Sampling(top_k=2), 1 / 3)):
        ids_B, drawn_B, whole_B = choose(logits_BV, sampling, u_B)
        assert ids_B.tolist() == [1]
        assert [drawn_B.item(), whole_B.item()] == pytest.approx([math.log(drawn), math.log(1 / 4)])
    cold_B = choose(logits_BV, Sampling(temperature=0.5, top_k=2), torch.tensor([0.81], dtype=torch.float64))
    assert cold_B[0].tolist() == [1]  # 16 / 20 = 0.8 < 0.81
    assert [cold_B[1].item(), cold_B[2].item()] == pytest.approx([math.log(4 / 20), math.log(4 / 22)])
    greedy = choose(logits_BV, GREEDY, None)
    assert [part.item() for part in greedy] == pytest.approx([0, 0, math.log(1 / 2)])


def test_rows_end_at_stop_strings():
    """Every token is a letter of an alphabet in which "ab" or "ccc" are soon said; a naive search is the measure."""
    model, prompts = tiny("llama"), ragged_prompts(24)
    decode = "".join
    letters = ["abcd", "b", "cc", "", "ca", "é", "a"]

    def text(ids: list[int]) -> str:
        return decode(letters[token % 7] for token in ids)

    given = {"max_new_tokens": 16, "stop_ids": [STOP], "pad_id": PAD, "sampling": Sampling(1.0)}
    uniforms_BT = draw_uniforms(24, 16, torch.Generator().manual_seed(2))
    free = generate(model, prompts, uniforms_BT=uniforms_BT, **given)
    found = generate(
        model, prompts, uniforms_BT=uniforms_BT, stop_strings=["dab", "ccca", "éa"], decode=text, batch_size=7, **given
    )

    def naive(ids: list[int]) -> list[int]:
        ends = (end for end in range(1, len(ids)) if any(s in text(ids[:end]) for s in ("dab", "ccca", "éa")))
        return ids[: next(ends, len(ids))]

    assert found.responses() == [naive(ids) for ids in free.responses()]
    assert 6 < sum(map(int.__lt__, found.lengths_B.tolist(), free.lengths_B.tolist())) < 24
    for ids, is_ended in zip(found.responses(), found.is_ended_B.tolist(), strict=True):
        assert is_ended == (ids[-1] == STOP or any(string in text(ids) for string in ("dab", "ccca", "éa")))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gemma3_text", "opt", "gemma2"])
@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_products_of_decoding_are_the_familys_own_attention(architecture: str, before: str):
    """In float32, where both are exact: prompts padded on the left, groups of heads, windows, capped scores."""
    model, prompts = tiny(architecture), ragged_prompts(6)
    ids_BP, is_real_BP = pad_left(prompts, PAD)
    found = []
    for name in ("eager" if architecture == "gemma2" else before, decode_attention.NAME):
        model.set_attn_implementation(name)
        with torch.no_grad():
            decoder = decoding.Decoder(model, ids_BP, is_real_BP)
            prompt_BV = decoder.logits_BV
            for _ in range(3):
                decoder.decode_one(decoder.logits_BV.argmax(-1))
        found.append(torch.stack([prompt_BV, decoder.logits_BV]))
    torch.testing.assert_close(found[1], found[0], atol=2e-4, rtol=2e-4)


def test_decoding_in_bf16_attends_by_products_and_gives_the_attention_back():
    model, prompts = tiny("llama"), ragged_prompts(4)
    called = []

    def note(module: torch.nn.Module, arguments: tuple[()]) -> None:
        called.append(module.config._attn_implementation)

    for enabled, expected in ((True, decode_attention.NAME), (False, "sdpa")):
        called.clear()
        with model.model.layers[0].self_attn.register_forward_pre_hook(note), torch.autocast("cpu", enabled=enabled):
            generate(model, prompts, max_new_tokens=3, stop_ids=[], pad_id=PAD)
        assert called == [expected] * 3
        assert model.config._attn_implementation == "sdpa"


def test_keys_in_the_dtype_of_the_products_change_nothing():
    """Under autocast the keys are kept as they are multiplied; transformers' cache keeps them wider and casts."""
    model, prompts = tiny("llama"), ragged_prompts(8)
    ids_BP, is_real_BP = pad_left(prompts, PAD)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        decoder = decoding.Decoder(model, ids_BP, is_real_BP)
        decoder.decode_one(torch.arange(8) + 3)
        cache = DynamicCache(config=model.config)
        positions_BP = (is_real_BP.long().cumsum(1) - 1).clamp(min=0)
        mask_BL = torch.nn.functional.pad(is_real_BP.long(), (0, 1), value=1)
        model(input_ids=ids_BP, attention_mask=mask_BL[:, :-1], position_ids=positions_BP, past_key_values=cache)
        expected_BV = model(
            input_ids=torch.arange(8)[:, None] + 3, attention_mask=mask_BL, position_ids=positions_BP[:, -1:] + 1,
            past_key_values=cache,
        ).logits[:, -1]  # fmt: skip
    assert {layer.keys.dtype for layer in decoder.cache.layers} == {torch.bfloat16}
    torch.testing.assert_close(decoder.logits_BV.float(), expected_BV.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.slow
def test_stream_is_generate_without_the_stop_token():
    model, prompt = tiny("llama"), [5, 9, 17]
    for seed in range(6):
        uniforms_BT = draw_uniforms(1, 20, torch.Generator().manual_seed(seed))
        sampling = Sampling(temperature=1.2, top_k=30, top_p=0.9)
        stops = list(range(1, 9))
        whole = generate(
            model,
            [prompt],
            max_new_tokens=20,
            stop_ids=stops,
            pad_id=PAD,
            sampling=sampling,
            uniforms_BT=uniforms_BT,
        )
        streamed = list(
            stream(model, prompt, max_new_tokens=20, stop_ids=stops, sampling=sampling, uniforms_T=uniforms_BT[0])
        )
        assert streamed == [token for token in whole.responses()[0] if token not in stops]
    greedy = generate(model, [prompt], max_new_tokens=9, stop_ids=[], pad_id=PAD).responses()[0]
    assert list(stream(model, prompt, max_new_tokens=9, stop_ids=[])) == greedy


def conversation(model: PreTrainedModel, heard: Heard | None) -> tuple[list[list[int]], list[int]]:
    """Answers to prompts that go on from what was said, rewrite its end, are cut down, and begin otherwise; and how
    many tokens each of them read."""
    read: list[int] = []

    def count(module: torch.nn.Module, arguments: tuple[()], given: dict[str, torch.Tensor]) -> None:
        read.append(given["input_ids"].numel())

    said, first = [], []
    prompt = list(range(5, 15))
    with model.register_forward_pre_hook(count, with_kwargs=True):
        for turn in range(6):
            place = len(read)
            answer = list(stream(model, prompt, max_new_tokens=9, stop_ids=[], heard=heard))
            said.append(answer)
            first.append(read[place])
            prompt = [
                [*prompt, *answer, 20, 21, 22],
                [*prompt, *answer[:-1], 40, 41],  # its last token is rewritten
                [*prompt],  # the same again
                [*prompt[:12], 50],  # turns were forgotten
                [33, 34, 35, 36],  # nothing alike
                [],
            ][turn]
    return said, first


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TINY)
def test_what_was_heard_is_not_read_again_and_changes_nothing(architecture: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoding, "BLOCK", 8)  # prompts end in the middle of a block and at its end
    model = tiny(architecture)
    apart, lengths = conversation(model, None)
    together, read = conversation(model, Heard())
    assert together == apart
    assert lengths == [10, 22, 32, 32, 13, 4]
    if architecture in ("llama", "gpt2", "opt", "qwen3"):
        assert read == [10, 4, 2, 1, 1, 4]  # an answer's last token was written and not read
    else:  # states, windows, biases
        assert read == lengths


def test_scaled_positions_that_depend_on_the_length_are_read_anew():
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    config = AutoConfig.for_model("llama", vocab_size=VOCAB, rope_parameters=rope, **TINY["llama"])
    model = AutoModelForCausalLM.from_config(config).eval()
    _, lengths = conversation(model, None)
    assert conversation(model, Heard())[1] == lengths


@pytest.mark.parametrize("torn", [2, 5])
def test_an_answer_broken_off_in_a_forward_is_forgotten_from_there(torn: int):
    """The first layer has the tokens, the second is interrupted: as a known prompt is read again (2), or later (5)."""
    model, heard = tiny("llama"), Heard()
    prompt = list(range(5, 15))
    answer = list(stream(model, prompt, max_new_tokens=4, stop_ids=[], heard=heard))
    longer = [*prompt, *answer, 20, 21, 22]
    calls = 0

    def interrupt(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == torn:
            raise KeyboardInterrupt

    def broken_off() -> None:
        for _ in range(2):
            list(stream(model, longer, max_new_tokens=1 if torn == 2 else 9, stop_ids=[], heard=heard))

    with model.model.layers[1].register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt):
        broken_off()
    expected = list(stream(model, longer, max_new_tokens=9, stop_ids=[]))
    assert list(stream(model, longer, max_new_tokens=9, stop_ids=[], heard=heard)) == expected


def test_probabilities_by_hand():
    # p = 1/2, 1/4, 1/8, 1/8. Temperature 1/2 squares them: 16, 4, 1, 1 of 22.
    logits_BV = torch.tensor([[4.0, 2.0, 1.0, 1.0]]).log()
    assert probabilities(logits_BV, Sampling())[0].tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125])
    cold = probabilities(logits_BV, Sampling(temperature=0.5))[0]
    assert cold.tolist() == pytest.approx([16 / 22, 4 / 22, 1 / 22, 1 / 22])
    two = probabilities(logits_BV, Sampling(top_k=2))[0]
    assert two.tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert probabilities(logits_BV, Sampling(top_k=3))[0].tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125])
    # 0.5 alone reaches 0.4; 0.5 + 0.25 are needed for 0.6; the first is kept even at 0.01.
    assert probabilities(logits_BV, Sampling(top_p=0.4))[0].tolist() == [1, 0, 0, 0]
    assert probabilities(logits_BV, Sampling(top_p=0.6))[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert probabilities(logits_BV, Sampling(top_p=0.01))[0].tolist() == [1, 0, 0, 0]


def test_probabilities_are_those_of_transformers():
    logits_BV = 3 * torch.randn(32, 200, generator=torch.Generator().manual_seed(0))
    for top_k, top_p in ((50, 1.0), (0, 0.8), (20, 0.5)):
        expected = logits_BV / 0.8
        if top_k:
            expected = TopKLogitsWarper(top_k)(None, expected)
        if top_p < 1:
            expected = TopPLogitsWarper(top_p)(None, expected)
        ours = probabilities(logits_BV, Sampling(temperature=0.8, top_k=top_k, top_p=top_p))
        torch.testing.assert_close(ours, expected.softmax(-1), atol=1e-6, rtol=1e-4)


def test_sample_inverts_the_distribution():
    """On an even grid of 1,000 numbers each token comes up its probability's share, zeros never."""
    probs = [0.0, 0.1, 0.0, 0.25, 0.65, 0.0]
    grid_B = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    ids_B = sample(torch.tensor([probs]).expand(1000, -1), grid_B)
    assert torch.bincount(ids_B, minlength=6).tolist() == [0, 100, 0, 250, 650, 0]
    edges = sample(torch.tensor([probs, probs]), torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64))
    assert edges.tolist() == [1, 4]


@pytest.mark.parametrize("vocab", [5, 128, 700, 1024])
def test_sampling_by_chunks_is_the_inverse_of_the_whole_cumulative_sum(vocab: int):
    """Peaked and flat rows, with and without zeros, chunks of nothing among them, numbers at the very ends."""
    generator = torch.Generator().manual_seed(vocab)
    logits_BV = torch.randn(600, vocab, generator=generator) * torch.tensor([0.1, 3.0, 20.0]).repeat(200)[:, None]
    logits_BV[::2, : vocab // 3] = -torch.inf
    logits_BV[1::4, -vocab // 3 :] = -torch.inf
    probs_BV = logits_BV.softmax(-1)
    uniforms_B = torch.rand(600, dtype=torch.float64, generator=generator)
    uniforms_B[:50], uniforms_B[-50:] = 0.0, math.nextafter(1.0, 0.0)
    ids_B = sample(probs_BV, uniforms_B)
    cumulative_BV = probs_BV.double().cumsum(-1)
    targets_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
    below_B = torch.where(ids_B > 0, cumulative_BV.gather(1, (ids_B - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    assert (probs_BV.gather(1, ids_B[:, None]) > 0).all()
    assert (below_B <= targets_B1[:, 0] + 1e-12).all()
    assert (cumulative_BV.gather(1, ids_B[:, None]) >= targets_B1 - 1e-12).all()
