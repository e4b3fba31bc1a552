"""Shuffled batches without end: the same on any number of processes and threads, and resumable to the batch.

Batch i of the run is a function of (seed, batch size, data) alone. An epoch is a permutation of the rows cut into whole
batches; what is left over is dropped and the next epoch permutes anew, as in openpi's loader. Process p of P reads the
rows [p b / P, (p + 1) b / P) of each batch of b.

Several sets with weights are permuted each on its own, epoch after epoch without a row dropped, and their rows
interleaved so that every set has its share of any stretch of draws; batches are cut from that.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from clp_jax.errors import InputError

Batch = dict[str, np.ndarray]
Read = Callable[[Int[np.ndarray, " b"]], Batch]
"""Reads the observations at these rows, in this order; called from several threads."""


class BatchIterator(Iterator[Batch]):
    """Batches of this process, with a position that can be saved and restored.

    Args:
      read: reads the observations of a batch; whole batches are read in parallel.
      rows: what to draw from.
      batch_size: observations of a batch over all processes.
      seed: of the permutations, in [0, 2^32).
      process_index: which share of each batch to read.
      process_count: how many shares there are.
      workers: threads that read ahead, two batches each; 0 reads in the calling thread.
      fingerprint: identity of the data, part of the state.
      shares: how many of the rows are each set's, one set after the other, and its weight; one set if empty.

    Raises:
      InputError: the rows do not fill one batch, or the batch does not divide into shares.
    """

    def __init__(
        self,
        read: Read,
        rows: Int[np.ndarray, " n"],
        batch_size: int,
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 4,
        fingerprint: str = "",
        shares: Sequence[tuple[int, float]] = (),
    ):
        import grain

        _check(len(rows), batch_size, seed, process_count)
        share = batch_size // process_count
        mine = slice(process_index * share, (process_index + 1) * share)
        drawn = _mixed(shares, seed) if shares else grain.MapDataset.range(len(rows)).shuffle(seed=seed)
        loaded = drawn.batch(batch_size, drop_remainder=True).map(lambda chosen: read(rows[chosen[mine]]))
        loaded = loaded if shares else loaded.repeat()
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
        self._identity = {"data": fingerprint, "rows": len(rows), "batch_size": batch_size, "seed": seed}
        self._identity |= {"shares": [list(share) for share in shares]} if shares else {}
        self._batches = iter(loaded.to_iter_dataset(options))

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> bytes:
        """The position, as JSON of some 200 bytes; the same on every process."""
        return json.dumps(self._identity | {"position": self._batches.get_state()}).encode()

    def set_state(self, state: bytes) -> None:
        """Go to where ``get_state`` was called; the process and thread counts may differ.

        Raises:
          InputError: the state belongs to other data, another batch size or another seed.
        """
        saved = json.loads(state)
        position = saved.pop("position")
        differ = [key for key, value in self._identity.items() if saved.get(key) != value]
        if differ:
            told = "; ".join(f"{key} was {saved.get(key)}, is {self._identity[key]}" for key in differ)
            raise InputError(f"the run cannot resume at its place in the data: {told}.")
        self._batches.set_state(position)


def _mixed(shares: Sequence[tuple[int, float]], seed: int) -> Any:
    """Places of rows without end, as a Grain data set."""
    import grain

    ends = np.cumsum([rows for rows, _ in shares]).tolist()
    spans = [(end - rows, end) for end, (rows, _) in zip(ends, shares, strict=True)]
    sets = [grain.MapDataset.range(*span).shuffle(seed=(seed + i) % 2**32).repeat() for i, span in enumerate(spans)]
    return grain.MapDataset.mix(sets, weights=[weight for _, weight in shares])


def _check(rows: int, batch_size: int, seed: int, process_count: int) -> None:
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"a batch size of {batch_size} does not divide into equal parts for {process_count} processes."
        )
    if rows < batch_size:
        raise InputError(f"{rows} training observations do not fill one batch of {batch_size}; lower the batch size.")
    if not 0 <= seed < 2**32:
        raise InputError(f"the seed {seed} of the shuffle is outside [0, 2^32).")
