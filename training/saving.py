"""Checkpoints of a run: which one to resume, what is saved, and writing it in the background."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from typing import NoReturn

from cli.errors import CheckpointError, ConfigError, WeightsError
from loading.classes import UNKNOWN, ClassNames, data_classes
from parallel.process import Preempted, Process, from_main, main_first
from resmlp import build_resmlp
from storage import checkpoints
from storage.adapt import load_pretrained, load_state, read_pretrained
from storage.run_folder import RunFolder
from storage.weights import WeightFile
from training import ppvit_checkpoint
from training.progress import Progress

_log = logging.getLogger("resmlp")


class Saver:
    """Saves and resumes one run. The writing thread sees copies; it changes nothing of the run.

    Rank 0 writes; the others wait until it has copied the state. ``saved``: there is a checkpoint.
    ``data`` is what checkpoints say of the data.
    """

    def __init__(self, config, process: Process, folder: RunFolder):
        self.config, self.process, self.folder = config, process, folder
        self.saved = False
        self.data: dict = {}
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None

    def choose(self) -> dict | None:
        """Reads what ``MODEL.RESUME`` names, on every rank; None to start anew. Its ``classes`` are
        `ClassNames`, from the checkpoint or from beside it.
        """
        resume = self.config.MODEL.RESUME
        if not resume:
            return None
        state = None
        if resume == "auto":  # rank 0 chooses, so that all take the same
            with main_first(self.process) as main:
                state, path = (main and checkpoints.load_newest(self.folder.path)) or (None, None)
            resume = from_main(str(path) if path else None, self.process)
            if resume is None:
                _log.info(f"resume auto: no checkpoint in {self.folder.path} yet, starting anew")
                self.folder.rewind_metrics(0)
                return None
        if state is None:
            state = checkpoints.load(resume, lambda path: ppvit_checkpoint.load(path, self.config))
        inside = ClassNames.of_record(state.get("classes"), str(resume))
        return {**state, "classes": inside or ClassNames.beside(resume)}

    def resume(self, state: dict, start: Progress) -> Progress:
        """Puts the folder back to where a checkpoint stands, says so, and returns where that is.

        ``start`` is the beginning of the first epoch that the checkpoint does not have.
        """
        if "place" not in state:  # PPViT's
            if (self.folder.path / checkpoints.LAST).exists():
                raise CheckpointError(
                    f"-output {self.folder.path}: holds a run of its own; name another folder"
                )
            self.folder.rewind_metrics(0)
            _log.info(f"resumed PPViT's checkpoint after epoch {start.epoch}, step {start.step}")
            for note in state["notes"]:
                _log.warning(note)
            return start
        # BEST_METRIC was top1, before there was a choice
        progress = Progress(**{"best_score": state["place"]["best_top1"], **state["place"]})
        if self.process.main and self.config.MODEL.RESUME != "auto":
            chosen = checkpoints.find(self.config.MODEL.RESUME)
            if chosen.parent.samefile(self.folder.path) and chosen.name != checkpoints.LAST:
                checkpoints.go_back_to(chosen, state)  # an earlier one of this very run
                if not (self.folder.path / checkpoints.BEST).exists():
                    progress.forget_best()
        if self.process.main:  # a run that ended between its last save and this saves no more
            self._rotate()
        self.folder.rewind_metrics(state["metrics_lines"])
        self.saved = True
        changes = checkpoints.config_changes(state["config"], self.config.dump())
        if state["processes"] != self.process.world:
            changes.append(f"processes {state['processes']} -> {self.process.world}")
        for split, before in state.get("images", {}).items():
            if before != (now := self.data["images"][split]):
                same = ", other paths or labels" * (before[0] == now[0])
                changes.append(f"{split} images {before[0]} -> {now[0]}{same}")
        for change in changes:
            if change.startswith(("BEST_METRIC ", "val ")) and "(none)" not in change:
                progress.forget_best()  # values of two metrics or sets do not compare
                change += ": the best so far does not count any more"
            if not change.startswith(("MODEL.RESUME ", "SAVE ")):
                _log.info(f"changed since the checkpoint: {change}")
        images = f" and {progress.samples} images" if progress.samples else ""
        _log.info(f"resumed after epoch {progress.epoch}{images}, step {progress.step}")
        return progress

    def save(self, learner, progress: Progress, *names: str) -> None:
        """Rank 0 saves under more ``names`` and as ``last``, in the background."""
        with main_first(self.process) as main:
            if main:
                self.finish()
                self.folder.flush_metrics()
                state = {
                    **learner.state(),
                    "epoch": progress.epoch,
                    "place": asdict(progress),
                    "metrics_lines": self.folder.metrics_lines,
                    "config": self.config.dump(),
                    "processes": self.process.world,
                    **self.data,
                }
                self._pending = self._pool.submit(self._write, checkpoints.to_numpy(state), names)
        self.saved = True

    def _write(self, state: dict, names: tuple[str, ...]) -> None:
        checkpoints.save(state, self.folder.path / checkpoints.LAST, names)
        self._rotate()

    def _rotate(self) -> None:
        keep, keep_every = self.config.KEEP_CHECKPOINTS, self.config.KEEP_EVERY
        checkpoints.rotate(self.folder.path, keep, keep_every)

    def finish(self, block: bool = True) -> None:
        """Waits for the save under way, or only looks if it has ended; raises what it raised."""
        if self._pending is None or not (block or self._pending.done()):
            return
        pending, self._pending = self._pending, None
        while not pending.done():
            wait([pending], 0.2)  # in pieces: signals are handled in between
        pending.result()

    def close(self) -> None:
        """Ends the last save; its error is only logged, so that it hides no earlier one."""
        try:
            self.finish()
        except CheckpointError as error:
            _log.error(str(error))

    def stop(self, what: str) -> NoReturn:
        """Ends the run on every rank when the last save has ended; no rank ends before: a launcher
        that sees one end gives the others seconds to follow.
        """
        with main_first(self.process):
            self.finish()
        where = "saved" if self.saved else "nothing is saved yet"
        raise Preempted(from_main(f"{what}; {where} in {self.folder.path}", self.process))


def first_weights(
    config, saved: dict | None, process: Process
) -> tuple[WeightFile | None, ClassNames]:
    """The file of MODEL.PRETRAINED, for a run without a checkpoint, and the classes that it goes on
    with: the checkpoint's, or those of that file if the data have these.
    """
    if saved or not config.MODEL.PRETRAINED:
        return None, saved["classes"] if saved else UNKNOWN
    file = read_pretrained(config.MODEL.PRETRAINED, config.MODEL.PRETRAINED_KEY, process)
    own = data_classes(config)
    return file, UNKNOWN if not own or own.difference(file.classes) else file.classes


def first_model(
    config, saved: dict | None, weights: WeightFile | None = None, classes: ClassNames = UNKNOWN
):
    """The model with the weights that the run begins with: a checkpoint's, pretrained, or new.

    If the classes of ``weights`` (MODEL.PRETRAINED) are others, the model has a new head.
    """
    model = build_resmlp(config)
    if saved:
        try:
            load_state(model, saved["model"])
        except WeightsError as error:
            raise CheckpointError(f"-resume {config.MODEL.RESUME}: another model: {error}")
    elif weights:
        new_head = classes.difference(weights.classes) or True
        for note in load_pretrained(model, config, new_head, weights):
            _log.info(note)
    elif config.TRAIN.FREEZE:
        raise ConfigError(
            f"TRAIN.FREEZE {config.TRAIN.FREEZE} would freeze random weights; give -pretrained FILE"
        )
    return model
