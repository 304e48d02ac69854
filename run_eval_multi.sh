#!/bin/sh
# Evaluates a weight file on every visible GPU of this node. Settings, by environment:
#
#   CFG          YAML file               DATASET      imagenet2012 or imagefolder
#   DATA_PATH    data folder             BATCH_SIZE   images per GPU and step
#   PRETRAINED   the weight file         OUTPUT       folder of the log and the numbers
#   GPUS         e.g. 0,1,2,3            NPROCS       processes, e.g. 2 on a CPU
#   AMP=0        float32, no -amp        PYTHON       the python to use
#   DRY_RUN=1    print the command only
#
# NNODES, MASTER, NODE_RANK and HOST: as in run_train_multi.sh.
# Further arguments go to main_multi_gpu.py: sh run_eval_multi.sh -opts EVAL_REPORT True
set -eu
here=$(dirname "$0")
. "$here/launch_multi.sh"

set -- -eval -pretrained="${PRETRAINED:-./resmlp_12_224.pdparams}" ${OUTPUT:+"-output=$OUTPUT"} "$@"
launch_multi "$@"
