"""Free memory, on made-up file systems."""

import os

import pytest

from clp_jax.memory import free_memory

MACHINE = 8 << 30


def write(root, files):
    for name, text in ({"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {MACHINE // 1024} kB\n"} | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, MACHINE),
        ({"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5\n"}, MACHINE),
        (
            {
                "sys/fs/cgroup/memory.max": "3000\n",
                "sys/fs/cgroup/memory.current": "2000\n",
                "sys/fs/cgroup/memory.stat": "anon 1200\ninactive_file 300\n",
            },
            1300,
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000\n",
                "sys/fs/cgroup/memory/memory.stat": "inactive_file 0\n",
            },
            MACHINE,
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000\n",
                "sys/fs/cgroup/memory/memory.stat": "inactive_file 0\n",
            },
            0,
        ),
    ],
    ids=["no groups", "no limit", "version 2", "version 1, no limit", "version 1, used up"],
)
def test_a_container_has_what_its_limit_leaves(tmp_path, files, free):
    assert free_memory(write(tmp_path, files)) == free


@pytest.mark.parametrize(
    ("line", "folder", "limit", "used"),
    [
        ("0::/slurm/job_1/task_0", "sys/fs/cgroup/slurm/job_1", "memory.max", "memory.current"),
        (
            "5:cpu,memory:/slurm/job_1/task_0",
            "sys/fs/cgroup/memory/slurm/job_1",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_a_job_has_what_the_limit_of_a_group_above_its_own_leaves(tmp_path, line, folder, limit, used):
    files = {f"{folder}/{limit}": "3000\n", f"{folder}/{used}": "2000\n", f"{folder}/memory.stat": "anon 1\n"}
    assert free_memory(write(tmp_path, files | {"proc/self/cgroup": f"1:name=systemd:/\n{line}\n"})) == 1000


def test_elsewhere_it_is_all_memory(tmp_path):
    assert free_memory(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_this_machine_has_some():
    assert 0 < free_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
