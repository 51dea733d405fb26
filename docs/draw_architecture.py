"""Draws the package layout from the imports: `python docs/draw_architecture.py FILE.svg [dark]`.

The layers and the imports are those that tests/test_floors.py enforces. An edge means "imports
from"; edges that follow from others (A to C, where A imports B and B imports C) are left out.
The documentation draws the picture anew at every build (docs/hooks.py).
"""

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {"longlive_jax.__main__", "longlive_jax.typing"}
"""One-line packages: everything imports `typing`, nothing imports `__main__`."""
COLOURS = {
    "light": {"text": "#1b1f24", "edge": "#8c959f", "box": "#ffffff", "band": "#f3f4f9"},
    "dark": {"text": "#e6e6ea", "edge": "#80838f", "box": "#2b2e3b", "band": "#252733"},
}
COLUMNS = {
    "cli": 2.0,
    "bench": 1.1, "planning": 1.1, "small_world": 3.0,
    "training": 2.0,
    "sampling": 0.3,
    "adapters": 2.9,
    "data": 1.5, "interop": 3.8,
    "io": 2.8, "models": 2.7,
    "diffusion": 0.0, "layout": 1.6, "parallel": 2.8, "quant": 4.0,
    "captions": 0.6, "spec": 4.1,
    "pallas_kernels": 2.4,
}  # fmt: skip
"""Horizontal places that keep edges clear of boxes they do not belong to."""
BOX = (1.7, 0.46)
"""Width and height of a package's box."""

Graph = dict[str, set[str]]


def read_rules() -> ModuleType:
    """tests/test_floors.py as a module: its layers and its reading of imports."""
    spec = importlib.util.spec_from_file_location("floors", ROOT / "tests" / "test_floors.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_imports(rules: ModuleType) -> Graph:
    """The packages that each package imports, read off the syntax trees of all modules."""
    graph: Graph = {package: set() for package in rules.FLOORS if package not in SKIPPED}
    for path in rules.SOURCES:
        package = rules.home_of(rules.name_of(path))
        if package not in graph:
            continue
        targets = {rules.home_of(name) for name, _ in rules.imports(path)}
        graph[package] |= {target for target in targets if target in graph and target != package}
    return graph


def without_implied(graph: Graph) -> Graph:
    """The transitive reduction: the fewest edges from which the others follow."""

    def reachable(start: str) -> set[str]:
        below: set[str] = set()
        stack = list(graph[start])
        while stack:
            node = stack.pop()
            if node not in below:
                below.add(node)
                stack += graph[node]
        return below

    return {
        node: targets - set().union(*(reachable(target) for target in targets))
        for node, targets in graph.items()
    }


def place(graph: Graph, layers: dict[str, int]) -> dict[str, tuple[float, float]]:
    """Centres of the boxes: one row per layer, in the columns of `COLUMNS`."""
    used = dict.fromkeys(layers.values(), -1.0)
    position = {}
    for node in sorted(graph, key=lambda node: COLUMNS.get(short_name(node), 99.0)):
        column = COLUMNS.get(short_name(node), used[layers[node]] + 1)  # new: right of its row
        used[layers[node]] = column
        position[node] = (column * 2.0 + BOX[0] / 2, layers[node] * 1.05)
    return position


def short_name(package: str) -> str:
    """The package's name inside longlive_jax."""
    return package.removeprefix("longlive_jax.")


def draw(colours: dict[str, str]) -> str:
    """The picture as SVG text."""
    # 1. The graph.
    rules = read_rules()
    graph = without_implied(read_imports(rules))
    position = place(graph, rules.FLOORS)
    width = max(x for x, _ in position.values()) + BOX[0] / 2 + 0.2
    # 2. Bands and edges.
    figure = Figure(figsize=(8.6, 7.4))
    axes = figure.add_axes((0, 0, 1, 1))
    for layer in sorted({rules.FLOORS[node] for node in graph}):
        y = layer * 1.05
        band = FancyBboxPatch(
            (-0.6, y - 0.34), width + 0.6, 0.68, boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=colours["band"], edgecolor="none", zorder=0,
        )  # fmt: skip
        axes.add_patch(band)
        axes.text(-0.3, y, str(layer), color=colours["edge"], va="center", ha="center")
    for node, targets in graph.items():
        for target in targets:
            (x0, y0), (x1, y1) = position[node], position[target]
            axes.plot(
                (x0, x1), (y0 - BOX[1] / 2, y1 + BOX[1] / 2),
                color=colours["edge"], linewidth=0.9, zorder=1, solid_capstyle="round",
            )  # fmt: skip
    # 3. Boxes and names.
    for node, (x, y) in position.items():
        box = FancyBboxPatch(
            (x - BOX[0] / 2, y - BOX[1] / 2), *BOX, boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=colours["box"], edgecolor="#5c6bc0", linewidth=1.2, zorder=2,
        )  # fmt: skip
        axes.add_patch(box)
        axes.text(x, y, short_name(node), color=colours["text"], va="center", ha="center", zorder=3)
    axes.set_xlim(-0.65, width + 0.05)
    axes.set_ylim(-0.4, max(y for _, y in position.values()) + 0.4)
    axes.axis("off")
    # 4. The file, the same bytes for the same imports.
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "longlive", "font.size": 11}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()


if __name__ == "__main__":
    scheme = "dark" if "dark" in sys.argv[2:] else "light"
    Path(sys.argv[1]).write_text(draw(COLOURS[scheme]), encoding="utf-8")
