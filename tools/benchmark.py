"""Measures a model's speed beside the machine's own limit, and beside peers in alternation.

    python tools/benchmark.py -cfg configs/resmlp_12_224.yaml -mode train -compare best
    python tools/benchmark.py -cfg ... -mode infer -backend inference -dtype bfloat16 -json

Modes: `infer` (forward), `train` (forward, backward, AdamW), `data` (JPEG to augmented uint8, on
one core), `step` (a training step of the config's recipe, part by part). Peers: timm's model as it
is, compiled, compiled with frozen weights, and in OpenVINO; `best` is all that do the same in the
same precision. docs/performance.md tells how to read the figures.
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

from cpu import setup  # noqa: F401  isort: skip

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from PIL import Image

from cli.errors import UserError, run_as_script
from cli.parser import Parser
from config import get_config
from cpu import onednn
from datasets import build_loader
from loading.images import read_pixels
from parallel.process import Process
from resmlp import build_resmlp
from tools.common import require
from tools.export import INT8_PACKAGES, ONNX_PACKAGES, on_cpu, save_for_inference
from tools.folding import fold
from tools.infer_exported import Run, open_onnx, open_openvino, open_paddle
from tools.model_info import config_info
from training.learner import Learner
from training.precision import autocast
from transforms import build_train_transform
from utils import memory_mb, step_rng

MODES = ("infer", "train", "data", "step")
DTYPES = {  # backend -> what it computes in on a CPU, and on a GPU
    "eager": (("float32", "bfloat16"), ("float32", "bfloat16", "float16")),
    "to_static": (("float32",), ("float32", "bfloat16", "float16")),
    "inference": (("float32", "bfloat16"), ("float32",)),
    "onnx": (("float32", "int8"), ("float32", "int8")),
    "openvino": (("float32", "bfloat16", "int8"), ()),
}
OPENERS = {"inference": open_paddle, "onnx": open_onnx, "openvino": open_openvino}
PEER_MODES = {
    "timm": ("infer", "train", "data"),
    "timm_compile": ("infer", "train"),
    "timm_compile_freeze": ("infer",),
    "openvino": ("infer",),
}
PEERS = {form + dtype: modes for form, modes in PEER_MODES.items() for dtype in ("", "_bf16")}
PEER_SCRIPT = Path(__file__).with_name("benchmark_timm.py")
SETTLE_SECONDS = 0.3  # OpenMP threads spin for 0.2 s after their work, and would disturb the next
GEMM_SIZE, GEMM_SIZE_GPU, GEMM_ROUNDS = 2048, 8192, 20
PARTS = ("data", "augment", "forward", "backward", "optimizer", "ema", "logging")
JPEG_SIZE = (500, 375)  # pixels, about ImageNet's

Step = Callable[[], None]


@dataclass
class Job:
    """What is to be measured: one of `MODES`, in a backend and dtype of `DTYPES`. Eager layers
    compute in what the config's AMP says.
    """

    config: object
    mode: str = "infer"
    batch_size: int = 32
    threads: int = 1
    dtype: str = "float32"
    backend: str = "eager"  # another one only to infer

    def __post_init__(self):
        able = DTYPES[self.backend][on_gpu()]
        if not (on_gpu() or onednn.has(paddle.float32)):
            able = [dtype for dtype in able if dtype != "bfloat16"]
        if self.mode != "infer" and self.backend != "eager":
            raise UserError(f"-backend {self.backend} is for -mode infer")
        if self.dtype not in able:
            device = "a GPU" if on_gpu() else "this CPU"
            raise UserError(
                f"-dtype {self.dtype}: on {device} -backend {self.backend} computes in "
                f"{' or '.join(able) or 'nothing'}"
            )

    @property
    def gflops(self) -> float:
        """Floating point operations of a step, 1e9; a backward pass counts as two forward."""
        passes = {"infer": 1, "data": 0}.get(self.mode, 3)
        return passes * 2e-9 * config_info(self.config).macs * self.batch_size

    def for_timm(self, name: str, files: Sequence[str]) -> dict:
        """The same work, as `benchmark_timm` takes it, in the form of a name of `PEERS`."""
        model, mixer = self.config.MODEL, self.config.MODEL.MIXER
        return {
            "mode": self.mode,
            "batch_size": self.batch_size,
            "threads": self.threads,
            "form": name.replace("_bf16", ""),
            "bf16": "bf16" in name,
            "device": "cuda" if on_gpu() and self.mode != "data" else "cpu",
            "files": list(files),
            "image_size": self.config.DATA.IMAGE_SIZE,
            "model": {
                "num_classes": model.NUM_CLASSES,
                "patch_size": mixer.PATCH_SIZE,
                "num_blocks": mixer.DEPTH,
                "embed_dim": mixer.EMBED_DIM,
                "mlp_ratio": mixer.MLP_RATIO,
                "drop_path_rate": model.DROPPATH,
            },
        }


def choose_peers(job: Job, compare: Sequence[str]) -> list[str]:
    """The peers that are meant; ``best``: all that do the job, in its precision, where it runs."""
    if "best" in compare:
        compare = [name for name, modes in PEERS.items() if job.mode in modes]
        is_bf16 = job.dtype == "bfloat16"
        compare = [name for name in compare if name.endswith("_bf16") == is_bf16]
        if on_gpu() or not find_spec("openvino"):
            print("-compare best: without OpenVINO, which is not here", file=sys.stderr)
            compare = [name for name in compare if not name.startswith("openvino")]
    for name in compare:
        if job.mode not in PEERS[name]:
            raise UserError(f"-compare {name} is for -mode {' and '.join(PEERS[name])}")
    return list(compare)


def benchmark(job: Job, rounds: int = 10, compare: Sequence[str] = ()) -> list[dict]:
    """Measures a job, and peers (of `PEERS`, or ``best``) in alternation with it.

    Returns the `figures` of Paddle, then of each peer; in mode ``step`` also ``parts_ms``. Raises
    UserError for a peer that cannot do the job or a missing package.
    """
    compare = choose_peers(job, compare)
    setup.set_threads(job.threads)
    if job.mode == "step":
        return [measure_parts(job, rounds)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = write_jpegs(folder, 16) if job.mode == "data" else []
        step = _paddle_step(job, files, folder)
        peers = [stack.enter_context(peer(name, job, files)) for name in compare]
        step()  # warm up: first products, memory, kernel choice
        sides = [lambda: _seconds(step), *(partial(ask, "step") for ask in peers)]
        times = alternate(sides, rounds)
        memory = [memory_mb(Process(on_gpu=on_gpu())), *(ask("memory") for ask in peers)]
    labels = [(name, "bfloat16" if "bf16" in name else "float32") for name in compare]
    labels = [(job.backend, job.dtype), *labels]
    # only now, as they measure the peak: it must not warm or fill the memory
    return [figures(job, label, t, times[0], mb) for label, t, mb in zip(labels, times, memory)]


@cache
def gemm_peak(dtype: str = "float32") -> float:
    """GFLOP/s of a large square matrix product in this process: the machine's limit. For int8 it is
    the float32 rate, since Paddle has no int8 product on a CPU; int8 may exceed it.
    """
    size = GEMM_SIZE_GPU if on_gpu() else GEMM_SIZE
    factor, product = paddle.randn([size, size]), paddle.matmul
    if on_gpu():
        factor = factor.astype(dtype)
    elif dtype == "bfloat16":
        factor, product = onednn.cast(factor, paddle.bfloat16), onednn.product
    seconds = min(_seconds(lambda: product(factor, factor)) for _ in range(GEMM_ROUNDS))
    return 2e-9 * size**3 / seconds


def on_gpu() -> bool:
    return paddle.device.get_device().startswith("gpu")


def _paddle_step(job: Job, files: Sequence[str], folder: Path) -> Step:
    if job.mode == "data":
        transform, rng = build_train_transform(job.config), np.random.default_rng(0)

        def augment():  # as a loader worker does it
            for number in range(job.batch_size):
                pixels = read_pixels(files[number % len(files)], job.config.DATA.EXIF_ORIENTATION)
                transform(pixels, rng)

        return augment
    model, size = build_resmlp(job.config), job.config.DATA.IMAGE_SIZE
    images = paddle.randn([job.batch_size, 3, size, size])
    if job.mode == "train":
        return train_step(job, model, images)
    if job.backend in OPENERS:
        run, array = _deployed(job, model, folder), images.numpy()
        return lambda: run(array)
    model.eval()
    if job.backend == "to_static":
        model = paddle.jit.to_static(fold(model), full_graph=True)

    @paddle.no_grad()
    def step():
        with autocast(job.config, on_gpu()):
            model(images)

    return step


def train_step(job: Job, model: nn.Layer, images: paddle.Tensor) -> Step:
    """Forward, backward and AdamW on one batch that stays: the same work as the peers'."""
    labels = paddle.randint(0, job.config.MODEL.NUM_CLASSES, [job.batch_size])
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=model.parameters())
    model.train()

    def step():
        with autocast(job.config, on_gpu()):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        loss.item()

    return step


def _deployed(job: Job, model: nn.Layer, folder: Path) -> Run:
    """The folded model, as tools/export and tools/infer_exported deploy it."""
    if job.backend != "inference":
        require(f"-backend {job.backend}", INT8_PACKAGES if job.dtype == "int8" else ONNX_PACKAGES)
    with on_cpu():
        size = job.config.DATA.IMAGE_SIZE
        file = save_for_inference(fold(model), folder / "model", [3, size, size])
    if job.backend != "inference":
        from tools.onnx_graph import write_onnx

        program, file = file, folder / "model.onnx"
        write_onnx(program, file, int8=job.dtype == "int8")
    return OPENERS[job.backend](file, job.dtype == "bfloat16", on_gpu(), job.threads)[0]


def measure_parts(job: Job, rounds: int) -> dict:
    """Times the parts of the run's own training step; ``backward`` includes clipping."""
    config, times = job.config, {part: [] for part in PARTS}

    def timed(part: str, function: Callable):
        def run(*args):
            start, others = time.perf_counter(), sum(map(sum, times.values()))
            value = function(*args)
            _synchronize()
            inside = sum(map(sum, times.values())) - others  # parts that have counted themselves
            times[part].append(time.perf_counter() - start - inside)
            return value

        return run

    process, loader = Process(on_gpu=on_gpu()), build_loader(config, "train")
    learner = Learner(config, process, build_resmlp(config))
    learner.network.train()
    learner.augment = timed("augment", learner.augment)
    learner.forward = timed("forward", learner.forward)
    if learner.ema is not None:
        learner.ema.update = timed("ema", learner.ema.update)
    learner.gradients = timed("backward", learner.gradients)
    load, train = timed("data", next), timed("optimizer", learner.step)
    with closing(batch for _ in itertools.count() for batch in loader) as batches:
        for step in range(rounds + 1):  # the first is the warm-up
            rng = step_rng(config.SEED, 0, 0, step)
            record = train([load(batches)], config.TRAIN.BASE_LR, rng, step)
            timed("logging", record.read)()
    times = {part: values[1:] for part, values in times.items() if values}
    totals = [sum(values) for values in zip(*times.values())]
    result = figures(job, (job.backend, job.dtype), totals, totals, memory_mb(process))
    parts = {part: round(1e3 * statistics.median(values), 3) for part, values in times.items()}
    return {**result, "parts_ms": parts}


def write_jpegs(folder: Path, count: int) -> list[str]:
    """Photograph-like files of ImageNet's usual size, with a training list; returns their names."""
    rng = np.random.default_rng(0)
    files = [f"{folder}/{number}.jpg" for number in range(count)]
    for file in files:
        coarse = Image.fromarray(rng.integers(0, 256, [12, 16, 3], dtype=np.uint8))
        pixels = np.asarray(coarse.resize(JPEG_SIZE, Image.BICUBIC), np.int16)
        noisy = np.clip(pixels + rng.integers(-12, 13, pixels.shape), 0, 255)  # as grain
        Image.fromarray(noisy.astype(np.uint8)).save(file, quality=90)
    (folder / "train_list.txt").write_text("".join(f"{n}.jpg 0\n" for n in range(count)))
    return files


@contextmanager
def peer(name: str, job: Job, files: Sequence[str]) -> Iterator[Callable[[str], float]]:
    """One of `PEERS` in a child process, which sleeps while Paddle is measured. What is
    yielded asks it for ``step``, seconds, or for ``memory``, megabytes.
    """
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, str(PEER_SCRIPT), json.dumps(job.for_timm(name, files))]
    child = subprocess.Popen(command, text=True, **pipes)

    def ask(request: str) -> float:
        with suppress(BrokenPipeError):  # it ended: said below
            print(request, file=child.stdin, flush=True)
        if answer := child.stdout.readline():
            return float(answer)
        raise UserError(f"-compare: {name} stopped ({reason()})")

    def reason() -> str:
        lines = child.communicate()[1].strip().splitlines()
        return lines[-1] if lines else f"exit code {child.returncode}"

    try:
        if child.stdout.readline().strip() != "ready":
            packages = "torch timm" + " openvino" * name.startswith("openvino")
            raise UserError(f"-compare: {name} did not start ({reason()}); pip install {packages}")
        yield ask
    finally:
        child.communicate()  # end of input: it leaves


def alternate(sides: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Seconds of every side, round by round: what disturbs the machine meets all sides.

    A turn's first step is not counted: after a pause it is slower, not by the same for all.
    """
    times = [[] for _ in sides]
    for _ in range(rounds):
        for side, found in zip(sides, times):
            if len(sides) > 1:
                time.sleep(SETTLE_SECONDS)
                side()
            found.append(side())
    return times


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if on_gpu():
        paddle.device.synchronize()


def figures(job: Job, label: tuple, times: list, own_times: list, memory: float) -> dict:
    """The result of one side, named by ``label`` (backend, dtype); ``times`` are seconds a round,
    ``memory`` is in MB. ``speedup`` is the median ratio to Paddle's `own_times`.
    """
    seconds, gflops = statistics.median(times), job.gflops
    peak = gemm_peak(label[1]) if gflops else 0.0  # no products in mode data
    return {
        "model": job.config.MODEL.NAME,
        "mode": job.mode,
        "backend": label[0],
        "dtype": label[1],
        "batch_size": job.batch_size,
        "threads": job.threads if peak else 1,
        "images_per_second": round(job.batch_size / seconds, 2),
        "ms_per_step": round(1e3 * seconds, 3),
        "peak_memory_mb": round(memory, 1),
        "gemm_peak_gflops": round(peak, 1),
        "gemm_efficiency": round(gflops / seconds / peak, 3) if peak else 0.0,
        "speedup": round(statistics.median(t / own for t, own in zip(times, own_times)), 3),
    }


def as_table(results: Sequence[dict]) -> str:
    """Results for people: a line each under their keys, and what a step's parts take."""
    keys = [key for key in results[0] if key != "parts_ms"]
    rows = [keys] + [[str(result[key]) for key in keys] for result in results]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    parts = results[0].get("parts_ms", {})
    total = sum(parts.values())
    lines += [f"{k:>10} {v:10.2f} ms {100 * v / total:6.1f} %" for k, v in parts.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("Measures speed and memory of a model beside the machine's limit.")
    parser.flag("cfg", "YAML config of the model", metavar="FILE")
    parser.flag("mode", "what to measure (default: infer)", default="infer", choices=MODES)
    parser.flag("batch_size", "images in a step", type=int, default=32, metavar="N")
    parser.flag("threads", "CPU threads (default: all cores)", type=int, metavar="N")
    dtypes = sorted({dtype for able in DTYPES.values() for dtype in sum(able, ())})
    parser.flag("dtype", "precision", default="float32", choices=dtypes)
    parser.flag("backend", "what infers", default="eager", choices=DTYPES)
    parser.flag("rounds", "timed steps", type=int, default=10, metavar="N")
    peers = f"run beside it: {', '.join(PEERS)}; or best"
    names = [*PEERS, "best"]
    parser.flag("compare", peers, nargs="+", default=(), choices=names, metavar="PEER")
    parser.flag("json", "one JSON object a line", action="store_true")
    parser.opts_flag("config keys: -opts MODEL.DROPPATH 0 ...")
    args = parser.parse_args(argv)
    threads = setup.default_threads() if args.threads is None else args.threads
    if min(args.batch_size, args.rounds, threads) < 1:
        raise UserError("-batch_size, -rounds and -threads are at least 1")
    config = get_config(args.cfg, args.opts)
    config.AMP = args.dtype in ("bfloat16", "float16")
    config.AMP_DTYPE = args.dtype if config.AMP else "auto"
    job = Job(config, args.mode, args.batch_size, threads, args.dtype, args.backend)
    with tempfile.TemporaryDirectory() as folder:
        if job.mode == "step":  # it is a run's
            config.DATA.BATCH_SIZE = job.batch_size
            if not Path(config.DATA.DATA_PATH).is_dir():
                write_jpegs(Path(folder), max(64, job.batch_size))
                config.DATA.DATA_PATH, config.DATA.DATASET = folder, "imagenet2012"
        config.freeze()
        if not args.json:
            print(setup.describe())
        try:
            results = benchmark(job, args.rounds, args.compare)
        except MemoryError:  # Paddle's is pages long
            raise UserError(f"-batch_size {job.batch_size} does not fit into memory") from None
    print("\n".join(map(json.dumps, results)) if args.json else as_table(results))
    if results[1:]:
        best = min(results[1:], key=lambda result: result["speedup"])
        line = f"{best['speedup']} times as fast as {best['backend']}, the fastest peer"
        print(line, file=sys.stderr)


if __name__ == "__main__":
    run_as_script(main)
