"""Saves of a run, in the foreground or behind its back.

Owns what goes into a checkpoint and when. In the background, the torch engine copies what training changes (trained
parameters, buffers, optimizer and random state) into host memory, and one thread writes the copy while training goes
on. Under DeepSpeed the ranks write their files together, and only hashing, fsync and the rename are left to the thread.
There is never more than one save under way; an error of one is raised at the next step. The folders, and their
guarantees, are those of the foreground.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmit.errors import CheckpointError
from mmit.models.vlm import VLM
from mmit.train.checkpoint import model as checkpoint
from mmit.train.checkpoint import resume
from mmit.train.engines.state import write_state
from mmit.train.engines.torch_engine import TorchEngine

if TYPE_CHECKING:
    from mmit.train.engines.base import Engine
    from mmit.train.loop import Progress

WriteModel = Callable[[Path, VLM, int], None]  # folder, model, step


class Writer:
    """One piece of work at a time, in a thread."""

    def __init__(self) -> None:
        # Its thread is no daemon: a process that ends, for whatever reason, finishes the save under way.
        self._pool = ThreadPoolExecutor(1, "checkpoint-writer")
        self._work: Future[None] | None = None

    @property
    def failed(self) -> bool:
        """Whether the last work ended with an error that nobody has seen."""
        return self._work is not None and self._work.done() and self._work.exception() is not None

    def wait(self) -> None:
        """Wait for the work under way; raises its error, once."""
        work, self._work = self._work, None  # forgotten before it raises: an error is told once, not at every step
        if work is not None:
            work.result()

    def submit(self, work: Callable[[], None]) -> None:
        """Begin `work` when the one before has ended; raises that one's error."""
        self.wait()
        self._work = self._pool.submit(work)


class CpuCopy:
    """A second model whose trained parameters and buffers lie in host memory; frozen ones are the model's own.

    Raises TypeError or RuntimeError for a model that cannot be copied.
    """

    def __init__(self, vlm: VLM) -> None:
        # Page-locked, so that the copy out of a GPU runs at full speed; reserved once, for as long as the run lasts.
        pinned = vlm.device.type == "cuda"
        memo: dict[int, Any] = {}
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for tensor in [*vlm.parameters(), *vlm.buffers()]:
            changes = tensor.requires_grad or not isinstance(tensor, nn.Parameter)
            if not changes:
                # `deepcopy` takes what stands in its memo for copied: a frozen base of many gigabytes is shared.
                memo[id(tensor)] = tensor
                continue
            host = torch.empty_like(tensor, device="cpu", requires_grad=False, pin_memory=pinned)
            self._pairs.append((host, tensor))
            wanted = tensor.requires_grad
            memo[id(tensor)] = nn.Parameter(host, wanted) if isinstance(tensor, nn.Parameter) else host
        for module in vlm.modules():
            # Their sets of names would be written in another order by a copy.
            memo.update({id(config): config for config in getattr(module, "peft_config", {}).values()})
        self.vlm: VLM = copy.deepcopy(vlm, memo)

    @torch.no_grad()
    def take(self) -> VLM:
        """Copy the tensors as they are now."""
        for host, tensor in self._pairs:
            host.copy_(tensor)
        return self.vlm


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint beside the optimizer.

    Args:
        write_model: puts everything but the trainer's state into a folder.
        order: step -> what decides the data order and the place in it, kept beside the progress.
    """

    vlm: VLM
    write_model: WriteModel
    order: Callable[[int], dict[str, Any]]


class Saves:
    """Writes checkpoints/step-N, prunes older ones, and writes down which is the best.

    Args:
        keep_last: so many checkpoints stay, and the best.
        background: write in a thread while training goes on, where the model can be copied.
    """

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        contents: Contents,
        *,
        keep_last: int,
        background: bool,
        say: Callable[[str], None],
    ) -> None:
        self.run_dir, self.engine, self.contents, self.keep_last, self.say = run_dir, engine, contents, keep_last, say
        self._writer = Writer() if background else None
        self._copy: CpuCopy | None = None
        if background and isinstance(engine, TorchEngine):
            try:
                self._copy = CpuCopy(contents.vlm)
            except (TypeError, RuntimeError) as error:
                say(f"saving in the foreground: this model cannot be copied ({str(error).splitlines()[0]})")
                self._writer = None

    def failed(self) -> bool:
        """Whether a save in the background failed; the next call of this object, or `wait`, raises why."""
        return self._writer is not None and self._writer.failed

    def wait(self) -> None:
        """Wait for a save under way; all ranks call this. Raises CheckpointError if it could not be written."""
        if self._writer is None:
            return
        failure: CheckpointError | None = None
        try:
            self._writer.wait()
        except CheckpointError as error:
            failure = error
        if not self.engine.all_true(failure is None):  # no rank may go on without the others
            raise failure or CheckpointError("rank 0 could not write it", where=str(self.run_dir / "checkpoints"))

    def close(self) -> None:
        """Finish the save under way when the run ends by an error of its own; tells what goes wrong."""
        if self._writer is not None:
            try:
                self._writer.wait()
            except CheckpointError as error:
                self.say(str(error))

    def __call__(self, progress: Progress) -> None:
        """Save, or begin to. Raises CheckpointError, also for the save before."""
        self.wait()  # one at a time: two would want the same host memory, and could publish in the wrong order
        folder = resume.checkpoint_folder(self.run_dir, progress.step)
        trainer = resume.TrainerState.of(self.engine, progress, order=self.contents.order(progress.step))
        best = copy.copy(progress.best)  # as of this step: the loop may find a better one while this is written
        if self._writer is not None and self._copy is not None:
            self._begin(self._writer, self._copy, folder, trainer=trainer, best=best)
            return
        fills = [self._model_fill(progress.step), trainer.write, lambda d: self.engine.save_state(d / "trainer")]
        common: dict[str, Any] = {"main": self.engine.rank == 0, "all_fine": self.engine.all_true}
        if self._writer is not None:
            # Under DeepSpeed the parts come together by collectives, which must not meet the loop's own: the files are
            # written here, and what follows without ranks (hashes, fsync, rename) is left to the thread.
            hand_over = self._then(self._writer, folder, best)
            checkpoint.write_folder(folder, fills, hand_over=hand_over, **common)
            return
        checkpoint.write_folder(folder, fills, **common)
        self._finish(folder, best)
        self.engine.barrier()

    def _begin(
        self,
        writer: Writer,
        copied: CpuCopy,
        folder: Path,
        *,
        trainer: resume.TrainerState,
        best: dict[str, Any] | None,
    ) -> None:
        vlm, shapes, step = copied.take(), self.engine.shapes(), trainer.facts["step"]
        # All of it before the loop goes on: the next step changes weights, moments and random state in place.
        states = [
            (name, {k: v.detach().to("cpu", copy=True) for k, v in tensors.items()})
            for name, tensors in self.engine.states()
        ]

        def model(draft: Path) -> None:
            (draft / "trainer").mkdir()
            self.contents.write_model(draft, vlm, step)

        def optimizer(draft: Path) -> None:
            write_state(draft / "trainer", states, shapes=shapes, write=True)

        hand_over = self._then(writer, folder, best)
        checkpoint.write_folder(folder, [], later=[model, trainer.write, optimizer], hand_over=hand_over)

    def _then(self, writer: Writer, folder: Path, best: dict[str, Any] | None) -> Callable[[Callable[[], None]], None]:
        def hand_over(publish: Callable[[], None]) -> None:
            def work() -> None:
                publish()
                self._finish(folder, best)

            writer.submit(work)

        return hand_over

    def _model_fill(self, step: int) -> Callable[[Path], None]:
        # Under ZeRO-3 only what is written is gathered: a frozen LLM is not, and may not fit into one rank's memory.
        named, everything = self.contents.vlm.named_parameters(), "llm" in self.contents.vlm.whole_parts
        written = [p for n, p in named if everything or p.requires_grad or not n.startswith("llm.")]

        def model(draft: Path) -> None:
            with self.engine.whole(written):
                if self.engine.rank == 0:
                    (draft / "trainer").mkdir()
                    self.contents.write_model(draft, self.contents.vlm, step)

        return model

    def _finish(self, folder: Path, best: dict[str, Any] | None) -> None:
        if self.engine.rank != 0:
            return
        if best is not None:  # first: what it names must never be pruned
            resume.write_best(self.run_dir, best)
        resume.prune(self.run_dir, self.keep_last, best=best["step"] if best else None, say=self.say)
        self.say(f"saved {folder}")
