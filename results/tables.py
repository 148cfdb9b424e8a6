"""Makes Table 1 and Table 2 from runs/*/result.json, prints them and writes runs/tables.md.

    python results/tables.py runs

Means are over seeds at equal settings. Runs on other images, or with another network or length,
have tables of their own; runs with any other setting have rows that name it. Gains are paired: both
sides start from the same theta~ (the model after pretraining), identified by a hash of its weights.
A run whose theta~ was pretrained by none of the runs is left out, with a note.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import mean, stdev

TITLES = {"cifar10": "CIFAR-10", "cifar10-jpeg": "CIFAR-10 (JPEG)"}  # others have their names
NAMES = {"vat": "VAT", "mixmatch": "MixMatch", "fixmatch": "FixMatch"}  # in the tables' order
PAPER_TABLE1 = {  # on CIFAR-10: accuracy without and with SCAR
    "vat": ("85.25", "86.79"),
    "mixmatch": ("89.99", "92.99"),
    "fixmatch": ("94.13", "95.17"),
}
PAPER_TABLE2 = {  # sensitivity, specificity
    ("vat", 1): ("92.22 (7587/8227)", "47.10 (835/1773)"),
    ("vat", 2): ("95.76 (6543/6833)", "37.42 (1185/3167)"),
    ("vat", 3): ("97.48 (5494/5636)", "30.55 (1333/4364)"),
    ("vat", 4): ("98.35 (4716/4795)", "26.81 (1396/5205)"),
    ("vat", 6): ("98.93 (3684/3724)", "22.86 (1435/6276)"),
    ("mixmatch", 1): ("98.91 (6054/6124)", "24.13 (936/3879)"),
    ("fixmatch", 1): ("99.59 (6385/6411)", "15.63 (561/3589)"),
}
KINDS = {  # what was added for the fine-tuning, in the tables' order
    "none": "nothing (control)",
    "all": "every pseudo-label (eps 0)",
    "fgsm": "SCAR (eps {:g})",
    "confidence": "the most confident (as many as eps {:g} keeps)",
}
# Runs that differ in TITLE have tables of their own; those that differ in any other setting, rows.
# FREE settings change no result, or are named or averaged over in a row.
TITLE = "num_labeled depth width epochs steps_per_epoch batch_size val image_size".split()
FREE = "seed out data_dir device compile tensorboard pretrained table2_eps select eps".split()
# options that a method does not have, or that only earlier versions had, as they stand when unused
UNUSED = [("reselect", 0), ("true_share", None), ("mu", 1)]


def read_run(path):
    """Reads what the tables need from a result.json; raises an error if any is missing."""
    result = json.loads(path.read_text(encoding="utf-8"))
    args = {"image_size": 32, **result["args"], "ranks": result["ranks"]}
    for name in TITLE:
        args[name] = int(args[name])
    kind = result["select"]
    if kind == "fgsm" and result["eps"] == 0:
        kind = "all"
    selection = result["selection"]
    table2 = {}
    for row in result["table2"]:
        kept = row["kept_correct"], row["kept"]
        rejected = row["rejected_wrong"], row["rejected"]
        table2[row["eps"]] = kept, rejected
    # results of earlier versions identify theta~ only by the folder that pretrained it
    folder_of_theta = Path(args["pretrained"] or path).parent.name
    return {
        "method": result["method"],
        "seed": int(result["seed"]),
        "folder": path.parent.name,
        "theta": result.get("theta", folder_of_theta),
        "pretrains": args["pretrained"] is None,
        "before": result["pretrain_accuracy"],
        "after": result["final_accuracy"],
        "kind": kind,
        "eps": 0 if kind == "none" else result["eps"],
        "added": (selection["kept_correct"], selection["kept"]),
        "unknown": selection.get("added", selection["kept"]) - selection["kept"],
        "table2": table2,
        "data": (TITLES.get(result["data"], result["data"]), result.get("images", "")),
        "args": args,
        "where": f"{result['device']}, torch {result['versions']['torch']}",
        "hours": result["seconds"] / 3600,
    }


def add_title_and_choice(run, pretraining):
    """Adds the keys by which a run finds its table and its rows.

    title: the data and, for each name in TITLE, its values (pretraining's, the run's own); choice:
    all other settings that change a result, except select and eps, as strings.
    """
    before, now = pretraining["args"], run["args"]
    pairs = [(before[name], now[name]) for name in TITLE]
    run["title"] = pretraining["data"], *pairs  # the folder of images may have moved since
    choice = {}
    for name in now:
        first, second = before.get(name, now[name]), now[name]
        is_unused = (name, first) in UNUSED and (name, second) in UNUSED
        if name not in TITLE + FREE and not is_unused:
            choice[name] = then(first, second)
    run["choice"] = tuple(sorted(choice.items()))


def read_runs(out):
    """Reads the runs in a folder that start from a theta~ which one of them pretrained.

    Returns (runs, left_out, errors): runs as in read_run, with title and choice; a Markdown list of
    the runs whose pretraining is not there; sentences on the results that cannot be read.
    """
    runs, errors = [], []
    for path in sorted(out.glob("*/result.json")):
        try:
            runs.append(read_run(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            errors.append(f"{path} is damaged or not a run's result ({type(error).__name__})")
    pretrainings = {}
    for run in runs:
        if run["pretrains"]:
            pretrainings.setdefault(run["theta"], run)
    kept = []
    left_out = ""
    for run in runs:
        if run["theta"] in pretrainings:
            add_title_and_choice(run, pretrainings[run["theta"]])
            kept.append(run)
        else:
            came_from = run["args"]["pretrained"]
            left_out += f"- left out: {run['folder']}; no run here pretrained its theta~ "
            left_out += f"(--pretrained {came_from})\n"
    if not kept:
        errors.append(f"{out} has no finished run whose pretraining is there, too")
    return kept, left_out, errors


def then(before, now):
    """A setting in pretraining and in fine-tuning, as text."""
    return str(now) if before == now else f"{before} then {now}"


def spread(values, sign=""):
    """Mean ± standard deviation and number of values, or a dash."""
    if not values:
        return "-"
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.2f}{deviation} (n = {len(values)})"


def rate(pairs):
    """Percentage of part in whole, averaged over seeds, and the mean counts behind it."""
    percents = [100 * part / whole for part, whole in pairs if whole > 0]
    if len(pairs) > 1:
        part = mean(part for part, _ in pairs)
        whole = mean(whole for _, whole in pairs)
        return f"{spread(percents)}, on average {part:.1f}/{whole:.1f}"
    part, whole = pairs[0]
    return f"{percents[0]:.2f} ({part}/{whole})" if whole > 0 else "none (0/0)"


def labels_added(runs):
    """How many of the added labels are right, and how many cannot be checked."""
    known = rate([run["added"] for run in runs])
    unknown = mean(run["unknown"] for run in runs)
    if unknown == 0:
        return known
    if all(kept == 0 for _, kept in (run["added"] for run in runs)):
        return f"{unknown:g} whose true label is unknown"
    return f"{known}, and {unknown:g} whose true label is unknown"


def first_of_each_seed(runs):
    """Keeps only the first run of each seed."""
    by_seed = {}
    for run in runs:
        by_seed.setdefault(run["seed"], run)
    return list(by_seed.values())


def method_rows(runs, pretrained, label):
    """Rows of both tables for one method's runs at one choice, and notes on runs not counted.

    pretrained: the runs whose theta~ counts towards the first row and Table 2.
    """
    method = runs[0]["method"]
    paper_before, paper_after = PAPER_TABLE1[method]
    control = {}
    for run in runs:
        if run["kind"] == "none":
            control.setdefault(run["theta"], run["after"])  # the first, as in its own row
    pretrained = first_of_each_seed(pretrained)
    first, second, notes = [], [], []
    if pretrained:
        before = spread([run["before"] for run in pretrained])
        first.append([label, paper_before, before, "", "", ""])
    rows = {(list(KINDS).index(run["kind"]), run["eps"]) for run in runs}
    for index, eps in sorted(rows):
        kind = list(KINDS)[index]
        what = f"{label} + {KINDS[kind].format(eps)}"
        same = [run for run in runs if (run["kind"], run["eps"]) == (kind, eps)]
        those = first_of_each_seed(same)
        after = spread([run["after"] for run in those])
        gain = spread([run["after"] - run["before"] for run in those], "+")
        paired = [run for run in those if run["theta"] in control]
        over_control = spread([run["after"] - control[run["theta"]] for run in paired], "+")
        added = labels_added(those)
        if kind == "none":
            over_control = added = ""
        paper = paper_after if kind == "fgsm" else ""
        first.append([what, paper, after, gain, over_control, added])
        alone = [run["folder"] for run in those if run["theta"] not in control]
        if kind != "none" and alone:
            notes.append(
                f"- {what}: left out of the gain over control, because no control with these "
                f"settings starts from the same theta~: {', '.join(alone)}"
            )
        if len(those) < len(same):
            notes.append(f"- {what}: {len(same)} runs; only the first of each seed counts")
    for eps in sorted({eps for run in pretrained for eps in run["table2"]}):
        measured = [run["table2"][eps] for run in pretrained if eps in run["table2"]]
        sensitivity = rate([kept for kept, _ in measured])
        specificity = rate([rejected for _, rejected in measured])
        papers = PAPER_TABLE2.get((method, eps), ("", ""))
        second.append([f"{label} (eps {eps:g})", *papers, sensitivity, specificity])
    return first, second, notes


def markdown(rows, paper_columns, with_paper):
    """The lines of a table; its first row is the heading."""
    lines = []
    for row in rows:
        cells = [cell for i, cell in enumerate(row) if with_paper or i not in paper_columns]
        lines.append(f"| {' | '.join(cells)} |")
        if len(lines) == 1:
            lines.append(f"| {' | '.join('---' for _ in cells)} |")
    return lines


def tables(runs):
    """Both tables of the runs with one title, with notes and settings, as Markdown."""
    (data, images), *pairs = runs[0]["title"]
    pairs = dict(zip(TITLE, pairs))
    value = {name: then(before, now) for name, (before, now) in pairs.items()}
    scored = "test" if value["val"] == "0" else "validation"
    gains = ["gain over pretraining", "gain over control", "labels added, right (%)"]
    first = [[f"Table 1: {scored} accuracy (%)", "paper", "ours"] + gains]
    papers = ["sensitivity, paper", "specificity, paper"]
    ours = ["sensitivity: right among kept (PPV)", "specificity: wrong among rejected (NPV)"]
    second = [[f"Table 2: theta~ on the {scored} images (%)"] + papers + ours]
    notes = []
    settings = []
    for method, name in NAMES.items():
        those = [run for run in runs if run["method"] == method]
        if not those:
            continue
        choices = sorted({run["choice"] for run in those})
        common = set(choices[0]).intersection(*choices)
        for choice in choices:
            own = [
                f"{option} {setting}"
                for option, setting in choice
                if (option, setting) not in common
            ]
            label = ", ".join([name] + own)
            same = [run for run in those if run["choice"] == choice]
            pretrained = [run for run in same if run["pretrains"]]
            if not any(run["pretrains"] for run in those):
                pretrained = same  # a fine-tuning of another length has a table of its own
            rows1, rows2, new_notes = method_rows(same, pretrained, label)
            first += rows1
            second += rows2
            notes += new_notes
        options = ", ".join(f"{option} {setting}" for option, setting in sorted(common))
        seeds = " ".join(str(seed) for seed in sorted({run["seed"] for run in those}))
        settings.append(f"- {name}: {options}; seeds {seeds}")
    epochs, epochs_after = pairs["epochs"]
    head = f"## {data}, {value['num_labeled']} labels, WRN-{value['depth']}-{value['width']}, "
    head += f"{epochs} + {epochs_after} epochs of {value['steps_per_epoch']} steps, "
    head += f"batch {value['batch_size']}"
    if value["image_size"] != "32":
        head += f", {value['image_size']} x {value['image_size']} pixels"
    if value["val"] != "0":
        head += f", scored on {value['val']} validation images"
    with_paper = data == "CIFAR-10"
    lines = [head, "", *markdown(first, [1], with_paper), ""]
    lines += [*markdown(second, [1, 2], with_paper), ""]
    hours = sum(run["hours"] for run in runs)
    where = "; ".join(sorted({run["where"] for run in runs}))
    machine = f"- {hours:.1f} hours on {where}"
    if images:
        machine += f"; images {images}"
    return "\n".join([*lines, *notes, *settings, f"{machine}\n"])


def main(argv=None):
    """Prints and writes the tables; returns 1 if a result is damaged or no run has a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="the folder that holds the run folders")
    out = parser.parse_args(argv).runs
    runs, left_out, errors = read_runs(out)
    parts = []
    for title in sorted({run["title"] for run in runs}):
        parts.append(tables([run for run in runs if run["title"] == title]))
    if left_out:
        parts.append(left_out)
    # names of folders need not be UTF-8
    text = "\n".join(parts).encode("utf-8", "backslashreplace").decode("utf-8")
    print(text, end="")
    if runs:
        # renamed when whole, because several run_all.sh may share a folder
        temporary = out / f".{os.getpid()}-tables.md"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out / "tables.md")
    for sentence in errors:
        print(f"error: {sentence}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
