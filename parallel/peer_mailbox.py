"""Exchange by reading: a rank publishes a tensor in memory that its peers can read, and they copy it to themselves.

The protocol, apart from what moves bytes (Transport). Every rank has slots of equal size. A publication takes the
next slot in turn; a reader copies it out and says so; the slot is written again when all its readers have. Per slot
and pair of ranks there are two signals, each raised once and taken once per publication:

    owner   wait READ of the slot's last readers - fill the slot - raise READY for each reader
    reader  wait READY - read the owner's slot - raise READ

Ranks call in one order, so that a wait is always for a call that stands earlier in it: no order of arrival can
deadlock. At most num_slots publications may be unread at a time, hence mailboxes apart for a gather, which is read
until its end, and for the exchanges between its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# One is read by peers while the next is filled.
NUM_SLOTS = 2


class Arrival(Protocol):
    """A point in a transport's queue."""

    def wait(self) -> object:
        """What the compute stream gets from now on runs after it."""
        ...


class Transport(Protocol):
    """Slots of memory that all ranks of a group can read, and a queue of work beside the compute stream.

    All but `finish` only enqueue; what is enqueued runs in order.
    """

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        ...

    def after_compute(self) -> None:
        """What is enqueued from now on runs after all that the compute stream got so far."""
        ...

    def fill(self, slot: int, x: Tensor) -> None:
        """Copy contiguous x into a slot of this rank."""
        ...

    def read(self, owner: int, slot: int, out: Tensor) -> None:
        """Copy a slot of rank owner into contiguous out."""
        ...

    def signal(self, peer: int, channel: int) -> None:
        """Raise this rank's signal of the channel at a peer; what was enqueued before is visible to it then."""
        ...

    def wait(self, peer: int, channel: int) -> None:
        """Wait until a peer's signal of the channel is up, and take it down."""
        ...

    def mark(self) -> Arrival:
        """The end of what is enqueued now."""
        ...

    def finish(self) -> None:
        """Block the host until all that is enqueued has run."""
        ...


@dataclass(frozen=True, slots=True)
class Publication:
    """A tensor on its way into a slot; every rank of the group has its own of the same number."""

    slot: int
    num_bytes: int


class Mailbox:
    """Publications of one group in one order, which every rank keeps.

    Args:
        open_transport: a new transport with slots of so many bytes; all ranks call it together.
    """

    def __init__(self, open_transport: Callable[[int], Transport]) -> None:
        self._open = open_transport
        self._transport: Transport | None = None
        self._published = 0
        self._readers: list[tuple[int, ...]] = [()] * NUM_SLOTS

    def publish(self, x: Tensor, readers: Sequence[int]) -> Publication:
        """Let readers fetch x, which may be freed once a fetch of this rank that came after has been waited for.

        Args:
            x: contiguous, of one size on every rank.
            readers: ranks that will, each once.
        """
        assert x.is_contiguous(), x.stride()
        num_bytes = x.numel() * x.element_size()
        transport = self._with_room(num_bytes)
        slot = self._published % NUM_SLOTS
        self._published += 1
        self._await_readers(transport, slot)
        transport.after_compute()
        transport.fill(slot, x)
        for reader in readers:
            transport.signal(reader, _ready(slot))
        self._readers[slot] = tuple(readers)
        return Publication(slot, num_bytes)

    def fetch(self, publication: Publication, owner: int, received: Tensor) -> Arrival:
        """Start copying what rank owner published at the same place in the order.

        Args:
            publication: this rank's own, of that place.
            received: contiguous, of the published size.
        """
        assert received.is_contiguous(), received.stride()
        assert received.numel() * received.element_size() == publication.num_bytes, (received.shape, publication)
        transport = self._transport
        assert transport is not None
        # The memory of `received` may still be in use by what the compute stream did before it was freed.
        transport.after_compute()
        transport.wait(owner, _ready(publication.slot))
        transport.read(owner, publication.slot, received)
        transport.signal(owner, _read(publication.slot))
        return transport.mark()

    def _with_room(self, num_bytes: int) -> Transport:
        """The transport, replaced by a larger one where its slots are too small."""
        transport = self._transport
        if transport is not None and num_bytes <= transport.slot_bytes:
            return transport
        if transport is not None:
            # Peers read this rank's memory until they say so; only then may it go.
            for slot in range(NUM_SLOTS):
                self._await_readers(transport, slot)
            transport.finish()
            # Lengths that grow step by step must not allocate at each.
            num_bytes = max(num_bytes, transport.slot_bytes * 5 // 4)
            # The old memory goes before the new comes.
            self._transport = transport = None
        self._transport = self._open(num_bytes)
        return self._transport

    def _await_readers(self, transport: Transport, slot: int) -> None:
        for reader in self._readers[slot]:
            transport.wait(reader, _read(slot))
        self._readers[slot] = ()


def _ready(slot: int) -> int:
    """Channel of the signal that a slot has been filled."""
    return slot


def _read(slot: int) -> int:
    """Channel of the signal that a slot has been read."""
    return NUM_SLOTS + slot
