"""Makes Table 1 and Table 2 from runs/*/result.json, prints them and writes runs/tables.md.

    python results/tables.py runs

A mean is over seeds at equal settings: runs of another data set, network or length have tables of
their own, those of any other setting rows that name it. Gains are paired: both sides come from the
same theta~ (the model after pretraining), known by the name of the run folder that pretrained it.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev

PAPER = {  # on CIFAR-10: name, accuracy without and with SCAR; by eps: sensitivity, specificity
    "vat": ("VAT", "85.25", "86.79", {
        1: ("92.22 (7587/8227)", "47.10 (835/1773)"),
        2: ("95.76 (6543/6833)", "37.42 (1185/3167)"),
        3: ("97.48 (5494/5636)", "30.55 (1333/4364)"),
        4: ("98.35 (4716/4795)", "26.81 (1396/5205)"),
        6: ("98.93 (3684/3724)", "22.86 (1435/6276)"),
    }),
    "mixmatch": ("MixMatch", "89.99", "92.99", {1: ("98.91 (6054/6124)", "24.13 (936/3879)")}),
    "fixmatch": ("FixMatch", "94.13", "95.17", {1: ("99.59 (6385/6411)", "15.63 (561/3589)")}),
}  # fmt: skip
ROWS = {  # in the tables' order
    "none": "nothing (control)",
    "all": "every pseudo-label (eps 0)",
    "fgsm": "SCAR (eps {:g})",
    "confidence": "the most confident (as many as eps {:g} keeps)",
}
TITLE = "num_labeled depth width epochs steps_per_epoch batch_size val image_size".split()
# What changes no result or makes a row of its own; options of earlier versions, where not used.
FREE = "seed out data_dir device compile tensorboard pretrained table2_eps select eps".split()
UNUSED = [("reselect", 0), ("true_share", None), ("mu", 1)]


def read_run(path):
    """What the tables need of a result.json; an error where that is not in it."""
    run = json.loads(path.read_text())
    args, eps, added, settings = run["args"], run["eps"], run["selection"], {"image_size": 32}
    settings |= args | {"ranks": run["ranks"]}
    kind = "all" if (run["select"], eps) == ("fgsm", 0) else run["select"]
    return {
        "method": run["method"], "name": PAPER[run["method"]][0], "seed": int(run["seed"]),
        "folder": path.parent.name, "theta": Path(args["pretrained"] or path).parent.name,
        "before": run["pretrain_accuracy"], "after": run["final_accuracy"], "kind": kind,
        "row": (list(ROWS).index(kind), 0 if kind == "none" else eps, ROWS[kind].format(eps)),
        "added": (added["kept_correct"], added["kept"]),
        "table2": {row["eps"]: ((row["kept_correct"], row["kept"]),
                                (row["rejected_wrong"], row["rejected"])) for row in run["table2"]},
        "title": (run["data"], *(int(settings[name]) for name in TITLE)),
        "choice": {name: str(value) for name, value in settings.items()
                   if name not in [*TITLE, *FREE] and (name, value) not in UNUSED},
        "where": f"{run['device']}, torch {run['versions']['torch']}",
        "hours": run["seconds"] / 3600,
    }  # fmt: skip


def spread(values, sign=""):
    """Mean ± standard deviation and number, or a dash."""
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.2f}{deviation} (n = {len(values)})" if values else "-"


def rate(pairs):
    """Percent from the (part, whole) of each seed, with the mean numbers behind it."""
    percents = [100 * part / whole for part, whole in pairs if whole]
    if len(pairs) == 1:
        return "{:.2f} ({}/{})".format(*percents, *pairs[0]) if percents else "none (0/0)"
    parts, wholes = map(mean, zip(*pairs))
    return f"{spread(percents)}, on average {parts:.1f}/{wholes:.1f}"


def rows_of(runs, label):
    """Rows for Table 1 and Table 2 of a method's runs at one choice, and notes on what lacks."""
    _, paper_before, paper_after, paper = PAPER[runs[0]["method"]]
    pretrained = [run for run in reversed(runs) if run["theta"] == run["folder"]]
    control = {run["theta"]: run["after"] for run in runs if run["kind"] == "none"}
    before = spread([*{run["seed"]: run["before"] for run in pretrained}.values()])
    first, second, notes, by_eps = [[label, paper_before, before, "", "", ""]], [], [], {}
    for row in sorted({run["row"] for run in runs}):
        same = [run for run in reversed(runs) if run["row"] == row]
        those = [*{run["seed"]: run for run in same}.values()]  # the first of each seed
        what, kind = f"{label} + {row[2]}", same[0]["kind"]
        over = [run["after"] - control[run["theta"]] for run in those if run["theta"] in control]
        end = [spread(over, "+"), rate([run["added"] for run in those])]
        gain = spread([run["after"] - run["before"] for run in those], "+")
        ours, end = spread([run["after"] for run in those]), ["", ""] if kind == "none" else end
        first.append([what, paper_after if kind == "fgsm" else "", ours, gain, *end])
        if kind == "fgsm" and len(over) < len(those):
            notes.append(f"- {what} lacks a control, which tells what more epochs alone gain")
        if len(those) < len(same):
            notes.append(f"- {what}: {len(same)} runs, of which the first of each seed counts")
    for run in pretrained:
        for eps, pairs in run["table2"].items():
            by_eps.setdefault(eps, {})[run["seed"]] = pairs
    for eps, seeds in sorted(by_eps.items()):
        cells = paper.get(eps, ("", ""))
        second.append([f"{label} (eps {eps:g})", *cells, *map(rate, zip(*seeds.values()))])
    return first if pretrained else first[1:], second, notes


def tables(runs):
    """Both tables of runs of one title, notes and settings below them: Markdown."""
    data, labels, depth, width, epochs, steps, batch, val, size = runs[0]["title"]
    scored, notes, settings = "validation" if val else "test", [], []
    first = [[f"Table 1: {scored} accuracy (%)", "paper", "ours", "gain over pretraining",
              "gain over control", "labels added, right (%)"]]  # fmt: skip
    second = [[f"Table 2: theta~ on the {scored} images (%)", "sensitivity, paper",
               "specificity, paper", "sensitivity: right among kept (PPV)",
               "specificity: wrong among rejected (NPV)"]]  # fmt: skip
    for method in sorted({run["method"] for run in runs}, key=list(PAPER).index):
        those = [run for run in runs if run["method"] == method]
        choices = sorted({tuple(sorted(run["choice"].items())) for run in those})
        common, name = set.intersection(*map(set, choices)), those[0]["name"]
        for one in choices:
            label = ", ".join([name, *(f"{key} {value}" for key, value in one
                                       if (key, value) not in common)])  # fmt: skip
            parts = rows_of([run for run in those if run["choice"] == dict(one)], label)
            first, second, notes = (old + new for old, new in zip((first, second, notes), parts))
        told = ", ".join(f"{key} {value}" for key, value in sorted(common))
        seeds = " ".join(map(str, sorted({run["seed"] for run in those})))
        settings.append(f"- {name}: {told}; seeds {seeds}")
    where, hours = "; ".join(sorted({run["where"] for run in runs})), sum(r["hours"] for r in runs)
    head = f"## {data}, {labels} labels, WRN-{depth}-{width}, {epochs} + {epochs} epochs of "
    head += f"{steps} steps, batch {batch}" + f", {size} x {size} pixels" * (size != 32)
    lines = [head + f", scored on {val} validation images" * bool(val), ""]
    for rows, paper in ((first, (1,)), (second, (1, 2))):
        rows = [[cell for i, cell in enumerate(row) if data == "CIFAR-10" or i not in paper]
                for row in rows]  # fmt: skip
        rows.insert(1, ["---"] * len(rows[0]))
        lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join([*lines, *notes, *settings, f"- {hours:.1f} hours on {where}\n"])


def main(argv=None):
    """Prints and writes the tables; the exit code is 1 where a file is damaged or none there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="the folder that holds the run folders")
    out, runs, errors = parser.parse_args(argv).runs, [], []
    for path in sorted(out.glob("*/result.json")):
        try:
            runs.append(read_run(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            errors.append(f"{path} is damaged or another kind of file ({type(error).__name__})")
    thetas = {run["folder"] for run in runs if run["theta"] == run["folder"]}
    kept = [run for run in runs if run["theta"] in thetas]
    titles = sorted({run["title"] for run in kept})
    parts = [tables([run for run in kept if run["title"] == title]) for title in titles]
    left = [f"- left out: {run['folder']}, whose pretraining, {run['theta']}, is not here\n"
            for run in runs if run["theta"] not in thetas]  # fmt: skip
    text = "\n".join([*parts, "".join(left)] if left else parts)
    print(text, end="")
    if kept:
        (out / "tables.md").write_text(text, encoding="utf-8")
    else:
        errors.append(f"there is no finished run in {out}")
    for sentence in errors:
        print(f"error: {sentence}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
