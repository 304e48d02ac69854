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

    def setup(self, **environment: str) -> subprocess.CompletedProcess:
        return self.run("-euc", ". ./setup_env.sh; setup_env", **environment)

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
def test_a_virtual_environment_is_made_once(sandbox):
    first = sandbox.setup()
    assert first.returncode == 0, first.stderr
    assert sandbox.calls("-m venv") == ["-m venv --clear .venv"]
    assert [c.split("--disable-pip-version-check ")[1] for c in sandbox.calls("-m pip")] == [
        "-r requirements-cpu.txt"
    ]
    second = sandbox.setup()
    assert second.returncode == 0 and not sandbox.calls("-m venv") and not sandbox.calls("-m pip")


def test_changed_requirements_and_an_interrupted_installation_are_installed_afresh(sandbox):
    assert sandbox.setup(PIP="fails").returncode == 2
    assert sandbox.setup().returncode == 0 and sandbox.calls("-m pip")
    with open(sandbox.folder / "requirements-cpu.txt", "a") as file:
        file.write("something-new\n")
    assert sandbox.setup().returncode == 0
    assert sandbox.calls("-m venv --clear") and sandbox.calls("-m pip")


def test_another_paddle_gets_an_environment_of_its_own(sandbox):
    result = sandbox.setup(PADDLE_VERSION="2.6.2")
    assert result.returncode == 0, result.stderr
    assert sandbox.calls("-m venv") == ["-m venv --clear .venv-2.6.2"]
    assert sandbox.calls("-m pip")[0].endswith("paddlepaddle==2.6.2 numpy<2")


def test_a_virtual_environment_of_somebody_else_is_left_alone(sandbox):
    (sandbox.folder / ".venv").mkdir()
    (sandbox.folder / ".venv" / "precious").touch()
    result = sandbox.setup()
    assert result.returncode == 2 and "not of our making" in result.stderr
    assert (sandbox.folder / ".venv" / "precious").exists()


def test_a_named_environment_gets_only_what_is_missing(sandbox):
    mine = str(sandbox.bin / "python3.11")
    assert sandbox.setup(PYTHON=mine).returncode == 0
    assert not sandbox.calls("-m pip") and not sandbox.calls("-m venv")
    assert sandbox.setup(PYTHON=mine, HAVE="no").returncode == 0
    assert sandbox.calls("-m pip")[0].endswith("-r requirements-cpu.txt")
    assert not (sandbox.folder / ".venv").exists()


def test_this_very_environment_is_found_complete(sandbox):
    result = sandbox.setup(PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    assert "pip install" not in result.stdout and "Paddle" in result.stdout


def test_paddle_for_gpu_is_chosen_where_a_gpu_answers(sandbox):
    sandbox.program("nvidia-smi", '#!/bin/sh\necho "GPU 0: NVIDIA A100 (UUID: GPU-1)"\n')
    assert sandbox.setup().returncode == 0
    assert sandbox.calls("-m pip")[0].endswith("-r requirements.txt")
    assert sandbox.setup(DEVICE="cpu").returncode == 0
    assert sandbox.calls("-m venv --clear")  # the two Paddles do not share an environment
    assert sandbox.calls("-m pip")[0].endswith("-r requirements-cpu.txt")


def test_a_failed_installation_ends_with_one_clear_line(sandbox):
    result = sandbox.setup(PIP="fails")
    assert result.returncode == 2
    assert "error: the installation failed" in result.stderr and "PIP_INDEX_URL" in result.stderr


def test_no_usable_python_is_said_with_the_versions_that_are(sandbox):
    result = sandbox.setup(VERSION="bad")
    assert result.returncode == 2
    assert "needs Python 3.9 to 3.13" in result.stderr
    assert "needs Python 3.9 to 3.12" in sandbox.setup(VERSION="bad", PADDLE_VERSION="2.6.2").stderr
    assert "does not run" in sandbox.setup(PYTHON="/no/such/python").stderr


GPU = """#!/bin/sh
case "$*" in
*compute_cap*) echo 8.0; echo "$CAPABILITY" ;;
*) echo "GPU 0: a stand-in" ;;
esac
"""


def setup_with_gpu(sandbox, **environment):
    sandbox.program("nvidia-smi", GPU)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        environment.setdefault(name, "")
    return sandbox.setup(**{"CAPABILITY": "8.9", **environment})


@pytest.mark.parametrize("capability", ["9.0", "10.0", "12.0"])
def test_a_gpu_that_the_default_paddle_has_no_code_for_is_said_first(sandbox, capability):
    result = setup_with_gpu(sandbox, CAPABILITY=capability)
    assert result.returncode == 2 and not sandbox.calls("-m pip")
    assert f"no code for a GPU of compute capability {capability}" in result.stderr
    assert "PIP_EXTRA_INDEX_URL=https://www.paddlepaddle.org.cn/packages/" in result.stderr
    other = setup_with_gpu(sandbox, CAPABILITY=capability, PIP_EXTRA_INDEX_URL="https://paddle")
    assert other.returncode == 0 and sandbox.calls("-m pip")[0].endswith("-r requirements.txt")


def test_python_313_with_a_gpu_needs_another_index(sandbox):
    for name in PYTHONS:  # the stand-ins get the limit as a word of the code they shall run
        sandbox.program(
            name, STAND_IN.replace("*version_info*)", "*'<= (3, 12)'* | *'> (3, 12)'*)")
        )
    result = setup_with_gpu(sandbox, VERSION="bad")
    assert result.returncode == 2 and "needs Python 3.9 to 3.12" in result.stderr
    mine = str(sandbox.bin / "python3.13")
    result = setup_with_gpu(sandbox, VERSION="bad", PYTHON=mine, HAVE="no")
    assert result.returncode == 2 and "for this Python (up to 3.12)" in result.stderr
    result = setup_with_gpu(sandbox, VERSION="bad", PIP_EXTRA_INDEX_URL="https://paddle")
    assert result.returncode == 0, result.stderr


# ----------------------------------------------------------------- run_tests.sh, run_demo.sh
def test_the_options_of_run_tests_go_and_those_of_pytest_stay(sandbox):
    def pytest_line(*arguments):
        result = sandbox.run("run_tests.sh", *arguments, PYTHON=str(sandbox.bin / "python3"))
        assert result.returncode == 0, result.stderr
        return sandbox.calls("-m pytest")[0]

    ignored = (
        "--ignore=tests/notebooks --ignore=tests/commands --ignore=tests/faults --ignore=tests/timm"
    )
    assert pytest_line() == f"-m pytest {ignored}"
    assert pytest_line("-k", "mixup", "--with-timm", "-x") == (
        "-m pytest --ignore=tests/notebooks --ignore=tests/commands --ignore=tests/faults "
        "-k mixup -x"
    )
    assert pytest_line("--faults", "tests/faults", "--commands", "--notebooks") == (
        "-m pytest --ignore=tests/timm tests/faults"
    )


def test_the_tests_use_all_cores_unless_pytests_options_say_otherwise(sandbox):
    show_options = STAND_IN.replace('"$*" |', '"$* $PYTEST_ADDOPTS" |')
    mine = str(
        sandbox.program("mine", show_options.replace("case", "[ $1 != -c ] || echo 3\ncase", 1))
    )
    sandbox.run("run_tests.sh", "-x", PYTHON=mine)
    assert sandbox.calls("-m pytest")[0].endswith(" -x -n 3 --dist loadscope")
    sandbox.run("run_tests.sh", "-x", PYTHON=mine, PYTEST_ADDOPTS="-q")
    assert sandbox.calls("-m pytest")[0].endswith(" -x -q")


def test_a_failing_lint_does_not_hide_the_tests_but_fails_the_run(sandbox):
    result = sandbox.run("run_tests.sh", PYTHON=str(sandbox.bin / "python3"), RUFF="fails")
    assert result.returncode != 0 and sandbox.calls("-m pytest")


def demo(sandbox, **environment):
    (sandbox.folder / "data").mkdir(exist_ok=True)
    for name in ("train", "val"):
        (sandbox.folder / "data" / f"{name}_list.txt").write_text(f"{name}/a.png 0\n" * 500)
    result = sandbox.run(
        "run_demo.sh", PYTHON=str(sandbox.bin / "python3"), DEMO_DATA="data", **environment
    )
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


def test_the_demo_has_a_short_form_in_a_folder_of_its_own(sandbox):
    _, calls = demo(sandbox, DEMO_SHORT="1")
    assert "-output=output/demo_short" in calls[1]
    assert calls[1].endswith("-opts TRAIN.NUM_EPOCHS 2")
    _, calls = demo(sandbox, DEMO_EPOCHS="3", DEMO_OUTPUT="elsewhere")
    assert "-output=elsewhere " in calls[1] and calls[1].endswith("TRAIN.NUM_EPOCHS 3")


def test_the_demo_passes_over_no_argument(sandbox):
    result = sandbox.run("run_demo.sh", "-epochs", "2")
    assert result.returncode == 2 and "no arguments: -epochs 2" in result.stderr
    assert not sandbox.calls(".py")


# ------------------------------------------------------ run_train_multi.sh, run_eval_multi.sh
def test_the_launch_scripts_without_settings_are_ppvits_commands(sandbox):
    train = sandbox.run("run_train_multi.sh", DRY_RUN="1").stdout.split()
    assert train == [
        "python3",
        "./main_multi_gpu.py",
        "-cfg=./configs/resmlp_12_224.yaml",
        "-dataset=imagenet2012",
        "-data_path=/dataset/imagenet",
        "-batch_size=256",
        "-amp",
    ]
    evaluate = sandbox.run("run_eval_multi.sh", DRY_RUN="1").stdout.split()
    assert evaluate == [*train, "-eval", "-pretrained=./resmlp_12_224.pdparams"]
    assert not sandbox.calls()


@pytest.mark.parametrize("script", ["run_train_multi.sh", "run_eval_multi.sh"])
def test_amp_is_turned_off_by_zero(sandbox, script):
    assert "-amp" not in sandbox.run(script, DRY_RUN="1", AMP="0").stdout.split()
    assert "-amp" in sandbox.run(script, DRY_RUN="1", AMP="1").stdout.split()


@pytest.mark.parametrize("script", ["run_train_multi.sh", "run_eval_multi.sh"])
def test_every_setting_of_a_launch_comes_from_the_environment(sandbox, script):
    settings = {
        "CFG": ("c.yaml", "-cfg=c.yaml"),
        "DATASET": ("imagefolder", "-dataset=imagefolder"),
        "DATA_PATH": ("my data", "-data_path=my data"),
        "BATCH_SIZE": ("7", "-batch_size=7"),
        "PRETRAINED": ("w.pdparams", "-pretrained=w.pdparams"),
        "OUTPUT": ("out", "-output=out"),
        "NPROCS": ("2", "-nprocs=2"),
        "AMP": ("1", "-amp"),
    }
    if script == "run_train_multi.sh":
        settings["RESUME"] = ("auto", "-resume=auto")
        settings["ACCUM_ITER"] = ("4", "-accum_iter=4")
    values = {name: value for name, (value, _) in settings.items()}
    result = sandbox.run(script, "-opts", "SEED", "1", GPUS="0,1", PYTHON="python3", **values)
    assert result.returncode == 0, result.stderr
    (call,) = sandbox.calls()
    assert all(f" {flag} " in call for _, flag in settings.values()), call
    assert call.startswith("./main_multi_gpu.py ") and call.endswith(" -opts SEED 1")
    assert result.stdout.startswith("CUDA_VISIBLE_DEVICES=0,1 python3 ")


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


def test_the_launch_scripts_work_from_any_folder(sandbox, tmp_path):
    script = sandbox.folder / "run_train_multi.sh"
    result = subprocess.run(
        ["sh", script],
        env={**os.environ, "DRY_RUN": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert f"{sandbox.folder}/main_multi_gpu.py" in result.stdout
    assert f"-cfg={sandbox.folder}/configs/" in result.stdout
