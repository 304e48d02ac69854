#!/bin/sh
# Trains, evaluates and uses a small ResMLP on real images, from nothing: a lesson in five steps.
#
#   sh run_demo.sh
#
# Run it again at any time: what is done is not done twice, and an interrupted training goes on.
#
#   PYTHON, DEVICE            see setup_env.sh
#   DEMO_DATA, DEMO_OUTPUT    folders of the images and of the run
#   DEMO_EPOCHS               epochs to train (default: configs/resmlp_demo.yaml)
#   DEMO_SHORT=1              two epochs, in another folder: is everything in place?
set -eu
cd "$(dirname "$0")"
. ./setup_env.sh
[ $# -eq 0 ] || die "run_demo.sh takes environment variables (its first lines), no arguments: $*"

config=./configs/resmlp_demo.yaml
data=${DEMO_DATA:-demo/data}
output=output/demo
epochs=${DEMO_EPOCHS:-}
if [ -n "${DEMO_SHORT:-}" ]; then
    output=output/demo_short
    epochs=${epochs:-2}
fi
output=${DEMO_OUTPUT:-$output}
# The last weights, not the best: choosing by the accuracy on an image set flatters it.
weights=$output/last.pdparams

step "1/5 An environment with Paddle"
setup_env

step "2/5 The data: 10,600 real images, unpacked into the structure of ImageNet2012"
show "$PYTHON" demo/prepare.py -output="$data"
show head -n 3 "$data/train_list.txt"

step "3/5 Training, to $output (log.txt, metrics.jsonl, curves.png, checkpoints)"
# -resume=auto starts anew in an empty folder, and otherwise goes on from the newest checkpoint.
set -- -cfg="$config" -data_path="$data" -output="$output" -resume=auto
[ -z "$epochs" ] || set -- "$@" -opts TRAIN.NUM_EPOCHS "$epochs"
show "$PYTHON" main_single_gpu.py "$@"

step "4/5 Evaluation of the saved weights, in a new process, on images that training never saw"
show "$PYTHON" main_single_gpu.py -cfg="$config" -data_path="$data" -output="$output/eval" \
    -eval -pretrained="$weights"

step "5/5 Predictions for a few of them"
images=$(awk -v data="$data" 'NR % 150 == 1 { print data "/" $1 }' "$data/val_list.txt")
# shellcheck disable=SC2086
show "$PYTHON" tools/predict.py -pretrained="$weights" -top_k=3 -grid="$output/predictions.png" $images

step "Done. Two pictures to look at: $output/curves.png (the training), $output/predictions.png"
