"""The whole zoo in one command: files told by their names, known counts, what is kept."""

from cpu import setup  # noqa: F401  isort: skip

import csv
import json

import numpy as np
import paddle
import pytest
from PIL import Image

import tools.evaluate_zoo as tool
from cli.errors import UserError
from config import get_config
from loading.imagenet import wordnet_ids
from port_weights.names import convert
from port_weights.zoo import MEASURES, ZOO
from resmlp import build_resmlp, load_state
from storage.weights import write_weights
from tools.evaluate_zoo import evaluate_zoo, find_files, identify, table_rows

from .helpers.tiny_run import run_here, run_tool

_TINY = "MODEL.MIXER.DEPTH 1 MODEL.MIXER.EMBED_DIM 8 MODEL.MIXER.PATCH_SIZE 16 DATA.IMAGE_SIZE 32 "
_TINY += "DATA.CROP_PCT 1.0 DATA.NUM_WORKERS 0"
OPTS = _TINY.split()
HUB = "hub/models--timm--resmlp_12_224.fb_distilled_in1k/snapshots/1a/model.safetensors"
FILES = {  # file -> the entry of the zoo, and whose names the parameters have
    "resmlp_24_224.pdparams": ("resmlp_24_224", "paddle"),
    "resmlp_12_no_dist.safetensors": ("resmlp_12_224", "facebook"),
    HUB: ("resmlp_12_distilled_224", "timm"),
}


def random_state(seed):
    rng = np.random.default_rng(seed)
    state = build_resmlp(get_config(opts=OPTS)).state_dict()
    return {n: rng.normal(0.1, 0.5, v.shape).astype("float32") for n, v in state.items()}


def ranking(state, images):
    """The classes of uint8 images ``[B, 32, 32, 3]``, the likeliest first; normalised in float64"""
    model = build_resmlp(get_config(opts=OPTS))
    load_state(model, state)
    model.eval()
    x = (images / 255 - [0.485, 0.456, 0.406]) / np.array([0.229, 0.224, 0.225])
    logits = model(paddle.to_tensor(x.transpose(0, 3, 1, 2).astype("float32"))).numpy()
    return np.argsort(-logits, axis=1)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Files of random weights, images, what the files say of them, and labels: what one says."""
    folder = tmp_path_factory.mktemp("zoo")
    images = np.random.default_rng(9).integers(0, 256, [10, 32, 32, 3], dtype=np.uint8)
    top = []
    for seed, (name, (_, names)) in enumerate(FILES.items()):
        path, state = folder / "weights" / name, random_state(seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_weights(state if names == "paddle" else convert(state, "paddle", names)[0], path)
        top.append(ranking(state, images))
    labels = [top[i % 3][i, i % 2] for i in range(10)]
    lines = []
    for i, label in enumerate(labels):
        name = f"ILSVRC2012_val_{i + 1:08d}.png"
        lines.append(f"val/{name} {label}\n")
        for path in (folder / "imagenet" / "val", folder / "a" / wordnet_ids()[label]):
            path.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(path / name)
    (folder / "imagenet" / "val_list.txt").write_text("".join(lines))
    real = [[int(top[0][i, 0])] if i < 4 else [] for i in range(10)]
    (folder / "real.json").write_text(json.dumps(real))
    return folder, top, np.array(labels)


def results(output):
    with open(output / "results.csv", encoding="utf-8") as file:
        return {(row["weights"], row["measure"]): row for row in csv.DictReader(file)}


def test_files_are_evaluated_again_where_they_or_the_data_change(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(tool.subprocess, "run", run_here)
    folder, top, labels = zoo
    val, weights = folder / "imagenet", folder / "weights"
    arguments = str(tmp_path), {"val": str(val)}, str(folder / "real.json"), OPTS
    assert evaluate_zoo(str(weights), *arguments, ["-batch_size=4"]) == []
    found = results(tmp_path)
    for (name, _), classes in zip(FILES.values(), top):
        hits = classes[:, :5] == labels[:, None]
        assert hits.any()
        assert float(found[name, "ImageNet"]["here"]) == 100 * hits[:, 0].sum() / 10
        assert float(found[name, "ImageNet, top-5"]["here"]) == 100 * hits.sum() / 10
        row, right = found[name, "ReaL"], (classes[:4, 0] == top[0][:4, 0]).sum()
        assert (float(row["here"]), row["images"]) == (100 * right / 4, "4")
    row = found["resmlp_24_224", "ImageNet"]
    assert row["published"] == "79.380" and row["explained"] == "other images (50000 published)"
    assert float(row["difference"]) == pytest.approx(float(row["here"]) - 79.38)
    assert "| resmlp_24_224 | resmlp_24_224.pdparams |" in (tmp_path / "results.md").read_text()

    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("eval.json")}
    changed = weights / list(FILES)[0]
    kept = changed.read_bytes()
    write_weights(random_state(7), changed)
    (val / "val_list.txt").touch()  # the images and labels are the same
    evaluate_zoo(str(weights), *arguments, ["-batch_size=5"])
    redone = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert len(times) == 3 and [path.parent.parent.name for path in redone] == [list(FILES)[0]]
    changed.write_bytes(kept)
    before = tool.fingerprint(tool.data_config(str(val), OPTS))
    with open(val / "val" / "ILSVRC2012_val_00000001.png", "ab") as file:
        file.write(b"\0")
    assert tool.fingerprint(tool.data_config(str(val), OPTS)) != before


def test_unusable_files_are_named_and_do_not_stop_the_others(zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool.subprocess, "run", run_here)
    folder, weights = zoo[0], tmp_path / "weights"
    weights.mkdir()
    write_weights(random_state(0), weights / "resmlp_24_224.pdparams")
    headless = {n: v for n, v in random_state(0).items() if not n.startswith("head.")}
    write_weights(headless, weights / "resmlp_12_distilled_224.pdparams")
    (weights / "resmlp_12_224.pdparams").write_bytes(b"damaged")
    problems = evaluate_zoo(str(weights), str(tmp_path), {"a": str(folder / "a")}, None, OPTS)
    assert [problem.rpartition(" ")[2] for problem in problems] == ["2", "2"]
    said = capsys.readouterr().err
    assert "damaged" in said and "missing: head.weight" in said
    assert (tmp_path / "results.md").read_text().count("Not evaluated: ") == 2
    assert [weights for weights, _ in results(tmp_path)] == ["resmlp_24_224"]


def test_two_processes_count_as_one_does(zoo, tmp_path):
    folder, (ranked, *_), labels = zoo
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("resmlp_24_224.pdparams", "resmlp_12_dino_224.pdparams", "vit_base.pth"):
        write_weights(random_state(0), weights / name)
    flags = ["-weights", weights, "-a", folder / "a", "-output", tmp_path / "out"]
    result = run_tool("evaluate_zoo", *flags, "-nprocs", 2, "-opts", *OPTS, cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"error: {weights}/vit_base.pth: the zoo")
    assert "k-NN accuracy is 62.6 %" in result.stdout
    among = [next(c for c in row if c in labels) for row in ranked]
    row = results(tmp_path / "out")["resmlp_24_224", "A"]
    assert (float(row["here"]), row["images"]) == (100 * np.mean(among == labels), "10")


def test_each_name_of_the_zoo_is_known_in_every_place_that_publishes_it(tmp_path):
    for weights in ZOO:
        hub = f"models--timm--{weights.timm}/snapshots/0a1b/pytorch_model.bin"
        timm = (f"{weights.timm}.bin", f"{weights.timm}/model.safetensors", hub)
        for name in (f"{weights.name}.pdparams", weights.file, *timm):
            assert identify(tmp_path / name) is weights
    assert identify(tmp_path / "model.safetensors") is identify(tmp_path / "best.pdparams") is None
    for name in ("resmlp_12_dist.pth", "resmlp_12_dist.pth.pdparams", "notes.txt"):
        (tmp_path / name).touch()
    assert find_files(str(tmp_path)) == [tmp_path / "resmlp_12_dist.pth"]  # and not what it became
    with pytest.raises(UserError, match="no weight files"):
        find_files(str(tmp_path / "none"))


def test_differences_are_explained_up_to_the_spread_of_timms_own_results():
    for off, word in ((0.04, "yes"), (-0.04, "yes"), (0.042, "no"), (-1.0, "no")):
        scores = {"top1": 79.38 + off, "images": MEASURES["top1"].images}
        rows = table_rows({"x": {"val": {"weights": "resmlp_24_224", "scores": scores}}})
        assert [row[-1] for row in rows] == [word]
