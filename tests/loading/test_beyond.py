"""What torch's DataLoader does not have: statistics, workers by need, prefetching across epochs; and pinning."""

from __future__ import annotations

import logging
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DistributedSampler

import torchwq
from torchwq.loading import autoscaling, internals, iterator, statistics
from torchwq.loading.counters import BATCHES

from . import datasets
from .datasets import same

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def test_statistics_add_up() -> None:
    loader = torchwq.DataLoader(datasets.Plain(400, 1000), batch_size=4, num_workers=2)
    assert "no batch" in loader.stats().verdict
    for _ in range(2):
        list(loader)
    stats = loader.stats()
    assert stats.batches == 200
    assert stats.bytes >= 2 * 400 * 1000 * 8
    assert stats.num_workers == 2
    assert stats.batches_per_second > 0
    assert stats.workers_busy > 0
    assert "bound" in stats.verdict


def _workers(n: int, busy: float, waited: float, processor: float) -> list[Any]:
    return [statistics.WorkerStatistics(9, busy, 0.0, 0.0, waited, 0.0, processor)] * n


@pytest.mark.parametrize(
    ("waited", "workers", "said"),
    [
        (0.1, _workers(2, 4.0, 15.0, 4.0), "compute-bound: the consumer waited 1%"),
        (5.0, _workers(1, 9.0, 0.1, 9.0), "more of them may help, up to the 4 cores"),
        (5.0, _workers(4, 9.0, 0.1, 4.6), "compute on all 4 cores: more of them will not help"),
        (5.0, _workers(4, 9.0, 0.1, 0.5), "mostly waiting themselves: more of them help, also more than cores"),
        (5.0, [statistics.WorkerStatistics(9, 9.0, 0.0, 0.0, 0.1, 0.0, 4.4, 4.4)] * 4, "compute on all 4 cores"),
        (5.0, _workers(2, 4.0, 15.0, 4.0), "a larger prefetch_factor may help"),
        (5.0, [], "no batch was made by a worker yet"),
    ],
)
def test_the_verdict(waited: float, workers: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "cores", lambda: 4)
    assert said in statistics._verdict(waited, 10.0, len(workers), workers)


class Sleeping(datasets.Plain):
    def __getitem__(self, index: int) -> Any:
        time.sleep(0.005)
        return super().__getitem__(index)


def slow_collate(samples: Any) -> Any:
    time.sleep(0.002)
    return torch.stack(samples)


def test_statistics_tell_where_the_time_of_each_worker_went() -> None:
    loader = torchwq.DataLoader(Sleeping(40), 2, num_workers=2, collate_fn=slow_collate)
    list(loader)
    first = loader.stats()
    assert [each.batches for each in first.workers] == [10, 10]
    for each in first.workers:
        assert each.fetch >= 20 * 0.005
        assert each.collate >= 10 * 0.002
        assert each.processor < each.fetch + each.collate
    assert "mostly waiting themselves" in first.verdict
    assert "20 batches" in str(first)
    assert len(str(first).splitlines()) == 1 + 1 + 2 + 1 + 1
    columns = re.split(r"  +", str(first).splitlines()[1].strip())
    assert columns == (
        ["worker", "batches", "fetch s", "collate s", "send s", "waited s", "far ahead s", "processor s", "ready s"]
    )
    assert "<table>" in first._repr_html_()
    for batch in loader:
        time.sleep(0.03)
        del batch
    assert loader.stats(last_epoch=True).batches == 20
    assert sum(each.ahead for each in loader.stats(last_epoch=True).workers) > 0
    assert loader.stats().batches == 40
    loader.reset_stats()
    assert loader.stats().batches == 0


def test_statistics_without_workers() -> None:
    loader = torchwq.DataLoader(Sleeping(10), 2)
    assert "no batch was made yet" in loader.stats().verdict
    list(loader)
    stats = loader.stats()
    assert (stats.batches, stats.num_workers, stats.workers) == (5, 0, ())
    assert stats.consumer_waited >= 10 * 0.005
    assert "mostly waiting: workers help" in stats.verdict
    assert str(stats).endswith(stats.verdict)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_tells_how_far_its_epoch_is(num_workers: int) -> None:
    loader = torchwq.DataLoader(datasets.Plain(20), 2, num_workers=num_workers)
    assert loader.batches_done == 0
    iterator = iter(loader)
    next(iterator)
    next(iterator)
    assert loader.batches_done == 2
    state = loader.state_dict()
    again = torchwq.DataLoader(datasets.Plain(20), 2, num_workers=num_workers)
    again.load_state_dict(state)
    assert again.batches_done == 2
    assert len(list(again)) == 8
    del iterator


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_between_two_epochs_no_batch_is_done(options: Any) -> None:
    loader = torchwq.DataLoader(datasets.Plain(20), 2, **options)
    list(loader)
    assert loader.batches_done == 0


def test_pauses_are_nobodys_time() -> None:
    """Neither between the epochs of workers that stay, nor after a loop that was broken off."""
    loader = torchwq.DataLoader(Sleeping(20), 2, num_workers=1, persistent_workers=True)
    list(loader)
    time.sleep(2.0)
    list(loader)
    assert loader.stats(last_epoch=True).workers_waited < 1.5
    for num_workers in (0, 1):
        loader = torchwq.DataLoader(Sleeping(20), 2, num_workers=num_workers)
        for _ in loader:
            break
        time.sleep(2.0)
        assert loader.stats().seconds < 1.5


def test_only_batches_are_counted_as_batches() -> None:
    loader = torchwq.DataLoader(datasets.Stream(20), 4, num_workers=2)
    handed_out = len(list(loader))
    assert loader.stats().batches == handed_out


def test_the_repr_of_a_loader() -> None:
    loader = torchwq.DataLoader(datasets.Plain(20), 2, num_workers=2)
    dataset = "tests.loading.datasets.Plain"
    assert repr(loader) == f"<torchwq.DataLoader of {dataset}, batch_size=2, 10 batches, 2 process workers>"
    assert loader._IterableDataset_len_called is None
    streams = torchwq.DataLoader(datasets.Stream(5), None)
    assert repr(streams) == "<torchwq.DataLoader of tests.loading.datasets.Stream, batch_size=None, no workers>"


def test_an_automatic_number_of_workers_grows_while_the_consumer_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torchwq.dataloader

    monkeypatch.setattr(torchwq.dataloader, "cores", lambda: 3)
    monkeypatch.setattr(iterator, "cores", lambda: 3)
    monkeypatch.setattr(autoscaling, "_BATCHES_PER_CHECK", 8)
    monkeypatch.setattr(statistics.StatsCollector, "since_last_check", lambda self: (0.5, True))
    with caplog.at_level(logging.INFO, "torchwq"):
        loader = torchwq.DataLoader(datasets.Plain(200), batch_size=2, num_workers="auto")
        assert loader.num_workers == 1
        found = [batch[:, 0].tolist() for batch in loader]
    assert found == [[number, number + 1] for number in range(0, 200, 2)]
    assert loader.stats().num_workers == 3
    assert "3 workers now" in caplog.text
    assert len(list(loader)) == 100
    assert loader.num_workers == 3


def test_an_automatic_number_of_workers_stays_where_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscaling, "_BATCHES_PER_CHECK", 8)
    monkeypatch.setattr(statistics.StatsCollector, "since_last_check", lambda self: (0.0, True))
    loader = torchwq.DataLoader(datasets.Plain(100), batch_size=2, num_workers="auto")
    list(loader)
    assert loader.stats().num_workers == 1


def test_automatic_workers_of_a_stream_are_as_many_as_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchwq.dataloader

    monkeypatch.setattr(torchwq.dataloader, "cores", lambda: 2)
    loader = torchwq.DataLoader(datasets.Stream(), batch_size=3, num_workers="auto")
    assert loader.num_workers == 2
    assert sorted(int(number) for batch, _ in loader for number in batch) == sorted([*range(23), 1000])
    with pytest.raises(ValueError, match="'auto'"):
        torchwq.DataLoader(datasets.Plain(), num_workers="many")  # type: ignore[arg-type]


def test_prefetching_across_epochs_brings_the_same_batches() -> None:
    def run(**more: Any) -> Any:
        torch.manual_seed(3)
        loader = torchwq.DataLoader(
            datasets.Plain(), 4, True, num_workers=2, persistent_workers=True, drop_last=True, **more
        )
        return [[batch for batch in loader] for _ in range(4)]  # noqa: C416

    assert same(run(), run(prefetch_across_epochs=True))


def test_workers_have_the_next_epoch_ready() -> None:
    loader = torchwq.DataLoader(
        datasets.Plain(), 4, num_workers=1, persistent_workers=True, prefetch_across_epochs=True
    )
    list(loader)
    assert loader._iterator._dispatcher.in_flight  # type: ignore[union-attr]
    assert len(list(loader)) == 10


def test_set_epoch_between_epochs_is_heeded_although_batches_were_prefetched() -> None:
    def run(cls: Any, **more: Any) -> Any:
        dataset = datasets.Plain()
        sampler = DistributedSampler(dataset, num_replicas=2, rank=0)
        loader = cls(dataset, 4, sampler=sampler, num_workers=2, persistent_workers=True, **more)
        out = []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            out += list(loader)
        return out

    assert same(run(torch.utils.data.DataLoader), run(torchwq.DataLoader, prefetch_across_epochs=True))


def test_breaking_off_with_prefetching_across_epochs() -> None:
    loader = torchwq.DataLoader(
        datasets.Plain(), 4, num_workers=2, persistent_workers=True, prefetch_across_epochs=True
    )
    for stop in (2, 8, 10, 3):
        for number, batch in enumerate(loader):
            assert batch[:, 0].tolist() == list(range(4 * number, min(4 * number + 4, 37)))
            if number + 1 == stop:
                break


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_workers": 2},
        {"num_workers": 0},
        {"dataset": datasets.Stream(), "num_workers": 1},
        {"num_workers": 1, "persistent_workers": True, "in_order": False},
    ],
    ids=["no persistent workers", "no workers", "iterable", "out of order"],
)
def test_prefetching_across_epochs_says_what_it_needs(arguments: dict[str, Any]) -> None:
    arguments = {"dataset": datasets.Plain(), "prefetch_across_epochs": True, **arguments}
    with pytest.raises(ValueError, match="prefetch_across_epochs needs"):
        torchwq.DataLoader(**arguments)


@pytest.mark.parametrize("bad", [{"on_worker_death": "shrug"}, {"max_restarts": -1}])
def test_bad_arguments_of_our_own(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        torchwq.DataLoader(datasets.Plain(), **bad)


def test_without_torchs_private_parts_torchs_own_transport_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "AVAILABLE", False)
    loader = torchwq.DataLoader(datasets.Plain(), 4, num_workers=1)
    with pytest.warns(RuntimeWarning, match="torch's own transport"):
        assert len(list(loader)) == 10


def test_the_profiler_sees_the_loader() -> None:
    loader = torchwq.DataLoader(datasets.Plain(), 4, num_workers=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        list(loader)
    assert any("enumerate(DataLoader)" in event.key for event in profile.key_averages())


class Waiting(datasets.Plain):
    """As one that reads from a network."""

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.01)
        return super().__getitem__(index)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_workers_that_wait_themselves_become_more_than_there_are_cores(
    batch_size: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torchwq.dataloader

    monkeypatch.setattr(torchwq.dataloader, "cores", lambda: 1)
    loader = torchwq.DataLoader(Waiting(500), batch_size, num_workers="auto")
    with caplog.at_level(logging.INFO, "torchwq"):
        rows = torch.cat(list(loader))
    assert rows[:, 0].tolist() == list(range(500))
    assert loader.stats().num_workers >= 4
    assert "workers now" in caplog.text


class _Counted:
    """Counters and workers as ``Autoscaler`` sees them, which make batches at a given pace."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cores: int, needs: float) -> None:
        self.workers: list[Any] = [SimpleNamespace(has_answered=True)]
        self.busy = self.batches = 0
        self.stats = statistics.StatsCollector(1)
        self.waited = 0.9
        monkeypatch.setattr(self.stats, "since_last_check", lambda: (self.waited, False))
        monkeypatch.setattr(autoscaling, "_processor_time", lambda workers: (int(self.busy * needs), 0))
        self.autoscaler = autoscaling.Autoscaler(self.stats, self, autoscaling.max_workers(cores), cores)  # type: ignore[arg-type]

    def sum(self, word: int) -> int:
        return self.batches if word == BATCHES else self.busy

    def run(self, seconds_for_a_batch: Any) -> int:
        """How many workers it comes to, where a batch takes as long as ``seconds_for_a_batch(workers)`` says."""
        for _ in range(20):
            count = len(self.workers)
            self.batches += 100
            self.busy += int(100 * seconds_for_a_batch(count) * 1e9)
            self.workers += [SimpleNamespace(has_answered=True)] * self.autoscaler.workers_to_add(self.workers)
        return len(self.workers)


@pytest.mark.parametrize(
    ("needs", "pace", "count", "why"),
    [
        (0.1, lambda count: 0.01, 8, "it starts no more on 2 cores"),
        (0.1, lambda count: 0.01 * count, 2, "they make no more than fewer did"),
        (0.9, lambda count: 0.01, 1, "no core is idle"),
    ],
)
def test_it_is_said_once_why_a_number_of_workers_stays(
    needs: float,
    pace: Any,
    count: int,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "torchwq"):
        counted = _Counted(monkeypatch, 2, needs)
        assert counted.run(pace) == count
    assert why in counted.stats.read().autoscaling
    assert caplog.text.count("it stays at") == 1
    assert why in caplog.text


def test_a_process_that_gets_more_cores_later_keeps_to_the_number_that_its_loader_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = _Counted(monkeypatch, 1, 0.9)
    monkeypatch.setattr(counted.stats, "since_last_check", lambda: (0.9, True))
    counted.autoscaler = autoscaling.Autoscaler(counted.stats, counted, autoscaling.max_workers(1), 16)  # type: ignore[arg-type]
    assert counted.run(lambda count: 0.01) == autoscaling.max_workers(1)


def test_it_is_said_that_the_consumer_hardly_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counted = _Counted(monkeypatch, 2, 0.1)
    with caplog.at_level(logging.INFO, "torchwq"):
        assert counted.run(lambda count: 0.002) == 8
        counted = _Counted(monkeypatch, 2, 0.1)
        counted.autoscaler.workers_to_add(counted.workers)
        counted.waited = 0.01
        assert counted.run(lambda count: 0.002) == 1
    assert "the consumer waits for 1% of its time" in caplog.text
