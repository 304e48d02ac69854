"""The process is prepared before Paddle, only where the user has not chosen, and once."""

import ctypes
import os
import sys
from unittest import mock

import pytest

from cpu import setup

from .helpers.runs import PREPARED, run_code


def run(code: str, **environment: str) -> str:
    return "".join(run_code(code, **environment)).strip()


def test_paddle_gets_all_cores_child_processes_choose_anew_and_pillow_keeps_its_zlib():
    code = """
from cpu import setup
import io, os, paddle
from PIL import Image
setup.set_threads()
print(setup.threads, setup.physical_cores(), os.environ.get("OMP_NUM_THREADS"))
print(setup.describe())
file = io.BytesIO()
Image.linear_gradient("L").save(file, "PNG")
print(Image.open(file).getpixel((0, 7)))
"""
    first, line, pixel = run(code).splitlines()  # and no ccache warning
    threads, cores, omp = first.split()
    assert threads == cores and omp == "None" and pixel == "7"
    assert line.startswith(f"process: {threads} CPU thread")


@pytest.mark.parametrize(
    "code, environment, expected",
    [
        ("setup.default_threads(), os.environ['OMP_NUM_THREADS']", {"OMP_NUM_THREADS": "3"}, "3 3"),
        (
            "setup.set_threads(2), os.environ.get('MKL_DEBUG_CPU_TYPE'), setup.describe()",
            {"RESMLP_RUNTIME": "off"},
            "None None process: left as it is (RESMLP_RUNTIME)",
        ),
        ("setup.describe()", {"RESMLP_MALLOC": "off"}, "as it is (RESMLP_MALLOC)"),
        ("setup.describe()", {"MALLOC_TRIM_THRESHOLD_": "100000"}, "as MALLOC_* says"),
        ("__import__('paddle') and setup.prepare()", {}, "Paddle was imported first"),
    ],
)
def test_what_the_user_has_chosen_is_kept_and_said(code, environment, expected):
    assert expected in run(f"import os; from cpu import setup; print({code})", **environment)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
def test_large_freed_blocks_are_reused_without_new_pages():
    code = (
        "from cpu import setup; import ctypes, resource; libc = ctypes.CDLL(None);"
        "libc.malloc.restype = ctypes.c_void_p; libc.free.argtypes = [ctypes.c_void_p];\n"
        "def touch():\n"
        "    block = libc.malloc(ctypes.c_size_t(64 << 20))\n"
        "    ctypes.memset(block, 1, 64 << 20); libc.free(block)\n"
        "touch(); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt; touch()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    assert int(run(code, RESMLP_MALLOC="off")) > 1000
    assert int(run(code)) < 100


@pytest.fixture
def fresh(monkeypatch):
    """This process without the user's choices."""
    for name in list(os.environ):
        if name.startswith(PREPARED) or name == "CUDA_VISIBLE_DEVICES":
            monkeypatch.delenv(name)
    monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", "")  # so that it is as before when the test ends
    monkeypatch.delenv("MKL_DEBUG_CPU_TYPE")
    monkeypatch.setattr(setup, "user_omp_threads", None)
    monkeypatch.setattr(setup, "threads", None)
    monkeypatch.setattr(setup, "has_gpu", lambda: False)
    return monkeypatch


def test_ranks_share_the_cores_unless_the_user_says_how_many_threads(fresh):
    fresh.setattr(setup, "physical_cores", lambda: 8)
    assert setup.default_threads() == 8
    fresh.setenv("PADDLE_TRAINERS_NUM", "2")
    assert setup.default_threads() == 4
    fresh.setenv("RESMLP_THREADS", "many")  # not a number: as if it were not there
    assert setup.default_threads() == 4
    fresh.setenv("RESMLP_THREADS", "5")
    fresh.setattr(setup, "user_omp_threads", "2")
    assert setup.default_threads() == 5
    fresh.delenv("RESMLP_THREADS")
    assert setup.default_threads() == 2
    fresh.setattr(setup, "user_omp_threads", None)
    fresh.setenv("PADDLE_LOCAL_SIZE", "16")  # more ranks than cores, on this of several machines
    assert setup.default_threads() == 1


@pytest.fixture
def files(fresh):
    """A machine of four cores with two hardware threads each, and its files."""
    found = {
        f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 4},{n % 4 + 4}"
        for n in range(8)
    }
    fresh.setattr(setup.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    fresh.setattr(setup, "read_text", lambda path: found.get(path, ""))
    return found


@pytest.mark.parametrize(
    "groups, limits, cores",
    [
        ("0::/", {"cpu.max": "250000 100000"}, 2),
        ("0::/", {"cpu.max": "max 100000"}, 4),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/docker/x", {"cpu.max": "200000 100000"}, 2),  # mounted for it alone
        (
            "3:cpuset:/\n2:cpu,cpuacct:/a\n0::/",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}
            | {"cpu/a/cpu.cfs_quota_us": "150000", "cpu/a/cpu.cfs_period_us": "50000"},
            3,
        ),
    ],
)
def test_a_quota_of_control_groups_limits_the_cores(files, fresh, groups, limits, cores):
    """Hardware threads of a core count once, but for matrix products alone."""
    files["/proc/self/cgroup"] = groups
    files.update({f"/sys/fs/cgroup/{name}": text for name, text in limits.items()})
    assert setup.physical_cores() == cores
    usable = 8 if cores == 4 else cores
    assert setup.usable_cores() == usable
    fresh.setenv("PADDLE_TRAINERS_NUM", "3")
    assert setup.usable_cores() == max(1, usable // 3)


@pytest.mark.parametrize("version, gpu", [("'False'", False), ("'11.8'", True), ("'12.6'", True)])
def test_a_cpu_build_beside_a_driver_uses_no_gpu(monkeypatch, tmp_path, version, gpu):
    (tmp_path / "paddle" / "version").mkdir(parents=True)
    (tmp_path / "paddle" / "__init__.py").touch()
    (tmp_path / "paddle" / "version" / "__init__.py").write_text(
        f"full_version     = '3.3.1'\ncuda_version     = {version}\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.split(".")[0] == "paddle"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(setup.os.path, "exists", lambda path: path == "/dev/nvidiactl")
    monkeypatch.setattr(setup, "is_cuda_build", setup.is_cuda_build.__wrapped__)
    assert setup.has_gpu() is gpu
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert setup.has_gpu() is False


def test_an_amd_processor_gets_mkls_fast_path_unless_the_user_chose(fresh):
    fresh.setattr(setup, "read_text", lambda path: "vendor_id : AuthenticAMD")
    assert "MKL_DEBUG_CPU_TYPE=5 (AMD)" in setup.prepare()
    assert os.environ["MKL_DEBUG_CPU_TYPE"] == "5"
    fresh.setenv("MKL_DEBUG_CPU_TYPE", "4")
    assert "MKL_DEBUG_CPU_TYPE=4 (AMD)" in setup.prepare()
    fresh.delenv("MKL_DEBUG_CPU_TYPE")
    fresh.setattr(setup, "has_gpu", lambda: True)  # such a machine is left alone
    assert setup.prepare() == ["GPU machine, nothing else to prepare"]
    assert "MKL_DEBUG_CPU_TYPE" not in os.environ
    setup.set_threads()
    assert setup.threads is None


@pytest.mark.parametrize("fault", [AttributeError, OSError, TypeError])
def test_systems_without_glibc_are_fine(fresh, fault):
    fresh.setattr(setup.ctypes, "CDLL", mock.Mock(side_effect=fault))
    assert setup.keep_freed_memory() is False
