"""What of the loader's process reaches its workers: datasets, functions and classes of ``__main__``, memory, files."""

from __future__ import annotations

import os
from typing import Any

import pytest

import torchwq

from . import datasets

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def test_a_class_of_main_is_the_same_class_after_forked_workers(run_script: Any) -> None:
    done = run_script("""
        import signal, typing, torch, torchwq
        signal.signal(signal.SIGTERM, lambda *_: print("handled"))
        class Batch(typing.NamedTuple):
            rows: torch.Tensor
        class Oops(Exception): pass
        class Data(torch.utils.data.Dataset):
            def __len__(self): return 6
            def __getitem__(self, index):
                if index == 5: raise Oops(index)
                return index
        iterator = iter(torchwq.DataLoader(Data(), batch_size=2, num_workers=2,
            collate_fn=lambda batch: Batch(torch.tensor(batch))))
        print([isinstance(next(iterator), Batch) for _ in range(2)])
        try:
            next(iterator)
        except Oops as error:
            print(error.args)
        left = iter(torchwq.DataLoader(Data(), num_workers=2))
        next(left)
    """)
    assert done.stdout.splitlines() == ["[True, True]", "(5,)"]


def test_a_lambda_and_a_class_of_main_reach_clean_workers(run_script: Any) -> None:
    done = run_script("""
        import torch, torchwq
        class Data(torch.utils.data.Dataset):
            def __init__(self, table): self.table = table
            def __len__(self): return 8
            def __getitem__(self, index): return self.table[index] * scale
        scale = 10
        offset = torch.ones(1)
        loader = torchwq.DataLoader(Data(torch.arange(8.0)), batch_size=4, num_workers=2,
            multiprocessing_context="spawn", collate_fn=lambda batch: torch.stack(batch) + offset)
        print([batch.tolist() for batch in loader])
    """)
    assert done.stdout.strip() == "[[1.0, 11.0, 21.0, 31.0], [41.0, 51.0, 61.0, 71.0]]"


def test_a_dataset_that_cannot_travel_is_refused_with_its_place() -> None:
    class Holding(datasets.Plain):
        def __init__(self) -> None:
            super().__init__()
            self.file = open(os.devnull)  # noqa: SIM115

    dataset = Holding()
    loader = torchwq.DataLoader(dataset, num_workers=1, multiprocessing_context="spawn")
    with pytest.raises(torchwq.MarshalError, match=r"the loader\.dataset\.file"):
        iter(loader)
    assert next(iter(torchwq.DataLoader(dataset, num_workers=1))).shape == (1, 3)
    dataset.file.close()


def test_the_data_of_clean_workers_are_in_memory_once(run_script: Any) -> None:
    done = run_script(
        """
        import numpy as np, psutil, torch, torchwq
        class Data(torch.utils.data.Dataset):
            def __init__(self, mb):
                self.tensor = torch.ones(mb, 1_000_000, dtype=torch.uint8)
                self.array = np.ones((mb, 1_000_000), np.uint8)
            def __len__(self): return len(self.tensor)
            def __getitem__(self, index):
                return self.tensor[index].sum(dtype=torch.int64) + int(self.array[index].sum(dtype=np.int64))
        def used():
            me = psutil.Process()
            return sum(each.memory_full_info().pss for each in [me, *me.children(recursive=True)])
        def run(mb):
            loader = torchwq.DataLoader(Data(mb), batch_size=8, num_workers=4, multiprocessing_context="forkserver",
                persistent_workers=True)
            assert all(bool((batch == 2_000_000).all()) for batch in loader)
            return used(), loader
        import warnings; warnings.simplefilter("ignore")
        small, _ = run(64)
        del _
        large, _ = run(464)
        print((large - small) / 800e6)
    """,
        timeout=120,
        fresh=True,  # what it shares with its parent would be counted, too
    )
    # Once the tensors, twice the arrays: the loader's own, and one for all workers.
    assert float(done.stdout) < 2.5, "each worker having its own would be 10"


def test_a_dataset_with_files_and_locks_works_in_forked_workers(run_script: Any) -> None:
    """Workers that are forked see the dataset as it is."""
    done = run_script("""
        import torch, torchwq
        class Data(torch.utils.data.Dataset):
            lock = __import__("threading").Lock()
            file = open("/dev/null")
            def __len__(self): return 8
            def __getitem__(self, index):
                with self.lock:
                    return self.file.fileno() >= 0, index
        print([batch[1].tolist() for batch in torchwq.DataLoader(Data(), batch_size=4, num_workers=2)])
    """)
    assert done.stdout.strip() == "[[0, 1, 2, 3], [4, 5, 6, 7]]"
