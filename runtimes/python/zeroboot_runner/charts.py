"""What a table or a matplotlib figure shows, as data: for programs that draw it anew.

The form is that of E2B's charts: line, scatter, bar, pie, box_and_whisker, superchart for several, or unknown.
"""

import math
import sys

DATA, CHART = "application/vnd.zeroboot.data+json", "application/vnd.zeroboot.chart+json"
# More than this is a picture or a table for people only.
MOST = 100000


class TooMuch(Exception):
    pass


def extras(obj):
    """Further representations of a table or a figure: MIME type to something that JSON can write."""
    try:
        figure = getattr(sys.modules.get("matplotlib.figure"), "Figure", None)
        if figure is not None and isinstance(obj, figure):
            chart = of_figure(obj)
            return {} if chart is None else {CHART: chart}
        table = getattr(sys.modules.get("pandas"), "DataFrame", None)
        if table is not None and isinstance(obj, table) and obj.size <= MOST:
            return {DATA: {str(name): values(obj[name]) for name in obj.columns}}
    except Exception:
        # An extra: the value itself is shown whatever happens here.
        pass
    return {}


def plain(value):
    """A value that JSON has."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "isoformat"):
        # A date that is none has this method as well.
        return None if value != value else value.isoformat()
    return str(value)


def values(series):
    return [plain(value) for value in series]


def of_figure(figure):
    charts = [chart for chart in map(of_axes, figure.axes) if chart is not None]
    if len(charts) < 2:
        return charts[0] if charts else None
    title = figure.get_suptitle() if hasattr(figure, "get_suptitle") else ""
    return {"type": "superchart", "title": title, "elements": charts}


def of_axes(axes):
    from matplotlib.collections import PathCollection
    from matplotlib.container import BarContainer
    from matplotlib.patches import Wedge

    budget = Budget()
    wedges = [patch for patch in axes.patches if isinstance(patch, Wedge)]
    bars = [container for container in axes.containers if isinstance(container, BarContainer)]
    dots = [found for found in axes.collections if isinstance(found, PathCollection) and len(found.get_offsets())]
    lines = list(axes.lines)
    try:
        if wedges:
            return {"type": "pie", "title": axes.get_title(), "elements": slices(axes, wedges)}
        if bars:
            return flat(axes, "bar", bar_elements(axes, bars, budget))
        boxes = box_elements(axes, lines)
        if boxes:
            return flat(axes, "box_and_whisker", boxes)
        if lines:
            found = [(line.get_label(), line.get_xdata(orig=True), line.get_ydata(orig=True)) for line in lines]
            return points(axes, "line", found, budget)
        if dots:
            found = [(one.get_label(), one.get_offsets()[:, 0], one.get_offsets()[:, 1]) for one in dots]
            return points(axes, "scatter", found, budget)
    except TooMuch:
        return None
    if not (axes.patches or axes.collections or axes.images):
        return None
    return {"type": "unknown", "title": axes.get_title(), "elements": []}


class Budget:
    def __init__(self):
        self.left = MOST

    def take(self, count):
        self.left -= count
        if self.left < 0:
            raise TooMuch


def label(text):
    """Names that begin like this are matplotlib's own."""
    text = str(text)
    return "" if text.startswith("_") else text


def unit(text):
    """What stands in brackets at the end of an axis' label."""
    text = text.strip()
    for opening, closing in ("()", "[]"):
        if text.endswith(closing) and opening in text:
            return text[text.rindex(opening) + 1 : -1] or None
    return None


def flat(axes, kind, elements):
    x, y = axes.get_xlabel(), axes.get_ylabel()
    return {
        "type": kind,
        "title": axes.get_title(),
        "x_label": x or None,
        "y_label": y or None,
        "x_unit": unit(x),
        "y_unit": unit(y),
        "elements": elements,
    }


def scale(axis):
    if type(axis.get_major_formatter()).__name__ == "StrCategoryFormatter":
        return "categorical"
    if "Date" in type(axis.get_major_locator()).__name__:
        return "datetime"
    return axis.get_scale()


def points(axes, kind, found, budget):
    elements = []
    for name, xs, ys in found:
        budget.take(len(xs))
        elements.append({"label": label(name), "points": [[plain(x), plain(y)] for x, y in zip(xs, ys)]})
    return {
        **flat(axes, kind, elements),
        "x_ticks": values(axes.get_xticks()),
        "x_tick_labels": [tick.get_text() for tick in axes.get_xticklabels()],
        "x_scale": scale(axes.xaxis),
        "y_ticks": values(axes.get_yticks()),
        "y_tick_labels": [tick.get_text() for tick in axes.get_yticklabels()],
        "y_scale": scale(axes.yaxis),
    }


def slices(axes, wedges):
    names = [text.get_text() for text in axes.texts]
    # Where the parts are written as well, every other text is one of those.
    if len(names) == 2 * len(wedges):
        names = names[::2]
    names += [""] * (len(wedges) - len(names))
    return [
        {"label": label(wedge.get_label()) or name, "angle": abs(wedge.theta2 - wedge.theta1), "radius": wedge.r}
        for name, wedge in zip(names, wedges)
    ]


def at_tick(axes, upright):
    """The name at a place of the axis that has names."""
    axis = axes.xaxis if upright else axes.yaxis
    names = dict(zip(values(axis.get_ticklocs()), (tick.get_text() for tick in axis.get_ticklabels())))

    def name(place):
        near = [at for at in names if abs(at - place) < 1e-6]
        return names[near[0]] if near and names[near[0]] else str(plain(place))

    return name


def bar_elements(axes, bars, budget):
    elements = []
    for container in bars:
        budget.take(len(container.patches))
        upright = container.orientation != "horizontal"
        name = at_tick(axes, upright)
        for patch in container.patches:
            place = patch.get_x() + patch.get_width() / 2 if upright else patch.get_y() + patch.get_height() / 2
            value = patch.get_height() if upright else patch.get_width()
            elements.append({"label": name(place), "group": label(container.get_label()), "value": plain(value)})
    return elements


def box_elements(axes, lines):
    """The lines of `boxplot`: a box of five corners, two whiskers, two caps, a median, and perhaps points beyond."""
    elements, at = [], 0
    while at < len(lines):
        group = lines[at : at + 6]
        if [len(line.get_xdata()) for line in group] != [5, 2, 2, 2, 2, 2]:
            return []
        box, low, high, _, _, middle = group
        at += 6
        beyond = []
        if at < len(lines) and lines[at].get_linestyle() == "None":
            beyond = lines[at]
            at += 1
        upright = len(set(values(middle.get_ydata()))) == 1
        along = (lambda line: values(line.get_ydata())) if upright else (lambda line: values(line.get_xdata()))
        across = (lambda line: values(line.get_xdata())) if upright else (lambda line: values(line.get_ydata()))
        elements.append(
            {
                "label": at_tick(axes, upright)(sum(across(middle)) / 2),
                "min": min(along(low)),
                "first_quartile": min(along(box)),
                "median": along(middle)[0],
                "third_quartile": max(along(box)),
                "max": max(along(high)),
                "outliers": along(beyond) if beyond != [] else [],
            }
        )
    return elements
