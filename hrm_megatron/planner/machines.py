"""Speeds of machines: GPUs by their data sheets, and the fraction of those figures that steps of an HRM reach."""
from __future__ import annotations

from dataclasses import dataclass, field, replace

from hrm_megatron.config import ConfigError

# Fractions of the data sheet figures. Matmuls: fitted to XL's 22.6 thousand tokens/s on an H100, as HRM-Text publishes,
# and tested on L's 39 thousand. The others are typical of such kernels.
MATMUL_SHARE, ATTENTION_SHARE, MEMORY_SHARE, LINK_SHARE = 0.57, 0.35, 0.75, 0.8
FP8_GAIN = 1.4  # of matmuls over bf16: makes a step 1.26 times as fast; torchtitan reports 1.28 for plain transformers
# Host time to launch one layer, forward or backward; `python tools/benchmark.py host` counts its launches.
HOST_SECONDS = 0.7e-3


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 FLOP/s; memory in bytes and bytes/s; NVLink and network in bytes/s, one direction, per GPU."""

    flops_per_second: float
    memory_bytes: float
    memory_bandwidth: float
    nvlink: float
    network: float
    fp8: bool


GPUS = {  # NVIDIA's data sheets; network as in the DGX system with that GPU
    "a100-40gb": Gpu(312e12, 40e9, 1.555e12, 300e9, 25e9, fp8=False),
    "a100-80gb": Gpu(312e12, 80e9, 2.039e12, 300e9, 25e9, fp8=False),
    "h100-80gb": Gpu(989e12, 80e9, 3.35e12, 450e9, 50e9, fp8=True),
    "h200-141gb": Gpu(989e12, 141e9, 4.8e12, 450e9, 50e9, fp8=True),
    "b200-180gb": Gpu(2250e12, 180e9, 8e12, 900e9, 50e9, fp8=True),
}

# torch's names of the devices with the peaks above. Other variants are slower: an H100 PCIe has 756e12.
DEVICE_NAMES = {"NVIDIA A100-SXM4-40GB": "a100-40gb", "NVIDIA A100-PCIE-40GB": "a100-40gb",
                "NVIDIA A100-SXM4-80GB": "a100-80gb", "NVIDIA A100 80GB PCIe": "a100-80gb",
                "NVIDIA H100 80GB HBM3": "h100-80gb", "NVIDIA H200": "h200-141gb", "NVIDIA B200": "b200-180gb"}


def known_peak(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device by its data sheet, None if it is not in GPUS."""
    name = DEVICE_NAMES.get(device_name)
    return GPUS[name].flops_per_second if name else None


@dataclass(frozen=True)
class Speeds:
    """Speeds that a step reaches: FLOP/s of matmuls and attention, bytes/s of element-wise operations and the
    optimizer, and host seconds per pass through a layer, which on a GPU (`hidden`) count only where the device is
    faster."""

    matmul: float
    attention: float
    elementwise: float
    optimizer: float
    host_seconds: float
    hidden: bool = True
    source: str = "shares of the makers' figures, fitted to what HRM-Text publishes of XL"

    @classmethod
    def of(cls, gpu: Gpu) -> Speeds:
        return cls(MATMUL_SHARE * gpu.flops_per_second, ATTENTION_SHARE * gpu.flops_per_second,
                   MEMORY_SHARE * gpu.memory_bandwidth, MEMORY_SHARE * gpu.memory_bandwidth, HOST_SECONDS)


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, in nodes; `speeds` come from a calibration if one was given.

    `gpu` is a name in GPUS, or the device name of a calibration, which has no known `peak`.
    """

    gpu: str
    gpus: int
    gpus_per_node: int = 8
    memory_bytes: float = 0.0
    nvlink: float = 0.0
    network: float = 0.0
    speeds: Speeds = field(default=Speeds(1, 1, 1, 1, 0))

    @classmethod
    def of(cls, name: str, gpus: int, gpus_per_node: int = 8, memory_gb: float | None = None,
           nvlink_gb: float | None = None, network_gb: float | None = None, speeds: Speeds | None = None) -> Cluster:
        """Return a cluster of `gpus` GPUs called `name`; given figures replace those of the data sheet."""
        if name not in GPUS:
            raise ConfigError(f"--gpu {name}: choose one of {', '.join(GPUS)}")
        if gpus > gpus_per_node and gpus % gpus_per_node:
            raise ConfigError(f"--gpus {gpus}: no multiple of {gpus_per_node} GPUs per node; choose "
                              f"{gpus // gpus_per_node * gpus_per_node} or {-(-gpus // gpus_per_node) * gpus_per_node}")
        gpu = GPUS[name]
        return cls(name, gpus, min(gpus, gpus_per_node), memory_gb * 1e9 if memory_gb else gpu.memory_bytes,
                   (nvlink_gb * 1e9 if nvlink_gb else gpu.nvlink) * LINK_SHARE,
                   (network_gb * 1e9 if network_gb else gpu.network) * LINK_SHARE, speeds or Speeds.of(gpu))

    @property
    def peak(self) -> float:
        """Dense bf16 FLOP/s of a GPU by its data sheet."""
        return GPUS[self.gpu].flops_per_second

    def link(self, ranks: int, stride: int = 1) -> float:
        """Return the bytes/s of a rank within a group of `ranks` that are `stride` apart."""
        return self.nvlink if ranks * stride <= self.gpus_per_node else self.network

    def with_fp8(self) -> Cluster:
        """Return the same cluster with matmuls in FP8."""
        return replace(self, speeds=replace(self.speeds, matmul=FP8_GAIN * self.speeds.matmul))
