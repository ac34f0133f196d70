"""What is installed, what was built, and what each op would run on: `pyprune info` on one page."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import pyprune
from pyprune import _native, ops

CPUINFO = Path("/proc/cpuinfo")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")


def version_of(package: str) -> str:
    """The installed version of a package; torch says itself for which CUDA it was built, which its wheel may not."""
    if package == "torch":
        return torch.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The processor's name as Linux tells it. Virtual machines hide the number in it ("AMD EPYC" is said by several
    generations); then family and model follow."""
    try:
        first = CPUINFO.read_text().partition("\n\n")[0]
    except OSError:
        first = ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = fields.get("model name") or platform.processor() or platform.machine()
    if re.search(r"\d{3}", name.partition("@")[0]) or not {"cpu family", "model"} <= fields.keys():
        return name
    return f"{name} (family {fields['cpu family']} model {fields['model']})"


def commit() -> str | None:
    """The commit of the git checkout that this package lies in, if it does."""
    root = Path(__file__).parent.parent
    # an installed copy may lie inside somebody else's checkout
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return git.stdout.strip() or None


def _devices() -> list[dict[str, Any]]:
    """Every device torch can use: the CPU, then the GPUs with their capability ("9.0")."""
    cpu = {"device": "cpu", "name": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    gpus = [
        {
            "device": f"cuda:{index}",
            "name": torch.cuda.get_device_name(index),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
        }
        for index in range(torch.cuda.device_count())
    ]
    return [cpu, *gpus]


def _dispatch(device: str) -> list[dict[str, str]]:
    """For every op: which implementation runs on this device in bf16, fp16 and fp32, and why."""
    chosen = {op: ops.choose(op, torch.device(device), torch.float32) for op in ops.OPS}
    return [
        {"op": op, "device": device, "runs": implementation.name, "how": implementation.description, "why": why}
        for op, (implementation, why) in chosen.items()
    ]


def report() -> dict[str, Any]:
    """Everything that `render` shows, as plain data."""
    devices = _devices()
    return {
        "pyprune": pyprune.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: version_of(package) for package in PACKAGES},
        "compiled": _native.module is not None,
        "why_not_compiled": _native.why_missing,
        "build": _native.build_info,
        "isas": list(_native.cpu.isas()) if _native.cpu else [],
        "isa": _native.cpu.isa() if _native.cpu else None,
        "torch_cuda": torch.version.cuda,
        "devices": devices,
        "ops": [row for device in devices for row in _dispatch(device["device"])],
    }


def _build_lines(report: dict[str, Any]) -> list[str]:
    build = report["build"]
    if not report["compiled"]:
        return [f"compiled   no: {report['why_not_compiled']}", "           the ops run in plain torch"]
    archs = f"sm_{', sm_'.join(build['cuda_archs'])}" if build["cuda"] else ""
    cuda = f"CUDA {build['cuda']} for {archs}" if build["cuda"] else f"no CUDA ({build['cuda_reason']})"
    cutlass = f"{'yes' if build.get('cutlass') else 'no'}, {build.get('cutlass_reason', 'an older build')}"
    return [
        f"compiled   yes, by {build['compiler']}; {cuda}",
        f"cpu code   {report['isa']}; this machine runs {', '.join(report['isas'])} (PYPRUNE_ISA chooses)",
        *([f"cutlass    2:4 for many tokens on sm_90a: {cutlass}"] if build["cuda"] else []),
    ]


def render(report: dict[str, Any]) -> str:
    """`report()` as one page of text."""
    lines = [
        f"pyprune    {report['pyprune']}, Python {report['python']}, {report['platform']}",
        f"packages   {', '.join(f'{name} {found}' for name, found in report['packages'].items())}",
        *_build_lines(report),
    ]
    for device in report["devices"]:
        details = f"capability {device['capability']}" if "capability" in device else f"{device['threads']} threads"
        lines.append(f"{device['device']:10} {device['name']}, {details}")
    if len(report["devices"]) == 1:
        lines.append(f"gpu        none that torch can use (torch was built {_torch_cuda(report['torch_cuda'])})")
    lines += ["", f"{'op':31} {'device':8} {'runs on':10} how; why"]
    lines += [f"{row['op']:31} {row['device']:8} {row['runs']:10} {row['how']}; {row['why']}" for row in report["ops"]]
    return "\n".join([*lines, "", "fp64 runs on the reference everywhere."])


def _torch_cuda(release: str | None) -> str:
    return f"for CUDA {release}" if release else "without CUDA"
