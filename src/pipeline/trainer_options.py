"""The recipe's `trainer:` mapping: which fields of TRL's config may stand there, found out without importing TRL.

A recipe is checked before anything heavy loads, so the names of the fields are read off the source files of TRL's and
transformers' configs (they are dataclasses; tests compare with the classes themselves). Where the files cannot be found
the stage's own check against the class, in `pipeline.trainer`, is the only one.
"""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Callable, Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.reading import meant

OURS = {
    "data_seed": "seed",
    "fp16": "bf16",
    "eval_strategy": "held_out",
    "eval_steps": "held_out",
    "do_eval": "held_out",
    "per_device_eval_batch_size": "eval_rows",
    "save_strategy": "save_steps",
    "logging_strategy": "logging_steps",
    "auto_find_batch_size": "per_device_train_batch_size",
    "dataloader_drop_last": "num_train_epochs",
    "optim_target_modules": "peft",
    "activation_checkpointing": "gradient_checkpointing",
    "chat_template_path": "chat_template",
    "eos_token": "chat_template",
    "packing_strategy": "packing",
    "padding_free": "packing",
    "eval_packing": "packing",
    "truncation_mode": "max_length",
}
"""Field of TRL's config -> the field of the recipe that decides it."""

NOT_TAKEN = {
    "output_dir": "a stage works in its own folder of the store",
    "use_cpu": "the device is what is there",
    "save_total_limit": "a checkpoint goes once the next one is whole",
    "save_only_model": "a checkpoint without the optimizer's state cannot be gone on from",
    "save_on_each_node": "the store is one folder",
    "resume_from_checkpoint": "the same command goes on from the last whole checkpoint",
    "ignore_data_skip": "a resumed run would read the first rows again",
    "restore_callback_states_from_checkpoint": "llmpipe keeps its own state with a checkpoint",
    "load_best_model_at_end": "the stage is measured after it has saved",
    "eval_on_start": "the stage measures before it trains",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "report_to": "metrics.jsonl is the record",
    "disable_tqdm": "llmpipe shows its own progress (--quiet)",
    "dataloader_num_workers": "rows are tokens in memory",
    "dataloader_pin_memory": "rows are tokens in memory",
    "accelerator_config": "the rows of a step are shared by the frame, so that two processes give what one gives",
    "enable_jit_checkpoint": "a stage saves when it is asked to stop",
    "average_tokens_across_devices": "the loss is the mean over the tokens of the whole step",
    "group_by_length": "transformers 5 calls it train_sampling_strategy, a field of the stage",
    "warmup_ratio": "transformers 5 takes a share as warmup_steps, a field of the stage",
    "remove_unused_columns": "rows hold what the trainer needs and no more",
    "push_to_hub": "a stage leaves a plain Hugging Face folder, which can be uploaded",
    "model_init_kwargs": "llmpipe loads the model (`dtype`)",
    "trust_remote_code": "code that a model's folder brings along is not run",
    "dataset_kwargs": "rows are tokens before TRL sees them",
    "dataset_text_field": "rows are tokens before TRL sees them",
    "dataset_num_proc": "rows are tokens before TRL sees them",
    "shuffle_dataset": "the order of the rows is a function of the seed",
    "assistant_only_loss": "the loss falls on the assistant's words and stop tokens only, always",
    "completion_only_loss": "the loss falls on the assistant's words and stop tokens only, always",
    "pad_token": "masks come from lengths, whatever the pad token is",
    "disable_dropout": "dropout is off; that of adapters is peft.lora_dropout",
    "precompute_ref_log_probs": "the reference's log-probs are always computed before training",
    "precompute_ref_batch_size": "the reference reads the very batches that are trained on",
}
"""Field of TRL's config -> why it cannot be set."""

NOT_EXACT = {
    "deepspeed": "DeepSpeed keeps states of its own",
    "fsdp": "FSDP keeps states of its own",
    "torch_compile": "compiled code may choose other kernels",
    "use_liger_kernel": "Liger's kernels sum in no fixed order",
    "tf32": "kernels are chosen anew",
    "jit_mode_eval": "compiled code may choose other kernels",
}
"""Field -> why a run with it, resumed, may differ in its last bits from an undisturbed one."""
EXACT_OPTIMS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd")
"""Those that tests resume to the same bits on a CPU."""
FILES = ("deepspeed", "fsdp_config", "liger_kernel_config")
"""Fields that TRL takes as a mapping or as the name of a JSON file that holds one."""


def problem_with(key: str, known: Collection[str], fields: Collection[str]) -> str:
    """What is wrong with `key` of `trainer:`; empty where nothing is.

    known: names of TRL's config, empty where they could not be found; fields: names of the stage's own config.
    """
    if key in fields:
        return f"a field of the stage itself: write `{key}` beside `trainer`, not in it"
    if key in OURS:
        return f"llmpipe's to decide: the stage's field is `{OURS[key]}`"
    if key in NOT_TAKEN or key.startswith(("hub_", "push_to_hub_", "eval_")):
        return f"not taken: {NOT_TAKEN.get(key, 'the stage measures and saves in its own way')}"
    if known and key not in known:
        return f"no such field of TRL's config{meant(key, known)}"
    return ""


def inexact(options: Mapping[str, Any]) -> dict[str, str]:
    """Those of the options that a resume does not reproduce to the bit, with why."""
    found = {key: why for key, why in NOT_EXACT.items() if options.get(key)}
    if options.get("optim", EXACT_OPTIMS[0]) not in EXACT_OPTIMS:
        found["optim"] = f"{options['optim']} has not been tested"
    return found


def with_files_read(options: Mapping[str, Any], find: Callable[[str, str], Path]) -> dict[str, Any]:
    """The options, a file in place of a mapping (`deepspeed: ds.json`) read: its content is what counts.

    find: (key, file as written) -> its path. Raises ConfigError for a file that holds no JSON object.
    """
    found = dict(options)
    for key in FILES:
        if isinstance(found.get(key), str):
            path = find(key, found[key])
            try:
                found[key] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"not JSON ({error})", where=str(path)) from error
            if not isinstance(found[key], dict):
                raise ConfigError("not a JSON object", where=str(path))
    return found


@functools.cache
def config_fields(kind: str) -> frozenset[str]:
    """Names that TRL's config `kind` (SFTConfig, …) takes, read off the source; empty where that is not found."""
    stem = kind.removesuffix("Config").lower()
    places = [
        ("trl", f"trainer/{stem}_config.py", kind),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("transformers", "training_args.py", "TrainingArguments"),
    ]
    found: set[str] = set()
    for package, file, name in places:
        spec = find_spec(package)  # finds a package without importing it
        path = Path(spec.origin).parent / file if spec and spec.origin else None
        if path is None or not path.exists():
            return frozenset()
        found |= _fields_of(ast.parse(path.read_text(encoding="utf-8")), name)
    return frozenset(found)


def _fields_of(tree: ast.Module, name: str) -> set[str]:
    """The dataclass fields that class `name` declares itself, without those that its constructor does not take."""
    body = next((node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), [])
    declared = [node for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return {
        node.target.id
        for node in declared
        if isinstance(node.target, ast.Name)
        and "ClassVar" not in ast.unparse(node.annotation)
        and not (isinstance(node.value, ast.Call) and "init=False" in ast.unparse(node.value))
    }
