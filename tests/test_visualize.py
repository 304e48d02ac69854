"""Pictures: the numbers behind them are exact, and the page that gathers them is whole."""

import re

import numpy as np
import paddle
import pytest
from PIL import Image

from cli.errors import UserError
from resmlp import ResMLP
from tools.common import load_model, run_config
from tools.visualize import (
    BATCH,
    choose_layers,
    contributions,
    draw_contributions,
    draw_magnitudes,
    draw_token_mixing,
    tile_maps,
    token_maps,
    training_batch,
    visualize,
)

from .helpers.tiny_data import make_config
from .helpers.tiny_run import make_images


@pytest.fixture(scope="module")
def model(weights):
    return load_model(run_config(weights))


@pytest.fixture
def data(tmp_path):
    """A data folder with four classes; every image has one colour, which tells which it is."""
    (tmp_path / "data").mkdir()
    for i in range(24):
        Image.new("RGB", (16, 16), (10 * i, 100, 200)).save(tmp_path / "data" / f"{i}.png")
    lines = [f"{i}.png {i % 4}\n" for i in range(24)]
    (tmp_path / "data" / "train_list.txt").write_text("".join(lines))
    return tmp_path / "data"


def quiet_config(data, cutmix=0.0):
    """No augmentation but what a test asks for."""
    opts = ["DATA.DATASET", "imagenet2012", "MODEL.NUM_CLASSES", "4", "TRAIN.SMOOTHING", "0.0"]
    opts += ["DATA.BATCH_SIZE", BATCH, "TRAIN.CUTMIX_ALPHA", cutmix]
    return make_config(data.parent, data, *opts)


def test_contributions_are_the_normalised_tokens_times_the_head_and_sum_to_the_logits(model):
    images = paddle.to_tensor(np.random.default_rng(3).normal(size=[3, 3, 16, 16]), "float32")
    terms, logits = contributions(model, images)
    x = model.patch_embed(images)
    for block in model.mixer_layers:
        x = block(x)
    norm = {name: p.numpy().astype("float64") for name, p in model.norm.named_parameters()}
    tokens = norm["alpha"] * x.numpy() + norm["beta"]  # [B, N, C]
    expected = (tokens @ model.head.weight.numpy() / 16).reshape(3, 4, 4, 4)
    assert np.ptp(terms) > 0.1
    np.testing.assert_allclose(terms, expected, rtol=1e-4, atol=1e-4)
    expected = model(images).numpy()
    np.testing.assert_array_equal(logits, expected)
    total = terms.astype("float64").sum((1, 2)) + model.head.bias.numpy()
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_a_patchs_contribution_stands_where_the_patch_is():
    model = ResMLP(image_size=12, patch_size=4, num_classes=2, embed_dim=8, depth=0)
    model.eval()
    image = np.zeros([1, 3, 12, 12], "float32")
    image[:, :, 4:8, 8:12] = 1.0  # row 1, column 2: without blocks nothing else can change
    black, _ = contributions(model, paddle.zeros([1, 3, 12, 12]))
    terms, _ = contributions(model, paddle.to_tensor(image))
    changed = np.abs(terms - black).max(axis=-1)[0] > 1e-6
    assert [tuple(place) for place in np.argwhere(changed)] == [(1, 2)]


def test_maps_magnitudes_and_sparsity_are_those_of_the_layers(weights):
    model, rng = load_model(run_config(weights)), np.random.default_rng(5)
    block, x = model.mixer_layers[1], rng.normal(size=[16])
    mixed = block.linear_tokens(paddle.to_tensor(x.astype("float32"))).numpy()
    expected = (token_maps(model, 1) * x.reshape(4, 4)).sum((1, 2))
    expected += block.linear_tokens.bias.numpy()
    np.testing.assert_allclose(mixed, expected, rtol=1e-4, atol=1e-5)
    scale, _, beta = draw_magnitudes(model).axes
    for line, value in ((scale.lines[0], block.ls1), (beta.lines[1], block.norm2.beta)):
        assert line.get_ydata()[1] == pytest.approx(np.median(np.abs(value.numpy())))
    values = np.full([16, 16], 1.0, "float32")
    values[0, 0], values[1:4, :6] = -40.0, [1.9, -1.9, 2.1, -2.1, 30.0, 0.0]  # the limit is 2
    values[8:], sparse = 40.0, 100 * (128 - 10) / 256
    block.linear_tokens.weight.set_value(values)
    (axis,) = draw_token_mixing(model, [1]).axes
    assert axis.get_title().endswith(f", {sparse:.0f} % sparse")


@pytest.mark.parametrize("grid, side", [(4, 4), (6, 6), (9, 6), (14, 6)])
def test_a_mosaic_shows_the_central_maps_and_marks_their_own_patch(grid, side):
    maps = np.eye(grid**2).reshape(-1, grid, grid)  # every token looks at itself only
    mosaic, (x, y) = tile_maps(maps)
    assert np.nansum(mosaic) == side**2
    assert (mosaic[y, x] == 1).all()
    assert np.isnan(mosaic).sum() == mosaic.size - (side * grid) ** 2  # the gaps between maps
    first_own = np.argwhere(maps[:, (grid - side) // 2, (grid - side) // 2] == 1)[0, 0]
    np.testing.assert_array_equal(mosaic[:grid, :grid], maps[first_own])


def test_a_batch_is_the_training_images_and_a_mixed_one_shows_both_and_their_shares(data):
    clean, labels = training_batch(quiet_config(data))
    assert clean.shape == (BATCH, 16, 16, 3) and clean.dtype == np.uint8
    number = clean[:, 8, 8, 0] // 10
    assert len(set(number)) == BATCH and (clean[..., 0] == 10 * number[:, None, None]).all()
    np.testing.assert_array_equal(labels, np.eye(4)[number % 4])
    images, targets = training_batch(quiet_config(data, 1.0))
    changed = (images != clean).any(axis=-1).mean(axis=(1, 2))
    assert changed.max() > 0
    own, other = labels.argmax(1), labels[::-1].argmax(1)
    differ = own != other  # there, what is not changed is the share of the image's own class
    shares = targets[np.arange(BATCH), own]
    np.testing.assert_allclose(shares[differ], 1 - changed[differ], atol=1e-6)


def test_layers_are_spread_from_the_first_to_the_last_or_chosen(model):
    assert choose_layers((), 3) == [0, 1, 2]
    assert choose_layers((), 24) == [0, 5, 9, 14, 18, 23]
    assert choose_layers((3, 1), 3) == [2, 0]
    with pytest.raises(UserError, match="layer 4: the model has layers 1 to 3"):
        choose_layers((4,), 3)
    figure = draw_token_mixing(model, [1, 0])
    assert [axis.get_title().split(",")[0] for axis in figure.axes] == ["layer 2", "layer 1"]


def test_the_two_likeliest_classes_are_explained():
    terms, logits = np.random.default_rng(0).normal(size=[1, 4, 4, 4]), np.array([[0, 3.0, -1, 2]])
    shown = np.zeros([1, 16, 16, 3], "u1"), terms, logits, ["a", "b", "c", "$d"]
    figure = draw_contributions(*shown)
    titles = [axis.get_title() for axis in figure.axes[:3]]
    assert titles == ["image", "b\nlogit 3.00", "$d\nlogit 2.00"]
    np.testing.assert_array_equal(figure.axes[1].images[1].get_array(), terms[0, ..., 1])
    assert draw_contributions(*shown, label=2).axes[1].get_title() == "c\nlogit -1.00"


def test_the_page_gathers_all_pictures_and_needs_nothing_else(weights, data, tmp_path):
    opts = ["DATA.DATA_PATH", str(data), "DATA.BATCH_SIZE", "4"]
    images = make_images(tmp_path, 2)
    with pytest.raises(UserError, match="class 4: the model has classes 0 to 3"):
        visualize(weights, tmp_path / "out", images=images, label=4)
    files = visualize(weights, tmp_path / "out", images=images, opts=opts)
    names = ["token_mixing.png", "magnitudes.png", "contributions.png", "batch.png"]
    assert [file.name for file in files] == [*names, "index.html"]
    for file in files[:-1]:
        assert np.asarray(Image.open(file).convert("L")).std() > 10  # not blank
    page = files[-1].read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 4 and all(s.startswith("data:image/png;base64,") for s in sources)


@pytest.mark.parametrize("layout", ["imagenet2012", "imagefolder"])
def test_what_there_is_no_data_for_is_left_out(weights, tmp_path, layout, capsys):
    make_images(tmp_path / "data" / "val" / "a", 1)
    opts = ["DATA.DATASET", layout, "DATA.DATA_PATH", str(tmp_path / "data")]
    files = visualize(weights, tmp_path / "out", opts=opts)
    assert f"no batch.png: {tmp_path}/data" in capsys.readouterr().err
    assert [file.name for file in files] == ["token_mixing.png", "magnitudes.png", "index.html"]
