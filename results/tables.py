"""Makes the paper's Table 1 and Table 2, with controls: python results/tables.py runs

Reads result.json and test.csv of the finished runs in a folder, prints the tables and writes them
to tables.md there: means over seeds ± standard deviations.

A gain compares two models that share one theta~ (the model after pretraining, known by a hash of
its weights): a fine-tuned model with theta~ itself, or with the control, which was fine-tuned from
the same theta~ with nothing added. z is McNemar's, (b - c) / sqrt(b + c), where b images are right
only with the first of the two models and c only with the second; each seed has its own.

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
KINDS = {  # what was added for the fine-tuning, in the tables' order
    "none": "nothing (control)",
    "all": "every pseudo-label (eps {:g})",
    "fgsm": "SCAR (eps {:g})",
    "confidence": "the most confident (as many as eps {:g} keeps)",
}
TABLE1 = ["Table 1: accuracy (%)", "seeds", "paper", "ours", "gain over pretraining", "z"]
TABLE1 += ["gain over control", "z", "labels added", "right (%)"]
TABLE2 = ["Table 2", "seeds", "sensitivity, paper", "specificity, paper", "images kept"]
TABLE2 += ["right among kept (%): sensitivity", "right among as many by confidence (%)"]
TABLE2 += ["wrong among rejected (%): specificity"]
PAPER = {"data": "cifar10", "val": 0, "num_labeled": 4000, "depth": 28, "width": 2}
PAPER_TABLE1 = {  # without and with SCAR
    "vat": ("85.25", "86.79"),
    "mixmatch": ("89.99", "92.99"),
    "fixmatch": ("94.13", "95.17"),
}
PAPER_TABLE2 = {  # eps: sensitivity and specificity
    "vat": {
        1: ("92.22 (7587/8227)", "47.10 (835/1773)"),
        2: ("95.76 (6543/6833)", "37.42 (1185/3167)"),
        3: ("97.48 (5494/5636)", "30.55 (1333/4364)"),
        4: ("98.35 (4716/4795)", "26.81 (1396/5205)"),
        6: ("98.93 (3684/3724)", "22.86 (1435/6276)"),
    },
    "mixmatch": {1: ("98.91 (6054/6124)", "24.13 (936/3879)")},
    "fixmatch": {1: ("99.59 (6385/6411)", "15.63 (561/3589)")},
}
# Settings that change no result, or that a row names (select, eps) or averages over (seed)
FREE = "seed select eps table2_eps pretrained out data_dir device compile tensorboard".split()


def read_run(path):
    """A result.json, with what follows from it and from the test.csv beside it."""
    run = json.loads(path.read_text(encoding="utf-8"))
    run["folder"] = path.parent.name
    name = {"cifar10-jpeg": "CIFAR-10 (JPEG)"}.get(run["data"], run["data"])
    run["title"] = f"{name}, {run['scored_on']} images"
    if run["select"] == "none":
        run["eps"] = 0  # nothing was attacked
    run["kind"] = "all" if run["select"] == "fgsm" and run["eps"] == 0 else run["select"]
    run["settings"] = {name: value for name, value in run["args"].items() if name not in FREE}
    run["settings"] |= {"images": run["images"], "ranks": run["ranks"]}
    run["table2"] = {row["eps"]: row for row in run["table2"]}
    run["right_before"], run["right_after"] = [], []  # for each image that was scored
    if path.with_name("test.csv").exists():
        with open(path.with_name("test.csv"), newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                run["right_before"].append(row["label"] == row["true_label"])
                run["right_after"].append(row["final_label"] == row["true_label"])
    return run


def disagreements(runs):
    """A sentence for each setting that runs of one method do not share: its values, their folders.

    Nor can a second theta~ of a seed be averaged, or a second run of one kind from a theta~.
    """
    folders = {}  # setting -> value -> folders
    for run in runs:
        settings = {**run["settings"], f"theta~ of seed {run['seed']}": run["theta"]}
        settings[f"folder of {run['kind']}, eps {run['eps']:g}, seed {run['seed']}"] = run["folder"]
        for name, value in settings.items():
            folders.setdefault(name, {}).setdefault(str(value), []).append(run["folder"])
    sentences = []
    for name, values in folders.items():
        if len(values) > 1:
            which = "; ".join(f"{value} ({', '.join(those)})" for value, those in values.items())
            sentences.append(
                f"{NAMES[run['method']]} is left out; its runs differ in {name}: {which}"
            )
    return sentences


def seeds(runs):
    """The seeds of the runs, as text."""
    return " ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))


def cell(values):
    """The mean of numbers, and their standard deviation if there are several."""
    values = list(values)
    if not values:
        return ""
    digits = 0 if all(isinstance(value, int) for value in values) else 2
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def percent(rows, part, whole):
    """The mean share of a part in a whole, two columns of the rows, in percent."""
    return cell(100 * row[part] / row[whole] for row in rows if row[whole] > 0)


def mcnemar(pairs):
    """z of each pair of models. A model is a list that says for each image whether it is right."""
    z = []
    for first, second in pairs:
        b = sum(one and not other for one, other in zip(first, second))
        c = sum(other and not one for one, other in zip(first, second))
        if first and second:
            z.append(f"{(b - c) / math.sqrt(max(1, b + c)):.1f}")
    return ", ".join(z)


def table1_rows(runs, paper):
    """Rows of Table 1 for the runs of one method. paper: accuracy without and with SCAR."""
    method = NAMES[runs[0]["method"]]
    thetas = {run["theta"]: run["pretrain_accuracy"] for run in runs}
    rows = [[method, seeds(runs), paper[0], cell(thetas.values()), *[""] * 6]]
    controls = {run["theta"]: run for run in runs if run["kind"] == "none"}
    for kind, title in KINDS.items():
        for eps in sorted({run["eps"] for run in runs if run["kind"] == kind}):
            same = [run for run in runs if (run["kind"], run["eps"]) == (kind, eps)]
            pairs = []
            if kind != "none":
                pairs = [(run, controls[run["theta"]]) for run in same if run["theta"] in controls]
            selections = [run["selection"] for run in same]
            row = [
                f"{method} + {title.format(eps)}",
                seeds(same),
                paper[1] if kind == "fgsm" else "",
                cell(run["final_accuracy"] for run in same),
                cell(run["final_accuracy"] - run["pretrain_accuracy"] for run in same),
                mcnemar([(run["right_after"], run["right_before"]) for run in same]),
                cell(run["final_accuracy"] - control["final_accuracy"] for run, control in pairs),
                mcnemar([(run["right_after"], control["right_after"]) for run, control in pairs]),
                cell(selection["added"] for selection in selections),
                percent(selections, "kept_correct", "kept"),
            ]
            rows.append(row)
    return rows


def table2_rows(runs, paper):
    """Rows of Table 2 for the runs of one method. paper: sensitivity and specificity by eps."""
    rows = []
    for eps in sorted({eps for run in runs for eps in run["table2"]}):
        measured = {run["theta"]: run for run in runs if eps in run["table2"]}.values()
        counts = [run["table2"][eps] for run in measured]
        row = [
            f"{NAMES[runs[0]['method']]} (eps {eps:g})",
            seeds(measured),
            *paper.get(eps, ("", "")),
            cell(row["kept"] for row in counts),
            percent(counts, "kept_correct", "kept"),
            percent(counts, "confidence_correct", "kept"),
            percent(counts, "rejected_wrong", "rejected"),
        ]
        rows.append(row)
    return rows


def notes_on(runs):
    """What the runs of one method were asked for, took, and lack."""
    method, settings = NAMES[runs[0]["method"]], runs[0]["settings"]
    options = ", ".join(f"{name} {value}" for name, value in settings.items())
    machines = sorted({f"{run['device']}, torch {run['versions']['torch']}" for run in runs})
    hours = sum(run["seconds"] for run in runs) / 3600
    notes = [f"- {method}: {options}; {hours:.1f} hours on {'; '.join(machines)}"]
    controlled = {run["theta"] for run in runs if run["kind"] == "none"}
    alone = [run["folder"] for run in runs if run["theta"] not in controlled]
    if alone:
        notes.append(f"- {method}: no control has the theta~ of {', '.join(alone)}")
    return notes


def markdown(heading, rows):
    """The lines of a table, without the columns that are empty in all rows."""
    used = [i for i in range(len(heading)) if any(row[i] for row in rows)]
    lines = [f"| {' | '.join(row[i] for i in used)} |" for row in [heading, *rows]]
    return [lines[0], f"|{'---|' * len(used)}", *lines[1:], ""]


def main(argv=None):
    """Prints and writes the tables; returns 1 if there is a result that they leave out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="the folder that holds the run folders")
    folder = parser.parse_args(argv).runs
    runs, errors = [], []
    for path in sorted(folder.glob("*/result.json")):
        try:
            runs.append(read_run(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            errors.append(f"{path} is damaged, or of another version: {error!r}")
    if not runs:
        errors.append(f"{folder} has no finished run")

    runs.sort(key=lambda run: run["seed"])
    lines = []
    for title in sorted({run["title"] for run in runs}):
        table1, table2, notes = [], [], []
        for method in NAMES:
            same = [run for run in runs if (run["title"], run["method"]) == (title, method)]
            differences = disagreements(same)
            errors += differences
            if same and not differences:
                settings = same[0]["settings"]
                as_in_paper = all(settings[name] == PAPER[name] for name in PAPER)
                table1 += table1_rows(same, PAPER_TABLE1[method] if as_in_paper else ("", ""))
                table2 += table2_rows(same, PAPER_TABLE2[method] if as_in_paper else {})
                notes += notes_on(same)
        if notes:
            lines += [f"## {title}", "", *markdown(TABLE1, table1), *markdown(TABLE2, table2)]
            lines += [*notes, ""]
    text = "\n".join(lines)
    print(text, end="")
    if text:
        (folder / "tables.md").write_text(text, encoding="utf-8")
    for sentence in errors:
        print(f"error: {sentence}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
