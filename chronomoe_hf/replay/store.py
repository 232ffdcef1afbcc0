"""The records of other passes, by content: what was chosen for which token after which tokens.

The routing of token t depends on tokens up to t alone, so a record is good for every row that begins with the same
tokens, as far as they are the same. Rows are found by the tokens themselves: no hash can collide.

Shape suffixes: N tokens of a record, L layers, K experts a token (of the layer with most), S tokens of a row.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Source = Literal["rollout", "old"]
Array = np.ndarray[Any, Any]


def smallest_dtype(num_experts: int) -> np.dtype[Any]:
    """The smallest integer type that holds the ids of `num_experts` experts and -1."""
    return np.dtype(np.int8 if num_experts <= 128 else np.int16 if num_experts <= 32768 else np.int32)


@dataclass(frozen=True)
class Record:
    """What one pass chose for one row.

    Args:
        tokens_N: int64 token ids.
        routes_NLK: ids of the experts, smallest signed integer type, -1 where nothing is known; the first axis may be
            shorter than the tokens (the last token of a rollout is never fed to the engine). None = only `logps_N`.
        logps_N: fp32 log-probability of every token after those before it, NaN where unknown; None = unknown.
        prompt: tokens of the prompt; 0 = unknown.
    """

    tokens_N: Array
    routes_NLK: Array | None
    logps_N: Array | None = None
    prompt: int = 0

    @property
    def nbytes(self) -> int:
        """Host memory of the record."""
        parts = (self.tokens_N, self.routes_NLK, self.logps_N)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True)
class Match:
    """The record with the longest common prefix of a row.

    Args:
        record: it.
        length: tokens in common.
    """

    record: Record
    length: int

    @property
    def routed(self) -> int:
        """Tokens of the row whose choice is known."""
        routes = self.record.routes_NLK
        return 0 if routes is None else min(self.length, routes.shape[0])


class ReplayStore:
    """Records of one model on one rank, in host memory; never in a checkpoint.

    Records of the two sources lie apart: what the old-policy pass chose never takes the place of what the engine chose.

    Args:
        max_bytes: of all records; the oldest go first.

    Attributes:
        nbytes: of all records now.
        dropped: records that went because of `max_bytes`, since the store was made.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = self.dropped = 0
        self._records: OrderedDict[tuple[Source, bytes], Record] = OrderedDict()
        # The row with the longest common prefix stands beside the place of a row in lexicographic order.
        self._sorted: dict[Source, list[bytes]] = {"rollout": [], "old": []}

    def __len__(self) -> int:
        return len(self._records)

    def count(self, source: Source) -> int:
        """Records of a source."""
        return len(self._sorted[source])

    def add(self, source: Source, record: Record) -> None:
        """Keep a record; a record of the same source and tokens gives way to it, but keeps what is None in the new."""
        key = source, _sortable(record.tokens_N)
        before = self._records.pop(key, None)
        if before is None:
            bisect.insort(self._sorted[source], key[1])
        else:
            self.nbytes -= before.nbytes
            routes = before.routes_NLK if record.routes_NLK is None else record.routes_NLK
            logps = before.logps_N if record.logps_N is None else record.logps_N
            record = Record(record.tokens_N, routes, logps, record.prompt or before.prompt)
        self._records[key] = record
        self.nbytes += record.nbytes
        while self.nbytes > self.max_bytes and self._records:
            self._drop(next(iter(self._records)))
            self.dropped += 1

    def _drop(self, key: tuple[Source, bytes]) -> None:
        self.nbytes -= self._records.pop(key).nbytes
        names = self._sorted[key[0]]
        del names[bisect.bisect_left(names, key[1])]

    def clear(self, source: Source | None = None) -> None:
        """Forget the records of one source, or of all."""
        for key in [key for key in self._records if source in (None, key[0])]:
            self._drop(key)

    def find(self, source: Source, tokens_S: Array) -> Match | None:
        """The record of a source with the longest common prefix of a row.

        Args:
            source: of the record.
            tokens_S: int64 token ids of the row, without padding.

        Returns:
            None where no record has even the first token in common.
        """
        names, name = self._sorted[source], _sortable(tokens_S)
        at = bisect.bisect_right(names, name)
        best: Match | None = None
        for beside in names[max(0, at - 1) : at + 1]:
            record = self._records[source, beside]
            length = common_prefix(record.tokens_N, tokens_S)
            if length > (0 if best is None else best.length):
                best = Match(record, length)
        return best


def _sortable(tokens_N: Array) -> bytes:
    """Bytes that stand in the order of the tokens; a row comes right after its own beginnings."""
    return tokens_N.astype(">i8").tobytes()


def common_prefix(one_N: Array, two_S: Array) -> int:
    """How many tokens two rows have in common from the start."""
    num = min(len(one_N), len(two_S))
    differs = np.flatnonzero(one_N[:num] != two_S[:num])
    return int(differs[0]) if differs.size else num
