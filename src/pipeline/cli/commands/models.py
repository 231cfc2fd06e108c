"""chat, blame, export: one model at a time."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import (
    ArtifactsOption,
    JsonOption,
)


def chat(
    references: Annotated[
        list[str], typer.Argument(help="run/stage, ./folder or hub:org/name; two of them answer side by side")
    ],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="answer this and end")] = None,
    system: Annotated[str | None, typer.Option("--system", help="system message")] = None,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="longest answer, in tokens")] = 256,
    seed: Annotated[int, typer.Option("--seed", help="seed of the sampling")] = 0,
    artifacts: ArtifactsOption = None,
    json: JsonOption = False,
) -> None:
    """Talk to a model, or to two side by side: answers stream on stdout."""
    from pipeline.artifacts import Store
    from pipeline.cli.chat import chat as talk
    from pipeline.cli.session import artifacts_root

    store = Store(artifacts_root(artifacts))
    talk(
        [(reference, store.resolve_or_unfinished(reference)) for reference in references],
        prompt=prompt,
        system=system,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        as_json=json,
    )


def blame(
    reference: Annotated[str, typer.Argument(help="run/stage, ./folder or hub:org/name")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="what is asked; else stdin")] = None,
    answer: Annotated[str | None, typer.Option("--answer", help="blame this, not its own greedy one")] = None,
    system: Annotated[str | None, typer.Option("--system", help="system message")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="longest answer, in tokens")] = 128,
    rows: Annotated[int, typer.Option("--rows", help="training rows shown of each stage")] = 3,
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
        as_json=json,
    )


def export(
    reference: Annotated[str, typer.Argument(help="run/stage, ./folder (peft's adapters too) or hub:org/name")],
    out: Annotated[Path, typer.Option("--out", help="the folder to write, which must not be there yet")],
    to: Annotated[str, typer.Option("--to", help="merged: a plain Hugging Face folder")] = "merged",
    base: Annotated[
        str | None, typer.Option("--base", help="what an adapter stands on, unless it is where its config says")
    ] = None,
    artifacts: ArtifactsOption = None,
) -> None:
    """A plain Hugging Face folder of a model; adapters are merged into their base."""
    from pipeline.artifacts import Store
    from pipeline.cli.export import export as write
    from pipeline.cli.session import artifacts_root

    write(Store(artifacts_root(artifacts)), reference, to=to, out=out, base=base)
