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
from datetime import timedelta

import torch
import torch.distributed as dist

from longreel.data.command_line import Config, parse_arguments
from longreel.parallel.liveness import LOST_SECONDS, Liveness

# How long a collective may take, and a rank wait for the others to join it: PyTorch's limit for NCCL.
TIMEOUT_SECONDS = 600.0

_ERROR_KEY = "longreel/error"
_LOST_KEY = "longreel/lost"
# How long a rank whose work failed waits for the reason another rank gives.
_REASON_SECONDS = 2.0
# What gloo says, as plain RuntimeErrors, where a peer went away or did not come.
_BROKEN = ("connection closed", "connection reset", "connection refused", "broken pipe", "socket", "timed out")
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
        self.liveness: Liveness | None = None
        self.timeout_s = TIMEOUT_SECONDS
        self.status = 0

    def __call__(self, message: str, key: str = _ERROR_KEY) -> None:
        try:
            first = self.store.add(key, 1) == 1 if self.store is not None else _env("RANK", 0) == 0
        except dist.DistError:
            # The store went with the process that held it: nobody to share the line with.
            first = True
        if first:
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
            elif self._failed_elsewhere(error):
                self.status = 2
            else:
                raise

    def lost(self, what: str) -> None:
        """Says which rank is gone, once on each node, unless a rank has said why it ended."""
        if not self._said():
            self(what, f"{_LOST_KEY}/{_env('GROUP_RANK', 0)}")

    def end(self, what: str) -> None:
        """Ends this process, whose work still waits for a rank that is gone."""
        self.lost(what)
        sys.stdout.flush()
        os._exit(2)

    def _fail(self, message: str) -> None:
        self.status = 2
        self(message)
        if self.liveness is not None:
            self.liveness.tell(message)

    def _said(self) -> bool:
        """Whether a rank has printed its error, or is about to; not known once the store is gone."""
        try:
            return self.store is not None and self.store.add(_ERROR_KEY, 0) > 0
        except dist.DistError:
            return False

    def _failed_elsewhere(self, error: RuntimeError) -> bool:
        """Whether the work failed because another rank is gone or did not come, which then has been said."""
        if self.liveness is None:
            return False
        broken = isinstance(error, dist.DistError) or any(words in str(error).lower() for words in _BROKEN)
        deadline = time.monotonic() + (self.liveness.verdict_s if broken else _REASON_SECONDS)
        while time.monotonic() < deadline:
            what = self.liveness.wait(0.05)
            if self._said():
                return True
            if what:
                self.lost(what)
                return True
        if broken and "timed out" in str(error).lower() and (stuck := self.liveness.stuck(_REASON_SECONDS)):
            self.lost(f"{stuck} did not take part in a collective within timeout_s = {self.timeout_s:g} s, yet lives")
            return True
        return False


def run_script(
    work: Callable[[Config, torch.device], None],
    config_type: type[Config],
    args: Sequence[str],
    *,
    expand: Callable[[Sequence[str]], Sequence[str]] | None = None,
    prepare: Callable[[Config], Config] | None = None,
) -> int:
    """Parse the command line, join the process group and work; what the user got wrong becomes one line.

    Args:
        work: called with the configuration and this rank's device, inside a process group (of one rank without
            torchrun).
        config_type: dataclass that the command line is made of; a field timeout_s of it limits collectives, in seconds.
        args: the command line without the program's name.
        expand: puts words of a preset into the command line.
        prepare: makes the configuration whole before there is a process group; the same on every rank.

    Returns:
        Exit status: 0, 2 after a ValueError, an OSError or sizes that do not fit in memory, printed as
        `error: ...` on stderr, or 130 if interrupted. Any other exception is a defect of ours and is raised.
    """
    report = _Reporter()
    try:
        with report.errors():
            config = parse_arguments(config_type, args if expand is None else expand(args))
            if prepare is not None:
                config = prepare(config)
            report.timeout_s = getattr(config, "timeout_s", TIMEOUT_SECONDS)
            # Said before the group is left, which breaks the collectives that other ranks wait in.
            with process_group(report) as device, report.errors():
                work(config, device)
    except KeyboardInterrupt:
        if _env("RANK", 0) == 0:
            print("interrupted", file=sys.stderr, flush=True)
        return 130
    return report.status


@contextlib.contextmanager
def process_group(report: _Reporter | None = None) -> Iterator[torch.device]:
    """The default process group of a script, NCCL on CUDA and gloo elsewhere; yields this rank's device."""
    report = report or _Reporter()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", _env("LOCAL_RANK", 0)) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # Every Linear on [B, s, C] returns a view, and nothing here writes into a prediction.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    store: dist.Store
    timeout = timedelta(seconds=report.timeout_s)
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    else:
        store, rank, world_size = dist.HashStore(), 0, 1
    report.store = store
    with contextlib.ExitStack() as stack:
        if world_size > 1:
            limit = min(report.timeout_s, LOST_SECONDS)
            report.liveness = Liveness(store, rank, world_size, limit_s=limit, end=report.end)
            stack.enter_context(report.liveness)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=dist.PrefixStore("longreel", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
        stack.callback(dist.destroy_process_group)
        yield device


def _too_large(error: BaseException) -> str:
    return (
        "sizes are too large for the memory of this machine; use a smaller model, batch_size, num_frames, height or "
        f"width, or more ranks: {str(error).strip().partition(chr(10))[0][:200] or type(error).__name__}"
    )


def _env(name: str, default: int) -> int:
    return int(os.environ.get(name, default))
