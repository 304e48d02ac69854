import argparse
import shlex
from functools import reduce
from pathlib import Path

import pytest

from cli.errors import ConfigError
from config import (
    KEYS,
    PPVIT,
    describe_keys,
    get_arguments,
    get_config,
    resolve_config,
    update_config,
)
from optimizer import learning_rate

ROOT = Path(__file__).parent.parent


@pytest.fixture
def write(tmp_path):
    """Writes a YAML file; returns its path."""

    def write(text, name="x.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def from_flags(flags):
    return resolve_config(get_arguments(shlex.split(flags)))


def test_a_config_is_updated_by_arguments_of_ones_own_as_in_ppvit(write):
    config = get_config(write("{SEED: 3, DATA: {BATCH_SIZE: 4}}"))
    config.TRAIN.NUM_EPOCHS = 50
    cfg = write("TRAIN: {BASE_LR: 0.25}", "more.yaml")
    args = argparse.Namespace(cfg=cfg, batch_size=16, data_path="here", amp=True, eval=False)
    assert update_config(config, args) is config
    assert (config.SEED, config.TRAIN.NUM_EPOCHS, config.TRAIN.BASE_LR) == (3, 50, 0.25)
    assert (config.DATA.BATCH_SIZE, config.DATA.BATCH_SIZE_EVAL) == (16, 16)
    assert (config.DATA.DATA_PATH, config.AMP, config.EVAL) == ("here", True, False)
    with pytest.raises(ConfigError, match="-batch_size: DATA.BATCH_SIZE"):
        update_config(config, argparse.Namespace(batch_size="many"))


def values(config, keys):
    return {key: reduce(dict.get, key.split("."), config) for key in keys}


def test_every_key_has_a_rule_and_every_default_obeys_it():
    for key, value in values(get_config(), KEYS).items():
        found = KEYS[key].rule(value)
        assert found == value and type(found) is type(value), key


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")))
def test_every_config_of_the_zoo_is_valid_and_survives_being_written(path, write):
    config = get_config(str(path))
    assert path.stem == config.MODEL.NAME
    assert get_config(write(config.dump())) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "transfer").glob("*.yaml")))
def test_every_config_of_a_transfer_is_the_authors_or_says_what_is_open(path):
    config, text = get_config(str(path)), path.read_text()
    assert f"resmlp_12_{path.stem}" == config.MODEL.NAME and "table 4" in text
    assert (config.TRAIN.OPTIMIZER.NAME, config.TRAIN.WEIGHT_DECAY) == ("adamw", 0.05)
    assert config.DATA.BATCH_SIZE * 8 == 768 and config.TRAIN.REPEATED_AUG == 3
    rates = [learning_rate(config, epoch, 768) for epoch in (0, 5, config.TRAIN.NUM_EPOCHS - 1e-6)]
    top = 7.5e-5 if "inat" in path.stem else 7.5e-6  # iNaturalist's falls; CIFAR's rises to DeiT's
    assert rates == pytest.approx([1e-6, top, 1e-5], rel=0.01)  # lowest rate, which is above it


def test_the_defaults_are_the_papers_recipe():
    train = get_config(str(ROOT / "configs" / "resmlp_12_224.yaml")).TRAIN
    assert (train.OPTIMIZER.NAME, train.BASE_LR, train.LINEAR_SCALED_LR) == ("lamb", 5e-3, 2048)
    assert (train.WEIGHT_DECAY, train.NUM_EPOCHS, train.WARMUP_EPOCHS) == (0.2, 400, 5)
    assert (train.MIXUP_ALPHA, train.CUTMIX_ALPHA, train.SMOOTHING) == (0.8, 1.0, 0.1)
    assert (train.RANDOM_ERASE_PROB, train.REPEATED_AUG, train.END_LR) == (0.25, 3, 1e-5)


BATCHES = {"DATA.BATCH_SIZE": 8, "DATA.BATCH_SIZE_EVAL": 8, "DATA.DATA_PATH": "x", "EVAL": True}
PPVITS = (
    "TAG: x\nDATA:\n    IMAGE_SIZE: 224\n    CROP_PCT: 0.875\nMODEL:\n    TYPE: ResMLP\n"
    "    NAME: resmlp_24_224\n    MIXER:\n        PATCH_SIZE: 16\n"
    "        HIDDEN_SIZE: 384\n        NUM_LAYERS: 24\n"
)


@pytest.mark.parametrize(
    "text, flags, expected",
    [
        (PPVITS, "", {"MODEL.MIXER.EMBED_DIM": 384, "MODEL.MIXER.DEPTH": 24}),
        ("TRAIN: {BASE_LR: 5e-3}", "", {"TRAIN.BASE_LR": 5e-3}),  # a text, to YAML
        ("TRAIN: {OPTIMIZER: {BETAS: '(0.9, 0.95)'}}", "", {"TRAIN.OPTIMIZER.BETAS": (0.9, 0.95)}),
        (
            "SEED: 3\nAMP: True\nTRAIN: {GRAD_CLIP: 2.0}",
            "-opts SEED 0 AMP False TRAIN.GRAD_CLIP None TRAIN.MIXUP_PROB 0",
            {"SEED": 0, "AMP": False, "TRAIN.GRAD_CLIP": None, "TRAIN.MIXUP_PROB": 0.0},
        ),
        (  # the command line mends what a file leaves inconsistent
            "DATA: {IMAGE_SIZE: 225}\nTRAIN: {LAST_EPOCH: 9, NUM_EPOCHS: 9}",
            "-image_size=224 -opts TRAIN.NUM_EPOCHS 10",
            {"DATA.IMAGE_SIZE": 224, "TRAIN.NUM_EPOCHS": 10},
        ),
        ("", "-batch_size=8 -data-path x -eval", BATCHES),
        ("", "--batch_size=8 --data-path x --eval", BATCHES),
        ("", "-batch_size_eval 3 -batch_size 8", {"DATA.BATCH_SIZE_EVAL": 3, "DATA.BATCH_SIZE": 8}),
        ("", "-opts TRAIN.NUM_EPOCHS 10 -opts SEED 3", {"TRAIN.NUM_EPOCHS": 10, "SEED": 3}),
        ("", "-last_epoch=400 -resume=auto", {"TRAIN.LAST_EPOCH": 400}),
        ("", "-last_epoch=400 -eval", {"TRAIN.LAST_EPOCH": 400}),
        (
            *("", "-opts TRAIN.OPTIMIZER.BETAS '(0.9, 0.95)' TRAIN.CROP_SCALE [0.5,1]"),
            {"TRAIN.OPTIMIZER.BETAS": (0.9, 0.95), "TRAIN.CROP_SCALE": (0.5, 1.0)},
        ),
        ("", "-opts DATA.DATA_PATH '/data/my set #1'", {"DATA.DATA_PATH": "/data/my set #1"}),
        ("", "-opts MODEL.NAME 007 SAVE 2026-01-01", {"MODEL.NAME": "007", "SAVE": "2026-01-01"}),
        ("", "-opts MODEL.NAME 'a: b'", {"MODEL.NAME": "a: b"}),
        ("", "-opts MODEL.PRETRAINED [best]", {"MODEL.PRETRAINED": "[best]"}),
    ],
)
def test_what_a_file_and_the_command_line_say_is_in_the_config(write, text, flags, expected):
    assert values(from_flags(f"-cfg={write(text)} {flags}"), expected) == expected


@pytest.mark.parametrize(
    "flags, schedule, warmup, outcome",
    [
        ("", "warmupcosine", 0.5, "shortened to 0.5"),
        ("", "constant", 5, "the learning rate does not come to TRAIN.BASE_LR"),
        ("", "step", 5, "the learning rate does not come to TRAIN.BASE_LR"),
        ("", "cosine", 5, None),
        ("-eval", "warmupcosine", 5, None),
    ],
)
def test_a_warmup_that_does_not_fit_is_said(caplog, flags, schedule, warmup, outcome):
    opts = f"{flags} -opts TRAIN.NUM_EPOCHS 1 TRAIN.LR_SCHEDULER.NAME {schedule}"
    assert warmup == from_flags(opts).TRAIN.WARMUP_EPOCHS
    said = "config: TRAIN.WARMUP_EPOCHS 5 does not fit into TRAIN.NUM_EPOCHS 1; "
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ([said + outcome] if outcome else [])


def test_base_files_come_first_and_a_home_folder_is_expanded(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sub").mkdir()
    write("SEED: 7", "base.yaml")
    write("SEED: 1\nDATA: {IMAGE_SIZE: 28}", "sub/base.yaml")  # its heir makes it consistent
    write("BASE: [sub/base.yaml, '~/base.yaml']\nMODEL: {MIXER: {PATCH_SIZE: 4}}", "heir.yaml")
    write("BASE: heir.yaml\nDATA: {VAL_LIST: ~/val.txt}")
    config = from_flags("-cfg=~/x.yaml -output=~/run -opts TRAIN.TEACHER_PRETRAINED ~/teacher")
    assert (config.SEED, config.DATA.IMAGE_SIZE) == (7, 28) and f"{tmp_path}/run" == config.SAVE
    assert f"{tmp_path}/val.txt" == config.DATA.VAL_LIST
    assert f"{tmp_path}/teacher" == config.TRAIN.TEACHER_PRETRAINED


def test_the_help_shows_each_flag_once_with_default_and_choices(capsys):
    with pytest.raises(SystemExit):
        get_arguments(["-h"])
    text = " ".join(capsys.readouterr().out.split("data and model:")[1].split())
    assert text.count("-batch_size_eval") == 1 and "batch-size" not in text
    assert "PATCH_SIZE (default: 224)" in text and "-dataset {imagenet2012,imagefolder}" in text


def test_the_list_of_keys_is_a_config_with_a_meaning_for_each(write):
    assert get_config(write(describe_keys())) == get_config()
    lines = {line.split(": ")[0]: line for line in describe_keys().splitlines()}
    assert set(lines) == set(KEYS) and all(declared.meaning for declared in KEYS.values())
    assert "paper: lamb" in lines["TRAIN.OPTIMIZER.NAME"]
    assert "one of lamb, adamw, sgd" in lines["TRAIN.OPTIMIZER.NAME"]
    assert "(min, max) share of a side" in lines["TRAIN.CUTMIX_MINMAX"]


def bomb(first):
    """Lists that hold the one before ten times: small to read, huge to show."""
    lists = [f"&l0 {first}"] + [f"&l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 8)]
    return f"[[{', '.join(lists)}]]"


BAD_FILES = {
    "DATA:\n  BATCHSIZE: 3": r"x.yaml:2: unknown .* DATA.BATCHSIZE; did you mean DATA.BATCH_SIZE",
    "FOO: {}": r"x.yaml:1: unknown config key FOO",
    "DATA: 4": r"x.yaml:1: DATA is a section; set one of BATCH_SIZE",
    "DATA: {BATCH_SIZE: -4}": r"BATCH_SIZE is -4; expected a whole number of at least 1",
    "DATA: {BATCH_SIZE: 2.5}": r"DATA.BATCH_SIZE is 2.5",
    "DATA: {BATCH_SIZE: yes}": r"DATA.BATCH_SIZE is True",
    "DATA: {BATCH_SIZE: {a: 1}}": r"DATA.BATCH_SIZE takes a value, found a section",
    "DATA: {CROP_PCT: 3}": r"DATA.CROP_PCT is 3; expected a number of at least 0.1 and at most 1.0",
    "DATA: {WORKER_TIMEOUT: 1e300}": r"WORKER_TIMEOUT is '1e300'; .* at most 1000000",
    "MODEL: {MIXER: {EMBED_DIM: 2147483647}}": r"EMBED_DIM is 2147483647; .* from 1 to 65536",
    'SAVE: "\\ud800"': r"SAVE is .*ud800'; expected a path",
    "SEED: !!int ''": r"x.yaml:1: SEED: not a plain value: its text does not fit its type",
    f"SEED: 0x{'f' * 5000}": r"SEED is a huge number; expected a whole number",
    "SEED: 1\nTAG: a\0b": r"x.yaml:2: not valid YAML: unacceptable character #x0000",
    "DATA.IMAGE_SIZE: 64\nDATA: {IMAGE_SIZE: 32}": r"x.yaml:2: .* twice .* first in line 1",
    "MODEL:\n  MIXER:\n    DEPTH: 1\n    NUM_LAYERS: 2": r"x.yaml:4: .*NUM_LAYERS is given twice",
    "DATA: {IMAGE_SIZE: 225}": r"IMAGE_SIZE is 225, not a multiple .* for example 224 or 240",
    "TRAIN: {BASE_LR: fast}": r"TRAIN.BASE_LR is 'fast'; expected a number above 0",
    "TRAIN: {BASE_LR: .nan}": r"TRAIN.BASE_LR is nan",
    "TRAIN: {OPTIMIZER: {NAME: adam2}}": r"NAME is 'adam2'; expected one of lamb, adamw, sgd",
    "TRAIN: {CROP_SCALE: [1.0, 0.5]}": r"smaller first",
    "a: [1,": r"x.yaml:\d: not valid YAML",
    "- 1": r"expected `KEY: value` lines, found a sequence",
    f"DATA: {{IMAGENET_MEAN: {bomb('[x]')}}}": r"DATA.IMAGENET_MEAN is .*; expected",
    f"BASE: {bomb('[x]')}": r"BASE is .*; expected",
    "BASE: x.yaml": r"BASE leads back to this file",
    "BASE: gone.yaml": r"gone.yaml: no such config file",
    "BASE: [[a.yaml]]": r"BASE is \[\['a.yaml'\]\]; expected a YAML file, or a list of them",
    'BASE: ["a\\0b"]': r"BASE is .*; expected",
    "EVAL: !!python/object/apply:os.system [ls]": r"x.yaml:1: EVAL: not a plain value",
}


@pytest.mark.parametrize("text", BAD_FILES, ids=lambda text: text[:40])
def test_a_mistake_in_a_file_is_named_with_its_place(text, write):
    with pytest.raises(ConfigError, match=BAD_FILES[text]) as caught:
        get_config(write(text))
    assert len(str(caught.value)) < 600


BAD_FLAGS = {
    "-foo": "unrecognized arguments: -foo",
    "-batch_size x": "-batch_size: DATA.BATCH_SIZE is 'x'; expected a whole number",
    "-opts SEED": "-opts takes KEY VALUE pairs",
    "-opts train.betas 1": "did you mean TRAIN.OPTIMIZER.BETAS",
    "-opts TRAIN.LOSS mse": "TRAIN.LOSS is 'mse'; expected one of ce, bce$",
    "-opts SEED [": "-opts: SEED: cannot read the value",
    "-opts SEED !!int": "-opts: SEED: cannot read the value",
    "-opts BASE x.yaml": "-opts: BASE belongs in a YAML file",
    "-pretrained=": "argument -pretrained: is empty; leave it out",
    "-last_epoch 400": "TRAIN.LAST_EPOCH is 400, which leaves nothing of TRAIN.NUM_EPOCHS 400",
    "-cfg configs/RESMLP_24_224.YAML": "no such config file; did you mean resmlp_24_224.yaml",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_mistake_on_the_command_line_is_named(flags):
    with pytest.raises(ConfigError, match=BAD_FLAGS[flags]):
        from_flags(flags)


def test_files_that_multiply_through_base_are_refused(write):
    for number in range(12):
        write(f"BASE: [{number + 1}.yaml, {number + 1}.yaml]", f"{number}.yaml")
    write("SEED: 1", "12.yaml")
    with pytest.raises(ConfigError, match="BASE leads to more than 100 files"):
        get_config(write("BASE: 0.yaml"))


# ------------------------------------------------------------------------- PPViT's defaults
def test_a_ppvit_yaml_is_told_each_default_that_differs_but_not_a_recipe_of_ours(write, capsys):
    base = write("TRAIN: {NUM_EPOCHS: 400}", "base.yaml")
    path = write(f"BASE: [{base}]\nMODEL: {{MIXER: {{HIDDEN_SIZE: 384}}}}\nTRAIN: {{BASE_LR: 1}}")
    from_flags(f"-cfg={path} -opts TRAIN.GRAD_CLIP 1.0 TRAIN.WEIGHT_DECAY 0.1")
    assert capsys.readouterr().out == (
        f"not set in {path}, so our default: MODEL.DROPPATH 0.05 (PPViT 0.1), "
        "TRAIN.WARMUP_EPOCHS 5.0 (PPViT 20), "
        "TRAIN.LINEAR_SCALED_LR 2048 (PPViT 512), TRAIN.OPTIMIZER.NAME lamb (PPViT adamw), "
        "TRAIN.REPEATED_AUG 3 (PPViT 1)\n"
    )
    ours = ROOT / "configs" / "resmlp_12_224.yaml"
    from_flags("-batch_size 2")
    from_flags(f"-cfg={ours}")
    from_flags(f"-cfg={write(f'BASE: [{ours}]')}")
    from_flags(f"-cfg={write('SEED: 1')} -eval")
    assert capsys.readouterr().out == ""


def test_the_table_of_ppvits_defaults_in_the_docs_is_whole():
    lines = (ROOT / "docs" / "porting.md").read_text().splitlines()
    rows = {row[1].strip("` "): row[2:4] for row in (li.split("|") for li in lines) if len(row) > 5}
    for key, value in values(get_config(), PPVIT).items():
        assert [cell.strip() for cell in rows[key]] == [str(PPVIT[key]), str(value)], key
