"""Hosts and their ranks, and how to say which of them is not like the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_LISTED = 8  # hosts that a message names


@dataclass
class Hosts:
    """Where each rank runs. A host's ranks stand in a row, as launchers number them; the first of them has local rank 0."""

    names: list[str]  # by rank
    firsts: list[int]  # the first rank of each host, ascending

    @classmethod
    def of(cls, places: list[tuple[str, int]]) -> Hosts:
        """places: host name and local rank of each rank."""
        firsts = [rank for rank, (_, local) in enumerate(places) if local == 0 or rank == 0]
        return cls([name for name, _ in places], firsts)

    def first_of(self, rank: int) -> int:
        """The first rank on the host of a rank."""
        return max(first for first in self.firsts if first <= rank)

    def ranks_of(self, first: int) -> list[int]:
        return [rank for rank in range(len(self.names)) if self.first_of(rank) == first]

    def where(self, ranks: list[int]) -> str:
        """`node1 (ranks 0-3), node2 (rank 5)`."""
        by_host: dict[int, list[int]] = {}
        for rank in ranks:
            by_host.setdefault(self.first_of(rank), []).append(rank)
        named = [
            f"{self.names[first]} (rank{'s' * (len(there) > 1)} {ranges(there)})" for first, there in by_host.items()
        ]
        more = [f"{len(named) - _LISTED} more hosts"] if len(named) > _LISTED else []
        return ", ".join(named[:_LISTED] + more)


def ranges(ranks: list[int]) -> str:
    """`0-3,6` of 0, 1, 2, 3, 6."""
    starts = [rank for rank in ranks if rank - 1 not in ranks]
    ends = [rank for rank in ranks if rank + 1 not in ranks]
    return ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True))


def by_value(values: list) -> list[tuple[Any, list[int]]]:
    """Each value, most frequent first, with the ranks that have it."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(repr(value), []).append(rank)
    return sorted(((values[there[0]], there) for there in ranks.values()), key=lambda pair: -len(pair[1]))


def difference(hosts: Hosts, name: str, values: list) -> list[str]:
    """A sentence when the ranks' values differ: what the minority has, or without a majority what all have."""
    (common, most), *others = by_value(values)
    if not others:
        return []
    if 2 * len(most) > len(values):
        told = [f"{hosts.where(ranks)} has {value}" for value, ranks in others]
        return [f"{name}: {'; '.join(told)}; the other {len(most)} ranks have {common}"]
    return [f"{name}: " + "; ".join(f"{hosts.where(ranks)} has {value}" for value, ranks in [(common, most), *others])]
