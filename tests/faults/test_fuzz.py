"""Every parser against mutated input: refused by one clear error, or read as it stands. An audit
hook sees that no input makes the process run a program, unpickle a class, write a file or open a
connection; a timer that none keeps it busy.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys

import numpy as np
import pytest
from PIL import Image, features

from cli.errors import CheckpointError, ConfigError, DataError, UserError, WeightsError
from config import KEYS, get_config
from loading.files import read_list
from loading.images import read_image
from resmlp import ResMLP, load_state
from storage import checkpoints
from storage.weights import read_weights, write_weights

COUNT = 1000  # inputs of each kind, at least
SECONDS = 10  # for one input
MEGABYTES = 1500  # that a kind of input may add: Pillow allows an image 89 million pixels

_FORBIDDEN = ("os.system", "subprocess.", "os.exec", "os.posix_spawn", "os.spawn", "os.fork")
_FORBIDDEN += ("pickle.", "socket.connect", "os.remove", "os.rename", "shutil.", "ctypes.dlopen")
_watching, _seen = False, []


def _hook(event: str, arguments: tuple) -> None:
    if not _watching:
        return
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event.startswith(_FORBIDDEN):
        _seen.append((event, arguments))


sys.addaudithook(_hook)


@pytest.fixture
def watch():
    """Calls a parser under watch. None: it raised a ``kind`` of `UserError`, of one line."""

    def expired(number, frame):
        raise AssertionError("an input kept the parser busy")

    def call(kind, parse, *arguments, says=""):
        global _watching
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        _watching = True
        try:
            return parse(*arguments)
        except kind as error:
            text = str(error)
            assert text and "\n" not in text and len(text) < 2000 and says in text, text
            assert "\0" not in text and "\x1b" not in text, text  # nothing for a terminal to obey
            return None
        finally:
            _watching = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert not _seen, _seen

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGALRM, expired)
    yield call
    signal.signal(signal.SIGALRM, old)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES


def mutate(rng: random.Random, data: bytes, words: list[bytes]) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place : place + rng.choice((1, 4, 64, len(data)))]
        elif kind == 2:
            data[place:place] = rng.choice(words)
        elif kind == 3:
            start = rng.randrange(len(data) + 1)
            data[place:place] = data[start : start + rng.randrange(1, 64)]
        elif kind == 4:
            data[place : place + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff"))
        elif kind == 5:
            data[place : place + rng.randrange(8)] = rng.randbytes(rng.randrange(8))
        elif words:
            word = rng.choice(words)
            data[place : place + len(word)] = word
    return bytes(data)


def test_list_files(tmp_path, watch):
    rng = random.Random(1)
    text = b"".join(b"train/a b/%d.JPEG %d\n" % (n, n % 7) for n in range(20))
    words = [b"../", b"/etc/passwd 1\n", b" ", b"\n", b"\0", b"-1", b"9" * 5000, b"\xef\xbb\xbf"]
    words += [b"1e3", b"1_0", b"\xd9\xa3", b"#", b"\r", b"\t", b"x 3 3", b"/", b"..", b"\x1b[2J"]
    path, root, accepted = tmp_path / "list.txt", str(tmp_path), 0
    for _ in range(3 * COUNT):
        path.write_bytes(mutate(rng, text, words))
        index = watch(DataError, read_list, str(path), root, 7, False)
        if index is None:
            continue
        accepted += 1
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        lines = [line.strip() for line in lines]
        lines = [line for line in lines if line and not line.startswith(b"#")]
        assert len(index) == len(lines)
        for number, line in enumerate(lines):
            name, label = line.rsplit(None, 1)
            assert index.name(number) == (os.path.normpath(name) if b".." in name else name)
            assert index.labels[number] == int(label) in range(7)
            assert index.path(number).startswith(root + "/")
            assert "/../" not in index.path(number).replace(root, "")
    assert COUNT / 10 < accepted < 2.5 * COUNT  # mutations of both kinds


YAML = b"""
DATA: {IMAGE_SIZE: 32, BATCH_SIZE: 8, IMAGENET_MEAN: [0.4, 0.5, 0.6], DATASET: imagefolder}
MODEL:
  NAME: tiny
  NUM_CLASSES: 3
  MIXER: {PATCH_SIZE: 8, EMBED_DIM: 16, DEPTH: 2}
TRAIN:
  NUM_EPOCHS: 10
  BASE_LR: 5e-3
  CROP_SCALE: [0.1, 1.0]
  OPTIMIZER: {NAME: adamw, BETAS: [0.9, 0.99]}
  LR_SCHEDULER: {MILESTONES: '30, 60'}
AMP: False
"""
YAML_WORDS = [b"!!python/object/apply:os.system ['touch ran']", b"!!python/name:os.system", b"&a"]
YAML_WORDS += [b"*a", b"<<: *a", b"BASE: [tiny.yaml]", b"BASE: ['']", b"null", b"{", b"[", b": "]
YAML_WORDS += [b"- ", b"\n  ", b"1e999", b".nan", b"0x10", b"2026-01-01", b"!!binary aGk=", b"\t"]
YAML_WORDS += [b"? ", b"---\n", b"'", b'"', b"True", b"-1", b"9" * 400, b"!!set {a}", b"\xff"]
YAML_WORDS += [b"[" * 500, b"{a: " * 500, b"&a [*a]", b"\x1b[2J", b"1:30"]


def obeys_its_rules(node, prefix=""):
    for name, value in node.items():
        if isinstance(value, dict):
            obeys_its_rules(value, f"{prefix}{name}.")
        else:
            assert KEYS[prefix + name].rule(value) == value


def test_yaml_files(tmp_path, watch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, accepted = random.Random(2), 0
    path = tmp_path / "tiny.yaml"
    for _ in range(3 * COUNT):
        path.write_bytes(mutate(rng, YAML, YAML_WORDS))
        config = watch(ConfigError, get_config, "tiny.yaml", says="tiny.yaml")
        if config is not None:
            accepted += 1
            obeys_its_rules(config)
            path.write_text(config.dump())  # what was accepted can be written and read again
            assert watch(ConfigError, get_config, "tiny.yaml") == config
    assert COUNT / 50 < accepted < 2.5 * COUNT
    assert not (tmp_path / "ran").exists()


def test_opts(watch):
    rng, accepted = random.Random(3), 0
    keys = [b"TRAIN.BASE_LR", b"DATA.IMAGE_SIZE", b"TRAIN.CROP_SCALE", b"AMP", b"SAVE", b"TRAIN"]
    values = [b"0.1", b"32", b"(0.1, 1.0)", b"True", b"x", b"[1, 2]", b"{a: 1}", b"None"]
    words = [b"__import__('os').system('touch ran')", b"(", b"(" * 5000, b".", b"lambda", b"()"]
    words += [*YAML_WORDS, b"2**9**9", b"'a'*9**9", b"(1,)*9999999"]
    for _ in range(3 * COUNT):
        key, value = rng.choice(keys), rng.choice(values)
        if rng.random() < 0.2:
            key = mutate(rng, key, words)
        if rng.random() < 0.9:
            value = mutate(rng, value, words)
        opts = [key.decode("utf-8", "replace"), value.decode("utf-8", "replace")]
        config = watch(ConfigError, get_config, None, opts)
        if config is not None:
            accepted += 1
            obeys_its_rules(config)
    assert COUNT / 20 < accepted < 2.5 * COUNT


WEIGHT_WORDS = [b"cos\nsystem\n", b"c__builtin__\neval\n", b"\x93", b"R", b"b", b"\x81", b"."]
WEIGHT_WORDS += [b"\x8c\x02os\x94\x8c\x06system\x94\x93", b"numpy\ndtype\n", b"O8", b"("]
WEIGHT_WORDS += [b'"F32"', b'"shape":[9999999999]', b'"data_offsets":[0,4]', b"{", b"[" * 300]
WEIGHT_WORDS += [b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x94" * 200, b"\x80\x04\x95"]
WEIGHT_WORDS += [b"2" * 300, b"}", b"]"]


@pytest.mark.parametrize("suffix", ["pdparams", "safetensors"])
def test_weight_files(tmp_path, watch, suffix):
    rng = random.Random(4)
    model = ResMLP(8, 4, num_classes=3, embed_dim=4, depth=1, mlp_ratio=1.0)
    names = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    path, accepted = tmp_path / f"w.{suffix}", 0
    write_weights(model.state_dict(), path)
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little") if suffix == "safetensors" else len(data)
    for number in range(2 * COUNT):
        # half of the inputs are hit where the structure is, half anywhere
        hit = data[:header] if number % 2 else data
        path.write_bytes(mutate(rng, hit, WEIGHT_WORDS) + data[len(hit) :])
        file = watch(WeightsError, read_weights, str(path))
        if file is None:
            continue
        assert all(np.isfinite(value).all() for value in file.state.values())
        if watch(WeightsError, load_state, model, file.state) is not None:  # taken as a whole
            accepted += 1
            assert {name: value.shape for name, value in file.state.items()} == names
            own = model.state_dict()
            assert all(np.array_equal(own[name].numpy(), file.state[name]) for name in names)
    assert COUNT / 50 < accepted < 1.8 * COUNT


def test_checkpoints(tmp_path, watch):
    rng, path = random.Random(5), tmp_path / "last.pdparams"
    state = {
        "model": {"w": np.arange(12, dtype="float32").reshape(3, 4), "b": np.zeros(3)},
        "optimizer": {"w": {"moment1_0": np.ones([3, 4], "float32")}},
        "scaler": {},
        "place": {"step": 7, "epoch_loss": 0.3, "best_top1": -1.0},
        "config": YAML.decode(),
    }
    checkpoints.save(state, path)
    data = path.read_bytes()
    expected = checkpoints.checksum(state)
    for _ in range(2 * COUNT):
        path.write_bytes(mutate(rng, data, WEIGHT_WORDS))
        loaded = watch(CheckpointError, checkpoints.load, path)
        if loaded is not None:
            assert checkpoints.checksum(loaded) == expected  # only the wrapping was touched


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it makes of them
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_images(tmp_path, watch, form):
    if form == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    rng, path = random.Random(form), tmp_path / "image"
    noise = np.random.default_rng(0).integers(0, 256, [12, 17, 3], dtype=np.uint8)
    words = [b"\xff\xd8", b"IHDR", b"\x89PNG", b"%!PS-Adobe", b"II*\0", b"\0\0\0\0", b"GIF89a"]
    Image.fromarray(noise).save(path, form)
    data = path.read_bytes()
    read = 0
    for _ in range(COUNT):
        path.write_bytes(mutate(rng, data, words))
        image = watch(DataError, read_image, str(path), says=str(path))
        if image is not None:
            read += 1
            assert image.mode == "RGB" and np.asarray(image).shape == (*image.size[::-1], 3)
    assert 0 < read < COUNT


def test_the_watch_sees_what_it_shall(watch):
    import pickle

    class Evil:
        def __reduce__(self):
            return print, ()

    for act in (lambda: pickle.loads(pickle.dumps(Evil())), lambda: open("/dev/null", "w").close()):
        with pytest.raises(AssertionError):
            watch(UserError, act)
        _seen.clear()
    with pytest.raises(AssertionError):
        watch(UserError, exec, "raise UserError('two\\nlines')", {"UserError": UserError})
