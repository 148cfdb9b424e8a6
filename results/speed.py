"""Milliseconds a training step: the scripts' variants, and the plain way to write FixMatch.

    python results/speed.py                                           on the GPU, where there is one
    python results/speed.py --variants plain,split,joint --steps 5    FixMatch alone, few steps
    python results/speed.py --data-dir data/cifar10-jpeg              real images (a folder)

The plain way is a DataLoader whose workers augment with Pillow and torchvision's RandAugment, and
one forward and backward over all images, weak views included, in float32. All variants take turns,
a step each, so that what disturbs one disturbs all; the median step counts, after a warm-up.
"""

import argparse
import copy
import platform
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fixmatch_scar
import mixmatch_scar
import vat_scar
from common import WideResNet, load_images, split_labeled

WARM_UP = 5

VARIANTS = {  # name: script, precision, channels_last, compiled, captured
    "split": (fixmatch_scar, "fp32", True, False, False),
    "split-nchw": (fixmatch_scar, "fp32", False, False, False),
    "split-compiled": (fixmatch_scar, "fp32", True, True, False),
    "joint": (fixmatch_scar, "fp32", True, False, False),
    "bf16": (fixmatch_scar, "bf16", True, False, False),
    "bf16-compiled": (fixmatch_scar, "bf16", True, True, False),
    "bf16-captured": (fixmatch_scar, "bf16", True, True, True),
    "bf16-joint-captured": (fixmatch_scar, "bf16", True, True, True),
    "mixmatch": (mixmatch_scar, "fp32", True, False, False),
    "mixmatch-bf16-captured": (mixmatch_scar, "bf16", True, True, True),
    "vat": (vat_scar, "fp32", True, False, False),
    "vat-bf16-captured": (vat_scar, "bf16", True, True, True),
}


class PlainImages(Dataset):
    """Labeled: (image, label); unlabeled: two views of an image. Augmented one by one."""

    def __init__(self, x, y, labeled):
        self.images = [v2.functional.to_pil_image(image) for image in x]
        self.labels, self.labeled = y.tolist(), labeled
        weak = [v2.RandomHorizontalFlip(), v2.RandomCrop(32, 4, padding_mode="reflect")]
        end = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        self.weak = v2.Compose(weak + end)
        self.strong = v2.Compose([*weak, v2.RandAugment(2, 10), *end, v2.RandomErasing(1.0)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        second = self.labels[index] if self.labeled else self.strong(image)
        return self.weak(image), second


def forever(loader):
    """Batches without end."""
    while True:
        yield from loader


def plain_step(args, x, y, labeled, unlabeled, device):
    """FixMatch's step as it is usually written; returns a function of nothing."""
    options = {"shuffle": True, "num_workers": args.workers, "drop_last": True}
    options |= {"persistent_workers": True}
    labeled_set = PlainImages(x[labeled], y[labeled], True)
    unlabeled_set = PlainImages(x[unlabeled], y[unlabeled], False)
    batches_l = forever(DataLoader(labeled_set, args.batch_size, **options))
    batches_u = forever(DataLoader(unlabeled_set, args.batch_size * args.mu, **options))
    model = WideResNet(10, args.depth, args.width).to(device)
    average = copy.deepcopy(model)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.03, momentum=0.9, nesterov=True, weight_decay=5e-4
    )

    def step():
        (x_l, y_l), (x_weak, x_strong) = next(batches_l), next(batches_u)
        x = torch.cat([x_l, x_weak, x_strong]).to(device)
        logits = model(x)
        logits_l, logits_weak, logits_strong = logits.split([len(x_l), len(x_weak), len(x_strong)])
        confidence, pseudo_label = logits_weak.detach().softmax(1).max(1)
        mask = (confidence >= 0.95).float()
        loss_u = (F.cross_entropy(logits_strong, pseudo_label, reduction="none") * mask).mean()
        loss = F.cross_entropy(logits_l, y_l.to(device)) + loss_u
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(average.parameters(), model.parameters()):
                ours.mul_(0.999).add_(theirs, alpha=0.001)
            for ours, theirs in zip(average.buffers(), model.buffers()):
                ours.copy_(theirs)
        return loss.item()

    return step


def joint_loss(model, x_l, y_l, x_weak, x_strong, threshold, lambda_u):
    """fixmatch_loss with one forward for all views, the weak ones with gradient too."""
    sizes = [len(x_l), len(x_weak), len(x_strong)]
    logits_l, logits_weak, logits_strong = model(torch.cat([x_l, x_weak, x_strong])).split(sizes)
    confidence, pseudo_label = logits_weak.detach().float().softmax(1).max(1)
    mask = (confidence >= threshold).float()
    loss_u = F.cross_entropy(logits_strong.float(), pseudo_label, reduction="none")
    return F.cross_entropy(logits_l.float(), y_l) + lambda_u * (mask * loss_u).mean(), {}


def joint_batch_loss(model, x_l, y_l, x_u, lambda_u, args):
    """fixmatch_scar.batch_loss with joint_loss."""
    weak, strong = fixmatch_scar.weak_augment(x_u), fixmatch_scar.strong_augment(x_u)
    to_float = fixmatch_scar.to_float
    x_l, weak, strong = to_float(fixmatch_scar.weak_augment(x_l)), to_float(weak), to_float(strong)
    with torch.autocast(x_l.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        return joint_loss(model, x_l, y_l, weak, strong, args.threshold, lambda_u)


def own_step(name, settings, x, y, labeled, unlabeled, device):
    """A variant of a script's own training step; returns a function of nothing."""
    script, precision, channels_last, compiled, captured = VARIANTS[name]
    argv = ["--precision", precision, "--batch-size", str(settings.batch_size)]
    if script is fixmatch_scar:
        argv += ["--mu", str(settings.mu)]
    args = script.parse_args(argv)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def to_float(x):
        return x.to(torch.float32, memory_format=layout) / 255

    model = WideResNet(10, settings.depth, settings.width).to(device, memory_format=layout)
    labels = torch.full_like(y, -1)
    labels[labeled] = y[labeled]
    loss = joint_batch_loss if "joint" in name else script.batch_loss
    run = SimpleNamespace(
        model=model.train(),
        average=copy.deepcopy(model).requires_grad_(False).eval(),
        optimizer=script.make_optimizer(model, args),
        images=x.to(device),
        labels=labels.to(device),
        batch_loss=torch.compile(loss) if compiled else loss,
    )
    pools = labeled.to(device), unlabeled.to(device)
    sizes = args.batch_size, script.unlabeled_batch_size(args)
    numbers = torch.tensor([args.lr, args.lambda_u, args.ema_decay], device=device).unbind()
    state = SimpleNamespace(step=partial(script.training_step, run, args), count=0)

    def step():
        script.to_float = to_float
        indices = [
            pool[torch.randint(len(pool), (size,), device=device)]
            for pool, size in zip(pools, sizes)
        ]
        if captured and state.count == 3:
            state.step = script.capture(run, args, (*indices, *numbers))
        state.count += 1
        return state.step(*indices, *numbers)

    return step


def timed(step, device):
    """Milliseconds that a step takes, until the device is done."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    default = ",".join(["plain", *VARIANTS]) if cuda else "plain,split,split-nchw,joint"
    parser.add_argument("--variants", default=default, help="comma-separated: plain, or as above")
    parser.add_argument("--data-dir", help="folder of images; without it, drawn ones")
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--width", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--mu", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2, help="of the plain way's DataLoader")
    parser.add_argument("--num-labeled", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=200 if cuda else 5, help="that are timed")
    args = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False

    x, y, _, _ = load_images("folder" if args.data_dir else "synthetic", args.data_dir)
    labeled, unlabeled = split_labeled(y, args.num_labeled, 0)
    makers = {name: partial(own_step, name) for name in VARIANTS} | {"plain": plain_step}
    stream = torch.cuda.Stream() if cuda else None
    with torch.cuda.stream(stream):
        steps = {
            name: makers[name](args, x, y, labeled, unlabeled, device)
            for name in args.variants.split(",")
        }
        times = {name: [] for name in steps}
        for i in range((WARM_UP if cuda else 1) + args.steps):
            for name, step in steps.items():
                times[name].append(timed(step, device))
                if name == "plain":
                    time.sleep(2)  # or its workers, filling their queue, would slow the next one
            if not cuda:
                shown = ", ".join(f"{name} {taken[-1]:.0f}" for name, taken in times.items())
                print(f"round {i}, ms: {shown}", file=sys.stderr, flush=True)

    device_name = fixmatch_scar.device_name(SimpleNamespace(device=device.type))
    print(
        f"WRN-{args.depth}-{args.width}, batch {args.batch_size}, mu {args.mu}, "
        f"{len(unlabeled):,} unlabeled images, {device_name}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"median of {args.steps} steps, DataLoader with {args.workers} workers\n"
    )
    medians = {name: float(np.median(taken[-args.steps :])) for name, taken in times.items()}
    print("| variant | ms a step | steps a second | of the plain way's |\n|---|---|---|---|")
    for name, ms in medians.items():
        ratio = f"{medians['plain'] / ms:.2f}" if "plain" in medians else ""
        print(f"| {name} | {ms:.1f} | {1000 / ms:.2f} | {ratio} |")


if __name__ == "__main__":
    main()
