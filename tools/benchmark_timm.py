"""The peers of tools/benchmark.py: the same work by timm, in a process of its own.

Settings come as JSON in the first argument. After that every line on standard input is a request,
``step`` or ``memory``, and its answer is one number on standard output: seconds, or megabytes.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from typing import Callable


def build_step(settings: dict) -> Callable[[], None]:
    """One step of the work that ``settings`` (see `benchmark.Job.for_timm`) describes."""
    if settings["mode"] == "data":
        return _data_step(settings)
    import torch
    from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

    device, size, batch = (settings[key] for key in ("device", "image_size", "batch_size"))
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this PyTorch sees no GPU, on which Paddle runs")
    torch.set_num_threads(settings["threads"])
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as Paddle multiplies there
    block = partial(ResBlock, init_values=0.1)
    model = MlpMixer(img_size=size, block_layer=block, norm_layer=Affine, **settings["model"])
    model = model.to(device)
    run = torch.compile(model) if "compile" in settings["form"] else model
    precision = partial(torch.autocast, device, torch.bfloat16, settings["bf16"])
    images = torch.randn(batch, 3, size, size, device=device)
    if settings["mode"] == "train":
        labels = torch.randint(model.num_classes, (batch,), device=device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        model.train()

        def step():
            with precision():
                loss = torch.nn.functional.cross_entropy(run(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

        return step
    model.eval()
    if settings["form"] == "openvino":
        return _openvino_step(model, images, settings)
    if settings["form"] == "timm_compile_freeze":
        import torch._inductor.config

        torch._inductor.config.freezing = True

    def step():
        with torch.no_grad(), precision():  # autocast keeps its casts; not in inference_mode
            run(images)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def _openvino_step(model, images, settings: dict) -> Callable[[], None]:
    import openvino

    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": settings["threads"],
        "INFERENCE_PRECISION_HINT": "bf16" if settings["bf16"] else "f32",
    }
    network = openvino.convert_model(model, example_input=images)
    run, array = openvino.compile_model(network, "CPU", options), images.numpy()
    if settings["bf16"] and run.get_property("INFERENCE_PRECISION_HINT") != openvino.Type.bf16:
        raise SystemExit("OpenVINO has no bfloat16 on this processor")
    return lambda: run(array)


def _data_step(settings: dict) -> Callable[[], None]:
    """The training pipeline of timm and torchvision on PIL, without normalisation: to uint8."""
    from PIL import Image
    from timm.data import create_transform

    transform = create_transform(
        settings["image_size"],
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        use_prefetcher=True,  # leaves out the conversion to float
    )
    files = settings["files"]

    def step():
        for number in range(settings["batch_size"]):
            with Image.open(files[number % len(files)]) as image:
                try:
                    transform(image.convert("RGB"))
                except ValueError as error:  # timm posterizes to 0 bits at times; Pillow 13 refuses
                    if "bits" not in str(error):
                        raise

    return step


def peak_memory_mb(device: str) -> float:
    """The largest memory of this process so far, MB: resident, or PyTorch's on its GPU."""
    if device == "cuda":
        return sys.modules["torch"].cuda.max_memory_allocated() / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(f"{__doc__}\nStarted by tools/benchmark.py; see its -h.")
        return
    settings = json.loads(sys.argv[1])
    step = build_step(settings)
    step()  # warm up
    print("ready", flush=True)
    for request in sys.stdin:
        start = time.perf_counter()
        if request.strip() == "memory":
            print(peak_memory_mb(settings["device"]), flush=True)
        else:
            step()
            print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
