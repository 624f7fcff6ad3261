"""What all pictures share: one style, and the numbers that each shows in a file beside it."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

# Without a background, in colors that have a contrast of 3 and more on white and on a dark page alike.
INK = "tab:gray"
COLORS = {"with": "tab:blue", "without": "tab:red", "other": "tab:purple"}
LABEL = {"textcoords": "offset points", "fontsize": "small"}
STYLE = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "xtick.color": INK,
    "ytick.color": INK,
    "savefig.dpi": 110,
    "savefig.transparent": True,
}
matplotlib.rcParams.update(STYLE)
PACKAGES = ("jbn", "jax", "flax", "optax", "numpy")


def save_picture(figure: Figure, path: Path) -> None:
    """Writes a figure into a folder that need not be there yet, as PNG whatever the path ends with.

    In 64 colors: that is a third of the bytes, and nobody sees a difference.
    """
    path = path.with_suffix(".png")  # other formats have no palette
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    with Image.open(path) as image:
        few = image.quantize(64, method=Image.Quantize.FASTOCTREE)  # the one that keeps transparency
    few.save(path, optimize=True)


def label_ends(axes: Axes, ends: Iterable[tuple[str, tuple[float, float], str]], gap: float = 0.055) -> None:
    """Writes the text of each (text, (x, y), color) to the right of that end of a line.

    What would overlap is moved up: `gap` is the least distance, in heights of the axes, whose limits are set.
    What ends outside is named at the edge.
    """
    low, high = axes.get_ylim()
    place = -math.inf
    for text, (x, y), color in sorted(ends, key=lambda end: end[1][1]):
        place = max(min(max(y, low), high), place + gap * (high - low))
        axes.annotate(text, (x, place), (6, 0), color=color, va="center", annotation_clip=False, **LABEL)


def save_numbers(
    picture: Path, numbers: dict[str, Any], packages: Sequence[str] = (), **settings: Any
) -> Any:
    """Writes numbers, to six digits, with versions and settings beside a picture; returns them so."""
    versions = {name: importlib.metadata.version(name) for name in (*PACKAGES, *packages)}
    content = {
        "settings": settings,
        "versions": {"python": platform.python_version()} | versions,
        "numbers": _rounded(numbers),
    }
    path = picture.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return content["numbers"]


def table(*rows: Iterable[object]) -> str:
    """A table of Markdown; the first of the rows is its head."""
    head, *body = ([str(cell) for cell in row] for row in rows)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def counted(count: int, noun: str) -> str:
    """Such as "1 seed", "3 seeds"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
