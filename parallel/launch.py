"""What a script needs around its work: the command line, the process group, and errors as one line.

Under torchrun every rank runs the script; an error that all of them meet is printed once, by the first to report it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from longreel.parallel.command_line import Config, parse_arguments

_ERROR_KEY = "longreel/error"
# How long a rank whose collective broke waits for the reason another rank gives.
_REASON_SECONDS = 2.0
# What PyTorch says, as plain RuntimeErrors, where a tensor does not fit in memory or in its numbers.
_TOO_LARGE = (
    "out of memory",
    "can't allocate memory",
    "storage size calculation overflowed",
    "overflow when unpacking",
    "multiplication overflow",
)


class _Reporter:
    """Prints one error for all ranks: the first rank to claim the key does."""

    def __init__(self) -> None:
        self.store: dist.Store | None = None
        self.world_size = 1
        self.status = 0

    def __call__(self, message: str) -> None:
        if self.store.add(_ERROR_KEY, 1) == 1 if self.store is not None else _env("RANK", 0) == 0:
            print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turns what the user got wrong into one line and status 2, and lets our own defects through."""
        try:
            yield
        except (ValueError, OSError) as error:
            self._fail(str(error))
        except (MemoryError, OverflowError) as error:
            self._fail(_too_large(error))
        except RuntimeError as error:
            if any(words in str(error).lower() for words in _TOO_LARGE):
                self._fail(_too_large(error))
            elif self._reported_elsewhere():
                # A collective broke because its peer went away; the peer has said why.
                self.status = 2
            else:
                raise

    def _fail(self, message: str) -> None:
        self.status = 2
        self(message)

    def _reported_elsewhere(self) -> bool:
        if self.store is None or self.world_size == 1:
            return False
        deadline = time.monotonic() + _REASON_SECONDS
        try:
            while self.store.add(_ERROR_KEY, 0) == 0:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.05)
        except dist.DistNetworkError:
            # The store went with the rank that held it.
            return False
        return True


def run_script(work: Callable[[Config, torch.device], None], config_type: type[Config], args: Sequence[str]) -> int:
    """Parse the command line, join the process group and work; what the user got wrong becomes one line.

    Args:
        work: called with the configuration and this rank's device, inside a process group (of one rank without
            torchrun).
        config_type: dataclass that the command line is made of.
        args: the command line without the program's name.

    Returns:
        Exit status: 0, or 2 after a ValueError, an OSError or sizes that do not fit in memory, printed as
        `error: ...` on stderr. Any other exception is a defect of ours and is raised.
    """
    report = _Reporter()
    with report.errors():
        config = parse_arguments(config_type, args)
        # Said before the group is left, which breaks the collectives that other ranks wait in.
        with process_group(report) as device, report.errors():
            work(config, device)
    return report.status


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
        report.store, report.world_size = store, world_size
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


def _too_large(error: BaseException) -> str:
    return (
        "sizes are too large for the memory of this machine; use a smaller model, batch_size, num_frames, height or "
        f"width, or more ranks: {str(error).strip().partition(chr(10))[0][:200] or type(error).__name__}"
    )


def _env(name: str, default: int) -> int:
    return int(os.environ.get(name, default))
