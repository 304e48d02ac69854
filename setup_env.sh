# Finds or makes the Python environment of run_demo.sh and run_tests.sh, which source this file.
#
#   PYTHON          an environment of yours (its python): only what is missing is installed into it.
#                   Without it, .venv in this folder is made and used.
#   DEVICE=cpu      Paddle for CPU even where there is an NVIDIA GPU
#                   With one, PyPI's Paddle is 2.6.2; for Paddle 3 see requirements.txt.
#   PADDLE_VERSION  another Paddle, e.g. 2.6.2, in an environment of its own (.venv-2.6.2)
#
# Afterwards $PYTHON is the python to use. What is installed is not installed again.

step() { printf '\n== %s\n' "$*"; }
show() { # prints a command as one would type it, then runs it
    printf '$ %s\n' "$*"
    "$@"
}
die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

has_gpu() { # a driver that answers and lists a GPU
    [ "${DEVICE:-auto}" != cpu ] && nvidia-smi -L 2>/dev/null | grep -q '^GPU '
}

paddle3="Paddle 3 has such: PIP_EXTRA_INDEX_URL=https://www.paddlepaddle.org.cn/packages/stable/cu129/\
 names its packages (requirements.txt says more); DEVICE=cpu goes on without the GPU"

only_pypi() { # whether Paddle for a GPU would come from PyPI, where the newest is 2.6.2
    [ "$paddle" = paddlepaddle-gpu ] && [ -z "${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}" ]
}

check_wheel() { # before hundreds of megabytes are downloaded that do not run here
    only_pypi || return 0
    for capability in $(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null); do
        case $capability in
        9.* | 1[0-9].*) die "PyPI's Paddle has no code for a GPU of compute capability" \
            "$capability (up to 8.9). $paddle3" ;;
        esac
    done
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] > (3, 12))' ||
        die "PyPI has no Paddle with GPU for this Python (up to 3.12). $paddle3"
}

find_python() { # a Python of a version that Paddle has wheels for, with venv and pip
    newest=13
    case "${PADDLE_VERSION:-}" in 2.*) newest=12 ;; esac
    other=
    if only_pypi; then newest=12 other=". $paddle3"; fi
    for candidate in python3 python3.12 python3.11 python3.10 python3.13 python3.9 python; do
        if "$candidate" -c "import sys, venv, ensurepip
sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, $newest))" >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    found=$(python3 --version 2>/dev/null || echo 'no python3')
    die "no usable Python: Paddle${PADDLE_VERSION:+ $PADDLE_VERSION} needs Python 3.9 to 3.$newest with venv" \
        "(Debian: apt install python3-venv), found $found; or name one with PYTHON=...$other"
}

missing() { # which of these modules $PYTHON cannot find
    "$PYTHON" -c 'import sys, importlib.util as u
print(*[name for name in sys.argv[1:] if u.find_spec(name) is None])' "$@"
}

pip_install() {
    case "$*" in "-r requirements.txt"*) check_wheel ;; esac
    quiet=--quiet
    [ ! -t 1 ] || quiet= # progress bars, where somebody can see them
    # shellcheck disable=SC2086
    show "$PYTHON" -m pip install $quiet --disable-pip-version-check "$@" ||
        die "the installation failed; pip says why above. Without network: let PIP_INDEX_URL name" \
            "a mirror, HTTPS_PROXY a proxy, or PYTHON an environment that has the packages"
}

stamp_of() { # what an installation depends on
    { cat "$1" setup_env.sh; echo "${PADDLE_VERSION:-}"; } | cksum
}

ensure() { # ensure FILE MODULE...: what a requirements file asks for is there
    file=$1
    shift
    if [ -n "$own_environment" ]; then
        [ -z "$(missing "$@")" ] || pip_install -r "$file"
        return
    fi
    stamp="$venv/.installed-$(echo "$file" | tr / -)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$(stamp_of "$file")" ]; then
        case $file in # only the first file names Paddle
        requirements.txt | requirements-cpu.txt)
            # Recent NumPy loads numpy.random at its first use, which crashes after Paddle 2.6.
            case "${PADDLE_VERSION:-}" in 2.*) set -- "numpy<2" ;; *) set -- ;; esac
            pip_install -r "$file" ${PADDLE_VERSION:+"$paddle==$PADDLE_VERSION"} "$@"
            ;;
        *) pip_install -r "$file" ;;
        esac
        stamp_of "$file" >"$stamp"
    fi
}

setup_env() {
    requirements=requirements-cpu.txt
    paddle=paddlepaddle
    if has_gpu; then
        requirements=requirements.txt
        paddle=paddlepaddle-gpu
    fi
    own_environment=${PYTHON:-}
    if [ -n "$own_environment" ]; then
        "$PYTHON" -c '' 2>/dev/null || die "PYTHON=$PYTHON does not run"
    else
        venv=.venv${PADDLE_VERSION:+-$PADDLE_VERSION}
        PYTHON=$venv/bin/python
        stamp=$venv/.installed-$requirements
        # Other requirements, the other kind of Paddle, or a Python that is gone: start afresh.
        if [ "$(cat "$stamp" 2>/dev/null)" != "$(stamp_of $requirements)" ] ||
            ! "$PYTHON" -c '' 2>/dev/null; then
            [ ! -e "$venv" ] || [ -e "$venv/.made_by_setup_env" ] ||
                die "$venv is not of our making: remove it, or use it with PYTHON=$PYTHON"
            base=$(find_python) || exit
            show "$base" -m venv --clear "$venv"
            : >"$venv/.made_by_setup_env"
        fi
    fi
    ensure "$requirements" paddle numpy PIL numba simplejpeg yaml yacs matplotlib safetensors
    [ $requirements = requirements-cpu.txt ] || check_gpu
    "$PYTHON" -W ignore -c 'import sys, paddle
print(f"Python {sys.version.split()[0]}, Paddle {paddle.__version__}, {sys.executable}")'
}

check_gpu() { # in a process of its own: where CUDA or cuDNN do not fit, Paddle ends the process
    "$PYTHON" -W ignore -c 'import paddle
paddle.set_device("gpu")
paddle.nn.Conv2D(3, 8, 3)(paddle.ones([2, 3, 8, 8])).mean().item()' >/dev/null 2>&1 ||
        die "Paddle cannot use the GPU that nvidia-smi lists. requirements.txt says which CUDA and" \
            "cuDNN it needs. $paddle3"
}
