"""The shell scripts, with a stand-in for Python that writes down what it is asked to do."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.sh"))
PYTHONS = ["python3", "python3.9", "python3.10", "python3.11", "python3.12", "python3.13", "python"]
CLEAN = ("PYTHON", "DEVICE", "PADDLE_VERSION", "DEMO_SHORT", "DEMO_EPOCHS", "DEMO_DATA")
CLEAN += ("PYTEST_ADDOPTS",)

# Modules are present if $HAVE says so; `-m venv DIR` makes one; the rest only leaves a line.
STAND_IN = """#!/bin/sh
echo "$*" | head -n 1 >>"$CALLS"
case "$*" in
*find_spec*) [ "$HAVE" = yes ] || echo paddle ;;
*"-m venv"*) for folder; do :; done; mkdir -p "$folder/bin"; cp "$0" "$folder/bin/python" ;;
*"-m pip"*) [ "${PIP:-works}" = works ] ;;
*version_info*) [ "${VERSION:-good}" = good ] ;;
*address.py*) echo 10.0.0.7 "${MASTER}1" ;;
*"-m ruff"*) [ "${RUFF:-passes}" = passes ] ;;
esac
"""


class Sandbox:
    """A copy of the shell scripts in a folder where every python is the stand-in."""

    def __init__(self, folder: Path):
        self.folder, self.calls_file = folder / "repository", folder / "calls"
        self.bin = folder / "bin"
        self.folder.mkdir()
        self.bin.mkdir()
        for path in [*SCRIPTS, *ROOT.glob("requirements*.txt")]:
            shutil.copy(path, self.folder)
        for name in PYTHONS:
            self.program(name, STAND_IN)
        self.program("nvidia-smi", "#!/bin/sh\nexit 9\n")

    def program(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        self.calls_file.write_text("")
        clean = {k: v for k, v in os.environ.items() if k not in CLEAN}
        paths = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        variables = {**clean, "PATH": paths, "CALLS": str(self.calls_file), "HAVE": "yes"}
        return subprocess.run(
            ["sh", *command],
            cwd=self.folder,
            env={**variables, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def setup(self, code: int = 0, **environment: str) -> str:
        result = self.run("-euc", ". ./setup_env.sh; setup_env", **environment)
        assert result.returncode == code, result.stderr
        return result.stdout + result.stderr

    def calls(self, word: str = "") -> list[str]:
        return [line for line in self.calls_file.read_text().splitlines() if word in line]


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_posix_shell(script):
    subprocess.run(["sh", "-n", script], check=True)
    assert not re.search(r"\[\[|^function |\blocal ", script.read_text(), re.M), "bash only"


def test_the_requirements_differ_in_paddle_only():
    def lines(name):
        text = (ROOT / name).read_text()
        return [line for line in text.splitlines() if line and not line.startswith("#")]

    cpu, gpu = lines("requirements-cpu.txt"), lines("requirements.txt")
    assert cpu[0].replace("paddlepaddle", "paddlepaddle-gpu") == gpu[0]
    assert cpu[1:] == gpu[1:]


# ----------------------------------------------------------------------------- setup_env.sh
def test_an_environment_is_made_once_and_afresh_when_it_is_not_what_is_asked_for(sandbox):
    output = sandbox.setup(2, PIP="fails")
    assert "error: the installation failed" in output and "PIP_INDEX_URL" in output
    sandbox.setup()
    assert sandbox.calls("-m venv") == ["-m venv --clear .venv"]
    (call,) = sandbox.calls("-m pip")
    assert call.endswith("--disable-pip-version-check -r requirements-cpu.txt")
    sandbox.setup()
    assert not sandbox.calls("-m venv") and not sandbox.calls("-m pip")
    with open(sandbox.folder / "requirements-cpu.txt", "a") as file:
        file.write("something-new\n")
    sandbox.setup()
    assert sandbox.calls("-m venv --clear") and sandbox.calls("-m pip")
    sandbox.setup(PADDLE_VERSION="2.6.2")
    assert sandbox.calls("-m venv") == ["-m venv --clear .venv-2.6.2"]
    assert sandbox.calls("-m pip")[0].endswith("paddlepaddle==2.6.2 numpy<2")


def test_environments_of_the_user_are_left_alone_or_get_what_is_missing(sandbox):
    mine = str(sandbox.bin / "python3.11")
    sandbox.setup(PYTHON=mine)
    assert not sandbox.calls("-m pip") and not sandbox.calls("-m venv")
    sandbox.setup(PYTHON=mine, HAVE="no")
    assert sandbox.calls("-m pip")[0].endswith("-r requirements-cpu.txt")
    output = sandbox.setup(PYTHON=sys.executable)  # this very one is complete
    assert "pip install" not in output and "Paddle" in output
    precious = sandbox.folder / ".venv" / "precious"
    precious.parent.mkdir()  # not there yet
    precious.touch()
    assert "not of our making" in sandbox.setup(2) and precious.exists()


def test_paddle_for_gpu_is_chosen_where_a_gpu_answers(sandbox):
    sandbox.program("nvidia-smi", '#!/bin/sh\necho "GPU 0: NVIDIA A100 (UUID: GPU-1)"\n')
    sandbox.setup()
    assert sandbox.calls("-m pip")[0].endswith("-r requirements.txt")
    sandbox.setup(DEVICE="cpu")
    assert sandbox.calls("-m venv --clear")  # the two Paddles do not share an environment
    assert sandbox.calls("-m pip")[0].endswith("-r requirements-cpu.txt")


def test_no_usable_python_is_said_with_the_versions_that_are(sandbox):
    assert "needs Python 3.9 to 3.13" in sandbox.setup(2, VERSION="bad")
    assert "needs Python 3.9 to 3.12" in sandbox.setup(2, VERSION="bad", PADDLE_VERSION="2.6.2")
    assert "does not run" in sandbox.setup(2, PYTHON="/no/such/python")


GPU = """#!/bin/sh
case "$*" in
*compute_cap*) echo 8.0; echo "$CAPABILITY" ;;
*) echo "GPU 0: a stand-in" ;;
esac
"""


def setup_with_gpu(sandbox, code=0, **environment):
    sandbox.program("nvidia-smi", GPU)
    plain = {"CAPABILITY": "8.9", "PIP_INDEX_URL": "", "PIP_EXTRA_INDEX_URL": ""}
    return sandbox.setup(code, **{**plain, **environment})


@pytest.mark.parametrize("capability", ["9.0", "10.0", "12.0"])
def test_a_gpu_that_the_default_paddle_has_no_code_for_is_said_first(sandbox, capability):
    output = setup_with_gpu(sandbox, 2, CAPABILITY=capability)
    assert f"no code for a GPU of compute capability {capability}" in output
    assert "PIP_EXTRA_INDEX_URL=https://www.paddlepaddle.org.cn/packages/" in output
    assert not sandbox.calls("-m pip")
    setup_with_gpu(sandbox, CAPABILITY=capability, PIP_EXTRA_INDEX_URL="https://paddle")
    assert sandbox.calls("-m pip")[0].endswith("-r requirements.txt")


def test_python_313_with_a_gpu_needs_another_index(sandbox):
    too_new = STAND_IN.replace("*version_info*)", "*'<= (3, 12)'* | *'> (3, 12)'*)")
    for name in PYTHONS:  # the stand-ins get the limit as a word of the code they shall run
        sandbox.program(name, too_new)
    assert "needs Python 3.9 to 3.12" in setup_with_gpu(sandbox, 2, VERSION="bad")
    mine = str(sandbox.bin / "python3.13")
    output = setup_with_gpu(sandbox, 2, VERSION="bad", PYTHON=mine, HAVE="no")
    assert "for this Python (up to 3.12)" in output
    setup_with_gpu(sandbox, VERSION="bad", PIP_EXTRA_INDEX_URL="https://paddle")


# ----------------------------------------------------------------- run_tests.sh, run_demo.sh
def test_the_options_of_run_tests_go_and_those_of_pytest_stay(sandbox):
    folders = ("notebooks", "commands", "faults", "timm")
    for options, ignored, rest in (
        ("", folders, ""),
        ("-k mixup --with-timm -x", folders[:3], "-k mixup -x"),
        ("--faults tests/faults --commands --notebooks", ("timm",), "tests/faults"),
    ):
        python = str(sandbox.bin / "python3")
        assert sandbox.run("run_tests.sh", *options.split(), PYTHON=python).returncode == 0
        words = ["-m", "pytest", *(f"--ignore=tests/{name}" for name in ignored), *rest.split()]
        assert sandbox.calls("-m pytest")[0].split() == words
    # a failing lint does not hide the tests, but fails the run
    result = sandbox.run("run_tests.sh", PYTHON=python, RUFF="fails")
    assert result.returncode != 0 and sandbox.calls("-m pytest")


def test_the_tests_use_all_cores_unless_pytests_options_say_otherwise(sandbox):
    show_options = STAND_IN.replace('"$*" |', '"$* $PYTEST_ADDOPTS" |')
    show_options = show_options.replace("case", "[ $1 != -c ] || echo 3\ncase", 1)
    mine = str(sandbox.program("mine", show_options))
    sandbox.run("run_tests.sh", "-x", PYTHON=mine)
    assert sandbox.calls("-m pytest")[0].endswith(" -x -n 3 --dist loadscope")
    sandbox.run("run_tests.sh", "-x", PYTHON=mine, PYTEST_ADDOPTS="-q")
    assert sandbox.calls("-m pytest")[0].endswith(" -x -q")


def demo(sandbox, **environment):
    (sandbox.folder / "data").mkdir(exist_ok=True)
    for name in ("train", "val"):
        (sandbox.folder / "data" / f"{name}_list.txt").write_text(f"{name}/a.png 0\n" * 500)
    environment = {"PYTHON": str(sandbox.bin / "python3"), "DEMO_DATA": "data", **environment}
    result = sandbox.run("run_demo.sh", **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout, sandbox.calls(".py")


def test_the_demo_prepares_trains_evaluates_predicts_and_shows_each_command(sandbox):
    output, calls = demo(sandbox)
    prepare, train, evaluate, predict = calls
    assert prepare == "demo/prepare.py -output=data"
    assert train.startswith("main_single_gpu.py -cfg=./configs/resmlp_demo.yaml -data_path=data ")
    assert train.endswith("-output=output/demo -resume=auto")
    assert "-eval -pretrained=output/demo/last.pdparams" in evaluate
    assert predict.startswith("tools/predict.py") and predict.count("data/val/a.png") == 4
    for call in calls:
        assert f"python3 {call}" in output


def test_the_demo_has_a_short_form_in_a_folder_of_its_own_and_no_arguments(sandbox):
    _, calls = demo(sandbox, DEMO_SHORT="1")
    assert "-output=output/demo_short" in calls[1]
    assert calls[1].endswith("-opts TRAIN.NUM_EPOCHS 2")
    _, calls = demo(sandbox, DEMO_EPOCHS="3", DEMO_OUTPUT="elsewhere")
    assert "-output=elsewhere " in calls[1] and calls[1].endswith("TRAIN.NUM_EPOCHS 3")
    result = sandbox.run("run_demo.sh", "-epochs", "2")
    assert result.returncode == 2 and "no arguments: -epochs 2" in result.stderr
    assert not sandbox.calls(".py")


# ------------------------------------------------------ run_train_multi.sh, run_eval_multi.sh
def test_the_launch_scripts_without_settings_are_ppvits_commands(sandbox):
    train = sandbox.run("run_train_multi.sh", DRY_RUN="1").stdout.split()
    assert " ".join(train) == (
        "python3 ./main_multi_gpu.py -cfg=./configs/resmlp_12_224.yaml -dataset=imagenet2012 "
        "-data_path=/dataset/imagenet -batch_size=256 -amp"
    )
    evaluate = sandbox.run("run_eval_multi.sh", DRY_RUN="1").stdout.split()
    assert evaluate == [*train, "-eval", "-pretrained=./resmlp_12_224.pdparams"]
    assert not sandbox.calls()
    elsewhere = sandbox.run("-c", f"cd / && sh {sandbox.folder}/run_train_multi.sh", DRY_RUN="1")
    assert f" {sandbox.folder}/main_multi_gpu.py -cfg={sandbox.folder}/confi" in elsewhere.stdout


@pytest.mark.parametrize("script", ["run_train_multi.sh", "run_eval_multi.sh"])
def test_every_setting_of_a_launch_comes_from_the_environment(sandbox, script):
    settings = dict(CFG="c.yaml", DATASET="imagefolder", DATA_PATH="my data", BATCH_SIZE="7")
    settings.update(PRETRAINED="w.pdparams", OUTPUT="out", NPROCS="2")
    if script == "run_train_multi.sh":
        settings.update(RESUME="auto", ACCUM_ITER="4")
    variables = dict(settings, GPUS="0,1", AMP="1", PYTHON="python3")
    result = sandbox.run(script, "-opts", "SEED", "1", **variables)
    assert result.returncode == 0, result.stderr
    (call,) = sandbox.calls()
    flags = ["-amp", *(f"-{name.lower()}={value}" for name, value in settings.items())]
    assert all(f" {flag} " in call for flag in flags), call
    assert call.startswith("./main_multi_gpu.py ") and call.endswith(" -opts SEED 1")
    assert result.stdout.startswith("CUDA_VISIBLE_DEVICES=0,1 python3 ")
    assert "-amp" not in sandbox.run(script, DRY_RUN="1", AMP="0").stdout.split()


def test_several_nodes_are_started_by_paddles_launcher(sandbox):
    nodes = {"NNODES": "2", "MASTER": "10.0.0.1:6170"}
    sandbox.run("run_train_multi.sh", NODE_RANK="1", NPROCS="4", OUTPUT="out", **nodes)
    asked, call = sandbox.calls()
    assert asked == "./parallel/address.py 10.0.0.1:6170"
    assert call.startswith(
        "-m paddle.distributed.launch --nnodes 2 --master 10.0.0.1:61701 --host 10.0.0.7 --rank 1 "
        "--nproc_per_node 4 --log_dir out/launcher/1 ./main_multi_gpu.py -cfg="
    )
    missing = sandbox.run("run_train_multi.sh", **nodes)
    assert missing.returncode != 0 and "NODE_RANK" in missing.stderr and not sandbox.calls()
