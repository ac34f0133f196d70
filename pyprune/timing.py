"""How long a call takes, and how long it must take at least: contenders in turn, on cold data, beside the limits of
the device as it is now.

A wall time of one contender alone says little on a machine that others use too. So all contenders of a comparison are
timed in one process, one after the other within every round, and a figure is a percentile over the rounds. Weights that
fit a cache would be found there, unlike those of a model: each contender walks through copies of its data that exceed
the cache together.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

COLD = 4
"""Data is cold when as much as this many times the last-level cache is read before it comes round again."""
UNKNOWN_CACHE = 32 * 2**20
"""Bytes of the last-level cache where the system does not tell them."""
CPUS = Path("/sys/devices/system/cpu")
SHORTEST = 1e-3
"""Seconds between two events on a GPU from which on the gap before the first kernel does not count."""
SLOW = 0.5
"""Seconds of a first call from which on a second one tells nothing new of how many there may be."""
LONG = 1e-2
"""Seconds of a product that is large enough to show what rate the device reaches."""
DOUBTFUL = 1.1
"""Times a limit's speed from which on it cannot be that of the limit by chance."""

Run = Callable[[int], object]
Data = tuple[Any, ...]


@dataclass(frozen=True)
class Samples:
    """Seconds of one call of one contender.

    Attributes:
        seconds: one value a round, in the order of the rounds: the mean over the calls of that round.
        graph: a CUDA graph was replayed, so only kernels were timed; otherwise launches count too.
        reason: why there was no graph on a GPU, or "".
    """

    seconds: tuple[float, ...]
    graph: bool = False
    reason: str = ""

    @property
    def p20(self) -> float:
        """A fifth of the rounds was faster."""
        return self._percentile(0.2)

    @property
    def p50(self) -> float:
        """The median round."""
        return self._percentile(0.5)

    @property
    def p80(self) -> float:
        """A fifth of the rounds was slower."""
        return self._percentile(0.8)

    def _percentile(self, share: float) -> float:
        return torch.tensor(self.seconds, dtype=torch.float64).quantile(share).item()


def interleave(
    runs: Mapping[str, Run],
    rounds: int,
    device: torch.device,
    copies: Mapping[str, int],
    *,
    graphs: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Samples]:
    """Times contenders against each other: in every round each goes once through all of its data.

    On a CPU the clock is read around the calls of a round. On a GPU these calls are one CUDA graph, replayed between
    two events, so that kernels are timed and not their launches. What cannot be captured is called between the events
    as it is, and its `Samples` say why. A backward pass runs on the stream of its forward pass: build it, and call
    this, within one `torch.cuda.stream(torch.cuda.Stream())`, which is then the stream that is captured.

    Args:
        runs: name -> function; `runs[name](i)` makes one call on data set i.
        rounds: how many count; one before them warms up.
        device: where the calls run.
        copies: name -> how many data sets there are, as `copies_for` says it.
        graphs: False: on a GPU the calls are timed as they are, with their launches.
        clock: seconds on a CPU; `time.process_time` for one thread on a busy machine.

    Raises:
        ValueError: no rounds, or a contender without data sets.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; expected at least 1")
    for name in runs:
        if copies.get(name, 0) < 1:
            raise ValueError(f"copies[{name!r}] is {copies.get(name)}; expected at least 1 data set")
    if device.type != "cuda":
        sides = {name: _Side(run, copies[name]) for name, run in runs.items()}
        return _take_turns(sides, rounds, lambda side: _on_clock(side, clock))
    with torch.cuda.device(device):
        sides = {name: _on_gpu(run, copies[name], graphs) for name, run in runs.items()}
        return _take_turns(sides, rounds, _between_events)


@dataclass(frozen=True)
class Contender:
    """Somebody's way to compute something: `run(*data)`, on data that `make()` gives, new memory at each call."""

    run: Callable[..., object]
    make: Callable[[], Data] = tuple


@dataclass
class Entrant:
    """A contender that has shown its result: with its first data set and the seconds of a call that was not its first
    one, or of the first where that took `SLOW` seconds."""

    contender: Contender
    data: Data
    seconds: float


def enter(contender: Contender, device: torch.device, check: Callable[[object], None]) -> Entrant:
    """Makes data for a contender and calls it; `check` gets its result, and raises when that is wrong."""
    data, start = contender.make(), now(device)
    check(contender.run(*data))
    if (seconds := now(device) - start) < SLOW:
        start = now(device)
        contender.run(*data)
        seconds = now(device) - start
    return Entrant(contender, data, seconds)


def race(
    entrants: Mapping[str, Entrant],
    rounds: int,
    device: torch.device,
    *,
    budget: float = math.inf,
    copies: int | None = None,
    graphs: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Samples]:
    """`interleave` on as many data sets of each as make its data cold (`copies_for`), or on `copies`.

    Where all rounds would take more than `budget` seconds there are fewer of them, at least 3, or 1 where that already
    takes longer; and fewer data sets: a call far longer than reading its data is as slow where it finds it in a cache.
    """
    sets: dict[str, list[Data]] = {}
    for name, entrant in entrants.items():
        size = bytes_of(*entrant.data)
        wanted = copies or (copies_for(size, device) if size else 1)
        affordable = budget / rounds / len(entrants) / max(entrant.seconds, 1e-9)
        more = max(1, int(min(wanted, affordable))) - 1
        sets[name] = [entrant.data, *(entrant.contender.make() for _ in range(more))]
    turn = sum(entrant.seconds * len(sets[name]) for name, entrant in entrants.items())
    return interleave(
        {
            name: lambda i, run=entrant.contender.run, data=sets[name]: run(*data[i])  # type: ignore[misc]
            for name, entrant in entrants.items()
        },
        max(1 if turn > budget else min(3, rounds), int(min(rounds, budget / max(turn, 1e-9)))),
        device,
        {name: len(data) for name, data in sets.items()},
        graphs=graphs,
        clock=clock,
    )


def error(found: object, expected: object) -> float:
    """The difference of two results (tensors, or tuples of them) relative to the expected one, in the norm: the largest
    over all expected tensors; infinite where there are fewer than expected, or of other shapes."""
    mine, theirs = (result if isinstance(result, tuple) else (result,) for result in (found, expected))
    errors = [math.inf if len(mine) < len(theirs) else 0.0]
    for one, other in zip(mine, theirs, strict=False):
        if one.shape != other.shape:
            return math.inf
        difference, size = (float(part.double().norm()) for part in (one.double() - other.double(), other))
        errors.append(difference / size if size else difference)
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def copy_of(data: Data) -> Data:
    """The same values in memory of their own."""
    return tuple(part.clone() if isinstance(part, Tensor) else part for part in data)


def bytes_of(*data: object) -> int:
    """Of all tensors among the data, and of modules' parameters and buffers."""
    total = 0
    for part in data:
        if isinstance(part, nn.Module):
            total += bytes_of(*part.parameters(), *part.buffers())
        elif isinstance(part, Tensor) and part.layout == torch.sparse_csr:
            total += bytes_of(part.crow_indices(), part.col_indices(), part.values())
        elif isinstance(part, Tensor):
            total += part.nbytes
    return total


def now(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """The clock's seconds once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


@dataclass
class _Side:
    """One contender: what a round calls, and how often it has been asked for."""

    run: Run
    calls: int
    graph: torch.cuda.CUDAGraph | None = None
    reason: str = ""
    repeats: int = 1

    def round(self) -> None:
        """All data sets once."""
        if self.graph is not None:
            self.graph.replay()
            return
        for index in range(self.calls):
            self.run(index)


def _take_turns(sides: Mapping[str, _Side], rounds: int, measure: Callable[[_Side], float]) -> dict[str, Samples]:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            seconds[name].append(measure(side))
    return {
        name: Samples(tuple(seconds[name][1:]), side.graph is not None, side.reason) for name, side in sides.items()
    }


def _on_clock(side: _Side, clock: Callable[[], float]) -> float:
    start = clock()
    side.round()
    return (clock() - start) / side.calls


def _between_events(side: _Side) -> float:
    """Rounds are queued back to back until they take SHORTEST together, as many as the last time showed to be needed;
    the first call, which warms up, finds it out."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(side.repeats):
        side.round()
    end.record()
    end.synchronize()
    seconds = start.elapsed_time(end) / 1e3 / side.repeats
    side.repeats = max(side.repeats, math.ceil(SHORTEST / max(seconds, 1e-6)))
    return seconds / side.calls


def _on_gpu(run: Run, calls: int, graphs: bool) -> _Side:
    """The contender with its CUDA graph, or with the reason why it has none."""
    side = _Side(run, calls)
    if not graphs:
        return side
    caller = torch.cuda.current_stream()
    stream = torch.cuda.Stream() if caller == torch.cuda.default_stream() else caller
    stream.wait_stream(caller)
    with torch.cuda.stream(stream):
        for index in range(max(3, calls)):  # compiles, and allocates workspaces, neither of which can be captured
            run(index % calls)
    caller.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            side.round()
    except RuntimeError as error:
        torch.cuda.synchronize()
        side.reason = f"it cannot be captured in a CUDA graph: {str(error).splitlines()[0]}"
    else:
        side.graph = graph
    return side


# ------------------------------------------------------------------------------------------------------------- limits


def copies_for(nbytes: int, device: torch.device) -> int:
    """How many data sets of `nbytes` exceed `COLD` times the last-level cache together."""
    if nbytes < 1:
        raise ValueError(f"nbytes is {nbytes}; expected at least 1")
    return 1 + COLD * last_level_cache(device) // nbytes


def last_level_cache(device: torch.device) -> int:
    """Bytes of the GPU's L2 cache; of a CPU's caches of the highest level, all that this process may run on."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return _cpu_cache()


@functools.cache
def _cpu_cache() -> int:
    """Linux tells in /sys; caches that several cores share are counted once."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    found: dict[int, dict[str, int]] = {}
    for core in cores:
        for cache in (CPUS / f"cpu{core}" / "cache").glob("index*"):
            try:
                level, shared, size = (
                    (cache / name).read_text().strip() for name in ("level", "shared_cpu_list", "size")
                )
                found.setdefault(int(level), {})[shared] = _bytes(size)
            except (OSError, ValueError):
                continue
    return sum(found[max(found)].values()) if found else UNKNOWN_CACHE


def _bytes(size: str) -> int:
    """Bytes of a size as the kernel writes it, such as 32768K."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(size[:-1]) * units[size[-1]] if size[-1:] in units else int(size)


def load() -> float:
    """Processes that wanted a core in the last minute, on average; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def busy(threads: int) -> bool:
    """Whether others leave this machine less than a core for each of `threads`, so that wall times mean little."""
    return load() + threads > (os.cpu_count() or 1) + 0.5


def share(least: float, seconds: float) -> str:
    """What part of a limit's speed is reached, such as "87%", with a word when that is more than the limit allows: the
    limit was measured beside others' work, or data lay in a cache."""
    return f"{'doubtful ' if least > DOUBTFUL * seconds else ''}{least / seconds:.0%}"


_turns = [0]
"""Measurements of each rate, of which the fastest counts."""


def measure_again() -> None:
    """`copy_bandwidth` and `matmul_rate` measure once more at their next call, and the fastest counts: what others did
    during one measurement makes a rate too low, and nothing makes it too high."""
    _turns.append(len(_turns))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of a copy far larger than the caches: the fastest of a few,
    measured once per process (and number of threads), and again after `measure_again`."""
    return max(_copy_bandwidth(_indexed(device), torch.get_num_threads(), turn) for turn in _turns)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second (an addition and a multiplication are two) of torch's product of two square matrices, the
    second transposed as a linear's: the fastest of a few, measured once per process (and number of threads), and again
    after `measure_again`."""
    return max(_matmul_rate(_indexed(device), dtype, torch.get_num_threads(), turn) for turn in _turns)


def floor(nbytes: int, operations: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds that moving `nbytes` and multiplying with `operations` take at least at the measured rates of this
    device, where the two overlap. A CPU may multiply in fp32 what it has no 16-bit instructions for."""
    moving = nbytes / copy_bandwidth(device)
    if not operations:
        return moving
    dtypes = {dtype, torch.float32} if device.type == "cpu" and dtype.itemsize == 2 else {dtype}
    return max(moving, operations / max(matmul_rate(device, kind) for kind in dtypes))


def _indexed(device: torch.device) -> torch.device:
    """`cuda` and `cuda:0` are one device, and measured once."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@functools.cache
def _copy_bandwidth(device: torch.device, threads: int, turn: int) -> float:
    source = torch.ones(max(COLD * last_level_cache(device) // 2, 2**26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = interleave({"copy": lambda _: target.copy_(source)}, 5, device, {"copy": 1})
    return 2 * source.nbytes / min(found["copy"].seconds)


@functools.cache
def _matmul_rate(device: torch.device, dtype: torch.dtype, threads: int, turn: int) -> float:
    """Sizes double until a product takes LONG: a processor may be a thousand times slower in one dtype than another."""
    size, seconds, rate = 256, 0.0, 0.0
    while seconds < LONG:
        size *= 2
        seconds = _product(size, device, dtype)
        rate = max(rate, 2 * size**3 / seconds)
    return rate


def _product(size: int, device: torch.device, dtype: torch.dtype) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return min(interleave({"product": lambda _: left @ right.T}, 5, device, {"product": 1})["product"].seconds)
