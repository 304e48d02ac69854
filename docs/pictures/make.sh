#!/bin/sh
# Draws the pictures of README and docs anew: those of one run of the demo, and those of one training on photographs.
#
#   PYTHON=python sh docs/pictures/make.sh      (from the repository's root; some 15 minutes on two cores)
#
# The photographs are six that scikit-image and scikit-learn bring along (pip install scikit-image scikit-learn), cut
# into 200 crops each: the task is to tell which one a crop is of. The numbers that the pages show beside the pictures
# are in the logs of these two runs.
set -eu
python=${PYTHON:-python3}
pages=docs/pictures
work=output/pictures

sh run_demo.sh
cp output/demo/curves.png "$pages/curves.png"
"$python" - "$pages/curves.png" "$pages/curves_dark.png" <<'DARK' # light and dark change places, colours stay
import sys

from PIL import Image

light, *colours = Image.open(sys.argv[1]).convert("YCbCr").split()
dark = light.point(lambda value: 255 - value * 238 // 255)
Image.merge("YCbCr", [dark, *colours]).convert("RGB").save(sys.argv[2])
DARK
cp output/demo/predictions.png "$pages/predict_grid.png"
"$python" tools/visualize.py -pretrained output/demo/last.pdparams -output "$work/demo" \
    -images demo/data/val/0_t_shirt_top/00000.png demo/data/val/8_bag/00960.png
cp "$work/demo/token_mixing.png" "$work/demo/contributions.png" "$pages/"

"$python" - "$work/photos" "$pages/finetune_folder.png" <<'CROPS'
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from skimage import data
from sklearn.datasets import load_sample_image

folder, sheet = map(Path, sys.argv[1:])
photographs = {
    "astronaut": data.astronaut(), "cat": data.chelsea(), "coffee": data.coffee(),
    "flower": load_sample_image("flower.jpg"), "rocket": data.rocket(), "temple": load_sample_image("china.jpg"),
}
rng = np.random.default_rng(0)
picture = Image.new("RGB", (8 * 100, 6 * 118), "white")
draw = ImageDraw.Draw(picture)
for row, (name, pixels) in enumerate(photographs.items()):
    (folder / name).mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels[..., :3])
    draw.text((4, 118 * row + 2), f"photos/{name}/", fill="black")
    for number in range(200):
        side = int(rng.integers(64, 160))
        left, top = rng.integers(0, image.width - side), rng.integers(0, image.height - side)
        crop = image.resize((96, 96), Image.BICUBIC, (left, top, left + side, top + side))
        crop.save(folder / name / f"{number:03}.jpg", quality=90)
        if number < 8:
            picture.paste(crop, (100 * number + 2, 118 * row + 18))
picture.save(sheet)
CROPS
"$python" tools/make_lists.py "$work/photos" -force
"$python" main_single_gpu.py -cfg=configs/resmlp_small_photos.yaml -data_path="$work/photos" -output="$work/run" \
    -resume=auto -opts TRAIN.NUM_EPOCHS 15 VALIDATE_FREQ 1
"$python" main_single_gpu.py -cfg="$work/run/config.yaml" -eval -pretrained="$work/run/best" -output="$work/run" \
    -opts EVAL_REPORT True MODEL.RESUME None
"$python" tools/predict.py "$work"/photos/*/00[01].jpg -pretrained="$work/run/best.pdparams" -grid="$work/grid.png"
"$python" tools/visualize.py -pretrained="$work/run/best.pdparams" -images "$work/photos/cat/000.jpg" \
    -output "$work/photographs"
cp "$work/run/curves.png" "$pages/finetune_curves.png"
cp "$work/run/confusion.png" "$pages/finetune_confusion.png"
cp "$work/run/mistakes.png" "$pages/finetune_mistakes.png"
cp "$work/grid.png" "$pages/finetune_predictions.png"
cp "$work/photographs/batch.png" "$pages/finetune_batch.png"
"$python" "$pages/charts.py" # from the tables in performance.md and results.md
"$python" - "$pages"/*.png <<'SMALL' # 256 colours: a third of the bytes
import sys

from PIL import Image

for path in sys.argv[1:]:
    Image.open(path).convert("RGB").quantize(256, dither=0).save(path, optimize=True)
SMALL
