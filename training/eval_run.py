"""The run of ``-eval``: a model with its weights, measured once, and the files of its report."""

from __future__ import annotations

import json
import logging

from datasets import build_loader
from loading.real_labels import read_real_labels
from parallel.process import Process
from resmlp import build_resmlp, load_pretrained
from storage.run_folder import RunFolder
from storage.weights import WeightFile
from training.eval_report import write_report
from training.evaluation import Result, evaluate
from training.precision import autocast
from utils import Normalize, ProgressLine

_log = logging.getLogger("resmlp")


def run_evaluation(config, process: Process, folder: RunFolder, weights: WeightFile) -> Result:
    """Evaluates weights on the validation images; eval.json holds what it finds.

    UserError if weights, data or labels do not fit, or the report cannot be written.
    """
    share = process.rank, process.world
    loader = build_loader(config, "val", *share, _log.info, weights.classes)
    model = build_resmlp(config)
    for note in load_pretrained(model, config, file=weights):
        _log.info(note)
    model.eval()
    normalize = Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)

    def predict(images):
        with autocast(config, process.on_gpu):
            return model(normalize(images))

    dataset, accepted, count = loader.dataset, None, config.MODEL.NUM_CLASSES
    if config.EVAL_REAL_LABELS:
        accepted = read_real_labels(config.EVAL_REAL_LABELS, dataset.files, count)
    progress = ProgressLine("evaluation", process.main)
    (metrics,) = evaluate(
        [predict],
        loader,
        process,
        count,
        config.EVAL_REPORT,
        progress=progress,
        accepted=accepted,
        subset=dataset.files.subset,
    )
    progress.end()
    _log.info(f"evaluation of {config.MODEL.NAME}: {metrics}")
    folder.write("eval.json", json.dumps(metrics.scores(), indent=1) + "\n")
    if config.EVAL_REPORT and process.main:
        for path in write_report(metrics, dataset.classes.names, folder.path, dataset.files):
            _log.info(f"wrote {path}")
    return Result.of(folder.path, process.rank, metrics)
