"""tools/benchmark.py measures what it says, prints what it promises, and refuses the rest."""

import itertools
import json
import statistics
from unittest import mock

import paddle
import pytest

from cli.errors import UserError
from config import get_config
from cpu import onednn
from resmlp import build_resmlp
from tools import benchmark as tool
from tools.benchmark import Job, benchmark
from training.learner import Learner

KEYS = {
    *("model", "mode", "backend", "dtype", "batch_size", "threads", "images_per_second"),
    *("ms_per_step", "peak_memory_mb", "gemm_peak_gflops", "gemm_efficiency", "speedup"),
}
ONNX = {"onnx": tool.ONNX_PACKAGES, "openvino": (*tool.ONNX_PACKAGES, "openvino")}


@pytest.fixture
def config(monkeypatch):
    """A tiny model; the machine's peak is said to be 2 GFLOP/s, so that it need not be measured."""
    monkeypatch.setattr(tool, "gemm_peak", lambda dtype: 2.0)
    monkeypatch.setattr(tool, "SETTLE_SECONDS", 0.0)
    config = get_config()
    config.defrost()
    config.DATA.IMAGE_SIZE, config.DATA.NUM_WORKERS, config.DATA.DATA_PATH = 16, 0, "no/such"
    config.MODEL.NAME, config.MODEL.NUM_CLASSES = "tiny", 3
    config.MODEL.MIXER.PATCH_SIZE, config.MODEL.MIXER.EMBED_DIM, config.MODEL.MIXER.DEPTH = 4, 8, 2
    config.freeze()
    return config


@pytest.fixture
def run_main(config, tmp_path, capsys):
    """Calls the script on the tiny model; returns what it printed on either stream."""
    (tmp_path / "tiny.yaml").write_text(config.dump())

    def call(flags):
        tool.main(["-cfg", str(tmp_path / "tiny.yaml"), "-rounds", "1", *flags.split()])
        return capsys.readouterr()

    return call


@pytest.mark.parametrize("backend", tool.DTYPES)
def test_every_backend_gives_every_figure_as_an_object_in_a_line_of_json(run_main, backend):
    for package in ONNX.get(backend, ()):
        pytest.importorskip(package)
    (line,) = run_main(f"-batch_size 2 -threads 1 -json -backend {backend}").out.splitlines()
    result = json.loads(line)
    assert set(result) == KEYS
    assert (result["model"], result["mode"], result["backend"]) == ("tiny", "infer", backend)
    assert (result["batch_size"], result["threads"], result["dtype"]) == (2, 1, "float32")
    assert result["images_per_second"] > 0
    assert result["peak_memory_mb"] > 50


def test_the_table_names_its_columns(run_main):
    process, header, row = run_main("--batch-size 3").out.splitlines()
    assert process.startswith("process:")
    assert header.split()[:5] == ["model", "mode", "backend", "dtype", "batch_size"]
    assert row.split()[:5] == ["tiny", "infer", "eager", "float32", "3"]


def test_int8_runs_in_onnxruntime_beside_the_float32_peak(config, monkeypatch, capfd):
    for package in (*ONNX["onnx"], "ml_dtypes"):
        pytest.importorskip(package)
    from tools import onnx_graph

    monkeypatch.setattr(tool, "gemm_peak", lambda dtype: {"int8": 2.0}[dtype])
    layers, write = [], onnx_graph.write_onnx
    monkeypatch.setattr(onnx_graph, "write_onnx", lambda *a, **k: layers.append(write(*a, **k)))
    (result,) = benchmark(Job(config, "infer", 2, backend="onnx", dtype="int8"), rounds=1)
    assert set(result) == KEYS and result["dtype"] == "int8"
    assert layers == [4]  # two in each of two blocks
    assert not capfd.readouterr().out  # which is for the results


@pytest.mark.skipif(not onednn.has(paddle.float32), reason="no oneDNN in this Paddle")
@pytest.mark.parametrize("mode", ["infer", "train", "step"])
def test_bfloat16_is_that_of_amp(run_main, mode, monkeypatch):
    product = mock.Mock(wraps=onednn.product)
    monkeypatch.setattr(onednn, "product", product)
    lines = run_main(f"-mode {mode} -batch_size 2 -dtype bfloat16 -json").out.splitlines()
    assert json.loads(lines[-1])["dtype"] == "bfloat16"
    assert {call.args[0].dtype for call in product.call_args_list} == {paddle.bfloat16}


FORMS = """import json, sys
form = json.loads(sys.argv[1])
seconds = {"timm": 1, "timm_compile": 3, "timm_compile_freeze": 5, "openvino": 7}[form["form"]]
print("ready", flush=True)
for line in sys.stdin: print(seconds + form["bf16"], flush=True)
"""


@pytest.fixture
def peers(config, monkeypatch, tmp_path):
    """Peers whose seconds tell the form that they were given."""
    (tmp_path / "other.py").write_text(FORMS)
    monkeypatch.setattr(tool, "PEER_SCRIPT", tmp_path / "other.py")


def test_a_peer_is_told_its_form_and_labelled_with_it(config, peers):
    seconds = {"timm": 1, "timm_bf16": 2, "timm_compile": 3, "timm_compile_freeze_bf16": 6}
    seconds["openvino"] = 7
    own, *others = benchmark(Job(config, "infer", 2), rounds=1, compare=list(seconds))
    assert (own["backend"], own["dtype"]) == ("eager", "float32")
    assert {other["backend"]: other["ms_per_step"] / 1e3 for other in others} == seconds
    for other in others:
        assert other["dtype"] == ("bfloat16" if "bf16" in other["backend"] else "float32")


def test_the_best_is_sought_among_all_that_do_the_job_and_the_ratio_to_it_said(
    config, peers, run_main, monkeypatch
):
    monkeypatch.setattr(tool, "find_spec", lambda name: True)
    shown, said = run_main("-compare best -json")
    ratios = [json.loads(line)["speedup"] for line in shown.splitlines()]
    assert len(ratios) == 5
    assert said.endswith(f"{ratios[1]} times as fast as timm, the fastest peer\n")
    assert tool.choose_peers(Job(config, "train"), ["best"]) == ["timm", "timm_compile"]
    monkeypatch.setattr(tool, "find_spec", lambda name: False)
    assert "openvino" not in tool.choose_peers(Job(config), ["best"])


def test_the_figures_follow_from_the_median_time(config):
    job = Job(config, "train", batch_size=4)
    own = tool.figures(job, ("eager", "float32"), [1.0, 2.0, 4.0], [1.0, 2.0, 4.0], 5.0)
    peer = tool.figures(job, ("timm", "float32"), [8.0, 2.0, 4.0], [1.0, 2.0, 4.0], 7.0)
    assert own["ms_per_step"] == 2000.0 and own["images_per_second"] == 2.0
    tokens, dim, hidden = 16, 8, 32
    block = 2 * (tokens * tokens * dim + 2 * tokens * dim * hidden)
    forward = 4 * (2 * tokens * 48 * dim + 2 * block + 2 * dim * 3) / 1e9
    assert Job(config, "infer", batch_size=4).gflops == pytest.approx(forward)
    assert job.gflops == pytest.approx(3 * forward)
    assert own["gemm_efficiency"] == round(job.gflops / 2.0 / 2.0, 3)
    assert peer["ms_per_step"] == 4000.0 and peer["peak_memory_mb"] == 7.0
    assert peer["speedup"] == statistics.median([8.0 / 1.0, 2.0 / 2.0, 4.0 / 4.0])
    assert own["speedup"] == 1.0


def test_sides_take_turns_whose_first_step_is_not_counted(config):
    turns = itertools.count()
    sides = [lambda: next(turns), lambda: next(turns)]
    assert tool.alternate(sides, rounds=2) == [[1, 5], [3, 7]]
    assert tool.alternate(sides[:1], rounds=2) == [[8, 9]]


def test_the_train_mode_trains(config):
    model = build_resmlp(config)
    before = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    tool.train_step(Job(config, "train", 2), model, paddle.randn([2, 3, 16, 16]))()
    for name, value in model.state_dict().items():
        assert (value.numpy() != before[name]).any(), name


def test_the_data_mode_augments_jpeg_files_to_the_models_size(config, monkeypatch):
    shapes = []
    build = tool.build_train_transform

    def spy(config):
        transform = build(config)
        return lambda image, rng: shapes.append((image.shape, transform(image, rng).shape))

    monkeypatch.setattr(tool, "build_train_transform", spy)
    (result,) = benchmark(Job(config, "data", batch_size=3), rounds=2)
    assert set(shapes) == {((375, 500), (16, 16, 3))}
    assert len(shapes) == 3 * 3  # warm-up and two rounds
    assert result["gemm_efficiency"] == 0.0


def test_the_step_mode_times_every_part_of_the_runs_own_step(run_main, monkeypatch):
    learners, gradients = [], Learner.gradients
    monkeypatch.setattr(
        Learner, "gradients", lambda self, *args: learners.append(self) or gradients(self, *args)
    )
    flags = "-mode step -batch_size 4 -json -opts TRAIN.MODEL_EMA True"
    result = json.loads(run_main(flags).out.splitlines()[-1])
    parts = ["data", "augment", "forward", "backward", "optimizer", "ema", "logging"]
    assert list(result["parts_ms"]) == parts and min(result["parts_ms"].values()) > 0
    assert sum(result["parts_ms"].values()) == pytest.approx(result["ms_per_step"], abs=0.01)
    moments = learners[0].state()["optimizer"]
    assert len(moments) > 2 and learners[0].ema is not None  # it has made optimizer steps


@pytest.mark.parametrize(
    "flags, message",
    [
        ("-threads 0", "-batch_size, -rounds and -threads are at least 1"),
        ("-mode train -backend inference", "-backend inference is for -mode infer"),
        ("-dtype bfloat16 -backend to_static", "-backend to_static computes in float32"),
        ("-dtype float16 -backend inference", "on this CPU"),
        ("-dtype bfloat16 -backend onnx", "float32 or int8"),
        ("-mode train -compare openvino", "-compare openvino is for -mode infer"),
        ("-batch_size 100000000000000", "-batch_size 100000000000000 does not fit"),
    ],
)
def test_flags_that_cannot_be_are_one_line(run_main, flags, message):
    with pytest.raises(UserError, match=message) as error:
        run_main(flags)
    assert "\n" not in str(error.value)


BLIND = """import sys
from unittest.mock import MagicMock
for name in ("timm", "timm.models", "timm.models.mlp_mixer"): sys.modules[name] = MagicMock()
cuda = MagicMock(**{"is_available.return_value": False})
"""


def test_a_peer_runs_on_the_gpu_as_paddle_does_or_says_that_it_cannot(
    config, monkeypatch, tmp_path
):
    (tmp_path / "torch.py").write_text(BLIND)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(tool, "on_gpu", lambda: True)
    peer = tool.peer("timm", Job(config, "infer", 1), [])
    with pytest.raises(UserError, match="this PyTorch sees no GPU, on which Paddle runs"), peer:
        pass


@pytest.mark.parametrize(
    "script, message",
    [
        ("import nowhere", r"timm did not start \(Mod.*nowhere'\); pip install torch timm"),
        ("raise SystemExit(3)", r"timm did not start \(exit code 3\); pip install torch timm"),
        ("print('ready', flush=True); input(); 1 / 0", r"timm stopped \(ZeroDivisionError"),
    ],
)
def test_a_peer_that_does_not_start_or_stops_is_named_with_its_last_words(
    run_main, monkeypatch, tmp_path, script, message
):
    (tmp_path / "other.py").write_text(script)
    monkeypatch.setattr(tool, "PEER_SCRIPT", tmp_path / "other.py")
    with pytest.raises(UserError, match=message):
        run_main("-compare timm")


@pytest.mark.parametrize(
    "dtype, gpu, size, computed_in",
    [
        ("float32", False, 64, "float32"),
        ("int8", False, 64, "float32"),  # Paddle has no int8 product
        ("bfloat16", False, 64, "bfloat16"),
        ("float16", True, 128, "float16"),
    ],
)
def test_the_peak_is_that_of_a_product_of_known_size(monkeypatch, dtype, gpu, size, computed_in):
    seen, ticks = [], iter([0.0, 4.0, 4.0, 5.0, 5.0, 7.0])
    for name, value in (("GEMM_SIZE", 64), ("GEMM_SIZE_GPU", 128), ("GEMM_ROUNDS", 3)):
        monkeypatch.setattr(tool, name, value)
    monkeypatch.setattr(tool, "on_gpu", lambda: gpu)
    monkeypatch.setattr(paddle.device, "synchronize", lambda: None)
    for module, name in ((paddle, "matmul"), (onednn, "product")):
        monkeypatch.setattr(module, name, lambda a, b: seen.append((a.shape, str(a.dtype)[7:])))
    monkeypatch.setattr(tool.time, "perf_counter", lambda: next(ticks))
    assert tool.gemm_peak(dtype) == pytest.approx(2e-9 * size**3)
    assert seen == [([size, size], computed_in)] * 3
