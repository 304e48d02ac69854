"""The PyTorch side of tools/benchmark.py computes in the precision it is asked for."""

import pytest

from config import get_config
from tools.benchmark import Job
from tools.benchmark_timm import build_step

torch = pytest.importorskip("torch")
pytest.importorskip("timm")


@pytest.fixture
def config():
    config = get_config()
    config.defrost()
    config.DATA.IMAGE_SIZE, config.MODEL.NUM_CLASSES = 16, 3
    config.MODEL.MIXER.PATCH_SIZE, config.MODEL.MIXER.EMBED_DIM, config.MODEL.MIXER.DEPTH = 4, 8, 2
    return config


def test_openvino_runs_timm_s_model(config):
    pytest.importorskip("openvino")
    (logits,) = build_step(Job(config, "infer", 2).for_timm("openvino", []))().values()
    assert logits.shape == (2, 3)


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("name, dtype", [("timm", torch.float32), ("timm_bf16", torch.bfloat16)])
def test_linear_layers_compute_in_the_precision_of_the_name(config, mode, name, dtype):
    step = build_step(Job(config, mode, 2).for_timm(name, []))
    dtypes = set()

    def note(module, _, output):
        if isinstance(module, torch.nn.Linear):
            dtypes.add(output.dtype)

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        step()
    finally:
        handle.remove()
    assert dtypes == {dtype}
