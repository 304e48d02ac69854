#!/bin/sh
# Trains on every visible GPU of this node, or on several nodes. Settings, by environment:
#
#   CFG          YAML file               DATASET      imagenet2012 or imagefolder
#   DATA_PATH    data folder             BATCH_SIZE   images per GPU and step
#   OUTPUT       folder of the run       PRETRAINED   weight file to start from
#   GPUS         e.g. 0,1,2,3            NPROCS       processes, e.g. 2 on a CPU
#   RESUME       a checkpoint, or auto   AMP=0        float32, no -amp
#   ACCUM_ITER   batches per step        PYTHON       the python to use
#   DRY_RUN=1    print the command only
#
# Several nodes: run it on each, with the same NNODES (how many), MASTER (host:port of the first)
# and its own NODE_RANK (0, 1, ...). HOST names this node's IPv4 address where the one by which it
# reaches MASTER is not the one to use.
#
# Further arguments go to main_multi_gpu.py: sh run_train_multi.sh -opts TRAIN.NUM_EPOCHS 100
set -eu
here=$(dirname "$0")
. "$here/launch_multi.sh"

set -- \
    ${OUTPUT:+"-output=$OUTPUT"} \
    ${PRETRAINED:+"-pretrained=$PRETRAINED"} \
    ${RESUME:+"-resume=$RESUME"} \
    ${ACCUM_ITER:+"-accum_iter=$ACCUM_ITER"} \
    "$@"
launch_multi "$@"
