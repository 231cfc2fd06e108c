"""A stage under torchrun or `accelerate launch`: this process is already one rank of several.

Rank 0 takes the lock, decides and tells the others, so that no two ranks see a different store.
"""

from __future__ import annotations

import atexit
import contextlib
import shutil

from accelerate.utils import broadcast_object_list

from pipeline.cli.session import Session
from pipeline.launch import execute, wait_line, world_size_from_outside
from pipeline.lineage import inputs_of, survey
from pipeline.runtime import join_ranks


def run_as_rank(session: Session, name: str, force: bool) -> bool:
    """Run the stage as one of the ranks; False where it stands. Collective."""
    import torch

    if not torch.distributed.is_initialized():
        atexit.register(_part)
    state = join_ranks()
    run, processes = session.recipe.run, world_size_from_outside()
    with contextlib.ExitStack() as held:
        decision = [False]
        if state.is_main_process:
            held.enter_context(session.store.hold(run, name, wait_line(run, name)))
            decision = [force or survey(session.recipe, session.store)[name].state != "stands"]
        broadcast_object_list(decision)
        if not decision[0]:
            return False
        standing = survey(session.recipe, session.store)[name]  # after rank 0's: all look at one store
        if force and standing.state == "stands" and state.is_main_process:
            shutil.rmtree(session.store.partial(run, name, standing.planned))
        partial = session.store.partial(run, name, standing.planned)
        state.wait_for_everyone()
        inputs = inputs_of(standing, session.recipe, session.store)
        execute(standing, inputs, session.store, run, partial, processes, session.launch, last=False)
    return True


def _part() -> None:
    """Leave the process group while its threads can still be joined: left to the end of the process, they abort it."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
