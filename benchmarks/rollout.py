"""Answers of `pipeline.model.generation.generate` against transformers' `generate`, on one batch of prompts.

    python benchmarks/rollout.py [5m | 135m | FOLDER] [batch] [new tokens] [repeats] [samples a prompt]

Models of random weights, whose tokens are all about equally likely: a Llama 256 wide, 6 layers, vocabulary 4,096
(5.5 M), and one of SmolLM2-135M's shape; or the model in FOLDER. Prompts of 8 to 32 tokens, temperature 1, nothing cut
off. Two cases: every row writes all its tokens; rows end at one of as many stop tokens as are 2 % of the vocabulary.

Both sides in bf16, by autocast and by the weights; transformers with its two kinds of attention, and with its static
cache (compiled on a GPU, as it does by itself). Compared are the best of each precision. Sides take turns; figures are
medians of the repeats. CLOCK=processor takes the processor's time (one thread, on a machine that others use).
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from pipeline.model.decoding import pad_left
from pipeline.model.generation import Sampling, draw_uniforms, generate

SHAPES = {
    "5m": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4,
           "num_key_value_heads": 4, "vocab_size": 4096},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},
}  # fmt: skip
PAD, FIRST = 0, 3
"""The pad id, and the first id that is no special one."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLOCK = time.process_time if os.environ.get("CLOCK") == "processor" else time.perf_counter


def model_of(name: str, dtype: torch.dtype) -> Any:
    """The model in eval mode on the device."""
    torch.manual_seed(0)
    if name in SHAPES:
        config = LlamaConfig(**SHAPES[name], tie_word_embeddings=True, pad_token_id=PAD, eos_token_id=None)
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(name)
    return model.to(DEVICE, dtype).eval()


def ours(model: Any, prompts: list[list[int]], stops: list[int], tokens: int, samples: int) -> int:
    """Tokens written."""
    uniforms_BT = draw_uniforms(len(prompts), tokens, torch.Generator().manual_seed(1))
    written = generate(
        model, prompts, max_new_tokens=tokens, stop_ids=stops, pad_id=PAD, sampling=Sampling(),
        uniforms_BT=uniforms_BT, batch_size=len(prompts), samples_per_prompt=samples,
    )  # fmt: skip
    return int(written.lengths_B.sum())


def theirs(model: Any, prompts: list[list[int]], stops: list[int], tokens: int, *, cache: str) -> int:
    """Tokens written."""
    ids_BP, is_real_BP = pad_left(prompts, PAD)
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, pad_token_id=PAD,
        eos_token_id=stops or None, cache_implementation=cache or None, disable_compile=DEVICE.type == "cpu",
    )  # fmt: skip
    model.generation_config.eos_token_id = None
    mask_BP = is_real_BP.long().to(DEVICE)
    output_BL = model.generate(input_ids=ids_BP.to(DEVICE), attention_mask=mask_BP, generation_config=config)
    is_stop_BT = torch.isin(output_BL[:, ids_BP.shape[1] :].cpu(), torch.tensor(stops))
    return int((is_stop_BT.long().cumsum(1) - is_stop_BT.long() == 0).sum())


def sides(name: str, samples: int) -> dict[str, Callable[[list[list[int]], list[int], int], int]]:
    """Each side: (prompts, stop tokens, new tokens) -> tokens written."""
    wide, narrow = model_of(name, torch.float32), model_of(name, torch.bfloat16)

    def side(model: Any, attention: str, autocast: bool, run: Callable[..., int]) -> Callable[..., int]:
        def one(prompts: list[list[int]], stops: list[int], tokens: int) -> int:
            model.set_attn_implementation(attention)
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=autocast):
                return run(model, prompts, stops, tokens)

        return one

    native = functools.partial(ours, samples=samples)
    found = {}
    for precision, model in (("autocast", wide), ("bf16 weights", narrow)):
        for attention in ("sdpa", "eager"):
            key = f"{precision}, {attention}"
            found[f"generate, {key}"] = side(model, attention, model is wide, functools.partial(theirs, cache=""))
        found[f"native, {precision}"] = side(model, "sdpa", model is wide, native)
    static = functools.partial(theirs, cache="static")  # fails under autocast: its cache is float32, what it gets bf16
    return found | {"generate, bf16 weights, sdpa, static": side(narrow, "sdpa", False, static)}


def measure(side: Callable[..., int], prompts: list[list[int]], stops: list[int], tokens: int) -> tuple[float, int]:
    """(seconds, tokens written) of one run."""
    begin = CLOCK()
    written = side(prompts, stops, tokens)
    return CLOCK() - begin, written


def main() -> None:
    """Run all sides in turns and print the table and the ratios."""
    name = sys.argv[1] if len(sys.argv) > 1 else "5m"
    batch, tokens, repeats, samples = (
        int(sys.argv[place]) if len(sys.argv) > place else default
        for place, default in ((2, 64), (3, 64), (4, 3), (5, 1))
    )
    chosen = sides(name, samples)
    vocab = SHAPES[name]["vocab_size"] if name in SHAPES else model_of(name, torch.bfloat16).config.vocab_size
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 33, (batch // samples,), generator=generator).tolist()
    prompts = [torch.randint(FIRST, vocab, (length,), generator=generator).tolist() for length in lengths]
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    some = (torch.randperm(vocab - FIRST, generator=generator)[: vocab // 50] + FIRST).tolist()
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{name}, {device}, torch {torch.__version__}, {batch} rows, {samples} a prompt, {tokens} new tokens")
    for case, stops in (("all rows to the end", []), ("rows end at 2 % a token", some)):
        for side in chosen.values():
            side(prompts[:samples], stops, 4)  # warm
        runs = {key: [] for key in chosen}
        for _ in range(repeats):
            for key, side in chosen.items():
                runs[key].append(measure(side, prompts, stops, tokens))
        print(case)
        rates = {key: statistics.median(written / seconds for seconds, written in found) for key, found in runs.items()}
        times = {key: statistics.median(seconds for seconds, _ in found) for key, found in runs.items()}
        for key, rate in rates.items():
            print(f"  {key:<38}{times[key]:>7.2f} s {rate:>8,.0f} tokens/s", flush=True)
        for precision in ("autocast", "bf16 weights"):
            peer = max(rate for key, rate in rates.items() if key.startswith(f"generate, {precision}"))
            print(f"  native / the best of generate, {precision}: {rates[f'native, {precision}'] / peer:.2f}")


if __name__ == "__main__":
    main()
