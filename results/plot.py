"""Draws the figure of results/README.md from the runs of a folder; needs matplotlib.

    python results/plot.py results/cpu results/cpu.svg

Left: test accuracy over epochs, of the pretraining and from its theta~ on with SCAR (solid) and
in the control (dashed). Right: what the attack on theta~ leaves over eps, on the test images:
sensitivity (solid) and the share of images kept (dotted).
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

NAMES = {"vat": "VAT", "mixmatch": "MixMatch", "fixmatch": "FixMatch"}
COLOURS = {"vat": "C0", "mixmatch": "C1", "fixmatch": "C2"}
LINES = {"fgsm": "-", "none": "--"}


def read_runs(folder):
    """The SCAR run and the control of each method at its default lambda_u and eps, with seed 0.

    A list of (result.json's content, rows of metrics.csv).
    """
    runs = []
    for path in sorted(Path(folder).glob("*/result.json")):
        result = json.loads(path.read_text())
        usual = {"vat": (6.0, 0.3), "mixmatch": (1.0, 0.75), "fixmatch": (1.0, 1.0)}
        settings = (result["eps"], result["args"]["lambda_u"])
        other = result["seed"] or result["args"]["val"] or result["args"].get("true_share")
        if other or result["select"] not in LINES or settings != usual[result["method"]]:
            continue
        with open(path.with_name("metrics.csv"), newline="") as file:
            runs.append((result, list(csv.DictReader(file))))
    return runs


def draw_accuracy(axes, result, rows):
    """A run's accuracy over the epochs of both phases; theta~ is where the second one starts."""
    colour = COLOURS[result["method"]]
    points = {
        phase: [row for row in rows if row["phase"] == phase] for phase in ("pretrain", "finetune")
    }
    epochs = len(points["finetune"])
    for phase, offset, line in (
        ("pretrain", 1, "-"),
        ("finetune", epochs, LINES[result["select"]]),
    ):
        accuracy = [float(row["accuracy"]) for row in points[phase]]
        if phase == "finetune":
            accuracy.insert(0, result["pretrain_accuracy"])
        axes.plot(range(offset, offset + len(accuracy)), accuracy, line, color=colour)


def draw_table2(axes, kept_axes, result):
    """Sensitivity and the share of images kept over eps."""
    method, table2 = result["method"], [row for row in result["table2"] if row["kept"]]
    eps = [row["eps"] for row in table2]
    share = [100 * row["kept"] / (row["kept"] + row["rejected"]) for row in table2]
    sensitivity = [row["sensitivity"] for row in table2]
    axes.plot(eps, sensitivity, "o-", color=COLOURS[method])
    kept_axes.plot(eps, share, "o:", color=COLOURS[method], markerfacecolor="white")


def main(folder, target):
    """Reads the runs in folder, writes the figure to target."""
    try:
        runs = read_runs(folder)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"error: {folder} holds a damaged run ({error})")
    if not runs:
        sys.exit(f"error: {folder} has no finished runs of seed 0 at default lambda_u and eps")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "scar"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    kept_axes = right.twinx()
    for result, rows in runs:
        draw_accuracy(left, result, rows)
        if result["select"] == "fgsm":
            draw_table2(right, kept_axes, result)
    for method in sorted({result["method"] for result, _ in runs}):
        left.plot([], [], color=COLOURS[method], label=NAMES[method])
    left.plot([], [], "k-", label="pretraining, then SCAR")
    left.plot([], [], "k--", label="control: nothing added")
    left.set(xlabel="epoch", ylabel="test accuracy (%)")
    left.legend(loc="lower right")
    right.set(xlabel="eps (1/255)", ylabel="sensitivity of theta~ (%), solid")
    kept_axes.set(ylabel="images kept (%), dotted", ylim=(0, 100))
    figure.savefig(target, metadata={"Date": None} if str(target).endswith(".svg") else None)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("error: give the folder with the runs and the file to write")
    main(*sys.argv[1:])
