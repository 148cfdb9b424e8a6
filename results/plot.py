"""Draws a study's figure: python results/plot.py results/h100 results/h100.svg (needs matplotlib).

Left: test accuracy over epochs, in pretraining and then with SCAR (solid) and in the control
(dashed). Right: the share of correct labels among those that FGSM keeps, over eps (solid), and
among as many chosen by confidence (dashed).
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

NAMES = {"vat": "VAT", "mixmatch": "MixMatch", "fixmatch": "FixMatch"}
COLORS = {"vat": "C0", "mixmatch": "C1", "fixmatch": "C2"}
SCAR, COMPARED = "-", "--"  # line styles


def draw_accuracy(axes, result, rows):
    """Draws a run's accuracy; a control's pretraining is that of its SCAR run, drawn once."""
    color = COLORS[result["method"]]
    accuracy = {"pretrain": [], "finetune": [result["pretrain_accuracy"]]}
    for row in rows:
        accuracy[row["phase"]].append(float(row["accuracy"]))
    epochs = len(accuracy["finetune"]) - 1
    before = range(1, len(accuracy["pretrain"]) + 1)
    after = range(epochs, 2 * epochs + 1)
    axes.plot(before, accuracy["pretrain"], SCAR, color=color)
    style = SCAR if result["select"] == "fgsm" else COMPARED
    axes.plot(after, accuracy["finetune"], style, color=color)


def draw_correct_labels(axes, method, rows, correct, style):
    """Draws the share of correct labels over eps, in percent; the column `correct` counts them."""
    rows = [row for row in rows if row["kept"] > 0]
    eps = [row["eps"] for row in rows]
    share = [100 * row[correct] / row["kept"] for row in rows]
    axes.plot(eps, share, style, marker="o", markersize=4, color=COLORS[method])


def main(study, target):
    """Reads the runs with SCAR and their controls in the folder `study`, writes the figure."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "scar"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    methods = set()
    for path in sorted(Path(study).glob("*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["select"] not in ("fgsm", "none"):
            continue
        methods.add(result["method"])
        with open(path.with_name("metrics.csv"), newline="", encoding="utf-8") as file:
            draw_accuracy(left, result, list(csv.DictReader(file)))
        if result["args"]["pretrained"] is None:  # each theta~ once
            rows = result["table2"]
            draw_correct_labels(right, result["method"], rows, "kept_correct", SCAR)
            draw_correct_labels(right, result["method"], rows, "confidence_correct", COMPARED)
    if not methods:
        sys.exit(f"error: {study} has no finished runs")

    for method, name in NAMES.items():
        if method in methods:
            left.plot([], [], color=COLORS[method], label=name)
    left.plot([], [], SCAR, color="black", label="pretraining, then SCAR")
    left.plot([], [], COMPARED, color="black", label="control: nothing added")
    left.set(xlabel="epoch", ylabel="test accuracy (%)")
    left.locator_params(axis="x", integer=True)
    left.legend(loc="lower right")
    right.plot([], [], SCAR, color="black", label="FGSM")
    right.plot([], [], COMPARED, color="black", label="confidence, as many images")
    right.set(xlabel="eps (1/255)", ylabel="correct among the kept labels (%)")
    right.legend(loc="lower left")
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("error: give the folder with the runs and the .svg file to write")
    main(sys.argv[1], sys.argv[2])
