"""How a model lies on this machine while it is trained: whole or in shards, its attention, what it recomputes."""

from __future__ import annotations

from pipeline.model.attention import check_keeps_apart, choose_attention, use_plain_products
from pipeline.model.build import recompute_activations
from pipeline.model.compiling import blocks_of
from pipeline.model.experts import use_autocast
from pipeline.model.next_token import NextToken
from pipeline.model.sharding import shard
from pipeline.runtime import Runtime


def place(
    losses: NextToken, *, length: int, bf16: bool, attention: str, apart: bool, recomputes: bool, runtime: Runtime
) -> None:
    """Make the model of `losses` ready to be trained on rows of `length` tokens, in place; says what is worth a word.

    `attention` is asked for by name, or "auto"; `apart`: documents of a row do not see each other; `recomputes`:
    activations are computed again in the backward. ConfigError where the model, or its teacher, cannot do so.
    """
    model = losses.model
    if apart:
        models = [model, *([losses.teacher.model] if losses.teacher else [])]
        check_keeps_apart([each for each in models if each.device.type != "meta"])  # rank 0 has the weights, and asks
    if runtime.shards:  # of which nothing can be tried alone
        runtime.say(shard(losses, blocks_of(model), runtime.device, runtime.world_size, evaluates="nats"))
        use_plain_products(model, bf16, length)
    else:
        chosen = choose_attention(model, bf16, length, asked=attention, apart=apart)
        if chosen:
            runtime.say(chosen)
    use_autocast(model, runtime.device)
    if recomputes:
        recompute_activations(model)
