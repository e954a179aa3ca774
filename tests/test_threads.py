"""How OpenMP's threads wait, and whether they have cores of their own: on planted machines."""

import os

import pytest

from dnc_kernels import _threads

GOMP = "7f0000000000-7f0000060000 r-xp 00000000 fe:00 12 /site/torch/lib/libgomp-24e2ab19.so.1.0.0\n"
IOMP = "7f0000000000-7f0000060000 r-xp 00000000 fe:00 12 /opt/conda/lib/libiomp5.so\n"
LLVM = "7f0000000000-7f0000060000 r-xp 00000000 fe:00 12 /usr/lib/llvm/libomp.so.5\n"


@pytest.mark.parametrize(
    ("maps", "environment", "setting", "spins"),
    [
        (GOMP, {}, "", True),
        (GOMP, {"OMP_WAIT_POLICY": "passive"}, "OMP_WAIT_POLICY=passive", False),
        (GOMP, {"OMP_WAIT_POLICY": "PASSIVE"}, "OMP_WAIT_POLICY=PASSIVE", False),
        (GOMP, {"OMP_WAIT_POLICY": "active"}, "OMP_WAIT_POLICY=active", True),
        (GOMP, {"GOMP_SPINCOUNT": "0"}, "GOMP_SPINCOUNT=0", False),
        (GOMP, {"GOMP_SPINCOUNT": "infinity", "OMP_WAIT_POLICY": "passive"}, "GOMP_SPINCOUNT=infinity", True),
        (GOMP, {"KMP_BLOCKTIME": "0"}, "", True),  # another library's
        (IOMP, {}, "", True),
        (IOMP, {"KMP_BLOCKTIME": "0"}, "KMP_BLOCKTIME=0", False),
        (LLVM, {"KMP_BLOCKTIME": "0us"}, "KMP_BLOCKTIME=0us", False),
        (LLVM, {"KMP_BLOCKTIME": "200", "OMP_WAIT_POLICY": "passive"}, "KMP_BLOCKTIME=200", True),
        (IOMP, {"GOMP_SPINCOUNT": "0"}, "", True),
        ("", {"OMP_WAIT_POLICY": "passive"}, "OMP_WAIT_POLICY=passive", False),
    ],
)
def test_how_threads_wait(maps, environment, setting, spins):
    found = _threads.waiting("7f00-7f01 r--p 0 fe:00 9 /usr/lib/libc.so.6\n" + maps, environment)
    assert (found.setting, found.spins) == (setting, spins)


@pytest.mark.parametrize(
    ("maps", "library", "path"),
    [
        (GOMP, "libgomp", "/site/torch/lib/libgomp-24e2ab19.so.1.0.0"),
        (IOMP, "libiomp5", "/opt/conda/lib/libiomp5.so"),
        (LLVM, "libomp", "/usr/lib/llvm/libomp.so.5"),
        ("7f00-7f01 r-xp 0 fe:00 9 /usr/lib/libcomposer.so /x/libgomp/libz.so\n", "", ""),
    ],
)
def test_which_library_is_loaded(maps, library, path):
    found = _threads.waiting(maps, {})
    assert (found.library, found.path) == (library, path)


def test_the_remedy_names_what_outranks_it():
    assert _threads.waiting(GOMP, {}).remedy == "set OMP_WAIT_POLICY=passive before Python starts"
    assert _threads.waiting(GOMP, {"OMP_WAIT_POLICY": "active"}).remedy.endswith("before Python starts")
    assert _threads.waiting(GOMP, {"GOMP_SPINCOUNT": "9k"}).remedy.endswith(", and unset GOMP_SPINCOUNT, which outranks it")


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),  # a container
        (
            {
                "proc/self/cgroup": "0::/a.slice/b\n", "sys/fs/cgroup/a.slice/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a.slice/b/cpu.max": "max 100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "12:memory:/m\n5:cpu,cpuacct:/x\n", "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        ({"proc/self/cgroup": "5:cpuset:/x\n", "sys/fs/cgroup/cpuset/x/cpu.cfs_quota_us": "50000\n"}, None),
        ({"proc/self/cgroup": "garbage\n"}, None),
    ],
    ids=["none", "no limit", "container", "slice", "version 1", "another controller", "garbage"],
)  # fmt: skip
def test_the_quota_of_a_control_group(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _threads.quota(tmp_path) == cores


@pytest.mark.parametrize(
    ("threads", "cores", "allowed", "busy", "words"),
    [
        (2, 2, None, 0.9, ""),  # what the doctor itself makes
        (2, 2, None, None, ""),
        (2, 2, 2, 0.0, ""),
        (1, 1, 0.5, 9.0, ""),  # nobody waits
        (4, 8, None, 4.9, ""),
        (8, 8, 4, 0.0, "the control group allows 4 cores' worth of time to 8 threads"),
        (2, 2, 1.5, 0.0, "the control group allows 1.5 cores' worth"),
        (2, 2, None, 1.2, "a load of 1.2 on 2 cores leaves 1 free for 2 threads"),
        (4, 8, None, 5.0, "a load of 5.0 on 8 cores leaves 3 free for 4 threads"),
        (8, 8, None, 40.0, "leaves 0 free"),
    ],
)
def test_when_threads_share_cores(threads, cores, allowed, busy, words):
    assert words in _threads.crowded(threads, cores, allowed, busy)
    assert bool(words) == bool(_threads.crowded(threads, cores, allowed, busy))


def test_this_machine():
    assert _threads.cores() == os.cpu_count()
    assert _threads.load() is None or _threads.load() >= 0
    assert _threads.quota() is None or _threads.quota() > 0
