"""What devices say of themselves: texts of boards and computers, and this very machine."""

from __future__ import annotations

import os

import pytest

from edge_demo.device import hardware
from edge_demo.device.throughput import disk_speed, memory_bytes_per_s
from tests.edge_demo.test_memory import fake, linux

PI_5 = """\
processor	: 0
BogoMIPS	: 108.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x4
CPU part	: 0xd0b
CPU revision	: 1

processor	: 1
CPU part	: 0xd0b

Revision	: c04170
Model		: Raspberry Pi 5 Model B Rev 1.0
"""
PI_4 = """\
processor	: 0
Features	: fp asimd evtstrm crc32 cpuid
CPU implementer	: 0x41
CPU part	: 0xd08
CPU revision	: 3
"""
BIG_LITTLE = "processor\t: 0\nCPU part\t: 0xd05\nprocessor\t: 4\nCPU part\t: 0xd0b\nprocessor\t: 5\nCPU part\t: 0xabc\n"
X86 = """\
processor	: 0
vendor_id	: GenuineIntel
model name	: Intel(R) N100
flags		: fpu sse4_2 avx avx2 fma avx_vnni
processor	: 1
model name	: Intel(R) N100
flags		: fpu sse4_2 avx avx2 fma avx_vnni
"""


@pytest.mark.parametrize(
    "cpuinfo, name, found, missing",
    [
        (PI_5, "Cortex-A76", ("dot product", "fp16"), ("i8mm",)),
        (PI_4, "Cortex-A72", (), ("dot product", "i8mm", "fp16")),
        (X86, "Intel(R) N100", ("AVX2", "AVX-VNNI"), ("AVX-512", "AVX-512 VNNI")),
        (BIG_LITTLE, "Cortex-A55 + Cortex-A76 + Arm core 0xabc", (), ()),
        ("", None, (), ()),  # macOS has no such file
    ],
    ids=["Pi 5", "Pi 4", "x86", "big.LITTLE", "none"],
)
def test_processor_and_instructions(cpuinfo, name, found, missing):
    assert hardware.processor(cpuinfo) == name
    assert hardware.instructions(cpuinfo) == (found, missing)


@pytest.mark.parametrize(
    "text, words",
    [
        ("throttled=0x0\n", "not throttled"),
        ("0", "not throttled"),
        ("50005\n", "now under-voltage, throttled; since it started under-voltage, throttled"),
        ("throttled=0x80000", "not throttled now; since it started soft temperature limit"),
        ("throttled=0x2", "now frequency capped"),
        ("", None),
        ("error=1", None),
    ],
)
def test_throttling_in_words(text, words):
    assert hardware.throttling(text) == words


@pytest.mark.parametrize(
    "text, word", [("always [madvise] never\n", "madvise"), ("[never]", "never"), ("", None)]
)
def test_the_chosen_of_a_setting(text, word):
    assert hardware.chosen(text) == word


def pi_5(folder):
    return fake(
        folder,
        {
            "proc/cpuinfo": PI_5,
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
            "proc/meminfo": "MemTotal: 4147616 kB\nMemAvailable: 2921036 kB\nSwapTotal: 524272 kB\nSwapFree: 100000 kB\n",
            "sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never\n",
            "sys/class/thermal/thermal_zone0/temp": "61250\n",
            "sys/class/thermal/thermal_zone1/temp": "-274000\n",  # a sensor that is not there
            "sys/class/thermal/thermal_zone2/temp": "invalid\n",
            "sys/devices/platform/soc/soc:firmware/get_throttled": "20002\n",
        }
        | {
            f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i}\n"
            for i in range(4)
        },
    )


def test_a_raspberry_pi_is_read_whole(tmp_path):
    found = hardware.look(pi_5(tmp_path))
    assert (found.board, found.processor) == ("Raspberry Pi 5 Model B Rev 1.0", "Cortex-A76")
    assert (found.cores, found.huge_pages, found.celsius) == (4, "always", 61.25)
    assert found.throttled == "now frequency capped; since it started frequency capped"


def test_threads_of_one_core_are_one_core(tmp_path):
    siblings = ["0,4", "1,5", "2-3", "2-3", "0,4", "1,5"]
    root = fake(
        tmp_path,
        {
            f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": text
            for i, text in enumerate(siblings)
        },
    )
    (root / "sys/devices/system/cpu/cpufreq").mkdir()
    assert hardware.physical_cores(root) == 3


def test_a_device_that_tells_nothing_is_unknown_and_no_error(tmp_path):
    found = hardware.look(tmp_path)
    assert found.board is found.huge_pages is found.celsius is found.throttled is None
    assert found.instructions == found.missing == ()
    assert found.bits == 64 and found.cores == os.cpu_count()


@linux
def test_this_machine_is_known():
    found = hardware.look()
    assert found.system == "Linux" and found.bits == 64
    assert found.processor or found.board
    assert found.cores is not None and 1 <= found.cores <= len(os.sched_getaffinity(0))
    assert found.page_bytes in (4096, 16384, 65536)


# --- throughput ----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_memory_speed_is_a_speed(threads):
    found = memory_bytes_per_s(threads, seconds=0.01, num_bytes=8 << 20)
    assert 1e7 < found < 1e13


def test_disk_speed_is_that_of_what_is_read(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(3 << 20))
    found = disk_speed(path, seconds=1)
    assert found is not None and 1e5 < found.bytes_per_s < 1e12
    assert disk_speed(tmp_path / "missing") is None
    path.write_bytes(b"")
    assert disk_speed(path) is None
