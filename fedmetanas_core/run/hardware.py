"""What a run is computed on, in words; seconds of different machines do not compare."""

import os
import platform
from pathlib import Path

import torch


def describe_hardware(device: str, ray_address: str = "") -> str:
    """This machine: processor, cores, the GPU if ``device`` is cuda, and the cluster that its clients run on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    gpu = f", {torch.cuda.get_device_name()}" if device == "cuda" and torch.cuda.is_available() else ""
    cluster = f", clients on the Ray cluster at {ray_address}" if ray_address else ""
    return f"{name}, {os.cpu_count()} cores{gpu}{cluster}"
