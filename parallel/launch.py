"""What a script needs around its work: the command line, the process group, and errors as one line.

Under torchrun every rank runs the script; an error that all of them meet is printed once, by the first to report it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from longreel.parallel.command_line import Config, parse_arguments

_ERROR_KEY = "longreel/error"


class _Reporter:
    """Prints one error for all ranks: the first rank to claim the key does."""

    def __init__(self) -> None:
        self.store: dist.Store | None = None

    def __call__(self, message: str) -> None:
        if self.store.add(_ERROR_KEY, 1) == 1 if self.store is not None else _env("RANK", 0) == 0:
            print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)

    def reported_elsewhere(self) -> bool:
        return self.store is not None and self.store.add(_ERROR_KEY, 0) > 0


def run_script(work: Callable[[Config, torch.device], None], config_type: type[Config], args: Sequence[str]) -> int:
    """Parse the command line, join the process group and work; what the user got wrong becomes one line.

    Args:
        work: called with the configuration and this rank's device, inside a process group (of one rank without
            torchrun).
        config_type: dataclass that the command line is made of.
        args: the command line without the program's name.

    Returns:
        Exit status: 0, or 2 after a ValueError or OSError, printed as `error: ...` on stderr. Any other exception is a
        defect of ours and is raised.
    """
    report = _Reporter()
    try:
        config = parse_arguments(config_type, args)
        with process_group(report) as device:
            work(config, device)
    except (ValueError, OSError) as error:
        report(str(error))
        return 2
    except RuntimeError:
        # A collective broke because its peer went away; the peer has said why.
        if report.reported_elsewhere():
            return 2
        raise
    return 0


@contextlib.contextmanager
def process_group(report: _Reporter | None = None) -> Iterator[torch.device]:
    """The default process group of a script, NCCL on CUDA and gloo elsewhere; yields this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", _env("LOCAL_RANK", 0)) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # Every Linear on [B, s, C] returns a view, and nothing here writes into a prediction.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    store: dist.Store
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://"))
    else:
        store, rank, world_size = dist.HashStore(), 0, 1
    if report is not None:
        report.store = store
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("longreel", store),
        rank=rank,
        world_size=world_size,
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _env(name: str, default: int) -> int:
    return int(os.environ.get(name, default))
