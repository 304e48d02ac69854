"""Image files, list files and class folders: what is read, and what each mistake is answered."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cli.errors import DataError
from cpu.resample import to_image
from loading import images
from loading.files import find_classes, list_images, read_list, scan_folder
from loading.images import BadImage, read_image, read_pixels

from .helpers.tiny_data import entries, make_tree


def index_of(folder, text, allow_outside=False):
    path = folder / "train_list.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_list(str(path), str(folder), 10, allow_outside)


def save(path, size=(8, 6), mode="RGB", **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, **kwargs).save(path)
    return str(path)


# ------------------------------------------------------------------------------ list files
@pytest.mark.parametrize(
    "text, outside, expected",
    [
        (
            "# a comment\n\na.jpg 0\nt/b c  d.jpg\t9\r\n   e.jpg   3  \n\t\n  # x 1\n",
            *(False, [("a.jpg", 0), ("t/b c  d.jpg", 9), ("e.jpg", 3)]),
        ),
        (b"\xef\xbb\xbfa.jpg 0\nb.jpg 1", False, [("a.jpg", 0), ("b.jpg", 1)]),  # Windows' mark
        (
            "train/../val/a.jpg 1\na..b.jpg 2\n{root}/c.jpg 3\n",
            *(False, [("val/a.jpg", 1), ("a..b.jpg", 2), ("c.jpg", 3)]),
        ),
        ("../a.jpg 1\n/b.jpg 2\n", True, [("../a.jpg", 1), ("/b.jpg", 2)]),
    ],
)
def test_the_last_field_is_the_label_and_the_rest_the_path(tmp_path, text, outside, expected):
    text = text.replace("{root}", str(tmp_path)) if isinstance(text, str) else text
    assert list(entries(index_of(tmp_path, text, outside)).items()) == expected


@pytest.mark.parametrize(
    "line,expected",
    [
        ("lonely.jpg", "expected `relative/path label`"),
        ("a.jpg cat", "the label 'cat' is not a whole number"),
        ("a.jpg 1.0", "the label '1.0' is not a whole number"),
        ("a.jpg 10", "not in 0 .. 9 (MODEL.NUM_CLASSES 10)"),
        ("a.jpg " + "9" * 5000, "not in 0 .. 9"),
        ("a\0.jpg 1", "zero bytes: it looks like UTF-16"),
        ("train/../../a.jpg 1", "leaves the data folder"),
        ("/etc/passwd 1", "leaves the data folder"),
        ("../{name}-other/a.jpg 1", "leaves the data folder"),  # begins as the data folder does
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, expected):
    line = line.replace("{name}", tmp_path.name)
    with pytest.raises(DataError) as caught:
        index_of(tmp_path, f"ok.jpg 1\n\n{line}\n")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/train_list.txt:3: ") and expected in message
    assert len(message) < 600 and "\n" not in message


def test_paths_find_their_file_in_any_encoding_and_with_two_dots_behind_a_link(tmp_path):
    save(tmp_path / "disk/secret/1.png")
    save(tmp_path / "data/secret/1.png", size=(5, 5))
    (tmp_path / "disk/train").mkdir()
    (tmp_path / "data/train").symlink_to(tmp_path / "disk/train")
    name = b"caf\xe9.png"  # Latin-1: not valid UTF-8
    os.link(tmp_path / "data/secret/1.png", os.path.join(os.fsencode(tmp_path / "data"), name))
    index = index_of(tmp_path / "data", b"train/../secret/1.png 0\n" + name + b" 1\n")
    assert [read_image(index.path(number)).size for number in (0, 1)] == [(5, 5), (5, 5)]


def test_a_list_that_is_empty_missing_or_a_pipe_says_so(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    missing, pipe = ("none.txt", "no such file.*make_lists.py"), ("pipe", "not a regular file")
    for name, said in (missing, pipe):
        with pytest.raises(DataError, match=f"{name}: {said}"):
            read_list(str(tmp_path / name), str(tmp_path), 10, False)
    with pytest.raises(DataError, match="lists no images"):
        index_of(tmp_path, "# nothing\n\n")


@pytest.mark.parametrize(
    "name,shown",
    [
        (b"caf\xe9", r"caf\xe9"),
        ("a\x1b[2J\rb\x7f\x9b\u2028".encode(), r"a\x1b[2J\rb\x7f\x9b\u2028"),
        ("Käse 日本\u3000語 می\u200cخواهم \\".encode(), None),
    ],
)
def test_an_entry_is_named_by_its_line_and_what_a_terminal_cannot_show(tmp_path, name, shown):
    index = index_of(tmp_path, b"# x\n\n" + name + b" 1\n")
    shown = shown or os.fsdecode(name)
    assert index.where(0) == f"{tmp_path}/train_list.txt:3: {tmp_path}/{shown}"


def test_an_index_takes_some_twenty_bytes_beside_each_path(tmp_path):
    text = "".join(f"train/n{i:08d}/n{i:08d}_{i}.JPEG {i % 10}\n" for i in range(1000))
    index = index_of(tmp_path, text)
    assert len(pickle.dumps(index, 4)) < len(text) + 20 * 1000


# --------------------------------------------------------------------------- class folders
def test_images_count_at_any_depth_junk_does_not_and_other_files_are_named(tmp_path):
    make_tree(tmp_path, splits=("train",))
    images = ["0.png", "deeper/x.PNG", "x.jfif", "x.jpe", "x.mpo", "x.pnm"]
    junk = ["__MACOSX/x.png", "@eaDir/x.png", ".ipynb_checkpoints/x.png", "$RECYCLE.BIN/x.png"]
    hidden, others = [".x.png", ".cache/x.png", "Thumbs.db"], ["a.heic", "b.HEIC", "c.txt"]
    for name in [*images[1:], *junk, *(f"../{name}" for name in junk), *hidden, *others]:
        path = tmp_path / "train/ant" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"?")
    index = scan_folder(str(tmp_path), "train", 2)
    assert list(entries(index)) == [*(f"train/ant/{name}" for name in images), "train/bee/0.png"]
    (note,) = index.notes
    assert "train: 3 files are passed over" in note
    assert ".heic (2), .txt (1), such as" in note and note.endswith("train/ant/a.heic")


def test_each_mistake_in_a_class_tree_has_its_message(tmp_path):
    def message(split="train", num_classes=2):
        with pytest.raises(DataError) as caught:
            scan_folder(str(tmp_path), split, num_classes)
        return str(caught.value)

    assert "make_lists.py" in message()
    (tmp_path / "train").mkdir()
    assert "no class folders" in message()
    save(tmp_path / "train/1.png")
    assert "1 images without a class; expected train/<class>/<image>" in message()
    make_tree(tmp_path, splits=("train",))
    assert "-opts MODEL.NUM_CLASSES 2" in message(num_classes=1000)
    assert "/val: no such folder" in message("val")
    save(tmp_path / "val/wasp/0.png")
    assert "'wasp' is not among" in message("val")


@pytest.mark.parametrize(
    "classes, wrong",
    [(["Cat", "ant", "bee"], None), (["-1", "2", "9", "10"], "02"), (["caf\xe9"], "cafe\u0301")],
)
def test_classes_are_sorted_by_name_and_numbers_by_value(tmp_path, classes, wrong):
    make_tree(tmp_path, classes[::-1])
    assert find_classes(str(tmp_path)) == classes
    index = scan_folder(str(tmp_path), "val", len(classes))
    assert entries(index) == {f"val/{name}/0.png": i for i, name in enumerate(classes)}
    assert index.where(0) == f"{tmp_path}/val/{classes[0]}/0.png"
    if wrong:
        make_tree(tmp_path, [wrong])
        with pytest.raises(DataError, match="'02' and '2' are one number|in .* NFC and NFD"):
            find_classes(str(tmp_path))


def test_evaluation_works_without_a_train_folder_and_with_classes_missing_in_val(tmp_path):
    make_tree(tmp_path, splits=("val",))
    assert len(scan_folder(str(tmp_path), "val", 2)) == 2
    make_tree(tmp_path, classes=("aaa", "ant", "bee"), splits=("train",))
    assert set(scan_folder(str(tmp_path), "val", 3).labels) == {1, 2}
    (tmp_path / "train/abc").mkdir()  # a folder without images keeps its label
    assert set(scan_folder(str(tmp_path), "train", 4).labels) == {0, 2, 3}


@pytest.mark.parametrize(
    "train,val", [("Train", "Val"), ("training", "VALID"), ("TRAIN", "validation")]
)
def test_the_usual_names_of_splits_are_known_in_any_case(tmp_path, train, val):
    make_tree(tmp_path, splits=(train, val, "dev", "test"))
    assert find_classes(str(tmp_path)) == ["ant", "bee"]
    index = scan_folder(str(tmp_path), "val", 2)
    assert list(entries(index)) == [f"{val}/ant/0.png", f"{val}/bee/0.png"]
    assert index.notes == [f"{tmp_path}: not used: dev/, test/"]


# ------------------------------------------------------------------------ 16 bits and more
@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_is_scaled_by_its_range(tmp_path, ending):
    values = np.array([[0, 255, 256, 511], [32768, 40000, 65279, 65535]], np.uint16)
    if ending == "pgm":
        (tmp_path / "x.pgm").write_bytes(b"P5 4 2 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / f"x.{ending}")
    grey = np.asarray(read_image(str(tmp_path / f"x.{ending}")))
    expected = [[0, 0, 1, 1], [128, 156, 254, 255]]
    assert np.array_equal(grey, np.dstack([expected] * 3))


@pytest.mark.parametrize("bits, scaled", [(None, 0), (12, 4), (10, 0)])
def test_twelve_bits_in_sixteen_are_scaled_by_what_a_png_says_or_warned_of(
    tmp_path, bits, scaled, caplog, monkeypatch
):
    monkeypatch.setattr(images, "dark_grey", [])
    values = np.array([[0, 2048, 4095]], np.uint16)
    more = PngImagePlugin.PngInfo()
    if bits:
        more.add(b"sBIT", bytes([bits]))
    path = str(tmp_path / "x.png")
    Image.fromarray(values).save(path, pnginfo=more)
    assert np.asarray(read_image(path))[0, :, 0].tolist() == [v >> 8 - scaled for v in (values[0])]
    read_image(path)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == (bits is None)  # once; of 10 bits, some use more: the range is all 16
    assert not warned or f"{path}: 16 bits of which at most 12 are used" in warned[0]


@pytest.mark.parametrize("dtype,reason", [("float32", "floating point"), ("int32", "32-bit")])
def test_grey_whose_range_is_not_known_is_refused(tmp_path, dtype, reason):
    Image.fromarray(np.zeros((2, 2), dtype)).save(tmp_path / "x.tif")
    with pytest.raises(BadImage, match=f"x.tif: {reason}.*save it with 8 or 16 bits"):
        read_image(str(tmp_path / "x.tif"))


@pytest.mark.parametrize("place", ["", "train", "val"])
@pytest.mark.parametrize(
    "written",
    ["output/train-1/config.yaml", "run/metrics.jsonl", "run/eval_log.txt", "packed/pack.json"]
    + ["lists/train_list.txt"],
)
def test_what_runs_have_written_into_a_data_folder_is_no_class(tmp_path, place, written):
    make_tree(tmp_path)
    path = tmp_path / place / written
    path.parent.mkdir(parents=True)
    path.touch()
    if "list" not in written:
        save(path.parent / "curves.png")
    save(tmp_path / "train/ant/x.png")
    (tmp_path / "train/ant/train_list.txt").touch()  # among images
    assert find_classes(str(tmp_path)) == ["ant", "bee"]
    index = scan_folder(str(tmp_path), "val", 2)
    assert list(index.labels) == [0, 1]
    folder = os.path.join(place, written.split("/")[0])
    assert f"{tmp_path}: not used: {folder}/" in index.notes


@pytest.mark.parametrize("unreadable", ["train", "train/ant", "train/bee/deeper"])
def test_a_folder_that_cannot_be_read_is_named_and_not_passed_over(
    tmp_path, monkeypatch, unreadable
):
    make_tree(tmp_path)
    save(tmp_path / "train/bee/deeper/x.png")
    scandir = os.scandir

    def refuse(path):  # the superuser, who may run this test, reads any folder
        if os.fspath(path) == str(tmp_path / unreadable):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError) as caught:
        scan_folder(str(tmp_path), "train", 2)
    assert str(caught.value) == f"{tmp_path / unreadable}: permission denied"


@pytest.mark.parametrize(
    "links",
    [
        {"train/ant/loop": "."},
        {"train/ant/loop": "/"},
        {"train/ant/other": "../../other", "other/back": "../train/ant"},
        {"train/bee": "."},
    ],
)
def test_a_link_to_a_folder_above_it_is_refused_and_named(tmp_path, links):
    make_tree(tmp_path, classes=("ant",))
    (tmp_path / "other").mkdir()
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    with pytest.raises(DataError, match="a link to .*, which it lies in") as caught:
        scan_folder(str(tmp_path), "train", len(find_classes(str(tmp_path))))
    assert str(caught.value).split(":")[0].endswith(tuple(os.path.basename(name) for name in links))


def test_a_link_that_leads_nowhere_but_to_itself_is_named(tmp_path):
    make_tree(tmp_path)
    (tmp_path / "train/cow").mkdir()
    (tmp_path / "train/cow/x").symlink_to("x")
    with pytest.raises(DataError, match="train/cow/x: too many levels of symbolic links"):
        find_classes(str(tmp_path))


def test_other_links_to_folders_are_followed(tmp_path, monkeypatch):
    make_tree(tmp_path, splits=("train",))
    save(tmp_path / "disk/x.png")
    (tmp_path / "train/ant/disk").symlink_to("../../disk")
    (tmp_path / "train/cow").symlink_to("../disk")
    assert len(scan_folder(str(tmp_path), "train", 3)) == 4
    monkeypatch.chdir(tmp_path)
    assert list_images("train/ant")[-1] == "train/ant/disk/x.png"


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\nb", b"a\rb", b"a\x1b[2J", b"  "])
def test_a_class_folder_whose_name_is_no_line_of_text_is_refused(tmp_path, name):
    make_tree(tmp_path)
    os.mkdir(os.fsencode(tmp_path / "train") + b"/" + name)
    with pytest.raises(DataError, match="class name is UTF-8") as caught:
        find_classes(str(tmp_path))
    message = str(caught.value)
    assert message.isprintable() and message.startswith(f"{tmp_path}/train/")


# -------------------------------------------------------------------------------- decoding
KINDS = "rgb.png grey.png grey.jpg cmyk.jpg palette.png palette.gif rgba.png two.png bit.png"
KINDS += " rotated.jpg misnamed.txt w.webp t.tif ycc.tif b.bmp p.ppm"


@pytest.mark.parametrize("name", KINDS.split())
def test_every_kind_of_image_becomes_rgb_as_pillow_converts_it(tmp_path, name):
    """timm opens a file and calls convert("RGB"), and nothing else."""
    modes = {"grey": "L", "cmyk": "CMYK", "palette": "P", "rgba": "RGBA", "two": "LA", "bit": "1"}
    modes["ycc"] = "YCbCr"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    image, path = Image.fromarray(pixels), tmp_path / name
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    form = "PNG" if path.suffix == ".txt" else None
    image.convert(modes.get(path.stem, "RGB")).save(path, format=form, exif=exif)
    try:
        theirs = Image.open(path).convert("RGB")
    except OSError:
        if name != "ycc.tif":
            raise
        pytest.skip("this Pillow cannot read what it wrote")  # 11.3, the last for Python 3.9
    result = read_image(str(path))
    assert result.mode == "RGB"
    np.testing.assert_array_equal(result, theirs)


@pytest.fixture(params=[True, False], ids=["simplejpeg", "Pillow alone"])
def decoder(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(images, "simplejpeg", None)
    images.simplejpeg_is_right.cache_clear()
    yield
    images.simplejpeg_is_right.cache_clear()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (17, 9), (640, 500)])
@pytest.mark.parametrize("layout", ["4:4:4", "4:2:0", "progressive"])
def test_a_jpeg_has_the_pixels_that_pillow_gives(tmp_path, mode, size, layout, decoder):
    bands = [Image.effect_noise(size, 80) for _ in range({"RGB": 3, "L": 1, "CMYK": 4}[mode])]
    how = {"progressive": True} if layout == "progressive" else {"subsampling": layout}
    Image.merge(mode, bands).save(tmp_path / "a.jpg", **how)
    found, expected = read_image(str(tmp_path / "a.jpg")), Image.open(tmp_path / "a.jpg")
    assert found.tobytes() == expected.convert("RGB").tobytes()
    assert found.info == expected.info
    assert to_image(read_pixels(str(tmp_path / "a.jpg"))).tobytes() == found.tobytes()


@pytest.mark.parametrize("change", ["bytes behind", "bytes between", "none"])
def test_a_damaged_or_turned_jpeg_is_what_pillow_makes_of_it(tmp_path, change):
    path, exif = tmp_path / "a.jpg", Image.Exif()
    exif[0x112] = 6
    Image.effect_noise((40, 30), 80).convert("RGB").save(path, exif=exif)
    data = path.read_bytes()
    scan = data.index(b"\xff\xda")
    changed = {"bytes behind": data + b"more" * 99, "none": data}
    path.write_bytes(changed.get(change, data[:scan] + b"\0\0" + data[scan:]))
    if change == "bytes between":
        with pytest.raises(ValueError):
            images.simplejpeg.decode_jpeg(path.read_bytes())
    expected = Image.open(path).convert("RGB")
    found = to_image(read_pixels(str(path), True))
    assert found.tobytes() == expected.transpose(Image.Transpose.ROTATE_270).tobytes()
    assert read_image(str(path)).tobytes() == expected.tobytes()


def test_photographs_are_decoded_by_simplejpeg_alone(tmp_path, monkeypatch):
    path = save(tmp_path / "a.jpg")
    images.simplejpeg_is_right()
    monkeypatch.setattr(Image, "open", None)  # not even a header is read by Pillow
    assert read_pixels(path).dtype == np.uint32


def test_warnings_of_pillow_do_not_reach_the_terminal(tmp_path):
    palette = Image.new("P", (4, 4))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.save(tmp_path / "palette.png", transparency=b"\x10\x80")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x1a\x01\x05\0\x01"
    Image.new("RGB", (4, 4)).save(tmp_path / "exif.jpg", exif=exif)
    code = "import sys; from loading.images import read_image; list(map(read_image, sys.argv[1:]))"
    paths = [str(tmp_path / "palette.png"), str(tmp_path / "exif.jpg")]
    command = [sys.executable, "-W", "always", "-c", code, *paths]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_each_kind_of_bad_image_is_named_with_its_reason(tmp_path, monkeypatch):
    noise = Image.effect_noise((64, 64), 50)
    noise.save(tmp_path / "whole.jpg")
    noise.save(tmp_path / "whole.png")
    jpeg, png = ((tmp_path / name).read_bytes() for name in ("whole.jpg", "whole.png"))
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, data, reason in (
        ("empty.jpg", b"", "empty"),
        ("truncated.jpg", jpeg[: len(jpeg) // 2], "truncated"),
        ("text.jpg", b"not an image at all", "not an image"),
        ("broken.png", png[:60] + bytes(20) + png[80:], "cannot be decoded|not an image"),
        ("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        ("phone.jpg", b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC picture, whatever its name"),
        ("zero.ppm", b"P6\n0 4\n255\n", "0 x 4 pixels|cannot be decoded|not an image"),
        ("missing.jpg", None, "no such file"),
        ("folder.jpg", None, "not a regular file"),
        ("pipe.jpg", None, "not a regular file"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        for read in (read_image, read_pixels):
            with pytest.raises(BadImage, match=reason) as caught:
                read(str(tmp_path / name))
            assert str(caught.value).startswith(f"{tmp_path}/{name}: ")

    def refuse(*args, **kwargs):  # the superuser, who may run this test, reads any file
        raise PermissionError(13, "Permission denied", args[0])

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(BadImage, match="whole.jpg: permission denied"):
        read_image(f"{tmp_path}/whole.jpg")


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("read", [read_image, lambda path: to_image(read_pixels(path))])
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_images_above_pillows_limit_are_refused_before_they_are_decoded(
    tmp_path, monkeypatch, ending, read
):
    path = save(tmp_path / f"large.{ending}", size=(11, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 110)
    assert read(path).size == (11, 10)
    for limit in (109, 50):  # Pillow would warn for the first, raise for the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        message = f"110 pixels, more than the limit of {limit}: DATA.MAX_IMAGE_PIXELS"
        with pytest.raises(BadImage, match=message):
            read(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read(path).size == (11, 10)
