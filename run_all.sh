#!/usr/bin/env bash
# Table 1 and Table 2: for every method and seed a SCAR run and, from its pretraining, the controls.
#
#   bash run_all.sh                               the paper's runs, three seeds, one after the other
#   GPUS="0 1 2 3" bash run_all.sh                the same, one run at a time on each of these GPUs
#   SEEDS=0 EPOCHS=50 OUT=runs/short bash run_all.sh --width 1      options go to every script
#   CONTROLS="none confidence eps0" bash run_all.sh                 more rows for Table 1
#   TAG=lambda75 METHODS=mixmatch bash run_all.sh --lambda-u 75     beside the runs without it
#   METHODS= OUT=results/table1 bash run_all.sh   the tables alone, from OUT/*/result.json
#
# Stopped and given again, it goes on where it was. The tables are printed and kept in
# OUT/tables.md. Exit code 0: done; 1: a run failed, or a result.json is damaged or missing;
# 2: refused; 130, 143: stopped.

set -u
export LC_ALL=C
SEEDS=${SEEDS-0 1 2} EPOCHS=${EPOCHS-200} DATA=${DATA-cifar10} DATA_DIR=${DATA_DIR-data}
OUT=${OUT-runs} GPUS=${GPUS-} METHODS=${METHODS-vat mixmatch fixmatch} PYTHON=${PYTHON-python}
CONTROLS=${CONTROLS-none} TAG=${TAG-}
here=$(cd "$(dirname "$0")" && pwd)

refuse() {
    echo "error: $1" >&2
    exit 2
}

# ---- the settings, checked -----------------------------------------------------------------------

case $DATA in
    cifar10 | folder | synthetic) ;;
    *) refuse "DATA=$DATA: choose cifar10, folder or synthetic" ;;
esac
for number in $EPOCHS $SEEDS; do
    [[ $number =~ ^[0-9]+$ ]] || refuse "EPOCHS and SEEDS are whole numbers, not '$number'"
done
for method in $METHODS; do
    case $method in
        vat | mixmatch | fixmatch) ;;
        *) refuse "METHODS: there is no method '$method'; choose from vat, mixmatch, fixmatch" ;;
    esac
done
for control in $CONTROLS; do
    case $control in
        none | confidence | eps0) ;;
        *) refuse "CONTROLS: there is no '$control'; choose from none, confidence, eps0" ;;
    esac
done
case $TAG in
    *[!A-Za-z0-9._-]*) refuse "TAG=$TAG: use letters, digits and ._-" ;;
esac

given_eps=
previous=
for word in "$@"; do
    case $word in
        --data | --data=* | --data-dir | --data-dir=* | --epochs | --epochs=* | --seed | --seed=*)
            refuse "${word%%=*}: set DATA, DATA_DIR, EPOCHS or SEEDS before the command instead" ;;
        --out | --out=* | --select | --select=* | --pretrained | --pretrained=*)
            refuse "${word%%=*} differs from run to run and is set by run_all.sh; see also OUT" ;;
        --eps=*) given_eps=${word#*=} ;;
        -h | --help)
            sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
            exit 0 ;;
    esac
    [ "$previous" != --eps ] || given_eps=$word
    previous=$word
done
if [[ " $CONTROLS " = *" eps0 "* && $(printf %g "${given_eps:-1}" 2> /dev/null) = 0 ]]; then
    refuse "--eps 0 is what the control eps0 does; leave one of them out"
fi

command -v "$PYTHON" > /dev/null || refuse "PYTHON=$PYTHON: there is no such program"
[ -n "$METHODS" ] || [ -d "$OUT" ] || refuse "OUT=$OUT: there is no such folder"
OUT=${OUT%/}
mkdir -p "$OUT" 2> /dev/null && [ -w "$OUT" ] || refuse "OUT=$OUT cannot be written; choose another"

GPUS=${GPUS//,/ }
gpu_count=$(wc -w <<< "$GPUS")
if [ -n "$METHODS" ] && [ "$gpu_count" -gt 0 ]; then
    found=$(CUDA_VISIBLE_DEVICES=$(echo $GPUS | tr ' ' ,) "$PYTHON" -c \
        'import torch; print(torch.cuda.device_count())')
    [ "$found" = "$gpu_count" ] ||
        refuse "GPUS=$GPUS: PyTorch can use $found of them; nvidia-smi -L lists what there is"
fi

if [ -n "$METHODS" ] && [ "$DATA" = cifar10 ]; then # once, before several runs want it
    "$PYTHON" - "$here" "$DATA_DIR" << 'FETCH' || exit 2
import sys

sys.path.insert(0, sys.argv[1])
from common import load_images

try:
    load_images("cifar10", sys.argv[2])
except ValueError as error:
    sys.exit(f"error: {error}")
FETCH
fi

# ---- the runs ------------------------------------------------------------------------------------

run() { # method seed select [option ...], in the background, so that a signal can stop it
    local method=$1 seed=$2 select=$3
    shift 3
    "$PYTHON" "$here/${method}_scar.py" --data "$DATA" --data-dir "$DATA_DIR" --epochs "$EPOCHS" \
        --seed "$seed" --select "$select" --out "$(folder "$method" "$seed" "$select")" "$@" &
    child=$!
    wait "$child"
}

folder() { # method seed select: the script's own default, in OUT, with TAG behind it
    local name=$DATA eps=$given_eps
    [ "$DATA" != folder ] || name=$(basename "$(realpath -m "$DATA_DIR")")
    [ -n "$eps" ] || { [ "$1" = vat ] && eps=6 || eps=1; }
    echo "$OUT/$1__${name}__$3-eps$(printf %g "$eps" 2> /dev/null)__seed$2${TAG:+__$TAG}"
}

rows() { # method seed [option ...]: SCAR, then the controls from the same pretraining
    local method=$1 seed=$2 code=0 control theta
    shift 2
    theta=$(folder "$method" "$seed" fgsm)/pretrain.pt
    child=
    trap '[ -z "$child" ] || { kill "$child" 2> /dev/null; wait "$child"; }; exit 143' TERM
    echo "== $method, seed $seed, SCAR"
    run "$method" "$seed" fgsm "$@" || return 1
    for control in $CONTROLS; do
        echo "== $method, seed $seed, control: $control"
        case $control in
            eps0) given_eps=0 run "$method" "$seed" fgsm --table2-eps 1 "$@" --eps 0 \
                --pretrained "$theta" || code=2 ;;
            *) run "$method" "$seed" "$control" --table2-eps 1 "$@" \
                --pretrained "$theta" || code=2 ;;
        esac
    done
    return "$code"
}

stop() {
    trap - INT TERM HUP # a second signal ends this at once
    kill $(jobs -p) 2> /dev/null
    wait
    echo "run_all.sh stopped; the same command goes on" >&2
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM HUP

# Descriptor 3 holds the names of the free GPUs, a line each; an empty one where GPUS is empty.
pipe=$(mktemp -u)
mkfifo "$pipe"
exec 3<> "$pipe"
rm "$pipe"
printf '%s\n' $GPUS >&3 # without a GPU that is an empty line

jobs=()
for seed in $SEEDS; do
    for method in $METHODS; do
        read -r gpu <&3
        (
            [ -z "$gpu" ] || export CUDA_VISIBLE_DEVICES=$gpu
            if [ "$gpu_count" -gt 1 ]; then
                log=$OUT/${method}__seed$seed${TAG:+__$TAG}.log
                echo "$method, seed $seed: on GPU $gpu, output in $log"
                exec >> "$log" 2>&1
            fi
            rows "$method" "$seed" "$@"
            code=$?
            echo "$gpu" >&3
            exit "$code"
        ) &
        jobs+=("$! $method $seed")
    done
done

failed=()
for job in ${jobs[@]+"${jobs[@]}"}; do
    read -r pid method seed <<< "$job"
    wait "$pid"
    case $? in
        0) ;;
        2) failed+=("a control of $method, seed $seed") ;;
        *) failed+=("$method, seed $seed (so its controls were not run)") ;;
    esac
done

# ---- the tables ----------------------------------------------------------------------------------

"$PYTHON" - "$OUT" << 'TABLES'
"""Makes Table 1 and Table 2 from OUT/*/result.json; prints them and writes OUT/tables.md."""
import json
import os
import sys
from pathlib import Path
from statistics import mean, stdev

PAPER = {  # name, accuracy without and with SCAR; by eps: sensitivity, specificity
    "vat": ("VAT", "85.25", "86.79", {
        1: ("92.22 (7587/8227)", "47.10 (835/1773)"),
        2: ("95.76 (6543/6833)", "37.42 (1185/3167)"),
        3: ("97.48 (5494/5636)", "30.55 (1333/4364)"),
        4: ("98.35 (4716/4795)", "26.81 (1396/5205)"),
        6: ("98.93 (3684/3724)", "22.86 (1435/6276)"),
    }),
    "mixmatch": ("MixMatch", "89.99", "92.99", {1: ("98.91 (6054/6124)", "24.13 (936/3879)")}),
    "fixmatch": ("FixMatch", "94.13", "95.17", {1: ("99.59 (6385/6411)", "15.63 (561/3589)")}),
}
TITLE = ("num_labeled", "depth", "width", "epochs", "steps_per_epoch", "batch_size", "val")
# What runs of one mean may differ in: the seed, what changes no result, and what is a row's own.
FREE = {"seed", "out", "data_dir", "device", "compile", "tensorboard", "pretrained", "table2_eps",
        "select", "eps", "reselect", "true_share"}
ROWS = {"fgsm": "SCAR (eps {})", "none": "nothing (control)",
        "confidence": "the most confident (as many as eps {} keeps)"}
ORDER = ("none", "fgsm", "confidence")
# Named in a row where it is used; --reselect was tried, and taken out (results/settings, README).
UNUSED = {"reselect": 0, "true_share": None}


def read(path):
    """What the tables need of a result.json, checked."""
    run = json.loads(path.read_text())
    args, accuracies = run["args"], (float(run["pretrain_accuracy"]), float(run["final_accuracy"]))
    theta = args["pretrained"] and Path(args["pretrained"]).parent.name
    select, eps = run["select"], float(run["eps"])
    table2 = {float(row["eps"]): ((int(row["kept_correct"]), int(row["kept"])),
                                  (int(row["rejected_wrong"]), int(row["rejected"])))
              for row in run["table2"]}
    if not all(0 <= accuracy <= 100 for accuracy in accuracies) or any(
        not 0 <= part <= whole for counts in table2.values() for part, whole in counts
    ):
        raise ValueError
    what = "every pseudo-label (eps {})" if (select, eps) == ("fgsm", 0) else ROWS[select]
    used = [f", {name} {args[name]}" for name in UNUSED
            if name in args and args[name] != UNUSED[name]]
    added = run["selection"]
    settings = {name: str(args[name]) for name in args.keys() - FREE - set(TITLE)}
    return {
        "method": str(run["method"]), "name": PAPER[run["method"]][0], "seed": int(run["seed"]),
        "table2": table2, "added": (int(added["kept_correct"]), int(added["kept"])),
        "folder": path.parent.name, "theta": theta or path.parent.name,
        "before": accuracies[0], "after": accuracies[1],
        "title": (str(run["data"]), *(int(args[name]) for name in TITLE)),
        "settings": {**settings, "ranks": str(run["ranks"])},
        "row": (select, -1.0 if select == "none" else eps, what.format(f"{eps:g}{''.join(used)}")),
        "where": f"{run['device']}, torch {run['versions']['torch']}",
        "hours": float(run["seconds"]) / 3600,
    }


def spread(values, sign=""):
    """Mean, standard deviation and number, or a dash."""
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.2f}{deviation} (n = {len(values)})" if values else "-"


def rate(counts):
    """Percent from [(part, whole), ...], a pair for each seed, with the mean counts behind it."""
    percents = [100 * part / whole for part, whole in counts if whole]
    if len(counts) == 1:
        (part, whole), = counts
        return f"{percents[0]:.2f} ({part}/{whole})" if whole else "none (0/0)"
    parts, wholes = zip(*counts)
    return f"{spread(percents)}, on average {mean(parts):.1f}/{mean(wholes):.1f}"


def markdown(*rows):
    """The lines of a table, the head first."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body, ""]


def table1(runs, label):
    """Rows of one method at one setting: pretraining, then each fine-tuning from it."""
    _, paper_before, paper_after, _ = PAPER[runs[0]["method"]]
    thetas = {run["seed"]: run["before"] for run in runs if run["theta"] == run["folder"]}
    control = {run["theta"]: run["after"] for run in runs if run["row"][0] == "none"}
    rows = [[label, paper_before, spread(list(thetas.values())), "", "", ""]] if thetas else []
    for row in sorted({run["row"] for run in runs}, key=lambda row: (ORDER.index(row[0]), row)):
        those = [run for run in runs if run["row"] == row]
        scar = row[0] == "fgsm" and row[1] > 0
        over = [run["after"] - control[run["theta"]] for run in those if run["theta"] in control]
        rows.append([
            f"{label} + {row[2]}",
            paper_after if scar else "",
            spread([run["after"] for run in those]),
            spread([run["after"] - run["before"] for run in those], "+"),
            "" if row[0] == "none" else spread(over, "+"),
            "" if row[0] == "none" else rate([run["added"] for run in those]),
        ])
    return rows


def table2(runs, label):
    """Rows of one method at one setting: theta~ of each seed, attacked with each eps."""
    paper = PAPER[runs[0]["method"]][3]
    thetas = {run["seed"]: run["table2"] for run in runs if run["theta"] == run["folder"]}
    rows = []
    for eps in sorted({eps for theta in thetas.values() for eps in theta}):
        counts = zip(*(theta[eps] for theta in thetas.values() if eps in theta))
        rows.append([f"{label} (eps {eps:g})", *paper.get(eps, ("", "")), *map(rate, counts)])
    return rows


out, runs, left_out, unreadable, seen = Path(sys.argv[1]), [], [], [], {}
for path in sorted(out.glob("*/result.json")):
    try:
        runs.append(read(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        unreadable.append(f"{path} is damaged or another kind of file ({type(error).__name__})")

# Each run belongs to a theta~ that was pretrained in OUT, and is left out with it; so the runs that
# pretrained come first. Settings other than those of its pretraining are told with both values.
origins, kept = {}, []
for run in sorted(runs, key=lambda run: run["theta"] != run["folder"]):
    origin = run if run["theta"] == run["folder"] else origins.get(run["theta"])
    if origin is None:
        left_out.append(
            f"{run['folder']} (its pretraining, {run['theta']}, is not counted in {out})")
        continue
    other = {f"theta~ {name}": value for name, value in origin["settings"].items()
             if run["settings"].get(name) != value}
    other |= {f"theta~ {name}": str(value) for name, value, own
              in zip(TITLE, origin["title"][1:], run["title"][1:]) if value != own}
    run["choice"] = tuple(sorted((run["settings"] | other).items()))
    key = (run["method"], run["title"], run["choice"], run["row"], run["seed"])
    if key in seen:
        left_out.append(f"{run['folder']} (the same run as {seen[key]})")
        continue
    seen[key] = run["folder"]
    if origin is run:
        origins[run["folder"]] = run
    kept.append(run)

lines = []
for title in sorted({run["title"] for run in kept}):
    data, labels, depth, width, epochs, steps, batch, val = title
    scored = "validation" if val else "test"
    first = [[f"Table 1: {scored} accuracy (%)", "paper", "ours", "gain over pretraining",
              "gain over control", "labels added, right (%)"]]
    second = [[f"Table 2: theta~ on the {scored} images (%)", "sensitivity, paper",
               "specificity, paper", "sensitivity, ours", "specificity, ours"]]
    notes = []
    for method, (name, *_) in PAPER.items():
        of_method = [run for run in kept if (run["title"], run["method"]) == (title, method)]
        choices = sorted({run["choice"] for run in of_method})
        for choice in choices:
            differs = [f"{key} {value}" for key, value in choice
                       if any(dict(other).get(key) != value for other in choices)]
            label = ", ".join([name, *differs])
            those = [run for run in of_method if run["choice"] == choice]
            first += table1(those, label)
            second += table2(those, label)
            settings = ", ".join(f"{key} {value}" for key, value in choice)
            seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in those}))
            notes.append(f"- {label}: {settings}; seeds {seeds}")
    where = sorted({run["where"] for run in kept if run["title"] == title})
    hours = sum(run["hours"] for run in kept if run["title"] == title)
    head = (f"## {data}, {labels} labels, WRN-{depth}-{width}, {epochs} + {epochs} epochs of "
            f"{steps} steps, batch {batch}")
    if val:
        head += f", scored on {val} validation images"
    lines += [head, "", *markdown(*first), *markdown(*second), *notes,
              f"- run on {'; '.join(where)}; {hours:.1f} hours, one run after the other", ""]
if left_out:
    lines += [f"Left out: {'; '.join(left_out)}.", ""]
if kept:
    text = "\n".join(lines)
    print(text)
    partial = out / "tables.md.partial"
    partial.write_text(text)
    os.replace(partial, out / "tables.md")
else:
    unreadable.append(f"there is no finished run in {out}")
for sentence in unreadable:
    print(f"error: {sentence}", file=sys.stderr)
sys.exit(1 if unreadable else 0)
TABLES
code=$?

for what in ${failed[@]+"${failed[@]}"}; do
    echo "failed: $what" >&2
    code=1
done
exit "$code"
