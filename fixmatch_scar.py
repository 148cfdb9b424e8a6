"""FixMatch -> SCAR (Selecting Clean samples with Adversarial Robustness), in one file.

Pretrains a WideResNet with FixMatch on 4,000 labels; attacks it with FGSM on every unlabeled image;
adds the images whose predicted label withstands the attack, under that label, to the labeled set;
trains on from there with FixMatch for as long again (SCAR). The second command is the control: the
same fine-tuning from the same pretraining, with nothing added.

    python fixmatch_scar.py --eps 1 --epochs 200
    python fixmatch_scar.py --eps 1 --epochs 200 --select none \\
        --pretrained runs/fixmatch__cifar10__fgsm-eps1__seed0/pretrain.pt

SCAR: Yang, Kim and Kim, "Improving Performance of Semi-Supervised Learning by Adversarial Attacks"
(PAPER below; there 94.13 %, with SCAR 95.17 %). FixMatch: Sohn et al. 2020, arXiv:2001.07685, and
google-research/fixmatch. Measured: CIFAR-10 (JPEG), 9 + 9 epochs, seed 0, bf16, torch 2.11, one
H100 (8.9 ms a step): 79.82 % after FixMatch, 81.86 % with SCAR, 82.96 % in the control.
"""

import argparse
import copy
import csv
import fcntl
import importlib
import io
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
import zipfile
from collections import namedtuple
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common import WideResNet, fgsm, image_names, load_images, split_labeled

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
METHOD, TITLE = "fixmatch", "FixMatch"

# ==================================================================================================
# The method: arguments, augmentation, FixMatch's loss, SCAR's selection, the training step
# ==================================================================================================


def number(low, high, kind=float):
    """An argparse type: a number from low to high."""

    def numeric(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, not {text}")
        return kind(text)

    return numeric


def parse_args(argv=None):
    """The command line; exits with code 2 and a sentence where it makes no sense."""
    style = argparse.ArgumentDefaultsHelpFormatter
    usage = "%(prog)s [--option value ...]   (--help lists the options)"
    parser = argparse.ArgumentParser(usage=usage, formatter_class=style, allow_abbrev=False)
    add, whole, count = parser.add_argument, number(0, 2**63 - 1, int), number(1, 10**6, int)
    from0, above0, below1 = number(0, 1e30), number(1e-9, 1e30), number(0, 1 - 1e-9)
    add("--data", default="cifar10", choices="cifar10 cifar100 svhn stl10 folder synthetic".split())
    add("--data-dir", default="data", help="of the images; folder: train/, test/, maybe unlabeled/")
    add("--image-size", type=number(16, 256, int), default=32, help="other images are resized")
    add("--num-labeled", type=count, help="labels; None: 4000, or all of a folder with unlabeled/")
    add("--val", type=whole, default=0, help="score on so many training images, not on the test's")
    add("--seed", type=whole, default=0, help="of the split, the initial weights and every draw")
    add("--depth", type=count, default=28, help="of the WideResNet, 6n + 4")
    add("--width", type=number(1, 1000, int), default=2, help="of the WideResNet")
    add("--epochs", type=count, default=200, help="of pretraining, and again of fine-tuning")
    add("--steps-per-epoch", type=number(2, 10**6, int), default=1024, help="at least two")
    add("--batch-size", type=count, default=64, help="labeled images a step")
    add("--mu", type=count, default=7, help="unlabeled images a step, in batch sizes")
    add("--lr", type=above0, default=0.03, help="learning rate at the start of each phase")
    add("--weight-decay", type=from0, default=5e-4, help="L2, on convolution and linear weights")
    add("--ema-decay", type=below1, default=0.999, help="decay of the evaluated, averaged model")
    add("--lambda-u", type=from0, default=1.0, help="weight of the unlabeled loss")
    add("--threshold", type=number(1e-9, 1), default=0.95, help="least confidence that counts")
    add("--eps", type=number(0, 255), default=1.0, help="FGSM's step in 1/255; 0 keeps every image")
    add("--select", default="fgsm", choices=["fgsm", "none", "confidence"], help="none: control")
    add("--table2-eps", type=number(0, 255), nargs="+", default=[1.0, 2.0, 3.0, 4.0, 6.0])
    add("--pretrained", metavar="PATH", help="start at the selection, from this pretrain.pt")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: CUDA if present")
    add("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="auto: bf16 if fast")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; None: if on CUDA")
    add("--tensorboard", action="store_true", help="write TensorBoard events as well")
    add("--out", help="run folder; None: runs/<method>__<data>__<select>-eps<eps>__seed<seed>")
    return parser.parse_args(argv)


def weak_augment(x):
    """Flips each image with probability 1/2 and moves it by up to an eighth of its side, reflected.

    x: uint8 [N, 3, H, W] -> the same; else ValueError. Source: FixMatch, section 2.3.
    """
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"uint8 images [N, 3, H, W] are needed, not {x.dtype} {[*x.shape]}")
    n, _, h, w = x.shape
    shift = torch.randint(-(h // 8), h // 8 + 1, (n, 1), device=x.device)
    row = (h - 1) - ((h - 1) - (torch.arange(h, device=x.device) + shift).abs()).abs()
    shift = torch.randint(-(w // 8), w // 8 + 1, (n, 1), device=x.device)
    column = (w - 1) - ((w - 1) - (torch.arange(w, device=x.device) + shift).abs()).abs()
    flip = torch.rand(n, 1, device=x.device) < 0.5
    column = torch.where(flip, (w - 1) - column, column)
    pixel = (row[:, :, None] * w + column[:, None, :]).view(n, 1, h * w)
    return x.flatten(2).gather(2, pixel.expand(n, 3, h * w)).view(n, 3, h, w)


def to_float(x):
    """uint8 [N, 3, H, W] -> float32 in [0, 1], channels_last; float images stay as they are."""
    if x.is_floating_point():
        return x
    return x.to(torch.float32, memory_format=torch.channels_last) / 255


RANDAUGMENT_OPS = (  # name, lowest and highest value (FixMatch, Table 12); three take no value
    ("AutoContrast", 0.0, 0.0),
    ("Brightness", 0.05, 0.95),
    ("Color", 0.05, 0.95),
    ("Contrast", 0.05, 0.95),
    ("Equalize", 0.0, 0.0),
    ("Identity", 0.0, 0.0),
    ("Posterize", 4.0, 8.0),  # bits kept
    ("Rotate", -30.0, 30.0),  # degrees
    ("Sharpness", 0.05, 0.95),
    ("ShearX", -0.3, 0.3),
    ("ShearY", -0.3, 0.3),
    ("Solarize", 0.0, 1.0),  # threshold, times 256
    ("TranslateX", -0.3, 0.3),  # times the side
    ("TranslateY", -0.3, 0.3),
)


def randaugment_op(x, op, level):
    """Applies to each image an operation of its own, with the result that Pillow would give.

    x: uint8 [N, 3, H, W]; op: int64 [N], index into RANDAUGMENT_OPS; level: float [N] in [0, 1],
    mapped linearly to the operation's range. Returns uint8 [N, 3, H, W].
    There are three kinds of operations. The whole batch goes through all three, and two of them
    leave an image as it is: no loop over images, no shape that depends on what was drawn.
    """
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"uint8 images [N, 3, H, W] are needed, not {x.dtype} {[*x.shape]}")
    n, _, h, w = x.shape
    op, level = op.view(n, 1, 1, 1), level.double().view(n, 1, 1, 1)
    chosen = {name: op == i for i, (name, _, _) in enumerate(RANDAUGMENT_OPS)}
    value = {name: low + (high - low) * level for name, low, high in RANDAUGMENT_OPS}

    # Brightness, Color, Contrast, Sharpness: base + value * (x - base), where the base is black,
    # the grey image, the grey image's mean, the smoothed image
    x = x.float()  # holds every integer below exactly: they stay under 2^24
    red, green, blue = x.split(1, dim=1)
    grey = ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor()
    mean = (grey.mean(dim=(2, 3), keepdim=True) + 0.5).floor()
    weighted = F.avg_pool2d(x, 3, stride=1, divisor_override=1) + 4 * x[:, :, 1:-1, 1:-1]
    smooth = x.clone()  # the border stays
    smooth[:, :, 1:-1, 1:-1] = ((2 * weighted + 13) / 26).floor()
    base, factor = torch.zeros_like(x), torch.ones_like(level)
    bases = {"Brightness": base, "Color": grey, "Contrast": mean, "Sharpness": smooth}
    for name, own in bases.items():
        base = torch.where(chosen[name], own, base)
        factor = torch.where(chosen[name], value[name], factor)
    x = (base + factor.float() * (x - base)).to(torch.uint8)

    # AutoContrast, Equalize, Posterize, Solarize: a table of 256 values an image and channel
    pixels = x.view(n, 3, 1, h * w).long()
    table = entry = torch.arange(256, device=x.device).expand(n, 3, 1, 256)
    low, high = pixels.amin(3, keepdim=True), pixels.amax(3, keepdim=True)
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1).double()  # not 255 * (1 / x)
    stretched = (entry * scale + -low * scale).long().clamp(0, 255)
    table = torch.where(chosen["AutoContrast"] & (high > low), stretched, table)
    histogram = torch.zeros_like(entry).scatter_add(3, pixels, torch.ones_like(pixels))
    step = (h * w - histogram.gather(3, high)) // 255
    darker = histogram.cumsum(3) - histogram
    equalized = ((step // 2 + darker) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(chosen["Equalize"] & (step > 0), equalized, table)
    dropped = 8 - value["Posterize"].long()
    table = torch.where(chosen["Posterize"], entry >> dropped << dropped, table)
    inverted = chosen["Solarize"] & (entry >= 256 * value["Solarize"])
    table = torch.where(inverted, 255 - entry, table)
    x = table.gather(3, pixels).view(n, 3, h, w).to(torch.uint8)

    # Rotate, Shear, Translate: output pixel (x, y) takes the input's at (ax + by + c, dx + ey + f),
    # nearest neighbour, pixel centres at .5, in Pillow's 16.16 fixed point; black outside the image
    angle = torch.where(chosen["Rotate"], -torch.deg2rad(value["Rotate"]), 0.0)
    a = e = angle.cos()
    b = angle.sin() + torch.where(chosen["ShearX"], value["ShearX"], 0.0)
    d = -angle.sin() + torch.where(chosen["ShearY"], value["ShearY"], 0.0)
    c = torch.where(chosen["Rotate"], (w - a * w - b * h) / 2, 0.0)  # about the centre
    c = torch.where(chosen["TranslateX"], w * value["TranslateX"], c)
    f = torch.where(chosen["Rotate"], (h - d * w - e * h) / 2, 0.0)
    f = torch.where(chosen["TranslateY"], h * value["TranslateY"], f)

    def fixed(value):
        return (65536 * value + 0.5).floor().long()

    row = torch.arange(h, device=x.device)[:, None]
    column = torch.arange(w, device=x.device)
    from_column = (fixed(a) * column + fixed(b) * row + fixed(c + a / 2 + b / 2)) >> 16
    from_row = (fixed(d) * column + fixed(e) * row + fixed(f + d / 2 + e / 2)) >> 16
    inside = (from_column >= 0) & (from_column < w) & (from_row >= 0) & (from_row < h)
    pixel = from_row.clamp(0, h - 1) * w + from_column.clamp(0, w - 1)
    moved = x.flatten(2).gather(2, pixel.view(n, 1, h * w).expand(n, 3, h * w)).view(n, 3, h, w)
    return moved * inside


def strong_augment(x):
    """weak_augment, two RandAugment operations, then a grey square of half the side.

    x: uint8 [N, 3, H, W] -> the same. Source: FixMatch, section 2.3 and appendix D: operations
    uniform with replacement and always applied, at uniform levels; the border may cut the square.
    """
    x = weak_augment(x)
    n, _, h, w = x.shape
    for _ in range(2):
        op = torch.randint(len(RANDAUGMENT_OPS), (n,), device=x.device)
        x = randaugment_op(x, op, torch.rand(n, device=x.device))
    row = torch.arange(h, device=x.device) - torch.randint(h, (n, 1), device=x.device)
    column = torch.arange(w, device=x.device) - torch.randint(w, (n, 1), device=x.device)
    row_hit = (row >= -(h // 4)) & (row < h // 4)
    column_hit = (column >= -(w // 4)) & (column < w // 4)
    return x.masked_fill((row_hit[:, :, None] & column_hit[:, None, :])[:, None], 127)


def fixmatch_loss(model, x_l, y_l, x_weak, x_strong, threshold, lambda_u):
    """Cross-entropy of the labels + lambda_u * that of confident pseudo-labels on strong views.

    x_l: float [B, 3, H, W] in [0, 1], y_l: int64 [B]; x_weak, x_strong: float [mu * B, 3, H, W],
    two views of the same images; threshold in (0, 1]; lambda_u: float or 0-dim tensor.
    Returns (loss, metrics): a scalar, and detached scalars loss_labeled, loss_unlabeled (without
    lambda_u) and mask_rate (the share of pseudo-labels that count).
    Source: FixMatch, equations 3 and 4; the mean is over the whole unlabeled batch.
    """
    logits = model(torch.cat([x_l, x_strong])).float()
    logits_l, logits_strong = logits.split([len(x_l), len(x_strong)])
    with torch.no_grad():  # the weak views need no gradient: a forward of their own
        prob = model(x_weak).float().softmax(dim=1)
    confidence, pseudo_label = prob.max(dim=1)
    mask = (confidence >= threshold).float()

    loss_labeled = F.cross_entropy(logits_l, y_l)
    loss_unlabeled = F.cross_entropy(logits_strong, pseudo_label, reduction="none")
    loss_unlabeled = (mask * loss_unlabeled).mean()
    return loss_labeled + lambda_u * loss_unlabeled, {
        "loss_labeled": loss_labeled.detach(),
        "loss_unlabeled": loss_unlabeled.detach(),
        "mask_rate": mask.mean(),
    }


def select_clean(model, x, eps):
    """SCAR: keeps the images whose predicted label withstands FGSM.

    model: float [N, 3, H, W] in [0, 1] -> logits, left in eval mode; x: uint8, or float in [0, 1],
    [N, 3, H, W], not augmented; eps: FGSM's step on the [0, 1] scale. Returns (keep, pseudo): bool
    [N], int64 [N]. Source: PAPER, Algorithm 1, lines 5 to 8.
    """
    model.eval()
    keep, pseudo = [], []
    with torch.no_grad():
        for chunk in map(to_float, x.split(500)):
            pseudo.append(model(chunk).argmax(dim=1))  # line 5
            attacked = fgsm(model, chunk, pseudo[-1], eps)  # line 6; it enables gradients itself
            keep.append(model(attacked).argmax(dim=1) == pseudo[-1])  # lines 7 and 8
    return torch.cat(keep), torch.cat(pseudo)


def select_confident(logits, count):
    """SCAR's rival (PAPER, section III.A): keep, bool [N], the `count` most confident of [N, C]."""
    confidence = logits.double().softmax(dim=1).amax(dim=1)  # in float32 many round to 1
    keep = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    keep[confidence.topk(count).indices] = True
    return keep


def selection_stats(keep, pseudo, y):
    """How well a selection tells right pseudo-labels from wrong ones, in Python numbers.

    keep: bool [N]; pseudo, y: int64 [N], predicted and true labels; y = -1 leaves an image out.
    sensitivity: kept_correct / kept, the precision of the kept (PPV); specificity: rejected_wrong /
    rejected, that of the rejected (NPV); percent, nan without any. Source: PAPER, equations 5, 6.
    """
    kept, rejected, wrong = keep & (y >= 0), ~keep & (y >= 0), pseudo != y
    masks = {"kept": kept, "kept_correct": kept & ~wrong}
    masks |= {"rejected": rejected, "rejected_wrong": rejected & wrong}
    stats = {name: int(mask.sum()) for name, mask in masks.items()}
    stats["sensitivity"] = 100 * (~wrong[kept]).double().mean().item()
    stats["specificity"] = 100 * wrong[rejected].double().mean().item()
    return stats


def make_optimizer(model, args):
    """SGD, Nesterov momentum, weight decay on convolution and linear weights (FixMatch, 2.4)."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(
        groups, args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay, fused=True
    )


def schedule(step, total_steps, phase, args):
    """(lr, lambda_u) at a step of a phase: lr * cos(7 pi t / 16 T), and lambda_u as it is."""
    return args.lr * math.cos(7 * math.pi * step / (16 * total_steps)), args.lambda_u


def batch_loss(model, x_l, y_l, x_u, lambda_u, args):
    """FixMatch on uint8 images: augments, then fixmatch_loss. torch.compile compiles this."""
    weak, strong = weak_augment(x_u), strong_augment(x_u)
    x_l, weak, strong = to_float(weak_augment(x_l)), to_float(weak), to_float(strong)
    with torch.autocast(x_l.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        return fixmatch_loss(model, x_l, y_l, weak, strong, args.threshold, lambda_u)


def update_average(average, model, decay):
    """average = decay * average + (1 - decay) * model, in place; integer buffers are copied."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values()))
    ours, theirs = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
    change = torch._foreach_sub(theirs, ours)
    torch._foreach_mul_(change, 1 - decay)
    torch._foreach_add_(ours, change)
    torch._foreach_copy_(*zip(*(pair for pair in pairs if not pair[0].is_floating_point())))


def average_over_ranks(tensors):
    """Replaces each float tensor by its mean over torchrun's processes, all in one exchange."""
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    if RANKS > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, mean in zip(tensors, (flat / RANKS).split([t.numel() for t in tensors])):
            tensor.copy_(mean.view(tensor.shape))


# average: the evaluated model; loss: batch_loss, compiled or not
Learner = namedtuple("Learner", "model average optimizer loss")
# on the device: images uint8 [N, 3, H, W]; int64 [N] true labels, for the report alone, and those
# that training knows (-1: none); the pool's indices; what is scored; names of classes and files
Data = namedtuple("Data", "images truth labels unlabeled x_scored y_scored classes files")


def training_step(learner, data, args, index_l, index_u, lr, lambda_u, decay):
    """One update of learner.model and of its average, in place; returns detached 0-dim metrics.

    index_l: int64 [B], index_u: int64 [U], images of the step; lr, lambda_u, decay: 0-dim float32.
    All are tensors on the device, and nothing waits for it, so that a CUDA graph can hold the step.
    """
    x_l, y_l, x_u = data.images[index_l], data.labels[index_l], data.images[index_u]
    loss, metrics = learner.loss(learner.model, x_l, y_l, x_u, lambda_u, args)
    loss.backward()
    average_over_ranks([p.grad for p in learner.model.parameters()])
    for group in learner.optimizer.param_groups:
        group["lr"] = lr
        group["capturable"] = lr.is_cuda and torch.cuda.is_current_stream_capturing()  # for Adam
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    update_average(learner.average, learner.model, decay)
    return {"loss": loss.detach(), **metrics}


# ==================================================================================================
# Plumbing, the same in every script: evaluation, the epoch, the run folder, both phases, main
# ==================================================================================================


def predict(model, x):
    """Logits [N, C] for images [N, 3, H, W], uint8 or float; leaves the model in eval mode."""
    with torch.no_grad():
        return torch.cat([model.eval()(to_float(chunk)) for chunk in x.split(500)])


def evaluate(model, x, y):
    """Accuracy in percent on images [N, 3, H, W], uint8 or float, with labels int64 [N]."""
    return 100 * int((predict(model, x).argmax(dim=1) == y).sum()) / len(x)


def draw_batches(pool, count, size, generator):
    """int64 [count, size] out of pool, int64 [M]: shuffled passes, each entry once a pass."""
    passes = -(-count * size // len(pool))
    order = torch.rand(passes, len(pool), generator=generator, device=pool.device).argsort(dim=1)
    return pool[order.flatten()[: count * size]].view(count, size)


def capture(function):
    """A function of tensors as one CUDA graph; what a call returns, the next overwrites."""
    calls, static, outputs, graph = 0, None, None, torch.cuda.CUDAGraph()

    def call(*inputs):
        nonlocal calls, static, outputs
        calls += 1
        if calls < 4:  # compiles, lets cuDNN choose its algorithms, makes the optimizer's state
            return function(*inputs)
        if calls == 4:
            static = [tensor.clone() for tensor in inputs]
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                outputs = function(*static)  # recorded, not computed
        torch._foreach_copy_(static, inputs)
        graph.replay()
        return outputs

    return call


def train_epoch(step, learner, data, phase, epoch, args):
    """One epoch; returns its row of metrics.csv. All it draws follows from (seed, phase, epoch)."""
    cuda, steps, started = args.device == "cuda", args.steps_per_epoch, time.perf_counter()
    seeds = np.random.SeedSequence([args.seed, int(phase == "finetune"), epoch]).generate_state(2)
    torch.manual_seed(int(seeds[0]) + RANK)
    # batches have a generator of their own, so that a larger labeled set moves no augmentation
    generator = torch.Generator(args.device).manual_seed(int(seeds[1]))
    batches_u = draw_batches(data.unlabeled, steps, args.mu * args.batch_size, generator)
    batches_l = draw_batches((data.labels >= 0).nonzero()[:, 0], steps, args.batch_size, generator)
    rates = []  # lr, lambda_u and the average's decay, of each step
    for i in range((epoch - 1) * steps, epoch * steps):
        decay = min(args.ema_decay, (1 + i) / (10 + i))  # young, the average follows faster
        rates.append((*schedule(i, args.epochs * steps, phase, args), decay))
    shares = batches_l[:, RANK::RANKS], batches_u[:, RANK::RANKS]  # of each batch, this process's
    inputs = zip(*shares, *torch.tensor(rates, device=args.device).unbind(1))
    totals, marks = {}, []
    learner.model.train()
    for i, tensors in enumerate(inputs, 1):
        metrics = step(*tensors)
        totals = {name: totals.get(name, 0) + value for name, value in metrics.items()}
        mark = torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter()
        marks.append(torch.cuda.current_stream().record_event(mark) if cuda else mark)
        if sys.stdout.isatty() and i % 10 == 0:
            print(f"{phase} {epoch}: step {i} of {steps}", end="\033[K\r", flush=True)
    average_over_ranks([*totals.values(), *learner.model.buffers(), *learner.average.buffers()])
    row = {"phase": phase, "epoch": epoch, "lr": rates[-1][0]}
    row |= {name: float(total) / steps for name, total in totals.items()}
    if not math.isfinite(row["loss"]):
        raise FloatingPointError(f"the loss is not finite in {phase} epoch {epoch}; lower --lr")
    ms = [a.elapsed_time(b) if cuda else 1000 * (b - a) for a, b in zip(marks, marks[1:])]
    row["accuracy"] = evaluate(learner.average, data.x_scored, data.y_scored)
    row["ms_per_step"] = float(np.median(ms[1:] or ms))  # the first two steps warm up
    return {**row, "seconds": time.perf_counter() - started}


def save(content, path):
    """Writes text, or anything else by torch.save, beside the file, then moves it into place."""
    if RANK == 0:
        buffer = io.BytesIO()  # for Python to write, so that a full disk is an OSError
        torch.save(content, buffer)
        beside = path.with_name(path.name + ".partial")
        beside.write_bytes(content.encode() if isinstance(content, str) else buffer.getvalue())
        os.replace(beside, path)


def load(path):
    """What a .json or torch.save file holds, on the CPU; ValueError where that cannot be read."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text())
        if zipfile.ZipFile(path).testzip():
            raise ValueError("wrong checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a dozen kinds
        raise ValueError(f"cannot read {path}; replace or delete it ({error!r})") from None


def prepare(args, out):
    """All that precedes training: a finished run's result or None, then learner, data, state."""
    given, state = {"method": METHOD, **vars(args)}, {"rows": []}
    must_match = [(out, given.keys() - {"device", "out", "data_dir", "compile", "tensorboard"})]
    if args.pretrained is not None:
        must_match.append((Path(args.pretrained).parent, {"method", "data", "num_labeled", "seed"}))
    for folder, names in must_match:
        saved = load(folder / "args.json") if (folder / "args.json").exists() else given
        for name in sorted(names):
            if saved.get(name) != given[name]:
                change = f"{name} was {saved.get(name)}, now {given[name]}"
                raise ValueError(f"{folder} is of another run ({change}): choose another folder")
    if [*out.glob("*")] and not [*out.glob("args.json*"), *out.glob("lock")]:
        raise ValueError(f"{out} is not empty and holds no run; choose another --out")
    if (out / "result.json").exists():
        return load(out / "result.json"), None, None, None

    args.device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    has_bf16 = torch.cpu._is_avx512_bf16_supported()
    if args.device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    args.precision = args.precision.replace("auto", "bf16" if has_bf16 else "fp32")
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; matrix products have it off already

    x, y, *scored = load_images(args.data, args.data_dir, args.image_size)
    classes, files, left_out = image_names(args.data, args.data_dir)
    if args.num_labeled is None:
        args.num_labeled = 4000 if args.data != "folder" or y.min() >= 0 else int((y >= 0).sum())
    labeled, unlabeled = split_labeled(y, args.num_labeled, args.seed, classes)
    if args.val:
        held_out, rest = split_labeled(y[unlabeled], args.val, args.seed, classes)
        scored = x[unlabeled[held_out]], y[unlabeled[held_out]]
        unlabeled = unlabeled[rest]
    labels = torch.full_like(y, -1).scatter(0, labeled, y[labeled])
    data = Data(*(t.to(args.device) for t in (x, y, labels, unlabeled, *scored)), classes, files)
    print(f"{len(classes)} classes, {len(labeled):,} labels, {len(unlabeled):,} unlabeled images, "
          f"{len(scored[0]):,} scored, {len(left_out)} files left out {left_out[:5]}")  # fmt: skip

    torch.manual_seed(args.seed)
    model = WideResNet(len(classes), args.depth, args.width)
    model = model.to(args.device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    loss = torch.compile(batch_loss) if args.compile else batch_loss
    learner = Learner(model, average, make_optimizer(model, args), loss)
    if (out / "checkpoint.pt").exists():
        state = load(out / "checkpoint.pt")
        data.labels.copy_(state["labels"])
        for part, saved in zip(learner, state["learner"]):  # model, average, optimizer
            part.load_state_dict(saved)
    elif args.pretrained is not None:
        try:
            average.load_state_dict(load(Path(args.pretrained)))
        except (RuntimeError, TypeError):
            raise ValueError(f"{args.pretrained} holds no weights of this network") from None
    out.mkdir(parents=True, exist_ok=True)
    return None, learner, data, state | {"settings": {**given, "classes": classes}}


def select(average, data, args, out):
    """Labels what theta~, the averaged model, selects; returns its scores, labels, confidences."""
    table2, x, y = [], data.images[data.unlabeled], data.truth[data.unlabeled]
    for eps in sorted({args.eps, *args.table2_eps}):
        stats = selection_stats(*select_clean(average, data.x_scored, eps / 255), data.y_scored)
        table2.append({"eps": eps, **stats})
    keep, pseudo = select_clean(average, x, args.eps / 255)
    logits = predict(average, x)
    if args.select == "confidence":
        keep = select_confident(logits, int(keep.sum()))
    keep &= args.select != "none"  # the control adds nothing
    data.labels[data.unlabeled] = torch.where(keep, pseudo, -1)  # they stay in the pool too
    if RANKS > 1:
        dist.broadcast(data.labels, 0)
    stats = {"unlabeled": len(x), "added": int(keep.sum()), **selection_stats(keep, pseudo, y)}
    stats["kept_per_class"] = torch.bincount(pseudo[keep], minlength=len(data.classes)).tolist()
    if RANK == 0:
        save_selection(out / "selection.png", x, keep, pseudo, y, data.classes)
    accuracy = evaluate(average, data.x_scored, data.y_scored)
    found = {"pretrain_accuracy": accuracy, "table2": table2, "selection": stats}
    return found, (pseudo, logits.softmax(dim=1).amax(dim=1))


def save_selection(path, x, keep, pseudo, y, classes):
    """A row a class: 8 kept, 8 rejected images; green: label right, red: wrong, grey: not known."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    side, left = x.shape[3] + 6, 12 + round(max(map(ImageFont.load_default().getlength, classes)))
    picture = Image.new("RGB", (left + 17 * side, 16 + len(classes) * side), "white")
    pen = ImageDraw.Draw(picture)
    for column, title, group in ((0, "kept", keep), (9, "rejected", ~keep)):
        pen.text((left + column * side, 2), title, "black")
        for row, name in enumerate(classes):
            pen.text((4, 10 + row * side + side // 2), name, "black")
            for i, n in enumerate(order[(group & (pseudo == row))[order]][:8].tolist()):
                tile = Image.fromarray(x[n].permute(1, 2, 0).cpu().numpy())
                colour = "grey" if y[n] < 0 else "green" if y[n] == row else "red"
                corner = left + (column + i) * side, 16 + row * side
                picture.paste(ImageOps.expand(tile, 2, colour), corner)
    picture.save(path)


def train(learner, data, state, args, out, name):
    """Both phases from where the state stands, then the files of a finished run; the result."""
    save(json.dumps(state["settings"], indent=1), out / "args.json")
    save(Path(__file__).read_text(), out / Path(__file__).name)
    board, phases = None, ["pretrain", "finetune"] if args.pretrained is None else ["finetune"]
    if args.tensorboard and RANK == 0:
        board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(out)
    for phase in phases:
        done = sum(row["phase"] == phase for row in state["rows"])
        if phase == "finetune" and done == 0:
            save(learner.average.state_dict(), out / "pretrain.pt")
            state["found"], state["theta"] = select(learner.average, data, args, out)
            learner.model.load_state_dict(learner.average.state_dict())
            learner = learner._replace(optimizer=make_optimizer(learner.model, args))
        step = partial(training_step, learner, data, args)
        step = capture(step) if args.compile and args.device == "cuda" else step
        for epoch in range(done + 1, args.epochs + 1):
            row = train_epoch(step, learner, data, phase, epoch, args)
            state |= {"rows": [*state["rows"], row], "labels": data.labels}
            state["learner"] = [part.state_dict() for part in learner[:3]]
            lines = [row.keys(), *(row.values() for row in state["rows"])]
            text = "".join(",".join(map(str, line)) + "\n" for line in lines)
            save(text, out / "metrics.csv")  # first: after a kill it is ahead, never behind
            save(state, out / "checkpoint.pt")
            numbers = [f"{key} {row[key]:.4f}" for key in [*row][3:-1]]
            steps = (len(phases) * args.epochs - len(state["rows"])) * args.steps_per_epoch
            left = f"{steps * row['ms_per_step'] / 60000:.1f} min left"
            print(f"{phase:8} {epoch:3}", *numbers, left, sep="  ", flush=True)
            for key in [*row][2:] if board else ():
                board.add_scalar(f"{phase}/{key}", row[key], epoch)
    save(learner.average.state_dict(), out / "model.pt")
    final = predict(learner.average, data.images[data.unlabeled]).softmax(dim=1).max(dim=1)
    kept, names, text = data.labels[data.unlabeled] >= 0, data.classes, io.StringIO()
    columns = data.unlabeled, *state["theta"], kept, final.indices, final.values
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow("file label confidence kept final_label final_confidence".split())
    for n, old, p, stands, new, q in zip(*(column.tolist() for column in columns)):
        file = data.files[n] if data.files else n
        writer.writerow([file, names[old], f"{p:.6f}", int(stands), names[new], f"{q:.6f}"])
    save(text.getvalue(), out / "selection.csv")
    ms, gpu = float(np.median([row["ms_per_step"] for row in state["rows"]])), args.device == "cuda"
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    packages = {name: version(name) for name in ("torch", "torchvision", "numpy", "pillow")}
    result = {
        "method": METHOD, "data": name, "scored_on": "validation" if args.val else "test",
        "select": args.select, "eps": args.eps, "seed": args.seed, **state["found"],
        "final_accuracy": state["rows"][-1]["accuracy"], "ms_per_step": ms,
        "images_per_second": 1000 * args.batch_size * (1 + args.mu) / ms,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
        "seconds": sum(row["seconds"] for row in state["rows"]),
        "device": torch.cuda.get_device_name() if gpu else cpu, "ranks": RANKS,
        "versions": {"python": platform.python_version(), **packages},
        "command": shlex.join(["python", *sys.argv]), "args": vars(args),
    }  # fmt: skip
    save(json.dumps(result, indent=1).replace(": NaN", ": null"), out / "result.json")
    return result


def main(argv=None):
    """Does what the command line says, or goes on with it; returns what result.json holds."""
    args, code = parse_args(argv), 2  # the exit code: 2 refused before training, 1 failed in it
    name = Path(args.data_dir).resolve().name if args.data == "folder" else args.data
    args.out = args.out or f"runs/{METHOD}__{name}__{args.select}-eps{args.eps:g}__seed{args.seed}"
    name = {"cifar10": "CIFAR-10", "cifar10-jpeg": "CIFAR-10 (JPEG)"}.get(name, name)
    out = Path(args.out)
    try:
        result, *run = prepare(args, out)
        if result is None:
            stream = torch.cuda.Stream() if args.device == "cuda" else None  # graphs need their own
            with open(out / "lock", "a") as lock, torch.cuda.stream(stream):
                if RANK == 0:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                code = 1
                result = train(*run, args, out, name)
    except (KeyboardInterrupt, SystemExit) as end:
        code, sentence = getattr(end, "code", 130), "stopped; the same command goes on"
    except BlockingIOError:
        sentence = f"error: {out} is in use by another process; let it end, or stop it"
    except (ValueError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        if code == 1 and type(error) in (ValueError, RuntimeError) and "alloc" not in str(error):
            raise  # a mistake in the code: its traceback helps
        where = f"; files in {out}" if code == 1 else ""
        sentence = f"error: {' '.join(str(error).partition('Traceback')[0].split())}{where}"
        if "torch._" in type(error).__module__:
            sentence += "; --no-compile goes without torch.compile"
    else:
        print(f"\nTable 1: {result['scored_on']} accuracy (%) on {result['data']} (files in {out})")
        print(f"{TITLE:40}{result['pretrain_accuracy']:6.2f}")
        print(f"{TITLE + ' fine-tuned, --select ' + args.select:40}{result['final_accuracy']:6.2f}")
        if args.select != "none":
            control = f"--select none --pretrained {out}/pretrain.pt --out {out}-control"
            print(f"What the selection did, its control tells: {result['command']} {control}")
        print("\nTable 2      sensitivity (%): right of kept   specificity (%): wrong of rejected")
        for row in result["table2"]:
            pairs = (row["kept_correct"], row["kept"]), (row["rejected_wrong"], row["rejected"])
            cells = [f"{100 * a / b if b else math.nan:.2f} ({a}/{b})" for a, b in pairs]
            print(f"eps {row['eps']:<9g}{cells[0]:33}{cells[1]}")
        return result
    print(sentence, file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if RANKS > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
    main()
