"""The pictures, drawn by matplotlib: SVG for the page, whose colours are the page's own and so follow its light or dark
scheme, and PNG for a README or a slide.

A picture is a panel of about a phone's width, so that its text is legible there; the page sets panels side by side.
Curves and points carry their names, so that nothing depends on telling colours apart; the colours differ in lightness
too, and baselines are dashed.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyprune.report import tables
from pyprune.report.reading import Model, Run, comparable

# Light is what a PNG is drawn with; page.html has both schemes under the names --ink, --muted, --grid, --paper, --s0...
INK, MUTED, GRID, PAPER = "#1b1f24", "#59616b", "#d9dde2", "#ffffff"
SERIES = ("#1769b0", "#c4520a", "#00805f", "#a3218c", "#4f3608", "#3431a8", "#7d1230", "#5a7482")
MARKERS = ("o", "s", "^", "v")
NAMES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {c: f"s{i}" for i, c in enumerate(SERIES)}
SIZE = (5.4, 3.7)  # inches of 72 units; a text of 10 is then as large as the page's small print
LABEL = 22  # characters of a name in a picture; the tables have all of it
STRONGEST = 0.4  # share of a colour under a number, which must be legible in both schemes
SAME = 0.01  # share by which sizes or speeds must differ to count as different
MASK_FIGURES = ("mask_going", "mask_staying", "mask")


@dataclass(frozen=True)
class Picture:
    """`draw` fills the axes; `alt` says in words what is to be seen, `table` names the one with the same numbers.
    `group`: of which runs it is, and how they were measured, where a section has several. `lines`: how many names
    stand one above the other; the picture grows with them."""

    name: str
    title: str
    alt: str
    table: str
    draw: Callable[[Any], None]
    note: str = ""
    group: str = ""
    lines: int = 0


@dataclass(frozen=True)
class Style:
    """How a model is drawn everywhere."""

    color: str
    marker: str = "o"
    baseline: bool = False

    @property
    def line(self) -> dict[str, Any]:
        """For curves; a baseline's are dashed."""
        return {"color": self.color, "linestyle": (0, (4, 2)) if self.baseline else "-", "linewidth": 1.8}

    @property
    def point(self) -> dict[str, Any]:
        """For points; a baseline's are hollow."""
        fill = PAPER if self.baseline else self.color
        return {"marker": self.marker, "markersize": 7, "color": self.color, "markerfacecolor": fill, "linestyle": ""}


DENSE = Style(INK, "D")


class Styles:
    """A colour for each result, in the order of the runs, and then for each baseline; when there are too many for that,
    baselines have the colour of their run's first result. Results beyond the colours have other markers."""

    def __init__(self, runs: Sequence[Run]) -> None:
        models = [
            (id(run), model)
            for role in ("result", "baseline")
            for run in runs
            for model in run.models
            if model.role == role
        ]
        own = models if len(models) <= len(SERIES) else [pair for pair in models if pair[1].role == "result"]
        self.place = {(run, model.name): i for i, (run, model) in enumerate(own)}

    def of(self, run: Run, name: str) -> Style:
        """The style of a run's model, or of the training of a stage."""
        if name == "dense":
            return DENSE
        first = min((place for (owner, _), place in self.place.items() if owner == id(run)), default=0)
        turn, color = divmod(self.place.get((id(run), name), first), len(SERIES))
        return Style(SERIES[color], MARKERS[turn % len(MARKERS)], name not in [model.name for model in run.results])


# ------------------------------------------------------------------------------------------------------------- drawing


def draw(picture: Picture, path: Path) -> str:
    """Writes the picture as a PNG, light and with its title, and returns it as an <svg> element whose colours and font
    are those of the page it stands in."""
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with _settings(picture):
        figure = Figure((SIZE[0], max(SIZE[1], 0.22 * picture.lines + 0.8)), layout="constrained")
        picture.draw(figure.add_subplot())
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        figure.suptitle(picture.title, x=0.02, ha="left", fontsize=11, fontweight="bold", color=INK)
        figure.savefig(path, dpi=200, facecolor=PAPER, metadata={"Software": None})
    return _for_the_page(buffer.getvalue())


def _for_the_page(text: str) -> str:
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<style type="text/css">.*?</style>', "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
    for color, name in NAMES.items():
        text = text.replace(color, f"var(--{name})")
    return text.replace("'DejaVu Sans'", "var(--sans)")


def _settings(picture: Picture) -> Any:
    import matplotlib

    return matplotlib.rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "text.parse_math": False,  # names come from files; a dollar sign is one
            "svg.fonttype": "none",
            "svg.hashsalt": picture.name,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": MUTED,
            "axes.linewidth": 0.8,
            "axes.axisbelow": True,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "grid.color": GRID,
            "grid.linewidth": 0.8,
            "text.color": INK,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "xtick.labelsize": 9.5,
            "ytick.labelsize": 9.5,
            "xtick.minor.size": 0,
            "ytick.minor.size": 0,
            "ytick.major.size": 0,
        }
    )


def short(name: str) -> str:
    """A name as it fits into a picture."""
    return name if len(name) <= LABEL else f"{name[: LABEL // 2 - 1]}…{name[-LABEL // 2 :]}"


def _name_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes names (x, y, name, colour) to the right of the axes at the height of the ends of their curves, moved apart
    where they would touch."""
    axes.figure.draw_without_rendering()
    height = axes.get_window_extent().height
    heights = [axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1] for x, y, *_ in ends]
    gap = min(1.25 * axes.figure.dpi * 9.5 / 72 / height, 1 / max(1, len(ends) - 1))
    for place, i in _spread(heights, gap):
        x, y, name, color = ends[i]
        axes.annotate(
            short(name),
            (x, y),
            xytext=(1.04, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9.5,
            color=color,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7, "linestyle": ":", "shrinkB": 2},
        )


def _spread(heights: Sequence[float], gap: float) -> Iterator[tuple[float, int]]:
    """Places at least `gap` apart, in the order of the heights and near to them: neighbours that touch are set around
    their common mean. Yields place and index."""
    clusters: list[list[int]] = []
    for i in sorted(range(len(heights)), key=lambda i: heights[i]):
        clusters.append([i])
        while len(clusters) > 1 and _bottom(clusters[-1], heights, gap) < _top(clusters[-2], heights, gap) + gap:
            last = clusters.pop()
            clusters[-1] += last
    for cluster in clusters:
        for step, i in enumerate(cluster):
            yield _bottom(cluster, heights, gap) + step * gap, i


def _bottom(cluster: Sequence[int], heights: Sequence[float], gap: float) -> float:
    """The lowest place of a cluster; it stays inside the axes."""
    extent = gap * (len(cluster) - 1)
    middle = sum(heights[i] for i in cluster) / len(cluster)
    return max(0.0, min(middle - extent / 2, 1 - extent))


def _top(cluster: Sequence[int], heights: Sequence[float], gap: float) -> float:
    return _bottom(cluster, heights, gap) + gap * (len(cluster) - 1)


def _name_points(axes: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes names (x, y, name, colour) beside points, where they cover neither a point nor another name."""
    axes.figure.draw_without_rendering()
    frame = axes.get_window_extent()
    taken = [_around(axes.transData.transform((x, y)), 5) for x, y, *_ in points]
    near = [(dx * far, dy * far) for far in (1, 2, 3) for dx, dy in ((9, 0), (0, 9), (0, -9), (-9, 0), (7, 7), (7, -7))]
    for x, y, name, color in sorted(points, key=lambda point: point[1]):
        best: tuple[float, Any] | None = None
        for dx, dy in near:
            text = axes.annotate(
                short(name),
                (x, y),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="bottom" if dy > 0 else "top" if dy < 0 else "center",
                fontsize=9.5,
                color=color,
                bbox={"facecolor": PAPER, "alpha": 0.8, "pad": 0.6, "linewidth": 0},
            )
            box = text.get_window_extent()
            cost = sum(_overlap(box, other) for other in taken) + 3 * _outside(box, frame)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = cost, text
            else:
                text.remove()
            if cost == 0:
                break
        taken.append(best[1].get_window_extent())  # type: ignore[index]


def _around(point: Any, reach: float) -> Any:
    from matplotlib.transforms import Bbox

    x, y = point
    return Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)


def _overlap(a: Any, b: Any) -> float:
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0.0) * max(height, 0.0)


def _outside(box: Any, frame: Any) -> float:
    return box.width * box.height - _overlap(box, frame)


# ------------------------------------------------------------------------------------------------------------- pictures


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """All pictures for which the runs have figures."""
    styles = Styles(runs)
    groups = [
        group
        for group in comparable(runs)
        if any(model.perplexity is not None for run in group for model in run.models)
    ]
    found: list[Picture | None] = []
    for number, group in enumerate(groups, 1):
        suffix = f"-{number}" if len(groups) > 1 else ""
        found += [_pareto(group, runs, styles, key, suffix) for key in ("bytes", "decode", "prefill")]
        found.append(_perplexities(group, runs, styles, suffix))
    found.append(_loss(runs, styles))
    found += [_masks(runs, styles), _active(runs, styles), _flips(runs, styles), _sparsity(runs, styles)]
    uneven = [(name, model, styles.of(run, model.name)) for name, run, model in tables.results(runs) if _uneven(model)]
    shares = [layer.removed for _, model, _ in uneven for layer in model.layers]
    found += [_linears(*one, min(shares), max(shares)) for one in uneven]
    taken: dict[str, int] = {}
    unique = []
    for picture in found:
        if picture is not None:
            count = taken[picture.name] = taken.get(picture.name, 0) + 1
            unique.append(picture if count == 1 else replace(picture, name=f"{picture.name}-{count}"))
    return unique


_SIZES = {  # attribute of a model: name of the picture, its title, label of the axis, how a value is said
    "bytes": ("pareto-size", "Size against perplexity", "weights, MB", tables.megabytes),
    "decode": ("pareto-decode", "Decoding speed against perplexity", "decoding speed, × dense", tables.times),
    "prefill": ("pareto-prefill", "Prefill speed against perplexity", "prefill speed, × dense", tables.times),
}


def _points(group: Sequence[Run], runs: Sequence[Run], key: str) -> list[tuple[float, float, str, Run, Model]]:
    """x, perplexity and name of the models that have both; the dense model once, at speed 1."""
    points: list[tuple[float, float, str, Run, Model]] = []
    for run in group:
        for model in run.models:
            is_dense = model.role == "dense"
            x = 1.0 if is_dense and key != "bytes" else getattr(model, key)
            seen = is_dense and any(other.role == "dense" for *_, other in points)
            if x is not None and model.perplexity is not None and not seen:
                name = "dense" if is_dense else tables.name_of(run, model, runs)
                points.append((x, model.perplexity, name, run, model))
    return points


def _measured(group: Sequence[Run], runs: Sequence[Run]) -> str:
    """How the perplexities of a group were measured, and whose they are when not of all runs."""
    p, names = group[0].protocol, ", ".join(run.label for run in group)
    how = (
        "perplexity on {tokens:,.0f} held-out tokens, window {window:.0f}, stride {stride:.0f}".format(**p)
        if len(p) == 3
        else "how it was measured is not recorded"
    )
    return f"{names}: {how}" if len(group) < len(runs) else how.capitalize()


def _pareto(group: Sequence[Run], runs: Sequence[Run], styles: Styles, key: str, suffix: str) -> Picture | None:
    points = _points(group, runs, key)
    if len(points) < 2 or not any(model.role == "result" for *_, model in points):
        return None
    name, title, label, said = _SIZES[key]
    better, unit = ("left", 1e6) if key == "bytes" else ("right", 1.0)

    def draw(axes: Any) -> None:
        front = _front(points, key)
        axes.plot(*zip(*front, strict=True), color=MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        for x, y, _, run, model in points:
            axes.plot(x, y, **styles.of(run, model.name).point)
        xs, ys = [x for x, *_ in points], [y for _, y, *_ in points]
        margin = max(0.16 * (max(xs) - min(xs)), 0.05 * max(xs))
        axes.set_xlim(max(min(xs) - margin, -margin / 4), max(xs) + margin)
        _logarithmic(axes.yaxis, *_room(ys, 0.14, 0.14))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / unit:,.10g}")
        axes.set_xlabel(f"{label}   ({'smaller' if key == 'bytes' else 'faster'} is to the {better})")
        axes.set_ylabel("perplexity")
        _name_points(axes, [(x, y, n, styles.of(run, m.name).color) for x, y, n, run, m in points])

    alt = f"{title}: " + "; ".join(f"{n} {said(x)}, {tables.perplexity(y)}" for x, y, n, *_ in points)
    note = f"Better is down and to the {better}; the dotted line joins what nothing else beats in both."
    return Picture(name + suffix, title, alt, "models", draw, note, _measured(group, runs), 2 * len(points) // 3)


def _front(points: Sequence[tuple[Any, ...]], key: str) -> list[tuple[float, float]]:
    """The points that no other beats in both. What differs by less than `SAME` in size or speed is equal there: two
    packed models of as many zeros are, but for padding."""
    sign = 1 if key == "bytes" else -1
    front: list[tuple[float, float]] = []
    for x, y, *_ in sorted(points, key=lambda point: (sign * point[0], point[1])):
        if front and y >= front[-1][1]:
            continue
        if front and abs(x - front[-1][0]) < SAME * front[-1][0]:
            front.pop()
        front.append((x, y))
    return front


def _logarithmic(axis: Any, low: float, high: float) -> None:
    """A logarithmic axis from low to high with a few round numbers, written out."""
    from matplotlib.ticker import FixedLocator, NullLocator

    name = axis.axis_name
    axis.axes.set(**{f"{name}scale": "log", f"{name}lim": (low, high)})
    axis.set_major_locator(FixedLocator(round_numbers(low, high)))
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.set_minor_locator(NullLocator())


def round_numbers(low: float, high: float) -> list[float]:
    """Round numbers, two or three at least and six at most, spread over a logarithmic axis from low to high."""
    decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 6)]
    width = 10.0 ** math.floor(math.log10(high - low))
    for step in (width, width / 2, width / 5):  # so near to each other that the axis is all but linear
        found = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        if len(found) >= 3:
            break
    return found[:: math.ceil(len(found) / 6)]


def _room(values: Sequence[float], below: float, above: float) -> tuple[float, float]:
    """The ends of a logarithmic axis, with room for names: shares of the way from the least to the largest value, which
    counts as a twentieth at least, so that noise does not look like a difference."""
    low, high = min(values), max(values)
    ratio = max(high / low, 1.05)
    return low / ratio**below, high * ratio**above


def _perplexities(group: Sequence[Run], runs: Sequence[Run], styles: Styles, suffix: str) -> Picture | None:
    found = [
        (model.perplexity, "dense" if model.role == "dense" else tables.name_of(run, model, runs), run, model)
        for run in group
        for model in run.models
        if model.perplexity is not None and (model.role != "dense" or run is group[0])
    ]
    if not found:
        return None
    found.sort(key=lambda row: -row[0])

    def draw(axes: Any) -> None:
        axes.grid(False)
        for place, (value, _, run, model) in enumerate(found):
            style = styles.of(run, model.name)
            axes.axhline(place, color=GRID, linewidth=0.8, zorder=0)
            axes.plot(value, place, **style.point)
            text = tables.perplexity(value)
            axes.annotate(text, (value, place), (9, 0), textcoords="offset points", va="center", fontsize=9.5)
        _logarithmic(axes.xaxis, *_room([value for value, *_ in found], 0.08, 0.2))
        axes.set_ylim(-0.6, len(found) - 0.4)
        axes.set_yticks(range(len(found)), [short(name) for _, name, *_ in found], fontsize=9.5, color=INK)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("perplexity, logarithmic")

    title = "Perplexity on held-out text"
    alt = f"{title}: " + "; ".join(f"{n} {tables.perplexity(v)}" for v, n, *_ in reversed(found))
    note = "Lower is better. Hollow: a baseline."
    return Picture(f"perplexity{suffix}", title, alt, "models", draw, note, _measured(group, runs), len(found))


Curve = tuple[str, Style, list[float], list[float]]


def _curves(runs: Sequence[Run], styles: Styles, keys: Sequence[str] = (), x: str = "step") -> list[Curve]:
    """Name, style, x and values of a figure over each training; of the first of `keys` that a training has, or, without
    keys, its loss."""
    found = []
    for run in runs:
        for stage, lines in run.metrics.items():
            for key in keys or (tables.loss_key(lines),):
                pairs = [(tables.number(line, x), tables.number(line, key)) for line in lines]
                pairs = [pair for pair in pairs if None not in pair]
                if pairs:
                    xs, ys = (list(values) for values in zip(*pairs, strict=True))
                    found.append((tables.stage_name(run, stage, runs), styles.of(run, stage), xs, ys))
                    break
    return found


def _thin(*values: Sequence[float]) -> list[Sequence[float]]:
    """Each with at most as many points as a picture can show, the last among them."""
    count = len(values[0])
    every = math.ceil(count / 1000)
    return [column[(count - 1) % every :: every] for column in values]


def _told(curves: Sequence[Curve], what: Callable[[float], str]) -> str:
    """First and last values in words."""
    return "; ".join(f"{name} from {what(ys[0])} to {what(ys[-1])}" for name, _, _, ys in curves)


def _loss(runs: Sequence[Run], styles: Styles) -> Picture | None:
    curves = _curves(runs, styles, x="tokens") or _curves(runs, styles)
    if not curves:
        return None

    def draw(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        ends, lows, highs = [], [], []
        for name, style, xs, ys in curves:
            mean = tables.smooth(ys)
            if len(curves) <= 3:
                axes.plot(*_thin(xs, ys), color=style.color, linewidth=0.6, alpha=0.35)
            axes.plot(*_thin(xs, mean), **style.line)
            ends.append((xs[-1], mean[-1], name, style.color))
            shown = ys if len(curves) <= 3 else mean
            lows.append(min(shown))
            highs.append(max(shown))
        margin = 0.06 * (max(highs) - min(lows)) or 0.1
        axes.set_ylim(min(lows) - margin, max(highs) + margin)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} ({_exp(value)})")
        axes.set_ylabel("loss, nats per token (perplexity)")
        _tokens_axis(axes)
        _name_ends(axes, ends)

    smoothed = [(name, style, xs, tables.smooth(ys)) for name, style, xs, ys in curves]
    alt = f"Training loss: {_told(smoothed, lambda value: f'{value:.3f}')}"
    note = "Cross entropy of the training text, the mean over a twentieth of the steps around each. Dashed: a baseline."
    return Picture("loss", "Loss over the training", alt, "training", draw, note, lines=len(curves))


def _exp(value: float) -> str:
    return tables.perplexity(math.exp(value)) if value < 20 else "…"


def _tokens_axis(axes: Any) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens trained on")


def _steps_axis(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("optimiser step")


def _masks(runs: Sequence[Run], styles: Styles) -> Picture | None:
    parts = {key: _curves(runs, styles, (key,)) for key in MASK_FIGURES}
    if not any(parts.values()):
        return None
    one = sum(len(curves) for curves in parts.values()) == len(parts["mask"]) or len(runs) == 1
    words = {"mask_going": "go", "mask_staying": "stay", "mask": "subspace that goes"}
    edges = {"mask_going": "mask_going_max", "mask_staying": "mask_staying_min"}

    def draw(axes: Any) -> None:
        ends = []
        for key, curves in parts.items():
            outer = _curves(runs, styles, (edges[key],)) if key in edges else []
            for i, (name, style, xs, ys) in enumerate(curves):
                axes.plot(*_thin(xs, ys), **style.line)
                if i < len(outer) and len(outer[i][3]) == len(ys):
                    axes.fill_between(*_thin(xs, ys, outer[i][3]), color=style.color, alpha=0.18, linewidth=0)
                what = words[key] if one and key != "mask" else f"{name}: {words[key]}"
                ends.append((xs[-1], ys[-1], what, style.color))
        axes.set_ylim(-0.03, 1.06)
        axes.set_ylabel("mask value")
        _steps_axis(axes)
        _name_ends(axes, ends)

    told = "; ".join(
        f"{name}, {words[key]}: from {ys[0]:.2f} to {ys[-1]:.2f}"
        for key, found in parts.items()
        for name, _, _, ys in found
    )
    note = (
        "The mean of the channels that go and of those that stay, shaded to the largest of the first and the smallest "
        "of the second; of a learned subspace, its one value. Curves end where the mask is final."
    )
    return Picture("mask-values", "Mask values", f"Mask values: {told}", "training", draw, note)


def _active(runs: Sequence[Run], styles: Styles) -> Picture | None:
    """Channels and groups that count, as shares, so that runs of any size stand together."""
    curves = []
    for run in runs:
        for name, style, xs, ys in _curves([run], styles, ("groups_left", "mask_count")):
            all_of_them = 1.0 if max(ys) <= 1 else _hidden(run)
            if all_of_them:
                label = tables.stage_name(run, name, runs)
                curves.append((label, style, xs, [y / all_of_them for y in ys]))
    if not curves:
        return None

    def draw(axes: Any) -> None:
        for _, style, xs, ys in curves:
            axes.step(*_thin(xs, ys), where="post", **style.line)
        _percent_axis(axes, top=1.06)
        axes.set_ylabel("still counted, share")
        _steps_axis(axes)
        _name_ends(axes, [(xs[-1], ys[-1], name, style.color) for name, style, xs, ys in curves])

    note = "Share of the hidden channels (PAT) or of the heads and MLP channels (LoRAPrune) that the mask still counts."
    alt = f"Active count: {_told(curves, tables.percent)}"
    return Picture("active", "Channels and groups that count", alt, "training", draw, note)


def _hidden(run: Run) -> float | None:
    """The hidden size of the dense model."""
    return tables.number(run.stages.get("dense"), "hidden_size") or tables.number(run.summary, "hidden_size_dense")


def _flips(runs: Sequence[Run], styles: Styles) -> Picture | None:
    curves = _curves(runs, styles, ("flip_rate",))
    if not curves:
        return None

    def draw(axes: Any) -> None:
        ends = []
        for name, style, xs, ys in curves:
            axes.step(*_thin(xs, ys), where="post", **style.line)
            ends.append((xs[-1], ys[-1], name, style.color))
        _percent_axis(axes)
        axes.set_ylabel("bits that flipped")
        _steps_axis(axes)
        _name_ends(axes, ends)

    note = "At each choice of the mask, the share of its bits that are not as they were at the choice before."
    return Picture("flip-rate", "Flip rate", f"Flip rate: {_told(curves, tables.percent)}", "training", draw, note)


def _percent_axis(axes: Any, top: float | None = None) -> None:
    axes.set_ylim(0, top)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.10g} %")


def _sparsity(runs: Sequence[Run], styles: Styles) -> Picture | None:
    found = [
        (name, styles.of(run, model.name), tables.block_shares(model)) for name, run, model in tables.results(runs)
    ]
    found = [row for row in found if len(row[2]) > 1]
    if not found:
        return None

    def draw(axes: Any) -> None:
        ends = []
        for name, style, shares in found:
            blocks = list(shares)
            axes.plot(blocks, list(shares.values()), marker="o", markersize=3.5, **style.line)
            ends.append((blocks[-1], shares[blocks[-1]], name, style.color))
        _percent_axis(axes, min(1.0, 1.25 * max(max(shares.values()) for *_, shares in found)))
        axes.set_ylabel("removed from the block's linears")
        _steps_axis(axes)
        axes.set_xlim(-0.3, max(end[0] for end in ends) + 0.3)
        axes.set_xlabel("block")
        _name_ends(axes, ends)

    alt = "Removed from each block: " + "; ".join(
        f"{name} {tables.percent(min(shares.values()))} to {tables.percent(max(shares.values()))}"
        for name, _, shares in found
    )
    note = "Share of the weights that is gone or zero, counted."
    return Picture("sparsity", "Sparsity by block", alt, "by-block", draw, note, lines=len(found))


def _uneven(model: Model) -> bool:
    """Whether linears of one name lost other shares in other blocks."""
    kinds: dict[str, list[float]] = {}
    for layer in model.layers:
        kinds.setdefault(layer.name, []).append(layer.removed)
    return any(max(shares) - min(shares) >= 0.005 for shares in kinds.values())


def _linears(name: str, model: Model, style: Style, low: float, high: float) -> Picture:
    """A field for every linear, the darker the more of it is gone, from `low` to `high` in all such pictures."""
    kinds = list(dict.fromkeys(layer.name for layer in model.layers))
    blocks = sorted({layer.block for layer in model.layers})

    def draw(axes: Any) -> None:
        from matplotlib.collections import PolyCollection
        from matplotlib.colors import to_rgba

        axes.grid(False)
        fields, colors = [], []
        for layer in model.layers:
            x, y = blocks.index(layer.block), len(kinds) - 1 - kinds.index(layer.name)
            strength = 0.06 + (STRONGEST - 0.06) * (layer.removed - low) / (high - low)
            fields.append([(x + dx, y + dy) for dx, dy in ((-0.47, -0.46), (0.47, -0.46), (0.47, 0.46), (-0.47, 0.46))])
            colors.append(to_rgba(style.color, strength))
            if len(blocks) <= 8:
                axes.text(x, y, f"{layer.removed:.0%}".replace("%", ""), ha="center", va="center", fontsize=9)
        axes.add_collection(PolyCollection(fields, facecolors=colors, linewidths=0), autolim=False)
        axes.set_xlim(-0.5, len(blocks) - 0.5)
        axes.set_ylim(-0.5, len(kinds) - 0.5)
        every = math.ceil(len(blocks) / 10)
        axes.set_xticks(range(0, len(blocks), every), [str(block) for block in blocks[::every]])
        axes.set_yticks(range(len(kinds)), [kind.rpartition(".")[2] for kind in reversed(kinds)])
        axes.tick_params(length=0)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.set_xlabel("block")

    title = f"Removed from each linear: {short(name)}"
    note = (
        f"From {tables.percent(low)} (palest) to {tables.percent(high)} (strongest) of a linear's weights, in percent."
    )
    stem = "linears-" + (re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model")
    return Picture(stem, title, f"{title}. {note}", "every-layer", draw, note)
