#!/bin/sh
# Sets up an environment, lints, and runs the tests.
#
#   sh run_tests.sh [OPTION ...] [pytest arguments: -k mixup, tests/test_config.py, ...]
#
#   --with-timm     also the comparisons with timm and torchvision (installs PyTorch: several GB)
#   --with-extras   also what needs ONNX or TensorBoard (tools/requirements.txt)
#   --faults        also the tests that kill processes and fill disks
#   --commands      also every command of README.md and docs/
#   --notebooks     also the notebook, executed (installs Jupyter's kernel)
#
#   PYTHON, DEVICE, PADDLE_VERSION   see setup_env.sh
#   PYTEST_ADDOPTS                   instead of all cores, up to four: "-n 4 --dist loadscope"
set -eu
cd "$(dirname "$0")"
. ./setup_env.sh

with_timm=
with_extras=
faults=
commands=
notebooks=
count=$#
while [ "$count" -gt 0 ]; do # our options go, pytest's stay
    case $1 in
    --with-timm) with_timm=yes ;;
    --with-extras) with_extras=yes ;;
    --faults) faults=yes ;;
    --commands) commands=yes ;;
    --notebooks) notebooks=yes ;;
    *) set -- "$@" "$1" ;;
    esac
    shift
    count=$((count - 1))
done

step "An environment with Paddle"
setup_env
ensure requirements-test.txt pytest xdist ruff sklearn
[ -z "$with_timm" ] || ensure port_weights/requirements.txt torch torchvision timm
[ -z "$with_extras" ] || ensure tools/requirements.txt paddle2onnx onnx onnxruntime ml_dtypes tensorboardX

[ -z "$notebooks" ] || ensure notebooks/requirements.txt nbclient ipykernel

step "Lint"
lint=passed
show "$PYTHON" -m ruff check . || lint=failed
show "$PYTHON" -m ruff format --check . || lint=failed

step "Tests"
[ -n "$with_timm" ] || set -- --ignore=tests/timm "$@"
[ -n "$faults" ] || set -- --ignore=tests/faults "$@"
[ -n "$commands" ] || set -- --ignore=tests/commands "$@"
[ -n "$notebooks" ] || set -- --ignore=tests/notebooks "$@"
if [ -z "${PYTEST_ADDOPTS+set}" ]; then # the tests of a module stay in one process
    cores=$("$PYTHON" -c 'from cpu.setup import usable_cores; print(min(4, usable_cores()))')
    export PYTEST_ADDOPTS="-n $cores --dist loadscope"
fi
show "$PYTHON" -m pytest "$@"
[ $lint = passed ] || die "the tests passed, but not the lint above"
