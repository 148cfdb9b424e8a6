"""Makes the paper's Table 1 and Table 2, with controls: python results/tables.py runs

Reads result.json and test.csv of the finished runs in a folder, prints the tables and writes them
to tables.md there: means over seeds ± standard deviations.

A run starts from theta~, the model after pretraining, which is identified by a hash of its weights.
Its gain over pretraining is its accuracy minus that of its theta~. Its gain over control is its
accuracy minus that of the control, the run that added nothing to the same theta~. z is McNemar's,
(b - c) / sqrt(b + c), where b images are right only with the first of the two models and c only
with the second; each seed has its own, if test.csv is there.

Runs of one method on the same data must agree in all settings that change a result. If they do not,
the settings are named, the method is left out, and the exit code is 1.
"""

import argparse
import csv
import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev

NAMES = {"vat": "VAT", "mixmatch": "MixMatch", "fixmatch": "FixMatch"}  # in the tables' order
KINDS = {  # what was added to theta~'s labels, in the tables' order
    "none": "nothing (control)",
    "all": "every pseudo-label (eps {:g})",
    "fgsm": "SCAR (eps {:g})",
    "confidence": "the most confident (as many as eps {:g} keeps)",
}
TABLE1 = ["Table 1: accuracy (%)", "seeds", "paper", "ours", "gain over pretraining", "z"]
TABLE1 += ["gain over control", "z", "labels added", "correct, where known (%)"]
TABLE2 = ["Table 2", "seeds", "sensitivity, paper", "specificity, paper", "images kept"]
TABLE2 += ["correct among kept (%): sensitivity", "correct among as many by confidence (%)"]
TABLE2 += ["wrong among rejected (%): specificity"]
PAPER_SETTINGS = {"data": "cifar10", "val": 0, "num_labeled": 4000, "image_size": 32}
PAPER_SETTINGS |= {"depth": 28, "width": 2}
PAPER = {  # Table 1: accuracy; Table 2: sensitivity and specificity
    "VAT": ["85.25"],
    "VAT + SCAR (eps 6)": ["86.79"],
    "MixMatch": ["89.99"],
    "MixMatch + SCAR (eps 1)": ["92.99"],
    "FixMatch": ["94.13"],
    "FixMatch + SCAR (eps 1)": ["95.17"],
    "VAT (eps 1)": ["92.22 (7587/8227)", "47.10 (835/1773)"],
    "VAT (eps 2)": ["95.76 (6543/6833)", "37.42 (1185/3167)"],
    "VAT (eps 3)": ["97.48 (5494/5636)", "30.55 (1333/4364)"],
    "VAT (eps 4)": ["98.35 (4716/4795)", "26.81 (1396/5205)"],
    "VAT (eps 6)": ["98.93 (3684/3724)", "22.86 (1435/6276)"],
    "MixMatch (eps 1)": ["98.91 (6054/6124)", "24.13 (936/3879)"],
    "FixMatch (eps 1)": ["99.59 (6385/6411)", "15.63 (561/3589)"],
}
# Options that change no result, or that have a row or a column of their own; theta~'s hash stands
# for pretrained
FREE = "seed select eps table2_eps pretrained out data_dir device compile tensorboard".split()


def read_run(path):
    """A result.json, with the run's place in the tables and what the test.csv beside it says."""
    run = json.loads(path.read_text(encoding="utf-8"))
    run["folder"] = path.parent.name
    data = {"cifar10-jpeg": "CIFAR-10 (JPEG)"}.get(run["data"], run["data"])
    run["title"] = f"{data}, {run['scored_on']} images"
    run["name"] = NAMES[run["method"]]
    kind = "all" if run["select"] == "fgsm" and run["eps"] == 0 else run["select"]
    run["row"] = f"{run['name']} + {KINDS[kind].format(run['eps'])}"
    run["order"] = (list(KINDS).index(kind), run["eps"] if kind != "none" else 0, run["seed"])
    run["settings"] = {name: value for name, value in run["args"].items() if name not in FREE}
    run["settings"] |= {"images": run["images"], "ranks": run["ranks"]}
    run["table2"] = {row["eps"]: row for row in run["table2"]}
    images = []
    if path.with_name("test.csv").exists():
        with open(path.with_name("test.csv"), newline="", encoding="utf-8") as file:
            images = list(csv.DictReader(file))
    right = [image["label"] == image["true_label"] for image in images]
    final_right = [image["final_label"] == image["true_label"] for image in images]
    run["before"] = {"accuracy": float(run["pretrain_accuracy"]), "right": right}
    run["after"] = {"accuracy": float(run["final_accuracy"]), "right": final_right}
    return run


def differences(runs):
    """A text for each setting that is not the same in all runs: its values, and their folders."""
    folders = {}  # setting -> value -> folders
    for run in runs:
        settings = {
            **run["settings"],
            f"theta~ of seed {run['seed']}": run["theta"],
            f"seed of theta~ {run['theta']}": run["seed"],
            f"folder of {run['row']} from theta~ {run['theta']}": run["folder"],  # made twice
        }
        for name, value in settings.items():
            folders.setdefault(name, {}).setdefault(str(value), []).append(run["folder"])
    texts = []
    for name, values in folders.items():
        if len(values) > 1:
            listed = [f"{value} ({', '.join(those)})" for value, those in values.items()]
            texts.append(f"{name}: {'; '.join(listed)}")
    return texts


def seeds(runs):
    """The seeds of the runs, as text."""
    return " ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))


def cell(values, digits=2):
    """The mean of some numbers, and their standard deviation if there are several."""
    values = list(values)
    if not values:
        return ""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def percent(rows, part, whole):
    """The cell for row[part] / row[whole] in percent."""
    return cell(100 * row[part] / row[whole] for row in rows if row[whole] > 0)


def gain(pairs):
    """Two cells: how many points the first model of each pair is ahead of the second, and z."""
    points = cell(first["accuracy"] - second["accuracy"] for first, second in pairs)
    z = []
    for first, second in pairs:
        if first["right"] and second["right"]:
            images = list(zip(first["right"], second["right"], strict=True))
            b, c = images.count((True, False)), images.count((False, True))
            z.append(f"{(b - c) / math.sqrt(max(1, b + c)):.1f}")
    return points, ", ".join(z)


def table1_rows(runs, paper):
    """The rows of Table 1 for the runs of one method."""
    name = runs[0]["name"]
    thetas = {run["theta"]: run["before"]["accuracy"] for run in runs}
    rows = [[name, seeds(runs), *paper.get(name, [""]), cell(thetas.values()), *[""] * 6]]
    controls = {run["theta"]: run["after"] for run in runs if run["select"] == "none"}
    for title in dict.fromkeys(run["row"] for run in runs):
        same = [run for run in runs if run["row"] == title]
        paired = [run for run in same if run["select"] != "none" and run["theta"] in controls]
        points, z = gain([(run["after"], controls[run["theta"]]) for run in paired])
        if 0 < len(paired) < len(same):
            points += f" (seeds {seeds(paired)})"
        selections = [run["selection"] for run in same]
        row = [
            title,
            seeds(same),
            *paper.get(title, [""]),
            cell(run["after"]["accuracy"] for run in same),
            *gain([(run["after"], run["before"]) for run in same]),
            points,
            z,
            cell((selection["added"] for selection in selections), digits=0),
            percent(selections, "kept_correct", "kept"),
        ]
        rows.append(row)
    return rows


def table2_rows(runs, paper):
    """The rows of Table 2 for the runs of one method, one for each eps."""
    rows = []
    for eps in sorted({eps for run in runs for eps in run["table2"]}):
        title = f"{runs[0]['name']} (eps {eps:g})"
        of_theta = {run["theta"]: run for run in runs if eps in run["table2"]}.values()
        counts = [run["table2"][eps] for run in of_theta]
        row = [
            title,
            seeds(of_theta),
            *paper.get(title, ["", ""]),
            cell((row["kept"] for row in counts), digits=0),
            percent(counts, "kept_correct", "kept"),
            percent(counts, "confidence_correct", "kept"),
            percent(counts, "rejected_wrong", "rejected"),
        ]
        rows.append(row)
    return rows


def notes_on(runs):
    """The settings of one method's runs, the machines, and the runs that are missing."""
    options = ", ".join(f"{name} {value}" for name, value in runs[0]["settings"].items())
    machines = sorted({f"{run['device']}, torch {run['versions']['torch']}" for run in runs})
    notes = [f"- {runs[0]['name']}: {options}; on {'; '.join(machines)}"]
    controlled = {run["theta"] for run in runs if run["select"] == "none"}
    pretrained = {run["theta"] for run in runs if run["args"]["pretrained"] is None}
    for run in runs:
        if run["theta"] not in controlled:
            notes.append(f"- missing: a control from the theta~ of {run['folder']}")
        if run["theta"] not in pretrained:
            notes.append(f"- missing: the run that pretrained the theta~ of {run['folder']}")
    return notes


def markdown(heading, rows):
    """The lines of a table, without the columns that are empty in all rows."""
    used = [i for i in range(len(heading)) if any(row[i] for row in rows)]
    lines = [f"| {' | '.join(row[i] for i in used)} |" for row in [heading, *rows]]
    return [lines[0], f"|{'---|' * len(used)}", *lines[1:], ""]


def main(argv=None):
    """Prints and writes the tables; returns 1 if a run or a method is left out."""
    parser = argparse.ArgumentParser(description="Makes Table 1 and Table 2 from finished runs.")
    parser.add_argument("runs", type=Path, help="the folder that holds the run folders")
    folder = parser.parse_args(argv).runs
    paths = sorted(folder.glob("*/result.json"))
    if not paths:
        parser.error(f"{folder} holds no finished run")
    runs, errors = [], []
    for path in paths:
        try:
            runs.append(read_run(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            errors.append(f"error: {path} is damaged, or of another version: {error!r}")

    runs.sort(key=lambda run: run["order"])
    lines = []
    for title in sorted({run["title"] for run in runs}):
        table1, table2, notes = [], [], []
        for name in NAMES.values():
            same = [run for run in runs if (run["title"], run["name"]) == (title, name)]
            differing = differences(same)
            for text in differing:
                errors.append(f"error: {title}: {name} is left out; its runs differ in {text}")
            if same and not differing:
                as_in_paper = PAPER_SETTINGS.items() <= same[0]["settings"].items()
                paper = PAPER if as_in_paper else {}
                table1 += table1_rows(same, paper)
                table2 += table2_rows(same, paper)
                notes += notes_on(same)
        if notes:
            lines += [f"## {title}", "", *markdown(TABLE1, table1), *markdown(TABLE2, table2)]
            lines += [*notes, ""]
    text = "\n".join([*lines, *errors, ""])
    (folder / "tables.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
