# What run_train_multi.sh and run_eval_multi.sh share: the launch line. (They source this file.)
# Without any setting the two scripts are PPViT's commands: a ResMLP-S12, 256 images a process, -amp.

launch_multi() { # launch_multi ARGUMENT...: runs main_multi_gpu.py on this node's devices
    case "${AMP:-1}" in 0) amp= ;; *) amp=-amp ;; esac
    set -- "$here/main_multi_gpu.py" \
        -cfg="${CFG:-$here/configs/resmlp_12_224.yaml}" \
        -dataset="${DATASET:-imagenet2012}" \
        -data_path="${DATA_PATH:-/dataset/imagenet}" \
        -batch_size="${BATCH_SIZE:-256}" \
        $amp \
        "$@"
    if [ -n "${NNODES:-}" ]; then
        : "${MASTER:?NNODES is set: give host:port of the first node too, e.g. MASTER=10.0.0.1:6170}"
        : "${NODE_RANK:?NNODES is set: give the number of this node too, NODE_RANK=0 on the first}"
        export NODE_RANK
        found=$("${PYTHON:-python3}" "$here/parallel/address.py" "$MASTER") || exit 2
        set -- -m paddle.distributed.launch --nnodes "$NNODES" --master "${found#* }" \
            --host "${found% *}" --rank "$NODE_RANK" ${NPROCS:+--nproc_per_node "$NPROCS"} \
            --log_dir "${OUTPUT:-./output}/launcher/$NODE_RANK" "$@"
    elif [ -n "${NPROCS:-}" ]; then
        main=$1
        shift
        set -- "$main" -nprocs="$NPROCS" "$@"
    fi
    set -- "${PYTHON:-python3}" "$@"
    if [ -n "${GPUS:-}" ]; then
        export CUDA_VISIBLE_DEVICES="$GPUS"
        printf 'CUDA_VISIBLE_DEVICES=%s ' "$GPUS"
    fi
    printf '%s ' "$@"
    echo
    [ -n "${DRY_RUN:-}" ] || exec "$@"
}
