"""What FGSM in one step leaves of a theta~, beside PGD in ten, on the images its run was scored on.

    python results/attack.py --data-dir data/cifar10-jpeg runs/A/pretrain.pt runs/B/pretrain.pt ...

For each model and eps: how many images keep their label under FGSM (the paper's Algorithm 1) and
under PGD (its equation 3, step eps / 4, no random start), how many of those labels are right, and
how the attacked images are spread over the predicted classes. A run's result.json must lie beside
its pretrain.pt (see mcnemar.py). `--every 5` takes every fifth image.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import WideResNet, fgsm
from fixmatch_scar import CHUNK, load, predict, to_float
from mcnemar import run_args, scored_images


def pgd(model, x, y, eps, steps=10):
    """Signed-gradient steps of eps / 4 up the loss, each put back to within eps of x and [0, 1].

    x: float [N, 3, H, W] in [0, 1]; y: int64 [N]; eps as x. Source: PAPER, equation 3.
    """
    x_adv = x
    for _ in range(steps):
        x_adv = fgsm(model, x_adv, y, eps / 4)
        x_adv = x_adv.clamp(x - eps, x + eps)
    return x_adv


def attacked_labels(attack, model, x, label, eps):
    """Labels, int64 [N], after the attack on uint8 images [N, 3, H, W] away from label."""
    with torch.no_grad():
        return torch.cat([
            model(attack(model, to_float(chunk), part, eps)).argmax(dim=1)
            for chunk, part in zip(x.split(CHUNK), label.split(CHUNK))
        ])  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="pretrain.pt")
    parser.add_argument("--data-dir", default="data", help="as the runs had it")
    parser.add_argument("--every", type=int, default=1, help="take every so many-th image")
    parser.add_argument("--eps", type=float, nargs="+", default=[1.0, 3.0, 6.0], help="in 1/255")
    settings = parser.parse_args(argv)
    if settings.every < 1:
        parser.error("--every must be at least 1")
    try:
        for path in settings.models:
            args = run_args(path)
            x, y = scored_images(args, settings.data_dir)
            classes = int(y.max()) + 1
            x, y = x[:: settings.every], y[:: settings.every]
            model = WideResNet(classes, args["depth"], args["width"]).eval()
            model.load_state_dict(load(path))
            label = predict(model, x)
            spread = torch.bincount(label, minlength=classes).tolist()
            print(f"{path}: {len(x):,} images, predicted {spread}")
            for eps in settings.eps:
                for attack in (fgsm, pgd):
                    attacked = attacked_labels(attack, model, x, label, eps / 255)
                    keep = attacked == label
                    right = int((keep & (label == y)).sum())
                    share = f" ({100 * right / int(keep.sum()):.1f} %)" if keep.any() else ""
                    spread = torch.bincount(attacked, minlength=classes).tolist()
                    print(
                        f"  eps {eps:g} {attack.__name__:4} keeps {int(keep.sum())}, {right} of "
                        f"them right{share}; predicted {spread}"
                    )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
