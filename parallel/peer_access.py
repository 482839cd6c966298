"""Whether the ranks of a group can exchange through symmetric memory: asked of each, tried, and answered on all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longreel.parallel import comm, symmetric

INSTEAD = "exchange 'p2p' works everywhere"
# "GPU-" and a UUID.
UUID_BYTES = 40


def require_peer_access(group: str) -> None:
    """Check that `symmetric` exchanges work in the group; every rank of it calls this.

    Args:
        group: name of a process group. A fake one needs nothing.

    Raises:
        ValueError: on every rank, if any rank lacks what it takes; the message of that rank says what.
    """
    if comm.is_fake(group):
        return
    need = unmet_need(group)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    on = device if "nccl" in comm.backend(group) else torch.device("cpu")
    _agree(need, group, on)
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    everyone = comm.all_gather(torch.tensor(list(uuid.ljust(UUID_BYTES)[:UUID_BYTES]), dtype=torch.uint8).to(on), group)
    uuids = [bytes(row).decode().strip() for row in everyone.tolist()]
    _agree(unreachable(uuids, comm.group_rank(group)), group, on)
    _agree(failed_trial(group, device), group, on)


def unmet_need(group: str) -> str | None:
    """Why this rank cannot start `symmetric` exchanges in the group, looking at itself alone; None if it can."""
    try:
        symmetric.load_api()
    except ValueError as error:
        return str(error)
    if not torch.cuda.is_available():
        return f"exchange 'symmetric' needs a CUDA device, and there is none; {INSTEAD}"
    backend = comm.backend(group)
    if "nccl" not in backend:
        return f"exchange 'symmetric' needs a group of backend nccl, got {backend!r}; {INSTEAD}"
    allocator = symmetric.allocator_of(torch.device("cuda", torch.cuda.current_device()))
    if allocator != "CUDA":
        return f"exchange 'symmetric' needs symmetric memory of allocator 'CUDA', got {allocator!r}; {INSTEAD}"
    return None


def unreachable(uuids: Sequence[str], rank: int) -> str | None:
    """Why rank's device cannot read those of the others; None if it can read them all.

    Args:
        uuids: the device of every rank of the group, as NVML writes it. rank: this one.
    """
    peers = {peer: uuid for peer, uuid in enumerate(uuids) if peer != rank}
    for peer, uuid in peers.items():
        if uuid == uuids[rank]:
            return f"exchange 'symmetric' needs a device per rank; rank {peer} has that of rank {rank}; {INSTEAD}"
    if not peers:
        return None
    import pynvml

    kinds = {
        "read access": pynvml.NVML_P2P_CAPS_INDEX_READ,
        "write access": pynvml.NVML_P2P_CAPS_INDEX_WRITE,
        "atomics": pynvml.NVML_P2P_CAPS_INDEX_ATOMICS,
    }
    pynvml.nvmlInit()
    try:
        for peer, uuid in peers.items():
            try:
                pair = [pynvml.nvmlDeviceGetHandleByUUID(one) for one in (uuids[rank], uuid)]
                lacking = [
                    kind
                    for kind, index in kinds.items()
                    if pynvml.nvmlDeviceGetP2PStatus(*pair, index) != pynvml.NVML_P2P_STATUS_OK
                ]
            except pynvml.NVMLError as error:
                return (
                    f"exchange 'symmetric' needs all ranks on one node; NVML of rank {rank} does not see its "
                    f"device and that of rank {peer} ({error}); {INSTEAD}"
                )
            if lacking:
                return (
                    f"exchange 'symmetric' needs NVLink, or other peer access with atomics; between the devices of "
                    f"ranks {rank} and {peer} there is no {' and no '.join(lacking)}; {INSTEAD}"
                )
    finally:
        pynvml.nvmlShutdown()
    return None


def failed_trial(group: str, device: torch.device) -> str | None:
    """Exchange rank numbers once; what went wrong, or None."""
    size, rank = comm.group_size(group), comm.group_rank(group)
    mine = torch.full((2,), float(rank), device=device)
    try:
        found = [int(chunk[1]) for _, chunk in comm.ring_chunks(mine, comm.symmetric_key(group))]
    except RuntimeError as error:
        return f"exchange 'symmetric' does not work between these devices: {error}; {INSTEAD}"
    expected = [(rank - step) % size for step in range(size)]
    return None if found == expected else f"exchange 'symmetric' brought {found} for {expected}; {INSTEAD}"


def _agree(problem: str | None, group: str, device: torch.device) -> None:
    """ValueError on every rank if any has a problem: ranks that went on alone would wait for the others."""
    failed = [rank for rank, is_so in enumerate(comm.over_ranks(float(problem is not None), group, device)) if is_so]
    if failed:
        raise ValueError(
            problem or f"exchange 'symmetric' is not possible on ranks {failed} of the group; they say why; {INSTEAD}"
        )
