"""Timing against scripted clocks: who is called when, on what data, what becomes of the seconds; and the floor."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from pyprune import timing

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Work:
    """Calls that move a clock by known seconds, and remember that they were made."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[tuple[str, int]]()

    def run(self, name: str, *seconds: float) -> timing.Run:
        """A contender whose k-th call takes the k-th of these seconds, round and round."""
        count = 0

        def call(index: int) -> None:
            nonlocal count
            self.calls.append((name, index))
            self.now += seconds[count % len(seconds)]
            count += 1

        return call


def test_contenders_take_turns_through_all_their_data() -> None:
    work = Work()
    runs = {"a": work.run("a", 1.0), "b": work.run("b", 2.0)}
    found = timing.interleave(runs, 2, CPU, {"a": 3, "b": 1}, clock=lambda: work.now)
    round_of_all = [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
    assert work.calls == 3 * round_of_all  # the first one warms up
    assert found == {"a": timing.Samples((1.0, 1.0)), "b": timing.Samples((2.0, 2.0))}


def test_a_sample_is_the_mean_of_a_round_and_the_first_round_is_left_out() -> None:
    work = Work()
    run = work.run("a", 100.0, 300.0, 1.0, 3.0, 5.0, 9.0)
    found = timing.interleave({"a": run}, 2, CPU, {"a": 2}, clock=lambda: work.now)
    assert found["a"].seconds == (2.0, 7.0)


def test_percentiles_are_those_of_numpy() -> None:
    for count in (1, 2, 7, 20):
        seconds = torch.rand(count, dtype=torch.float64).tolist()
        found = timing.Samples(tuple(seconds))
        expected = numpy.percentile(seconds, [20, 50, 80])
        # the same interpolation in another order of operations: a rounding of fp64
        assert (found.p20, found.p50, found.p80) == pytest.approx(tuple(expected), rel=1e-14)


def test_a_contender_without_data_and_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds is 0; expected at least 1"):
        timing.interleave({"a": print}, 0, CPU, {"a": 1})
    with pytest.raises(ValueError, match=r"copies\['b'\] is None; expected at least 1 data set"):
        timing.interleave({"a": print, "b": print}, 1, CPU, {"a": 1})


# ---- on a GPU, of which these stand for torch's parts


class FakeGpu:
    """Graphs that keep the calls made while they are captured, and events on the clock of `work`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, work: Work) -> None:
        self.work, self.captures = work, 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = work.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3  # events tell milliseconds

        class Graph:
            def replay(self) -> None:
                work.now += self.seconds

        @contextlib.contextmanager
        def capture(graph: Graph, stream: object) -> Any:
            start, gpu.captures = work.now, gpu.captures + 1
            yield
            graph.seconds, work.now = work.now - start, start

        stream = SimpleNamespace(wait_stream=lambda other: None)
        parts = {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "synchronize": lambda *device: None,
            "device": lambda device: contextlib.nullcontext(),
            "stream": lambda stream: contextlib.nullcontext(),
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "default_stream": lambda: stream,
        }
        for name, value in parts.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_a_graph_holds_all_data_sets_and_short_ones_are_replayed_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work()
    gpu = FakeGpu(monkeypatch, work)
    run = work.run("a", 1e-4, 3e-4)
    found = timing.interleave({"a": run}, 3, GPU, {"a": 4}, graphs=True)
    # 4 calls warm up, 4 are captured; every later round is replays
    assert [index for _, index in work.calls] == [0, 1, 2, 3, 0, 1, 2, 3] and gpu.captures == 1
    assert found["a"].graph and found["a"].reason == ""
    assert found["a"].seconds == pytest.approx((2e-4,) * 3)
    # The graph takes 0.8 ms: replayed once in the first round, and twice in the three others, past SHORTEST.
    assert work.now == pytest.approx(8e-4 * (1 + 1 + 3 * 2))


def test_what_cannot_be_captured_is_timed_with_its_launches_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work()
    gpu = FakeGpu(monkeypatch, work)
    captured = work.run("a", 1e-3)

    def reads_back(index: int) -> None:
        captured(index)
        if gpu.captures == 1 and len(work.calls) > 3:
            gpu.captures = 2
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    found = timing.interleave({"a": reads_back}, 2, GPU, {"a": 1})
    assert not found["a"].graph and found["a"].seconds == pytest.approx((1e-3, 1e-3))
    assert found["a"].reason.endswith("CUDA graph: operation not permitted when stream is capturing")
    without = timing.interleave({"a": captured}, 2, GPU, {"a": 1}, graphs=False)
    assert not without["a"].graph and without["a"].reason == "" and gpu.captures == 2


# ---- limits


def test_copies_exceed_four_times_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 1000)
    for nbytes in (1, 7, 999, 1000, 1001, 3999, 4000, 4001, 10**9):
        count = timing.copies_for(nbytes, CPU)
        assert count * nbytes > 4000 >= (count - 1) * nbytes
    with pytest.raises(ValueError, match="nbytes is 0"):
        timing.copies_for(0, CPU)


def test_caches_that_cores_share_count_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four cores, two on each of two 8 MiB caches of level 3, and one of level 2 each."""
    for core in range(4):
        pair = f"{core // 2 * 2}-{core // 2 * 2 + 1}"
        for index, (level, size, shared) in enumerate([(2, "512K", str(core)), (3, "8M", pair)]):
            folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in {"level": level, "size": size, "shared_cpu_list": shared}.items():
                (folder / name).write_text(f"{value}\n")
    monkeypatch.setattr(timing, "CPUS", tmp_path)
    for cores, expected in (({0, 1, 2, 3}, 2), ({2, 3}, 1), ({0, 3}, 2)):
        monkeypatch.setattr(timing.os, "sched_getaffinity", lambda process, cores=cores: cores)
        timing._cpu_cache.cache_clear()
        assert timing.last_level_cache(CPU) == expected * 8 * 2**20
    monkeypatch.setattr(timing, "CPUS", tmp_path / "nowhere")
    timing._cpu_cache.cache_clear()
    assert timing.last_level_cache(CPU) == timing.UNKNOWN_CACHE
    timing._cpu_cache.cache_clear()


def test_rates_count_bytes_and_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the fastest of all calls take 0.25 s: bytes read and written, two operations a product."""
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 2**10)
    monkeypatch.setattr(timing, "interleave", lambda runs, *rest: {name: timing.Samples((0.5, 0.25)) for name in runs})
    timing._copy_bandwidth.cache_clear()
    timing._matmul_rate.cache_clear()
    try:
        assert timing.copy_bandwidth(CPU) == 2 * 2**26 / 0.25
        assert timing.matmul_rate(CPU, torch.float32) == 2 * 512**3 / 0.25
    finally:
        timing._copy_bandwidth.cache_clear()
        timing._matmul_rate.cache_clear()


def test_the_floor_is_the_longer_of_moving_and_multiplying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 100.0)
    rates = {torch.float32: 10.0, torch.bfloat16: 5.0, torch.float64: 2.0}
    monkeypatch.setattr(timing, "matmul_rate", lambda device, dtype: rates[dtype])
    assert timing.floor(1000, 0, CPU, torch.float32) == 10
    assert timing.floor(1000, 20, CPU, torch.float32) == 10
    assert timing.floor(1000, 200, CPU, torch.float32) == 20
    assert timing.floor(1000, 200, CPU, torch.bfloat16) == 20  # multiplied in fp32, which is faster here
    assert timing.floor(1000, 200, GPU, torch.bfloat16) == 40
    assert timing.floor(0, 200, CPU, torch.float64) == 100


def test_the_error_is_the_largest_over_what_is_expected() -> None:
    one, two = torch.tensor([3.0, 4.0]), torch.tensor([0, 10])
    assert timing.error(one, one) == 0.0
    assert timing.error(torch.tensor([3.0, 4.5]), one.double()) == pytest.approx(0.5 / 5)
    assert timing.error((one, torch.tensor([1, 10])), (one, two)) == pytest.approx(1 / 10)
    assert timing.error((one, two), one) == 0.0  # what nobody expects is not compared
    assert timing.error(one, (one, two)) == float("inf")
    assert timing.error(one[:1], one) == float("inf")
    assert timing.error(torch.tensor([0.0, 2.0]), torch.zeros(2)) == 2.0
    assert numpy.isnan(timing.error((torch.tensor([float("nan"), 1.0]), two), (one, two)))


def test_a_race_is_run_on_cold_data_of_the_right_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "copies_for", lambda nbytes, device: 1 + 30 // nbytes)
    made, called = [], []

    def make() -> tuple[torch.Tensor]:
        made.append(torch.ones(2))
        return (made[-1],)

    results: list[object] = []
    contender = timing.Contender(lambda x: called.append(id(x)) or "result", make)
    entrants = {"eight bytes": timing.enter(contender, CPU, results.append)}
    assert results == ["result"] and len(made) == 1
    called.clear()
    timing.race(entrants, 2, CPU)
    assert len(made) == 4 and called == [id(x) for x in made] * 3  # a round that warms up, two that count
    made.clear()
    timing.race({"no data": timing.Entrant(timing.Contender(called.clear), (), 0.0)}, 2, CPU)
    timing.race(entrants, 2, CPU, copies=2)
    assert len(made) == 1
