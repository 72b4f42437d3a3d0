"""What nvidia-smi prints, in the forms that it has, becomes the job's own GPUs or one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc.core.errors import HpcError
from hpc.node import gpus

ROOT = Path(__file__).resolve().parent.parent.parent
STUBS = ROOT / "tests" / "cluster" / "stubs"
DGX = """\
0, GPU-1a2b3c4d-2f0e-9d4c-86f2-7a6b5c4d3e2f, NVIDIA A100-SXM4-80GB, 97, 40536, 81920, 61, 388.52
1, GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77, NVIDIA A100-SXM4-80GB, 0, 4, 81920, 33, 61.10
2, GPU-9f8e7d6c-0a1b-2c3d-4e5f-60718293a4b5, NVIDIA A100-SXM4-80GB, [N/A], 87, 81920, 35, 71.00
"""
LISTING = """\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-1a2b3c4d-2f0e-9d4c-86f2-7a6b5c4d3e2f)
GPU 2: NVIDIA A100-SXM4-80GB (UUID: GPU-9f8e7d6c-0a1b-2c3d-4e5f-60718293a4b5)
  MIG 3g.40gb     Device  0: (UUID: MIG-c7384736-a75d-5afc-978f-d2f1294409fd)
  MIG 1g.10gb     Device  1: (UUID: MIG-a28ad590-3fda-56dd-84fc-0a0b96edc58d)
"""


def test_every_field_is_read_with_its_unit() -> None:
    assert gpus.parse(DGX)[0] == gpus.Gpu(
        index=0,
        uuid="GPU-1a2b3c4d-2f0e-9d4c-86f2-7a6b5c4d3e2f",
        name="NVIDIA A100-SXM4-80GB",
        utilization=97,
        memory_used_mib=40536,
        memory_total_mib=81920,
        temperature_c=61,
        power_w=388.52,
    )


@pytest.mark.parametrize(
    "word", ["[N/A]", "[Not Supported]", "N/A", "[Unknown Error]", "[GPU is lost]", "[Insufficient Permissions]", ""]
)
def test_what_is_not_told_is_none(word: str) -> None:
    (one,) = gpus.parse(f"3, GPU-1, NVIDIA GB10, {word}, {word}, {word}, {word}, {word}\n")
    told = (one.utilization, one.memory_used_mib, one.memory_total_mib, one.temperature_c, one.power_w)
    assert told == (None,) * 5
    assert one.index == 3


@pytest.mark.parametrize("text", ["", "No devices were found\n", "Unable to determine the device handle, GPU 0: x\n"])
def test_what_is_no_gpu_is_passed_over(text: str) -> None:
    assert gpus.parse(text) == []


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, [0, 1, 2]),
        ("1", [1]),
        ("2,0", [2, 0]),
        ("GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77", [1]),
        ("GPU-5d5b", [1]),
        ("7", []),
        ("", []),
        ("NoDevFiles", []),
    ],
)
def test_only_the_jobs_own_gpus_are_kept(visible: str | None, found: list[int]) -> None:
    assert [gpu.index for gpu in gpus.own(gpus.parse(DGX), visible)] == found


def test_mig_slice_is_told_by_its_profile_and_takes_nothing_of_the_cards_that_others_share() -> None:
    (one,) = gpus.own(gpus.parse(DGX), "MIG-a28ad590-3fda-56dd-84fc-0a0b96edc58d", LISTING)
    assert (one.index, one.name) == (2, "NVIDIA A100-SXM4-80GB MIG 1g.10gb")
    assert (one.utilization, one.memory_used_mib, one.memory_total_mib) == (None, None, None)
    assert (one.temperature_c, one.power_w) == (35, 71.0)


def sampler(**env: str) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
    argv = [sys.executable, "-m", "hpc.node.gpus", env.pop("every", "0")]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, env={**clean, "PYTHONPATH": str(ROOT), **env}, stdin=pipe, stdout=pipe, text=True)


def only(**env: str) -> dict[str, object]:
    done = sampler(**env)
    out, _ = done.communicate(timeout=20)
    assert done.returncode == 0
    found: dict[str, object] = json.loads(out)
    assert found.pop("node") == os.uname().nodename
    return found


def test_sample_is_one_line_with_the_node() -> None:
    found = only(PATH=f"{STUBS}:/usr/bin:/bin", CUDA_VISIBLE_DEVICES="2,5")
    assert [g["index"] for g in found["gpus"]] == [2, 5]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ({"PATH": "/nowhere"}, "there is no nvidia-smi on this node"),
        (
            {"PATH": f"{STUBS}:/usr/bin:/bin", "STUB_GPU_ANSWER": "No devices\n  were found"},
            "nvidia-smi failed: No devices were found",
        ),
        (
            {"PATH": f"{STUBS}:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "9"},
            "nvidia-smi shows none of the job's GPUs (CUDA_VISIBLE_DEVICES=9)",
        ),
    ],
)
def test_no_sample_is_one_sentence(env: dict[str, str], problem: str) -> None:
    assert only(**env) == {"problem": problem}


def test_hanging_program_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = tmp_path / "nvidia-smi"
    hang.write_text("#!/bin/sh\nexec sleep 60\n")
    hang.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(gpus, "_ANSWER_S", 0.2)
    with pytest.raises(HpcError, match=r"gave no answer"):
        gpus.sample(None)


def test_sampler_goes_on_until_nobody_holds_its_input() -> None:
    process = sampler(PATH=f"{STUBS}:/usr/bin:/bin", every="0.05")
    assert process.stdout is not None
    assert process.stdin is not None
    lines = [process.stdout.readline() for _ in range(3)]
    assert all(len(json.loads(line)["gpus"]) == 8 for line in lines)
    process.stdin.close()
    assert process.wait(10) == 0
    process.stdout.close()
