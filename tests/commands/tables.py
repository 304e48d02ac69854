"""What is not run, what is changed, what a command needs and leaves, by regular expressions;
``test_docs.py`` fails where one fits no command any more.
"""

from __future__ import annotations

import importlib.util
import re

# Commands (whole) that are not run here, and why.
ELSEWHERE = {
    r"sh run_demo\.sh": "a stage of .ci/run",
    r"sh run_tests\.sh.*": "a stage of .ci/run, and what runs this",
    r"pip install .*": "network; setup_env.sh installs the requirements files in .ci/run",
    r"python port_weights/load_timm_weights\.py -model .*": "network; the porting itself is run "
    "with -checkpoint, and the names of -model are compared with timm's in tests/timm",
    r"python tools/compare_deit\.py .*": "needs DeiT's code; tests/test_compare_deit.py runs it",
    r".*main_single_gpu\.py \.\.\.": "shortened by the page; the whole command is in README",
    r"(tensorboard|visualdl) --logdir .*": "serves until it is stopped; tests/test_dashboard.py "
    "reads what they show",
}

# Changes to the commands, in this order: pattern, replacement, why.
_SHORT = "TRAIN.NUM_EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 DATA.BATCH_SIZE 2"
_TRAINING = r"(?:main_\w+\.py|run_train_multi\.sh)(?!.* -eval)"
_OPTS = r"-opts(?: [A-Z_.]+ [\w./]+)+"
CHANGES = [
    (r"/dataset/imagenet", "../dataset/imagenet", "no test writes outside of its folder"),
    (r"/nfs/run", "../nfs/run", "likewise"),
    (r"/usr/share/datasets/fashion-mnist", "../fashion_mnist.tar.xz", "a few of its images"),
    (r"-seeds 3 -opts TRAIN.NUM_EPOCHS 8", f"-seeds 1 -opts {_SHORT}", "six short trainings"),
    (r"(NNODES=|--nnodes )2", r"\g<1>1", "one node; tests/faults/test_ranks.py starts two"),
    (r"10\.0\.0\.1", "127.0.0.1", "this node"),
    (r":6170", ":{port}", "a port that is free"),
    (rf"({_TRAINING}.* {_OPTS})", rf"\1 {_SHORT}", "an epoch of two or more steps"),
    (rf"({_TRAINING})(?!.* -opts)", rf"\1 -opts {_SHORT}", "likewise"),
    (r"^(?=.*(?i:resume)=auto)(.*NUM_EPOCHS) 1", r"\1 2", "more than the run before it has done"),
    (r"(tools/benchmark\.py.*)", r"\1 -batch_size 2 -rounds 1", "two steps"),
]

# Changes to the files that the commands read: files, pattern, replacement, why.
DEPTH = 2
IN_THE_CLONE = [
    ("config.py", *CHANGES[0]),
    ("launch_multi.sh", *CHANGES[0]),
    ("configs/studies/freezing.yaml", r"FREEZE: 6", "FREEZE: 1", "a model of two blocks"),
    ("configs/resmlp_[12][24]_224.yaml", r"DEPTH: \d+", f"DEPTH: {DEPTH}", "time, and disk"),
]

# Packages that a command needs beside Paddle; it is skipped where one is missing.
NEEDS = {
    r"tools/(plot_metrics|visualize)\.py": ("matplotlib",),
    r"-compare timm": ("torch", "timm"),
    r"\.pth\b": ("torch",),
    r"-format (paddle )?onnx|-backend onnx|/exported/": ("paddle2onnx", "onnx", "onnxruntime"),
}

# Files (patterns, from the root; \1 is of the command's) that a command makes anew; without
# Matplotlib no pictures.
_LISTS = ("train_list.txt", "val_list.txt", "classes.txt")
_RUN = ("config.yaml", "log.txt", "metrics.jsonl", "curves.png", "last.pdparams", "best.pdparams")
_PICTURES = ("index.html", "token_mixing.png", "magnitudes.png", "contributions.png", "batch.png")
_REPORT = ("eval.json", "per_class.csv", "confusion.png", "report.json", "mistakes.png")
_EXPORTED = ("model.json", "model.pdiparams", "model.metadata", "model.onnx", "model.safetensors")
LEAVES = {
    r"make_lists\.py /(dataset/imagenet)": [rf"../\1/{name}" for name in _LISTS],
    r"make_lists\.py (photos)": [rf"\1/{name}" for name in _LISTS],
    r"prepare\.py cifar": [f"cifar10/{name}" for name in ("train.tar", "val.tar", *_LISTS)],
    r"prepare\.py 102": [f"flowers102/{name}" for name in ("train.tar", "val.tar", *_LISTS[:2])],
    r"tools/pack\.py": [f"packed/{name}" for name in ("train-00000.tar", *_LISTS[:2])],
    r"-output=\S*(output/(?:resmlp_24|small|photos|fmnist))": [rf"\1/{name}" for name in _RUN],
    r"-output=/(nfs/run)": [rf"../\1/{name}" for name in _RUN],
    rf"^(?!.*(?i:output|resume)=).*{_TRAINING}": [f"output/train-*/{name}" for name in _RUN],
    r"-resume=auto": ["output/train-*/last.pdparams"],
    r"OUTPUT=/nfs/run": ["../nfs/run/last.pdparams"],
    r"^(?!.*-cfg=output/).*(-eval|run_eval)": ["output/eval-*/eval.json"],
    r"-cfg=output/photos/config\.yaml": [f"output/photos/{name}" for name in _REPORT],
    r"-grid=(predictions\.png)": [r"\1"],
    r"photos/best\.pdparams -format onnx": ["output/photos/exported/model.onnx"],
    r"-checkpoint resmlp_12_no_dist\.pth": ["resmlp_12_224.pdparams"],
    r"-checkpoint resmlp_24_dist\.pth": ["resmlp_24_distilled_224.pdparams"],
    r"-checkpoint model\.safetensors": ["x.pdparams"],
    r"export_timm_weights\.py .*\.(safetensors|pth)": [r"x.\1"],
    r"demo/prepare\.py": [f"output/fashion_mnist_data/{name}" for name in _LISTS],
    r"studies/(ablation|freezing)": [r"output/\1/results.md"],
    r"tools/features\.py.*-split (train|val)": [r"\1.safetensors"],
    r"tools/evaluate_zoo\.py": [f"output/zoo/results.{kind}" for kind in ("md", "csv", "json")],
    r"tools/plot_metrics\.py": ["curves.png", "curves.html"],
    r"visualize\.py -pretrained output/demo": [f"output/demo/pictures/{n}" for n in _PICTURES],
    r"visualize\.py -pretrained=output/photos": ["output/photos/pictures/batch.png"],
    r"-format onnx_int8": ["output/demo/exported/model.int8.onnx"],
    r"-format paddle onnx": [f"output/demo/exported/{name}" for name in _EXPORTED],
}


def missing(command: str) -> list[str]:
    names = [name for pattern in NEEDS if re.search(pattern, command) for name in NEEDS[pattern]]
    return [name for name in names if importlib.util.find_spec(name) is None]


def leaves(command: str) -> list[str]:
    matches = [(re.search(pattern, command), names) for pattern, names in LEAVES.items()]
    names = [match.expand(name) for match, names in matches if match for name in names]
    drawn = importlib.util.find_spec("matplotlib") is not None
    return [name for name in names if drawn or not name.endswith(".png")]


def elsewhere(command: str) -> str | None:
    return next((why for pattern, why in ELSEWHERE.items() if re.fullmatch(pattern, command)), None)


def changed(command: str, port: int) -> str:
    for pattern, replacement, _ in CHANGES:
        command = re.sub(pattern, replacement, command)
    return command.replace("{port}", str(port))
