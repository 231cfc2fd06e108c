"""Liger's fused head and loss against ours in chunks: under Triton's interpreter, which works on CPU tensors.

A machine with a GPU runs the same comparison on it.
"""

import json
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError, MachineError
from pipeline.model.liger import check_liger
from pipeline.model.next_token import NextToken
from pipeline.model.presets import Shape, build_model

SHAPE = Shape(depth=1, width=16, heads=2, kv_heads=2, mlp_width=32, context=16, vocab=37, tied=True)
COMPARE = """
import json, os
import torch
device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
from pipeline.model.next_token import NextToken
from pipeline.model.presets import Shape, build_model

def losses_of(tied, vocab, is_fused, bf16):
    torch.manual_seed(0)
    shape = Shape(depth=1, width=16, heads=2, kv_heads=2, mlp_width=32, context=16, vocab=vocab, tied=tied)
    model = build_model("llama", shape, {}).to(device)
    ids_BT = torch.randint(0, vocab, (3, 17), device=device)
    targets_BT = ids_BT[:, 1:].clone()
    targets_BT[1, 5:] = -100
    with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
        nats, _ = NextToken(model, is_fused=is_fused)(ids_BT[:, :-1], targets_BT)
    (nats / 37).backward()
    return float(nats.detach()), {name: p.grad.float() for name, p in model.named_parameters()}

found = []
for tied, vocab in ((True, 37), (False, 37), (False, 200)):
    for bf16 in (False, True):
        fused, ours = (losses_of(tied, vocab, is_fused, bf16) for is_fused in (True, False))
        apart = {name: float((fused[1][name] - grad).norm() / grad.norm()) for name, grad in ours[1].items()}
        found.append([bf16, fused[0], ours[0], max(apart.values()), len(apart)])
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("liger_kernel") is None or find_spec("triton") is None,
    reason="liger-kernel or triton is not installed: Liger's head and loss were not compared with ours",
)
def test_fused_loss_and_gradients_are_those_in_chunks(cli: Any):
    """Tied and not, a vocabulary of no round number and one that takes several of its chunks, some targets ignored; a
    factor on the loss. Relative, over every parameter: 1e-5 in fp32, 2 % in bf16."""
    done = cli.python(COMPARE)
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 6
    for bf16, fused, ours, apart, parameters in found:
        assert fused == pytest.approx(ours, rel=1e-3 if bf16 else 1e-6)
        assert apart < (0.02 if bf16 else 1e-5)
        assert parameters >= 11


def test_it_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(MachineError, match="Liger's kernels need a CUDA device, and this one is cpu"):
        check_liger(torch.device("cpu"))
    monkeypatch.setattr("pipeline.model.liger.find_spec", lambda name: None)
    with pytest.raises(MachineError, match="liger-kernel is not installed") as caught:
        check_liger(torch.device("cuda"))
    assert caught.value.mend == 'pip install "llmpipe[gpu]"'
    monkeypatch.setattr("pipeline.model.liger.find_spec", lambda name: ModuleType(name))
    check_liger(torch.device("cuda"))


def test_logits_that_are_capped_are_refused():
    model = build_model("gemma3", SHAPE, {"final_logit_softcapping": 30.0})
    with pytest.raises(ConfigError, match="neither scaled nor capped, and no teacher"):
        NextToken(model, is_fused=True)
