"""Compares finished runs on the test images, image by image, and writes runs/confidence.csv.

    python results/compare.py runs

The first table says how many points each run gained over theta~ (the model after pretraining) and
over its control: the run with the same theta~ and settings that added nothing (the first, if there
are several). z is McNemar's statistic (b - c) / sqrt(b + c): b images are right only with the run's
model, c only with theta~ or the control. The second table says, for each theta~ (named by the run
that pretrained it) and each eps of that run's Table 2, how many of the labels that FGSM keeps are
right, and how many of equally many labels chosen by confidence.

The runs need their weights (pretrain.pt, model.pt), and the images must be where they were when the
runs began, or in --data-dir.
"""

import argparse
import functools
import io
import sys
from pathlib import Path

import torch
from tables import rate, read_runs

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import WideResNet, image_names, load_images  # noqa: E402
from fixmatch_scar import (  # noqa: E402
    csv_text,
    fingerprint,
    load,
    predict,
    save,
    select_confident,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def read_test_images(data, data_dir, image_size):
    """Images uint8 [N, 3, size, size], their labels int64 [N], the number of classes."""
    print(f"Reading the images of {data} in {data_dir}", file=sys.stderr)
    _, _, x_test, y_test = load_images(data, data_dir, image_size)
    classes, _, _ = image_names(data, data_dir)
    return x_test.to(DEVICE), y_test.to(DEVICE), len(classes)


def logits_of(path, run, accuracy):
    """Logits [N, C] of the weights in path on the run's test images; and the true labels.

    Raises ValueError if the images or the weights are not those of the run, as far as their number
    and their accuracy tell.
    """
    args = run["args"]
    x, y, classes = read_test_images(args["data"], args["data_dir"], args["image_size"])
    (_, kept), (_, rejected) = next(iter(run["table2"].values()))
    if kept + rejected != len(y):
        raise ValueError(
            f"{run['folder']} had {kept + rejected} test images; {args['data_dir']} has {len(y)}"
        )
    model = WideResNet(classes, args["depth"], args["width"])
    try:
        model.load_state_dict(load(path))
    except (RuntimeError, TypeError):
        raise ValueError(f"{path} does not hold the weights of its run") from None
    logits = predict(model.to(DEVICE, memory_format=torch.channels_last), x)
    right = int((logits.argmax(dim=1) == y).sum())
    right_in_run = round(accuracy / 100 * len(y))
    if abs(right - right_in_run) > 2:  # another device may round differently
        raise ValueError(
            f"{path} classifies {right} test images correctly, in its run {right_in_run}: the "
            f"weights or the images in {args['data_dir']} are not those of the run"
        )
    return logits, y


def gain(right, right_before):
    """Difference in accuracy in points, and McNemar's z; both are positive if `right` is better.

    right, right_before: bool [N], which images each of two models classifies correctly.
    """
    gained = int((right & ~right_before).sum())
    lost = int((right_before & ~right).sum())
    points = f"{100 * (gained - lost) / len(right):+.2f}"
    if gained + lost == 0:
        return points
    return f"{points} (z = {(gained - lost) / (gained + lost) ** 0.5:.1f})"


def compare(out, runs):
    """Prints the gains of the runs that start from one theta~, as rows of the first table.

    Returns rows for confidence.csv: for each eps of theta~'s Table 2, how many labels are right
    among the most confident ones, as many as FGSM keeps.
    """
    pretraining = next(run for run in runs if run["pretrains"])
    weights = out / pretraining["folder"] / "pretrain.pt"
    logits, y = logits_of(weights, pretraining, pretraining["before"])
    if fingerprint(load(weights).values()) != pretraining["theta"]:
        raise ValueError(f"{weights} is not the theta~ of its run")
    right_before = logits.argmax(dim=1) == y
    right_in_control = {}  # by the settings, in which a run and its control agree
    for run in sorted(runs, key=lambda run: run["kind"] != "none"):  # controls first
        final_logits, _ = logits_of(out / run["folder"] / "model.pt", run, run["after"])
        right = final_logits.argmax(dim=1) == y
        settings = run["title"], run["choice"]
        over_control = "-"
        if run["kind"] == "none":
            right_in_control.setdefault(settings, right)
        elif settings in right_in_control:
            over_control = gain(right, right_in_control[settings])
        print(f"| {run['folder']} | {gain(right, right_before)} | {over_control} |", flush=True)
    rows = []
    for eps, ((kept_correct, kept), _) in sorted(pretraining["table2"].items()):
        most_confident = select_confident(logits, kept)
        rows.append(
            {
                "run": pretraining["folder"],
                "eps": f"{eps:g}",
                "kept": kept,
                "fgsm_correct": kept_correct,
                "confidence_correct": int((most_confident & right_before).sum()),
            }
        )
    return rows


def main(argv=None):
    """Prints the tables, writes confidence.csv; returns 1 if a result is damaged or none fits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="the folder that holds the run folders")
    parser.add_argument("--data-dir", help="folder of the images, if they have been moved")
    args = parser.parse_args(argv)
    out = args.runs
    torch.backends.cudnn.allow_tf32 = False  # as in the runs
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of folders need not be UTF-8
    all_runs, left_out, errors = read_runs(out)
    groups = {}
    for run in all_runs:
        if run["args"]["val"] > 0:
            left_out += f"- left out: {run['folder']}; it was not scored on the test images\n"
            continue
        if args.data_dir is not None:
            run["args"]["data_dir"] = args.data_dir
        for name in ["pretrain.pt", "model.pt"] if run["pretrains"] else ["model.pt"]:
            if not (out / run["folder"] / name).exists():
                sys.exit(f"error: {out / run['folder'] / name} is missing; move its run elsewhere")
        groups.setdefault(run["theta"], []).append(run)
    if all_runs and not groups:
        errors.append(f"no run in {out} was scored on the test images")

    if groups:
        print("| test accuracy, points | over pretraining | over control |")
        print("| --- | --- | --- |", flush=True)
        rows = []
        try:
            for runs in groups.values():
                rows += compare(out, runs)
        except ValueError as error:
            sys.exit(f"error: {error}")
        print("\n| right among the kept (%) | eps | FGSM | confidence, as many images |")
        print("| --- | --- | --- | --- |")
        for row in rows:
            fgsm = rate([(row["fgsm_correct"], row["kept"])])
            confidence = rate([(row["confidence_correct"], row["kept"])])
            print(f"| {row['run']} | {row['eps']} | {fgsm} | {confidence} |")
        save(csv_text(rows), out / "confidence.csv")
    if groups and left_out:
        print()
    print(left_out, end="")
    for sentence in errors:
        print(f"error: {sentence}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
