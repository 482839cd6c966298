"""GPUs that steps are predicted for: vendor figures, and the shares of them that software is assumed to reach.

Vendor figures: NVIDIA data sheets of A100, H100, H200, B200 (dense bf16 without sparsity, SXM); H800 is an H100 with
NVLink at 400 GB/s, H20 an H100 with fewer tensor cores. NVLink totals are halved to bytes per second per direction.
The network between nodes is that of the DGX systems: one adapter of 400 Gb/s a GPU, 200 Gb/s with A100.
What is assumed is marked so, with the measurement it leans on; nothing here was measured by this project.
GPUs that are not here come from a TOML file of the user's own.
"""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

Provenance = Literal["vendor", "assumed", "measured"]

GiB = 2**30
TERA = 1e12
GIGA = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """A figure with the range it is believed to lie in, and where it comes from.

    Args:
        value, low, high: low <= value <= high, in the unit that the field's name says.
        provenance: `vendor`, `assumed` or `measured`.
        source: data sheet, measurement or reasoning, in words.
    """

    value: float
    low: float
    high: float
    provenance: Provenance
    source: str

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.value <= self.high:
            raise ValueError(f"a rate needs 0 < low <= value <= high, got {self.low}, {self.value}, {self.high}")
        if self.provenance not in get_args(Provenance):
            raise ValueError(f"provenance must be one of {', '.join(get_args(Provenance))}; got {self.provenance!r}")

    def scaled(self, factor: float, *, note: str = "") -> Rate:
        """This rate times a factor that is taken as exact."""
        source = f"{self.source}; {note}" if note else self.source
        return Rate(
            value=self.value * factor,
            low=self.low * factor,
            high=self.high * factor,
            provenance=self.provenance,
            source=source,
        )


def _assumed(value: float, low: float, high: float, source: str) -> Rate:
    return Rate(value=value, low=low, high=high, provenance="assumed", source=source)


# Shares of the vendor figure.
MATMUL_SHARE = _assumed(
    0.70,
    0.55,
    0.81,
    "769-798 of 989 TFLOP/s measured on one H200 for 8192^3 bf16 on random data; DiT shapes are smaller",
)
MEMORY_SHARE = _assumed(
    0.80, 0.65, 0.90, "copy at 4.3 of 4.8 TB/s on one H200; fused normalisation kernels reach 71-87 % of HBM there"
)
LINK_SHARE = _assumed(
    0.75, 0.55, 0.90, "NCCL over NVLink, large messages; includes nothing for contention with compute"
)

# Seconds.
COLLECTIVE_LATENCY = _assumed(20e-6, 10e-6, 40e-6, "launch and synchronisation of one NCCL collective inside a node")
HOST_LINK = _assumed(40e9, 20e9, 52e9, "pinned memory over PCIe 5.0 x16, one direction; less where GPUs share a switch")
KERNEL_FLOOR = _assumed(6e-6, 3e-6, 12e-6, "shortest time between two kernels launched by eager PyTorch")

# Memory that is not the model's. "80 GB" is taken as 80 GiB, which is what the driver shows within 1 %.
FIXED_RESERVE_BYTES = int(2.5 * GiB)
FIXED_RESERVE_SOURCE = "CUDA context 0.5 GiB, driver 0.8 GiB, NCCL buffers 0.7 GiB, cuBLAS workspaces, kernels"
FRAGMENTATION_SHARE = 0.05
FRAGMENTATION_SOURCE = "share of the device memory that the caching allocator cannot use"

# Padded head_dim -> (forward, backward) TFLOP/s over padded columns, 16K tokens, H100. 64 and 128 were published
# (FlashAttention-3 paper, arXiv:2407.08608, figures 5 and 6); 96 is the estimate behind "265 forward and 233 backward
# useful at head_dim 72", 32 half-way to what softmax alone allows.
FLASH2_H100_TFLOPS = {32: (200.0, 175.0), 64: (324.0, 291.0), 96: (353.0, 311.0), 128: (370.0, 322.0)}
FLASH2_SOURCE = "FlashAttention-2 on H100 at 16K tokens as published, interpolated in the padded head_dim"


@dataclass(frozen=True, kw_only=True, slots=True)
class GPUProfile:
    """One GPU of a node of equal GPUs.

    Args:
        name: key of get_profile.
        matmul_flops: dense bf16 FLOP/s, vendor.
        hbm_bytes_s: memory bandwidth, vendor.
        memory_bytes: device memory.
        link_bytes_s: link bandwidth per direction between any two GPUs of the node, vendor.
        gpus_per_node: GPUs that these links join.
        node_link_bytes_s: network bandwidth of one GPU per direction to other nodes, vendor; None: one node only.
        flash_scale: FlashAttention-2 rates relative to H100's, assumed.
        measured_matmul, measured_memory: rates in place of the shares of vendor figures, None if nothing was measured.
        measured_attention: (head_dim, backward, ((seq_len, rate), ...)) in place of FlashAttention-2's as published.
        file: TOML file that it is of, None for one of PROFILES.
    """

    name: str
    matmul_flops: float
    hbm_bytes_s: float
    memory_bytes: int
    link_bytes_s: float
    gpus_per_node: int = 8
    node_link_bytes_s: float | None = None
    flash_scale: Rate
    measured_matmul: Rate | None = None
    measured_memory: Rate | None = None
    measured_attention: tuple[tuple[int, bool, tuple[tuple[int, Rate], ...]], ...] = ()
    file: str | None = None

    @property
    def target(self) -> str:
        """What get_profile finds it by, from the same folder."""
        return self.name if self.file is None else f"{self.file}:{self.name}"

    @property
    def label(self) -> str:
        """Its name in words, which no other profile has."""
        return self.name if self.file is None else f"{self.name} ({Path(self.file).name})"

    @property
    def usable_bytes(self) -> int:
        """Memory left for the model: all but the reserve for context, libraries and fragmentation (assumed)."""
        return int(self.memory_bytes * (1 - FRAGMENTATION_SHARE)) - FIXED_RESERVE_BYTES

    @property
    def matmul(self) -> Rate:
        """FLOP/s of large bf16 matrix products."""
        if self.measured_matmul is not None:
            return self.measured_matmul
        return MATMUL_SHARE.scaled(self.matmul_flops, note=f"times {self.name}'s vendor peak")

    @property
    def memory(self) -> Rate:
        """Bytes/s that memory-bound kernels move."""
        if self.measured_memory is not None:
            return self.measured_memory
        return MEMORY_SHARE.scaled(self.hbm_bytes_s, note=f"times {self.name}'s vendor bandwidth")

    @property
    def link(self) -> Rate:
        """Bytes/s one GPU sends in a collective inside a node."""
        return LINK_SHARE.scaled(self.link_bytes_s, note=f"times {self.name}'s vendor bandwidth per direction")

    @property
    def node_link(self) -> Rate:
        """Bytes/s one GPU sends in a collective whose ranks lie on several nodes."""
        assert self.node_link_bytes_s is not None
        note = f"times {self.name}'s vendor network bandwidth per direction"
        return LINK_SHARE.scaled(self.node_link_bytes_s, note=note)

    def standing_for(self, target: GPUProfile) -> GPUProfile:
        """This GPU where a rank of another one is emulated on it: it computes, links and memory are the target's."""
        return replace(
            self,
            memory_bytes=target.memory_bytes,
            link_bytes_s=target.link_bytes_s,
            gpus_per_node=target.gpus_per_node,
            node_link_bytes_s=target.node_link_bytes_s,
        )

    def check_gpus(self, num_gpus: int) -> None:
        """ValueError unless so many GPUs are part of a node, or whole nodes with a known network."""
        node = self.gpus_per_node
        if 1 <= num_gpus <= node:
            return
        if self.node_link_bytes_s is None or num_gpus < 1 or num_gpus % node:
            beyond = "" if self.node_link_bytes_s is None else f", or a multiple of {node}"
            raise ValueError(f"num_gpus must be 1 to {node}, one node of {self.name}{beyond}, got {num_gpus}")

    def rates(self, head_dim: int) -> dict[str, Rate]:
        """Every rate that a step on this GPU may lean on, by name."""
        rates = {
            "matmul_flop_s": self.matmul,
            "memory_byte_s": self.memory,
            "attention_forward_flop_s": self.attention(head_dim, backward=False),
            "attention_backward_flop_s": self.attention(head_dim, backward=True),
            "link_byte_s": self.link,
            "collective_latency_s": COLLECTIVE_LATENCY,
            "kernel_floor_s": KERNEL_FLOOR,
            "host_byte_s": HOST_LINK,
        }
        return rates | ({} if self.node_link_bytes_s is None else {"node_link_byte_s": self.node_link})

    def attention(self, head_dim: int, *, backward: bool, seq_len: int | None = None) -> Rate:
        """FLOP/s of flash attention (FlashAttention-2, which SDPA runs), counting head_dim as it is.

        Args:
            head_dim: D; columns that pad it to a multiple of 32 are computed and not counted.
            backward: the rate of the backward kernel, otherwise forward.
            seq_len: of measured rates, that of the nearest length; None: of the longest. Others are of any length.

        Raises:
            ValueError: head_dim above 128.
        """
        for measured_dim, measured_backward, by_length in self.measured_attention:
            if (measured_dim, measured_backward) == (head_dim, backward):
                longest = max(length for length, _ in by_length)
                wanted = math.log(max(seq_len or longest, 1))
                return min(by_length, key=lambda one: abs(math.log(one[0]) - wanted))[1]
        padded = -(-head_dim // 32) * 32
        if padded not in FLASH2_H100_TFLOPS:
            raise ValueError(f"no flash attention rate for head_dim {head_dim}; it must be between 1 and 128")
        rate = FLASH2_H100_TFLOPS[padded][int(backward)] * TERA * head_dim / padded
        return self.flash_scale.scaled(rate, note=f"{FLASH2_SOURCE}; {head_dim} of {padded} columns useful")


_HOPPER = _assumed(1.0, 0.80, 1.10, "same tensor cores and clocks as H100")

_PROFILES = (
    GPUProfile(
        name="A100",
        matmul_flops=312 * TERA,
        hbm_bytes_s=2.04 * TERA,
        memory_bytes=80 * GiB,
        link_bytes_s=300 * GIGA,
        node_link_bytes_s=25 * GIGA,
        flash_scale=_assumed(0.60, 0.50, 0.65, "FlashAttention-2 paper (arXiv:2307.08691): up to 73 % of 312 TFLOP/s"),
    ),
    GPUProfile(
        name="H800",
        matmul_flops=989 * TERA,
        hbm_bytes_s=3.35 * TERA,
        memory_bytes=80 * GiB,
        link_bytes_s=200 * GIGA,
        node_link_bytes_s=50 * GIGA,
        flash_scale=_HOPPER,
    ),
    GPUProfile(
        name="H100",
        matmul_flops=989 * TERA,
        hbm_bytes_s=3.35 * TERA,
        memory_bytes=80 * GiB,
        link_bytes_s=450 * GIGA,
        node_link_bytes_s=50 * GIGA,
        flash_scale=_HOPPER,
    ),
    GPUProfile(
        name="H20",
        matmul_flops=148 * TERA,
        hbm_bytes_s=4.0 * TERA,
        memory_bytes=96 * GiB,
        link_bytes_s=450 * GIGA,
        node_link_bytes_s=50 * GIGA,
        flash_scale=_assumed(
            0.22, 0.16, 0.27, "half of 148 TFLOP/s, as FlashAttention-2 is bound by other units on H100"
        ),
    ),
    GPUProfile(
        name="H200",
        matmul_flops=989 * TERA,
        hbm_bytes_s=4.8 * TERA,
        memory_bytes=141 * GiB,
        link_bytes_s=450 * GIGA,
        node_link_bytes_s=50 * GIGA,
        flash_scale=_HOPPER,
    ),
    GPUProfile(
        name="B200",
        matmul_flops=2250 * TERA,
        hbm_bytes_s=8.0 * TERA,
        memory_bytes=180 * GiB,
        link_bytes_s=900 * GIGA,
        node_link_bytes_s=50 * GIGA,
        flash_scale=_assumed(1.1, 0.80, 1.70, "FlashAttention-2 does not use Blackwell's own tensor-core instructions"),
    ),
)
PROFILES: dict[str, GPUProfile] = {profile.name: profile for profile in _PROFILES}


def get_profile(name: str) -> GPUProfile:
    """The profile of a GPU.

    Args:
        name: of one here, upper or lower case; or a TOML file that holds one profile, or `file.toml:NAME`.

    Raises:
        ValueError: there is no such profile; it asks for one and shows a template.
    """
    path, _, of_file = name.partition(".toml")
    if of_file or name.endswith(".toml"):
        return load_profile(f"{path}.toml", of_file.removeprefix(":"))
    profile = PROFILES.get(name.upper())
    if profile is None:
        raise ValueError(
            f"unknown GPU {name!r}; profiles are {', '.join(PROFILES)}. For another one write a TOML file and give its "
            f"path: {TEMPLATE}"
        )
    return profile


def profile_of_device(device_name: str) -> GPUProfile | None:
    """The profile of a device by the name its driver gives, None for others."""
    words = re.split(r"[^A-Z0-9]+", device_name.upper())
    return next((profile for name, profile in PROFILES.items() if name in words), None)


# One line, as errors at the command line are.
TEMPLATE = (
    "[MYGPU]; bf16_tflops = 989; hbm_tb_s = 3.35; memory_gib = 80; link_gb_s = 450; gpus_per_node = 8; "
    "node_link_gb_s = 50; flash_attention = [1.0, 0.8, 1.1] (one key a line; link_gb_s per direction between two GPUs "
    "of a node, node_link_gb_s between nodes, both may be left out for one GPU; flash_attention: rate of its "
    "FlashAttention over H100's, with its range)"
)
_KEYS = {
    "bf16_tflops": "matmul_flops",
    "hbm_tb_s": "hbm_bytes_s",
    "memory_gib": "memory_bytes",
    "link_gb_s": "link_bytes_s",
    "node_link_gb_s": "node_link_bytes_s",
    "gpus_per_node": "gpus_per_node",
}
_UNITS = {"bf16_tflops": TERA, "hbm_tb_s": TERA, "memory_gib": GiB, "link_gb_s": GIGA, "node_link_gb_s": GIGA}


@lru_cache
def load_profile(path: str, name: str = "") -> GPUProfile:
    """A profile of a TOML file with one table per GPU, as TEMPLATE shows.

    Args:
        path: of the file. name: of the GPU, upper or lower case; may be left out where there is one.

    Raises:
        ValueError: the file cannot be read, or has no such table; or a figure is missing, unknown or not positive.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: no profiles of GPUs there ({error}); a file has: {TEMPLATE}") from None
    tables = {key: value for key, value in tables.items() if isinstance(value, dict)}
    wanted = [key for key in tables if not name or key.upper() == name.upper()]
    if len(wanted) != 1:
        raise ValueError(f"{path}: has {', '.join(tables) or 'no table'}; {name or 'name'} must be one of them")
    (key,) = wanted
    given = tables[key]
    needed = {"bf16_tflops", "hbm_tb_s", "memory_gib", "flash_attention"}
    given.setdefault("gpus_per_node", 8 if "link_gb_s" in given else 1)
    for field in sorted(needed | given.keys()):
        if field not in given or field not in _KEYS.keys() | {"flash_attention"}:
            word = "lacks" if field not in given else "has an unknown"
            raise ValueError(f"{path}: [{key}] {word} {field}; a table has: {TEMPLATE}")
        values = given[field] if field == "flash_attention" else [given[field]]
        if not isinstance(values, list) or not all(type(v) in (int, float) and 0 < v < math.inf for v in values):
            raise ValueError(
                f"{path}: [{key}] {field} must be positive and finite, got {given[field]!r}; a table has: {TEMPLATE}"
            )
    flash = given["flash_attention"]
    if len(flash) != 3 or type(given["gpus_per_node"]) is not int:
        raise ValueError(
            f"{path}: [{key}] flash_attention has value, low and high, gpus_per_node is whole; got {flash!r}, "
            f"{given['gpus_per_node']!r}"
        )
    if not flash[1] <= flash[0] <= flash[2]:
        raise ValueError(
            f"{path}: [{key}] flash_attention is [value, low, high] with low <= value <= high, got {flash!r}"
        )
    if given["gpus_per_node"] > 1 and "link_gb_s" not in given:
        raise ValueError(f"{path}: [{key}] lacks link_gb_s for its gpus_per_node {given['gpus_per_node']}")
    figures = {_KEYS[field]: given[field] * _UNITS.get(field, 1) for field in given if field in _KEYS}
    figures.setdefault("link_bytes_s", figures.get("node_link_bytes_s", GIGA))
    figures["memory_bytes"] = int(figures["memory_bytes"])
    scale = _assumed(flash[0], flash[1], flash[2], f"as {Path(path).name} says")
    return GPUProfile(name=key.upper(), flash_scale=scale, file=path, **figures)
