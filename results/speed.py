"""Times variants of FixMatch's training step in turns, beside the plain way to write it.

    python results/speed.py --variants plain,eager,compiled,captured --steps 20

plain      a DataLoader with two workers, torchvision's RandAugment, one forward and backward over
           all images, float32
eager      the script's own step, neither compiled nor captured
compiled   its augmentation and loss by torch.compile
captured   compiled, and the whole step as one CUDA graph (needs CUDA)
Drawn images, WRN-28-2, batch 64, mu 7. Prints the median of the single steps.
"""

import argparse
import copy
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
import torchvision
from torchvision import transforms

import fixmatch_scar as script
from common import WideResNet, load_images


class Views(torch.utils.data.Dataset):
    """Weak and strong views of one image, as most codebases make them."""

    def __init__(self, x):
        self.x = x
        weak = [
            transforms.RandomHorizontalFlip(),
            transforms.RandomCrop(32, 4, False, 0, "reflect"),
        ]
        self.weak = transforms.Compose([*weak, transforms.ToTensor()])
        self.strong = transforms.Compose([*weak, transforms.RandAugment(), transforms.ToTensor()])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, n):
        image = transforms.functional.to_pil_image(self.x[n])
        return self.weak(image), self.strong(image)


def plain(args, x, y, model, optimizer):
    """A function that does one step of the plain way."""
    size, device = (1 + args.mu) * args.batch_size, args.device
    loader = torch.utils.data.DataLoader(Views(x.cpu()), size, True, num_workers=2, drop_last=True)
    batches = (batch for _ in range(10**9) for batch in loader)

    def step():
        weak, strong = (views.to(device) for views in next(batches))
        labeled, weak, strong = (
            weak[: args.batch_size],
            weak[args.batch_size :],
            strong[args.batch_size :],
        )
        logits = model(torch.cat([labeled, weak, strong]))
        logits_l, rest = logits[: args.batch_size], logits[args.batch_size :]
        logits_weak, logits_strong = rest.chunk(2)
        confidence, pseudo_label = logits_weak.detach().softmax(dim=1).max(dim=1)
        loss = F.cross_entropy(logits_strong, pseudo_label, reduction="none")
        loss = (loss * (confidence >= args.threshold)).mean()
        loss = loss + F.cross_entropy(logits_l, y[: args.batch_size])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def ours(args, x, y, learner, variant):
    """A function that does one step of the script's."""
    loss = torch.compile(script.batch_loss) if variant != "eager" else script.batch_loss
    data = script.Data(x, y, y, None, None, None, None, None)
    step = partial(script.training_step, learner._replace(loss=loss), data, args)
    step = script.capture(step) if variant == "captured" else step
    rates = [torch.tensor(value, device=x.device) for value in (args.lr, args.lambda_u, 0.999)]

    def run():
        index = torch.randint(len(x), (1 + args.mu, args.batch_size), device=x.device)
        step(index[0], index[1:].flatten(), *rates)

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default="plain,eager", help="names from above")
    parser.add_argument("--steps", type=int, default=5, help="of each variant, after five")
    given, rest = parser.parse_known_args()
    args = script.parse_args(rest)
    cuda = torch.cuda.is_available()
    args.device, args.precision = "cuda" if cuda else "cpu", "bf16" if cuda else "fp32"
    x, y = (tensor.to(args.device) for tensor in load_images("synthetic", None)[:2])
    steps = {}
    for name in given.variants.split(","):
        model = WideResNet(10, args.depth, args.width).to(args.device)
        if name != "plain":
            model = model.to(memory_format=torch.channels_last)
        optimizer = script.make_optimizer(model, args)
        learner = script.Learner(model, copy.deepcopy(model), optimizer, None)
        steps[name] = (
            plain(args, x, y, model, optimizer)
            if name == "plain"
            else ours(args, x, y, learner, name)
        )
    times = {name: [] for name in steps}
    with torch.cuda.stream(torch.cuda.Stream() if cuda else None):
        for _ in range(given.steps + 5):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                if cuda:
                    torch.cuda.synchronize()
                times[name].append(1000 * (time.perf_counter() - started))
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    for name, all_times in times.items():
        print(f"{name:10}{statistics.median(all_times[5:]):12.1f} ms a step")


if __name__ == "__main__":
    main()
