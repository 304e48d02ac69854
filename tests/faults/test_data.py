"""Bad images and broken loader workers, end to end."""

import time

import pytest
from PIL import Image

from loading.samplers import train_indices

from ..helpers.runs import DRIVER, alive, command, error_line, metrics, run
from ..helpers.tiny_data import make_data, write_lists

BAD = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:70]),
    "no image": lambda path: path.write_text("<html>404</html>"),
    "bomb": lambda path: Image.new("1", (20_000, 20_000)).save(path),
    "zero pixels": lambda path: path.write_bytes(b"GIF89a\x00\x00\x00\x00\x00\x00\x00;"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def with_lists(folder):
    data = make_data(folder / "data")
    write_lists(data)
    return data, sorted(data.glob("train/*/*.png"))


def job(data, folder, *opts):
    opts = ["DATA.DATASET", "imagenet2012", "DATA.NUM_WORKERS", 2, *opts]
    return command(data, folder / "run", *opts, main=DRIVER)


def test_all_kinds_of_bad_images_are_skipped_counted_and_listed(tmp_path):
    data, paths = with_lists(tmp_path)
    for number, spoil in enumerate(BAD.values()):
        spoil(paths[1 + 2 * number])
    words = job(data, tmp_path, "DATA.BAD_IMAGE", "skip", "REPORT_FREQ", 1)
    code, output = run(words)
    assert code == 0, output
    assert output.count(f"skipped {len(BAD)} unreadable images:") == 2
    assert all(f"train_list.txt:{2 + 2 * number}: " in output for number in range(len(BAD)))
    (tmp_path / "again").mkdir()
    code, _ = run(job(data, tmp_path / "again", *words[words.index("-opts") + 5 :]))
    assert metrics(tmp_path / "again" / "run") == metrics(tmp_path / "run")  # deterministic


@pytest.mark.parametrize("policy, expected", [("skip", 0), ("error", 2)])
def test_a_bad_image_in_validation_stops_a_run_unless_it_may_be_skipped(tmp_path, policy, expected):
    data, _ = with_lists(tmp_path)
    bad = sorted(data.glob("val/*/*.png"))[4]
    bad.write_text("x")
    code, output = run(job(data, tmp_path, "DATA.BAD_IMAGE", policy))
    assert code == expected and f"val_list.txt:5: {bad}" in output, output


@pytest.mark.parametrize(
    "fault, said",
    [
        ("sleep3600", "delivered no batch for 3 s (DATA.WORKER_TIMEOUT)"),
        ("kill", "a data loader worker died (SIGKILL, out of memory?)"),
    ],
)
def test_a_worker_that_hangs_or_dies_ends_the_run_in_time(tmp_path, fault, said):
    data, _ = with_lists(tmp_path)
    begin = time.monotonic()
    code, output = run(job(data, tmp_path, "DATA.WORKER_TIMEOUT", 3), fault=f"load:0:5:{fault}")
    assert code == 2 and time.monotonic() - begin < 30
    assert said in error_line(output)
    assert alive(str(tmp_path)) == []


def test_the_image_that_stops_a_run_is_the_first_in_its_order_and_named_with_its_line(tmp_path):
    data, paths = with_lists(tmp_path)
    order = train_indices(24, 0, 0)
    for position in (20, 6, 13):
        paths[order[position]].write_text("x")
    where = f"{data}/train_list.txt:{order[6] + 1}: {paths[order[6]]}: not an image"
    for workers in (0, 2):
        (tmp_path / str(workers)).mkdir()
        code, output = run(job(data, tmp_path / str(workers), "DATA.NUM_WORKERS", workers))
        line = error_line(output)
        assert code == 2 and line.startswith(f"error: {where}"), output
        assert "make_lists.py -verify" in line and "DATA.BAD_IMAGE skip" in line
