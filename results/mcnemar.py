"""McNemar's test: do two models differ on the same images, or is it chance?

    python results/mcnemar.py --data-dir data/cifar10-jpeg runs/A/model.pt runs/B/model.pt ...

Compares the first model with each of the others, on the images that its run was scored on. A
run's result.json must lie beside its model.pt (or pretrain.pt, which is theta~), for the network
and the images. A line for each: the images that only one of the two gets right, the gain in
accuracy, and how many of its standard errors that is: (only the other - only the first) over the
root of their sum (McNemar 1947). More than two is what the README calls a difference.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import WideResNet, load_images, split_labeled
from fixmatch_scar import load, predict


def run_args(model_path):
    """The settings in the result.json beside a model."""
    return load(model_path.with_name("result.json"), "args")["args"]


def scored_images(args, data_dir):
    """The images that a run with these args was scored on: uint8 [N,3,32,32] and int64 [N]."""
    x, y, x_scored, y_scored = load_images(args["data"], data_dir)
    if args["val"]:
        _, unlabeled = split_labeled(y, args["num_labeled"], args["seed"])
        held_out, _ = split_labeled(y[unlabeled], args["val"], args["seed"])
        x_scored, y_scored = x[unlabeled[held_out]], y[unlabeled[held_out]]
    return x_scored, y_scored


def right_images(model_path, x, y):
    """bool [N]: which of these images the model gets right."""
    args = run_args(model_path)
    model = WideResNet(int(y.max()) + 1, args["depth"], args["width"])
    model.load_state_dict(load(model_path))
    return predict(model, x) == y


def compare(first, other):
    """(only the first right, only the other right, gain in points, its standard errors)."""
    only_first, only_other = int((first & ~other).sum()), int((other & ~first).sum())
    gain = only_other - only_first
    errors = gain / math.sqrt(max(only_first + only_other, 1))
    return only_first, only_other, 100 * gain / len(first), errors


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.pt")
    parser.add_argument("--data-dir", default="data", help="as the runs had it")
    args = parser.parse_args(argv)
    first_path, *other_paths = args.models
    try:
        first_args = run_args(first_path)
        images = ["data", "data_dir", "val"]
        if first_args["val"]:
            images += ["num_labeled", "seed"]
        for path in other_paths:
            if any(run_args(path)[name] != first_args[name] for name in images):
                raise ValueError(f"{path} was scored on other images than {first_path}")
        x, y = scored_images(first_args, args.data_dir)
        first = right_images(first_path, x, y)
        print(f"{first_path}: {100 * first.double().mean().item():.2f} % of {len(y):,} images")
        for path in other_paths:
            only_first, only_other, gain, errors = compare(first, right_images(path, x, y))
            print(
                f"{path}: only the first right {only_first}, only this {only_other}: "
                f"{gain:+.2f} points, {errors:+.1f} standard errors"
            )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
