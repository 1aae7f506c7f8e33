"""Training on a stream of examples, which are read as they are needed and never all at once."""

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import get_worker_info


Columns = dict[str, list]


class TrainingStream(torch.utils.data.IterableDataset):
    """Endless training examples from a streamed data set, for the `CroprTrainer` with `max_steps`.

    - Each process reads its own share: whole shards (files) where their number is a multiple of that of the processes,
      otherwise every n-th example.
    - Each pass over the data has a new order: that of the shards, and that within a buffer.
    - Order, augmentation and mixing are functions of the seed, the process and the number of the batch. A resumed run
      goes on with exactly the batches that the uninterrupted one would have seen, with the same number of processes
      and data-loader workers; it reads what comes before them, but decodes and transforms nothing of it.

    Args:
        examples: from `load_dataset(..., streaming=True)` or `Dataset.to_iterable_dataset(num_shards=...)`.
        transform: columns of several examples -> columns, as `Dataset.set_transform` takes it. The random numbers of
            Python, NumPy and PyTorch repeat.
        seed: of order and random numbers.
        buffer_size: examples, not decoded, among which the next one is drawn.
    """

    def __init__(
        self, examples: IterableDataset, transform: Callable[[Columns], Columns], seed: int, buffer_size: int = 1000
    ):
        self.examples = examples
        self.transform = transform
        self.seed = seed
        self.buffer_size = buffer_size
        self.start = 0  # batches of a process that were used before
        self.set_batches(1, list, 0, 1)

    def set_batches(
        self, batch_size: int, collate: Callable[[list[Any]], Any], process: int, num_processes: int
    ) -> None:
        """Says which batches this process takes; the Trainer does so."""
        self.batch_size, self.collate = batch_size, collate
        self.process, self.num_processes = process, num_processes

    def read(self, number: int) -> IterableDataset:
        """Pass `number` over the examples of this process, not decoded."""
        shuffled = self.examples.decode(False).shuffle(seed=self.seed + number, buffer_size=self.buffer_size)
        return split_dataset_by_node(shuffled, self.process, self.num_processes)

    def __iter__(self) -> Iterator[Any]:
        """Batches; `None` for those before `start`."""
        worker = get_worker_info()  # `datasets` gives each worker shards of its own
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        examples = self._endless_examples()
        for index in itertools.count(first, step):
            rows = list(itertools.islice(examples, self.batch_size))
            yield None if index < self.start else self._batch(rows, index)

    def _endless_examples(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            is_empty = True
            for example in self.read(number):
                is_empty = False
                yield example
            if is_empty:
                raise ValueError(
                    f"There is no example for process {self.process} of {self.num_processes}; use fewer processes or "
                    "data-loader workers."
                )

    def _batch(self, rows: list[dict[str, Any]], index: int) -> Any:
        features = self.examples.features
        rows = [features.decode_example(row) for row in rows] if features else rows
        with random_numbers(random.Random(f"{self.seed} {self.process} {index}").getrandbits(63)):
            columns = self.transform({name: [row[name] for row in rows] for name in rows[0]})
            return self.collate([dict(zip(columns, values)) for values in zip(*columns.values())])


@contextlib.contextmanager
def random_numbers(seed: int) -> Iterator[None]:
    """A context in which Python, NumPy and PyTorch draw from a seed; they go on afterwards as if nothing had been."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # and not those of accelerators, which the model draws from
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
