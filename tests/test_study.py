import pytest

from cli.errors import ConfigError, UserError
from config import get_config
from tools import study as tool
from tools.study import ROOT, last_top1, read_study, run_study, table

from .helpers.tiny_data import CONFIG, make_data
from .helpers.tiny_run import run_here


def test_a_study_trains_every_variant_with_every_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(tool.subprocess, "run", run_here)
    data, output = make_data(tmp_path / "data", train=12, val=6), tmp_path / "out"
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    study = {"all": [], "no decay": ["TRAIN.WEIGHT_DECAY", "0"]}
    flags = [f"-cfg={tmp_path / 'tiny.yaml'}", f"-data_path={data}"]
    found = run_study(study, flags, str(output), 2, "main_single_gpu.py")
    assert set(found) == {"all", "no decay"}
    assert all(len(values) == 2 and 0 <= min(values) <= 100 for values in found.values())
    assert (output / "no_decay" / "seed_1" / "curves.png").is_file()
    assert run_study(study, flags, str(output), 2, "main_single_gpu.py") == found
    other = {"no decay": ["TRAIN.WEIGHT_DECAY", "0.1"]}
    with pytest.raises(UserError, match=r"no_decay/seed_0 .*TRAIN.WEIGHT_DECAY 0.0 -> 0.1\)"):
        run_study(other, flags, str(output), 1, "main_single_gpu.py")


def test_a_failed_run_is_named(tmp_path):
    with pytest.raises(UserError, match="odd, seed 0: the run ended with exit code 2"):
        run_study({"odd": ["NO.KEY", "1"]}, [], str(tmp_path), 1, "main_single_gpu.py")


def test_the_table_has_mean_spread_and_difference():
    text = table({"all": [80.0, 82.0], "less": [78.0, 79.0]})
    assert "| all | 81.00 ± 1.41 |  | 2 |" in text
    assert "| less | 78.50 ± 0.71 | -2.50 | 2 |" in text


@pytest.mark.parametrize("name", ["ablation", "training", "model"])
def test_the_studies_are_configs_that_the_12_layers_take(name):
    study = read_study(str(ROOT / "configs" / "studies" / f"{name}.yaml"))
    assert name != "ablation" or (list(study)[0] == "full recipe" and len(study) == 6)
    for keys in study.values():
        get_config(str(ROOT / "configs" / "resmlp_12_224.yaml"), keys)  # refuses what is wrong


def test_values_stay_as_they_are_written(tmp_path):
    (tmp_path / "x.yaml").write_text("a: {K: null, L: False, M: 5e-3}\n1: {}\n")
    keys = ["K", "null", "L", "False", "M", "5e-3"]
    assert read_study(str(tmp_path / "x.yaml")) == {"a": keys, "1": []}


@pytest.mark.parametrize(
    "text, words",
    [
        ("with +ema: {}\nwith -ema: {}\n", "would share the folder with_ema"),
        ("a: {}\nb: {}\na: {SEED: 1}\n", "a is given twice in .*line 3"),
        ("a: {SEED: 1, SEED: 2}\n", "SEED is given twice"),
        ("caf\xe9: {}\n", "cannot be read as YAML"),
        ("a: {b: c\n", "cannot be read as YAML: .*line"),
        ("- a\n- b\n", "expected `variant"),
    ],
)
def test_a_study_that_is_ambiguous_or_unreadable_is_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=rf"x\.yaml: .*{words}") as error:
        read_study(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, '{"kind": "epoch", "epoch": 1, "step": 3}'])
def test_a_run_without_an_accuracy_is_named(tmp_path, content):
    if content:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match="metrics.jsonl"):
        last_top1(tmp_path)
