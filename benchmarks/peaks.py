"""Draws the peaks of training steps that benchmarks/RESULTS.md holds, into peaks.png.

    python -m benchmarks.peaks

`python -m benchmarks memory --save` measures them.
"""

import pathlib
import re

from matplotlib.figure import Figure
from PIL import Image

from benchmarks.__main__ import RESULTS
from benchmarks.memory import FLAX, JBN, NOTHING, PEAKS, PIECES

PICTURE = pathlib.Path(__file__).with_suffix(".png")
NETWORKS = ("ResNet50", "MobileNetV2", "DenseNet121", "Conformer")
BARS = {
    (FLAX, NOTHING): ("Flax", "tab:red"),
    (JBN, NOTHING): ("jbn", "tab:blue"),
    (JBN, "policy, stages"): ("stages, policy", "tab:blue"),
    (JBN, PIECES): ("pieces and moments kept", "tab:blue"),
    (JBN, "moments, blocks"): ("blocks, moments kept", "tab:blue"),
}


def peaks(document):
    """{network: {(layer, computed again): gigabytes}}, of the document's table."""
    section = document.partition(f"### {PEAKS}\n")[2].partition("\n##")[0]
    found = {}
    for line in re.findall(r"^\| (.*) \|$", section, re.MULTILINE)[2:]:
        network, layer, again, gigabytes, *_ = line.split(" | ")
        if gigabytes != "-":
            found.setdefault(network, {})[layer, again] = float(gigabytes)
    return found


def draw(found, path):
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    for network, axes in zip(NETWORKS, figure.subplots(1, len(NETWORKS), sharey=True), strict=True):
        for position, (case, (_, color)) in enumerate(BARS.items()):
            if (gigabytes := found[network].get(case)) is not None:
                bar = axes.barh(position, gigabytes, color=color, alpha=1 if case[1] == NOTHING else 0.5)
                axes.bar_label(bar, fmt="%.1f GB", padding=2)
        axes.set(
            title=network, xticks=[], yticks=range(len(BARS)), yticklabels=[name for name, _ in BARS.values()]
        )
        axes.margins(x=0.35)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=90)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    draw(peaks(RESULTS.read_text(encoding="utf-8")), PICTURE)
    print(f"{PICTURE} is drawn")
