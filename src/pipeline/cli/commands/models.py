"""chat, blame, export: one model at a time."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import completion
from pipeline.cli.options import (
    ArtifactsOption,
    JsonOption,
    LongestOption,
    ReferenceArgument,
    SystemOption,
)


def chat(
    references: Annotated[
        list[str],
        typer.Argument(
            help="run/stage, ./folder or hub:org/name; two of them answer side by side",
            autocompletion=completion.references,
        ),
    ],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="answer this and end")] = None,
    system: SystemOption = None,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy")] = 0.0,
    max_new_tokens: LongestOption = 256,
    seed: Annotated[int, typer.Option("--seed", help="seed of the sampling")] = 0,
    artifacts: ArtifactsOption = None,
    json: JsonOption = False,
) -> None:
    """Talk to a model, or to two side by side: answers stream on stdout."""
    from pipeline.artifacts import Store
    from pipeline.cli.chat import chat as talk
    from pipeline.cli.session import artifacts_root
    from pipeline.roles import to_talk_to

    store = Store(artifacts_root(artifacts))
    talk(
        [(reference, to_talk_to(store, reference)) for reference in references],
        prompt=prompt,
        system=system,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        as_json=json,
    )


def blame(
    reference: ReferenceArgument,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="what is asked; else stdin")] = None,
    answer: Annotated[str | None, typer.Option("--answer", help="blame this, not its own greedy one")] = None,
    system: SystemOption = None,
    max_new_tokens: LongestOption = 128,
    rows: Annotated[int, typer.Option("--rows", help="training rows shown of each stage", min=0)] = 3,
    keep: Annotated[bool, typer.Option("--keep", help="show it in the report of the model's run too")] = False,
    artifacts: ArtifactsOption = None,
    json: JsonOption = False,
) -> None:
    """Which stage taught it this? Every token of an answer under every ancestor of the model."""
    from pipeline.artifacts import Store
    from pipeline.cli.blame import blame_answer
    from pipeline.cli.session import artifacts_root

    blame_answer(
        Store(artifacts_root(artifacts)),
        reference,
        prompt=prompt,
        system=system,
        answer=answer,
        max_new_tokens=max_new_tokens,
        rows=rows,
        keep=keep,
        as_json=json,
    )


def export(
    reference: ReferenceArgument,
    out: Annotated[Path, typer.Option("--out", help="the folder or the .gguf file to write, which is not there yet")],
    to: Annotated[
        str, typer.Option("--to", help="hf: with a model card; merged: the plain folder; gguf: one file for llama.cpp")
    ] = "merged",
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="what an adapter stands on, unless it is where its config says",
            autocompletion=completion.references,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="of a GGUF: f32, bf16, f16 or q8_0")] = "f32",
    push: Annotated[
        str | None, typer.Option("--push", help="hf: org/name on the hub; says what it would upload")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="--push: really upload, with your token")] = False,
    artifacts: ArtifactsOption = None,
    json: JsonOption = False,
) -> None:
    """A model for others to use: a folder with its card, a plain one, or a GGUF; adapters are merged."""
    from pipeline.artifacts import Store
    from pipeline.cli.export import say_exported
    from pipeline.cli.session import artifacts_root

    say_exported(
        Store(artifacts_root(artifacts)),
        reference,
        to=to,
        out=out,
        base=base,
        dtype=dtype,
        repository=push,
        really=yes,
        as_json=json,
    )


def serve(
    reference: ReferenceArgument,
    port: Annotated[int, typer.Option("--port", help="0 takes a free one", min=0, max=65535)] = 8000,
    host: Annotated[str, typer.Option("--host", help="address to listen on; this machine alone unless set")] = (
        "127.0.0.1"
    ),
    engine: Annotated[str, typer.Option("--engine", help="transformers or vllm")] = "transformers",
    artifacts: ArtifactsOption = None,
    json: JsonOption = False,
) -> None:
    """An OpenAI-compatible endpoint of a model."""
    from pipeline.artifacts import Store
    from pipeline.cli.serve import serve as answer
    from pipeline.cli.session import artifacts_root

    artifact = Store(artifacts_root(artifacts)).resolve_or_unfinished(reference)
    answer(artifact, reference, host=host, port=port, engine=engine, as_json=json)
