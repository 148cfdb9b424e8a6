"""MixMatch -> SCAR on CIFAR-10, in one file.

Pretrains a WideResNet with MixMatch on 4,000 labels; attacks it with FGSM on every unlabeled image;
adds the images whose predicted label withstands the attack, under that label, to the labeled set;
trains on from there with MixMatch for as long again (SCAR).

    the paper's run, on a GPU
        python mixmatch_scar.py --eps 1 --epochs 200
    its control: the same fine-tuning from the same pretraining, nothing added
        python mixmatch_scar.py --eps 1 --epochs 200 --select none \\
            --pretrained runs/mixmatch__cifar10__fgsm-eps1__seed0/pretrain.pt

Sources: SCAR is Yang, Kim and Kim, "Improving Performance of Semi-Supervised Learning by
Adversarial Attacks" (PAPER below); MixMatch is Berthelot et al. 2019, arXiv:1905.02249, and the
code google-research/mixmatch.
Measured: CIFAR-10 (JPEG), 9 + 9 epochs, seed 0, bf16, torch 2.11, one H100: 78.56 % after MixMatch,
80.74 % with SCAR, 79.74 % in the control. The paper's 200 + 200 are still to come.
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
import re
import shlex
import signal
import sys
import time
import zipfile
from collections import namedtuple
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.func import functional_call

from common import WideResNet, fgsm, image_names, load_images, split_labeled

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
METHOD, TITLE = "mixmatch", "MixMatch"
TABLE_NAMES = {
    "cifar10": "CIFAR-10",
    "cifar10-jpeg": "CIFAR-10 (JPEG)",
    "cifar100": "CIFAR-100",
    "svhn": "SVHN",
    "stl10": "STL-10",
}
PAPER_TABLE1 = ("89.99", "92.99")  # accuracy (%) without and with SCAR
PAPER_TABLE2 = {1.0: ("98.91 (6054/6124)", "24.13 (936/3879)")}  # eps: sensitivity, specificity

# ==================================================================================================
# The method: arguments, augmentation, MixMatch's loss, SCAR's selection, the training step
# ==================================================================================================


def number(low, high, kind=float):
    """An argparse type: a number from low to high."""

    def value(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, not {text}")
        return kind(text)

    return value


def parse_args(argv=None):
    """The command line; exits with code 2 and a sentence where it makes no sense."""
    style = argparse.ArgumentDefaultsHelpFormatter
    usage = "%(prog)s [--option value ...]   (--help lists the options)"
    parser = argparse.ArgumentParser(usage=usage, formatter_class=style, allow_abbrev=False)
    add, whole, count = parser.add_argument, number(0, 2**63 - 1, int), number(1, 10**6, int)
    from0, above0, below1 = number(0, 1e30), number(1e-9, 1e30), number(0, 1 - 1e-9)
    images = ["cifar10", "cifar100", "svhn", "stl10", "folder", "synthetic"]
    add("--data", default="cifar10", choices=images, help="images")
    add("--data-dir", default="data", help="their place; folder: train/, test/, maybe unlabeled/")
    add("--image-size", type=number(16, 256, int), default=32, help="other images are resized")
    add("--num-labeled", type=count, help="labels, the same number for each class; None: 4000, or "
        "all that there are where a folder has unlabeled/")  # fmt: skip
    add("--val", type=whole, default=0, help="score on so many training images, not on the test's")
    add("--seed", type=whole, default=0, help="of the split, the initial weights and every draw")
    add("--depth", type=count, default=28, help="of the WideResNet, 6n + 4")
    add("--width", type=number(1, 1000, int), default=2, help="of the WideResNet")
    add("--epochs", type=count, default=200, help="of pretraining, and again of fine-tuning")
    add("--steps-per-epoch", type=count, default=1024, help="training steps an epoch")
    add("--batch-size", type=count, default=64, help="labeled images a step, and unlabeled ones")
    add("--lr", type=above0, default=0.002, help="learning rate")
    add("--weight-decay", type=from0, default=0.02, help="w *= 1 - lr * this, conv and linear")
    add("--ema-decay", type=below1, default=0.999, help="decay of the evaluated, averaged model")
    add("--lambda-u", type=from0, default=0.75, help="weight of the unlabeled loss, after its ramp")
    add("--temperature", type=above0, default=0.5, help="sharpens guesses: p^(1/T), rescaled")
    add("--alpha", type=from0, default=0.75, help="of MixUp's Beta(alpha, alpha); 0: no MixUp")
    add("--eps", type=number(0, 255), default=1.0, help="FGSM's step in 1/255; 0 keeps every image")
    add("--select", default="fgsm", choices=["fgsm", "none", "confidence"], help="images to "
        "label: those that withstand FGSM, none (the control), as many most confident")  # fmt: skip
    add("--table2-eps", type=number(0, 255), nargs="+", default=[1.0, 2.0, 3.0, 4.0, 6.0])
    add("--pretrained", metavar="PATH", help="start at the selection, from this pretrain.pt")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: CUDA if present")
    add("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="auto: bf16 if fast")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; None: if on CUDA")
    add("--tensorboard", action="store_true", help="write TensorBoard events as well")
    add("--out", help="run folder; None: runs/<method>__<data>__<select>-eps<eps>__seed<seed>")
    parser.set_defaults(mu=1)  # unlabeled images a step, in batch sizes
    return parser.parse_args(argv)


def weak_augment(x):
    """Flips each image with probability 1/2 and moves it by up to an eighth of its side, reflected.

    x: uint8 [N, 3, H, W] -> the same; else ValueError. Source: FixMatch, section 2.3.
    """
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(
            f"only uint8 images [N, 3, H, W] are augmented, not {x.dtype} {[*x.shape]}"
        )
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


def forward_untracked(model, x):
    """model(x), batch norm's running statistics left as they are: only copies of them move."""
    copies = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return functional_call(model, copies, x)


def draw_mix(count, alpha, device):
    """float [count]: max(l, 1 - l) with l from Beta(alpha, alpha); 1 when alpha is 0.

    From two logarithms of Gamma(alpha) = Gamma(alpha + 1) * uniform^(1 / alpha), in float64: at a
    small alpha the samples themselves are 0 in any precision.
    """
    if alpha == 0:
        return torch.ones(count, device=device)
    shape = torch.full((2, count), alpha, dtype=torch.float64, device=device)
    gamma = torch.distributions.Gamma(shape + 1, torch.ones_like(shape), validate_args=False)
    log_gamma = gamma.sample().log() + (1 - torch.rand_like(shape)).log() / alpha
    return (log_gamma[0] - log_gamma[1]).abs().sigmoid().float()


def mixmatch_loss(
    model, x_l, y_l, x_u1, x_u2, temperature, alpha, lambda_u, *, mix=None, perm=None
):
    """Cross-entropy on mixed labeled images + lambda_u * squared error on mixed unlabeled ones.

    x_l: float [B, 3, H, W] in [0, 1], y_l: int64 [B]; x_u1, x_u2: float [B, 3, H, W], two weak
    views of the same images; temperature above 0; alpha at least 0; lambda_u: float or 0-dim
    tensor. mix: float [3B] in [0.5, 1], the share of an image itself in its mixture; perm: int64
    [3B], whom it is mixed with; both drawn when None, mix as max(l, 1 - l), l from Beta(alpha,
    alpha); alpha 0 switches MixUp off.
    Returns (loss, metrics): a scalar, and detached scalars loss_labeled and loss_unlabeled (without
    lambda_u; the mean over images and classes).
    Source: MixMatch, algorithm 1 and equations 2 to 5; google-research/mixmatch, mixmatch.py.
    """
    # The guess: the mean prediction for both views, sharpened. Detached, not under no_grad: before
    # PyTorch's pull request 165068, autocast reuses the bf16 weights made there, without gradient.
    prob = forward_untracked(model, torch.cat([x_u1, x_u2])).float().softmax(dim=1)
    prob = prob.detach().view(2, len(x_u1), -1).mean(dim=0)
    guess = (prob.log() / temperature).softmax(dim=1)  # p^(1/T), rescaled to sum 1

    # MixUp: every image, labeled or not, with any other of the step
    x = torch.cat([x_l, x_u1, x_u2])
    target = torch.cat([F.one_hot(y_l, guess.shape[1]), guess, guess])
    mix = draw_mix(len(x), alpha, x.device) if mix is None else mix.float()
    perm = torch.rand(len(x), device=x.device).argsort() if perm is None else perm
    x = mix[:, None, None, None] * x + (1 - mix[:, None, None, None]) * x[perm]
    target = mix[:, None] * target + (1 - mix[:, None]) * target[perm]

    logits_l, logits_u = model(x).float().tensor_split([len(x_l)])
    target_l, target_u = target.tensor_split([len(x_l)])
    loss_labeled = F.cross_entropy(logits_l, target_l)
    loss_unlabeled = F.mse_loss(logits_u.softmax(dim=1), target_u)
    return loss_labeled + lambda_u * loss_unlabeled, {
        "loss_labeled": loss_labeled.detach(),
        "loss_unlabeled": loss_unlabeled.detach(),
    }


def select_clean(model, x, eps):
    """SCAR: keeps the images whose predicted label withstands FGSM.

    model: float [N, 3, H, W] in [0, 1] -> logits, used in eval mode; x: uint8, or float in [0, 1],
    [N, 3, H, W], not augmented; eps: FGSM's step on the [0, 1] scale. Returns (keep, pseudo): bool
    [N], int64 [N]. Source: PAPER, Algorithm 1, lines 5 to 8.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    keep, pseudo = [], []
    with torch.no_grad():
        for chunk in map(to_float, x.split(500)):
            pseudo.append(model(chunk).argmax(dim=1))  # line 5
            attacked = fgsm(model, chunk, pseudo[-1], eps)  # line 6
            keep.append(model(attacked).argmax(dim=1) == pseudo[-1])  # lines 7 and 8
    for module, training in modes:
        module.training = training
    return torch.cat(keep), torch.cat(pseudo)


def select_confident(logits, count):
    """SCAR's rival (PAPER, section III.A): the `count` most confident of logits [N, C] -> bool [N].

    By log-odds, which rise with the confidence and still differ where that rounds to 1.
    """
    top, label = logits.max(dim=1)
    log_odds = top - logits.scatter(1, label[:, None], -torch.inf).logsumexp(dim=1)
    keep = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    keep[log_odds.topk(count).indices] = True
    return keep


def selection_stats(keep, pseudo, y):
    """How well a selection tells right pseudo-labels from wrong ones, in Python numbers.

    keep: bool [N]; pseudo, y: int64 [N], predicted and true labels; where y is -1 an image is left
    out. sensitivity: kept_correct / kept, the precision of the kept (PPV); specificity:
    rejected_wrong / rejected, that of the rejected (NPV); in percent, nan where nothing was kept
    or rejected. Source: PAPER, equations 5 and 6.
    """
    known, wrong = y >= 0, pseudo != y
    masks = {"kept": keep, "kept_correct": keep & ~wrong}
    masks |= {"rejected": ~keep, "rejected_wrong": ~keep & wrong}
    n = {name: int((mask & known).sum()) for name, mask in masks.items()}
    sensitivity = 100 * n["kept_correct"] / n["kept"] if n["kept"] else math.nan
    specificity = 100 * n["rejected_wrong"] / n["rejected"] if n["rejected"] else math.nan
    return {"sensitivity": sensitivity, "specificity": specificity, **n}


def make_optimizer(model, args):
    """Adam; after it, convolution and linear weights shrink by the factor 1 - lr * weight_decay.

    AdamW shrinks them just before its update instead, which differs by lr^2 * weight_decay.
    """
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=True)


def schedule(step, total_steps, phase, args):
    """(lr, lambda_u) at step 0 .. total_steps - 1 of a phase.

    lr is constant; lambda_u rises linearly over the first 16,384 steps, as in MixMatch's code, and
    fine-tuning goes on where pretraining's rise ended.
    """
    done = step + (total_steps if phase == "finetune" else 0)
    return args.lr, min(1.0, done / 16384) * args.lambda_u


def batch_loss(model, x_l, y_l, x_u, lambda_u, args):
    """MixMatch on stored images: augments, then mixmatch_loss. This is what torch.compile compiles.

    x_l, x_u: uint8 [B, 3, H, W], y_l: int64 [B]. Returns (loss, metrics).
    """
    x_l, x_u1, x_u2 = (to_float(weak_augment(x)) for x in (x_l, x_u, x_u))
    with torch.autocast(x_l.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        return mixmatch_loss(model, x_l, y_l, x_u1, x_u2, args.temperature, args.alpha, lambda_u)


def update_average(average, model, decay):
    """average = decay * average + (1 - decay) * model, in place, batch-norm statistics too.

    decay: float or 0-dim tensor. Integer buffers are copied.
    """
    pairs = list(zip(average.state_dict().values(), model.state_dict().values()))
    ours, theirs = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
    change = torch._foreach_sub(theirs, ours)
    torch._foreach_mul_(change, 1 - decay)
    torch._foreach_add_(ours, change)
    counters = [pair for pair in pairs if not pair[0].is_floating_point()]
    if counters:
        torch._foreach_copy_(*zip(*counters))


def average_over_ranks(tensors):
    """Replaces each float tensor by its mean over torchrun's processes, all in one exchange."""
    if RANKS > 1:
        tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = (flat / RANKS).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts):
            tensor.copy_(part.view(tensor.shape))


# what learns; average is the model that is evaluated, loss is batch_loss, compiled or not
Learner = namedtuple("Learner", "model average optimizer loss")
# all on the device: uint8 images [N, 3, H, W] and, int64, their true labels [N] for the report
# alone, the labels [N] that training knows (-1: none), the pool's indices; the images to score on;
# the names of classes and, of a folder, files
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
        group["capturable"] = lr.is_cuda and torch.cuda.is_current_stream_capturing()  # Adam asks
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    update_average(learner.average, learner.model, decay)
    return {"loss": loss.detach(), **metrics}


# ==================================================================================================
# Plumbing, the same in every script: evaluation, the epoch, the run folder, both phases, main
# ==================================================================================================

STATEFUL = ("model", "average", "optimizer")
MAY_CHANGE = {
    "device",
    "out",
    "data_dir",
    "compile",
    "tensorboard",
    "classes",
}  # when a run goes on


def predict(model, x):
    """Logits [N, C] of the model in eval mode for images [N, 3, H, W], uint8 or float."""
    training = model.training
    with torch.no_grad():
        logits = [model.eval()(to_float(chunk)) for chunk in x.split(500)]
    model.train(training)
    return torch.cat(logits)


def evaluate(model, x, y):
    """Accuracy in percent on images [N, 3, H, W], uint8 or float, with labels int64 [N]."""
    return 100 * int((predict(model, x).argmax(dim=1) == y).sum()) / len(x)


def draw_batches(pool, count, size, generator):
    """int64 [count, size] out of pool, int64 [M]: shuffled passes, each entry once a pass."""
    passes = -(-count * size // len(pool))
    order = torch.rand(passes, len(pool), generator=generator, device=pool.device).argsort(dim=1)
    return pool[order.flatten()[: count * size]].view(count, size)


def capture(function):
    """A function of tensors that is one CUDA graph, a single launch, from its fourth call on.

    Calls must be on one stream, not the default one. What a call returns, the next overwrites.
    """
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
    """One epoch; returns its row of metrics.csv. All it draws follows from (seed, phase, epoch).

    Raises FloatingPointError when the loss or the averaged weights are not finite.
    """
    cuda, steps, started = args.device == "cuda", args.steps_per_epoch, time.perf_counter()
    seeds = np.random.SeedSequence([args.seed, int(phase == "finetune"), epoch]).generate_state(2)
    torch.manual_seed(int(seeds[0]) + RANK)
    # batches have a generator of their own, so that a larger labeled set moves no augmentation
    generator = torch.Generator(args.device).manual_seed(int(seeds[1]))
    batches_u = draw_batches(data.unlabeled, steps, args.mu * args.batch_size, generator)
    known = torch.nonzero(data.labels >= 0).squeeze(1)
    batches_l = draw_batches(known, steps, args.batch_size, generator)
    rates = []
    for i in range((epoch - 1) * steps, epoch * steps):
        decay = min(args.ema_decay, (1 + i) / (10 + i))  # young, the average follows faster
        rates.append((*schedule(i, args.epochs * steps, phase, args), decay))
    # every process takes its share of each batch
    inputs = batches_l[:, RANK::RANKS], batches_u[:, RANK::RANKS]
    inputs = zip(*inputs, *torch.tensor(rates, device=args.device).unbind(1))

    def now():  # without waiting for the device
        mark = torch.cuda.Event(enable_timing=True) if cuda else None
        return torch.cuda.current_stream().record_event(mark) if cuda else time.perf_counter()

    learner.model.train()
    totals, marks, shown = {}, [now()], started
    for i, tensors in enumerate(inputs, 1):
        metrics = step(*tensors)
        totals = {name: totals.get(name, 0) + value for name, value in metrics.items()}
        marks.append(now())
        if sys.stdout.isatty() and time.perf_counter() - shown > 0.5:
            shown = time.perf_counter()
            print(f"{phase} {epoch}: step {i} of {steps}", end="\033[K\r", flush=True)

    average_over_ranks([*totals.values(), *learner.model.buffers(), *learner.average.buffers()])
    means = {name: float(total) / steps for name, total in totals.items()}
    finite = all(weight.isfinite().all() for weight in learner.average.state_dict().values())
    if not (finite and math.isfinite(means["loss"])):
        raise FloatingPointError(f"loss or weights not finite in {phase} epoch {epoch}; lower --lr")
    if cuda:
        torch.cuda.synchronize()
    ms = [a.elapsed_time(b) if cuda else 1000 * (b - a) for a, b in zip(marks, marks[1:])]
    row = {"phase": phase, "epoch": epoch, "lr": rates[-1][0], **means}
    row["accuracy"] = evaluate(learner.average, data.x_scored, data.y_scored)
    row["ms_per_step"] = float(np.median(ms[2:] or ms))  # the first two warm up
    return {**row, "seconds": time.perf_counter() - started}


def print_row(row, args, header):
    """An aligned line for an epoch and the time that is left; header: the names above it."""
    epochs = args.epochs * (2 if row["phase"] == "pretrain" else 1) - row["epoch"]
    seconds = round(epochs * args.steps_per_epoch * row["ms_per_step"] / 1000)
    cells = {"phase": f"{row['phase']:8}", "epoch": f"{row['epoch']:5}"}
    cells |= {name: f"{row[name]:{max(8, len(name))}.4f}" for name in [*row][2:-1]}
    cells["time left"] = f"{timedelta(seconds=seconds)!s:>9}"
    if header:
        print(*(f"{name:>{len(cell)}}" for name, cell in cells.items()))
    print(*cells.values(), flush=True)


def save(content, path):
    """Writes text, or anything else by torch.save, beside the file, then moves it into place."""
    if RANK == 0:
        buffer = io.BytesIO()  # written by Python, so that a full disk is an OSError
        buffer.write(content.encode()) if isinstance(content, str) else torch.save(content, buffer)
        partial = path.with_name(path.name + ".partial")
        with open(partial, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # or the move could reach the disk before the content
        os.replace(partial, path)


def load(path, *names):
    """What a .json or torch.save file holds, on the CPU; names: what must be in it. ValueError."""
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text())
        elif zipfile.ZipFile(path).testzip() is None:  # its checksums are right
            content = torch.load(path, map_location="cpu", weights_only=True)
        for name in names:
            content[name]  # or it is another kind of file
        return content
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except Exception as error:  # of a dozen kinds
        problem = f"{path} is damaged or another kind of file ({type(error).__name__})"
        raise ValueError(f"{problem}; delete or replace it") from None


def refuse_changes(begun, given, names, sentence):
    """Raises ValueError with the sentence if two command lines differ in one of the settings."""
    pairs = {name: (begun.get(name), given.get(name)) for name in sorted(names)}
    changed = [f"{name} was {a}, now {b}" for name, (a, b) in pairs.items() if a != b]
    if changed:
        raise ValueError(f"{sentence} ({'; '.join(changed)})")


def open_folder(out, given):
    """(result or None, checkpoint or None): what a run folder holds of the run that is given."""
    begun_at_most = {"lock", "args.json.partial"}  # by a run that was killed as it began
    if not out.exists() or {path.name for path in out.iterdir()} <= begun_at_most:
        return None, None
    if not (out / "args.json").exists():
        raise ValueError(f"{out} is not empty and holds no run; choose another --out")
    begun, result, checkpoint = load(out / "args.json", "method"), None, None
    if (out / "result.json").exists():
        result = load(out / "result.json", "table2", "args")
    elif (out / "checkpoint.pt").exists():
        checkpoint = load(out / "checkpoint.pt", "given", "labels", *STATEFUL)
        begun = checkpoint["given"]
    sentence = f"{out} holds another run; choose another --out, or delete it to start over"
    refuse_changes(begun, given, (begun.keys() | given.keys()) - MAY_CHANGE, sentence)
    return result, checkpoint


def prepare(args, given, checkpoint):
    """Everything before training: (learner, data, what a checkpoint holds). Settles every "auto".

    Raises ValueError or OSError with one sentence.
    """
    cuda = torch.cuda.is_available()
    args.device = args.device.replace("auto", "cuda" if cuda else "cpu")
    if args.device == "cuda" and not cuda:
        raise ValueError("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    if args.precision == "auto":
        on_gpu = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        on_cpu = torch.cpu._is_avx512_bf16_supported()
        args.precision = "bf16" if (on_gpu if args.device == "cuda" else on_cpu) else "fp32"
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; matrix products have it off already

    if RANK > 0:
        dist.barrier()  # until process 0 has downloaded what was missing
    x, y, *scored = load_images(args.data, args.data_dir, args.image_size)
    if RANK == 0 and RANKS > 1:
        dist.barrier()
    classes, files, left_out = image_names(args.data, args.data_dir)
    print(f"{len(classes)} classes: {', '.join(classes)}")
    if left_out:
        print(f"left out: {len(left_out)} files, {', '.join(left_out[:5])}")
    if args.num_labeled is None:
        args.num_labeled = 4000 if args.data != "folder" or y.min() >= 0 else int((y >= 0).sum())
    labeled, unlabeled = split_labeled(y, args.num_labeled, args.seed, classes)
    if args.val:
        held_out, rest = split_labeled(y[unlabeled], args.val, args.seed, classes)
        scored = x[unlabeled[held_out]], y[unlabeled[held_out]]
        unlabeled = unlabeled[rest]
    print(f"{args.num_labeled:,} labels, {len(unlabeled):,} unlabeled images, {len(scored[0]):,} "
          f"scored; WRN-{args.depth}-{args.width}, {args.device} {args.precision}")  # fmt: skip
    labels = torch.full_like(y, -1)
    labels[labeled] = y[labeled]
    tensors = (tensor.to(args.device) for tensor in (x, y, labels, unlabeled, *scored))
    data = Data(*tensors, classes, files)

    torch.manual_seed(args.seed)
    model = WideResNet(len(classes), args.depth, args.width)
    model = model.to(args.device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    loss = torch.compile(batch_loss) if args.compile else batch_loss
    learner = Learner(model, average, make_optimizer(model, args), loss)
    state = {"phase": "pretrain", "epoch": 0, "rows": [], "found": None, "given": given}
    state |= checkpoint or {}
    path = Path("checkpoint.pt" if args.pretrained is None else args.pretrained)
    if args.pretrained is not None and not checkpoint:
        beside, names = path.with_name("args.json"), ("method", "data", "num_labeled", "seed")
        if beside.exists():
            refuse_changes(
                load(beside, *names), given, names, f"{path} is of a run with other labels"
            )
        state |= {"phase": "finetune", **dict.fromkeys(("model", "average"), load(path))}
    try:
        for name in state.keys() & {*STATEFUL}:
            getattr(learner, name).load_state_dict(state[name])
        data.labels.copy_(state.get("labels", data.labels))
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError):
        raise ValueError(
            f"{path} does not fit a WRN-{args.depth}-{args.width} and this data"
        ) from None
    if not all(weights.isfinite().all() for weights in average.state_dict().values()):
        raise ValueError(f"{path} holds weights that are not finite")
    return learner, data, state


def select(average, data, args, out):
    """Scores theta~, the averaged model after pretraining, and labels the images that it selects.

    Changes data.labels; writes selection.png. Returns what result.json says of theta~, and its
    label and confidence for each unlabeled image.
    """
    table2, x, y = [], data.images[data.unlabeled], data.truth[data.unlabeled]
    for eps in sorted({args.eps, *args.table2_eps}):
        stats = selection_stats(*select_clean(average, data.x_scored, eps / 255), data.y_scored)
        table2.append({"eps": eps, **stats})
    logits = predict(average, x)
    keep, pseudo = torch.zeros_like(y, dtype=torch.bool), logits.argmax(dim=1)
    if args.select != "none":
        keep, pseudo = select_clean(average, x, args.eps / 255)
    if args.select == "confidence":
        keep = select_confident(logits, int(keep.sum()))
    data.labels[data.unlabeled] = torch.where(keep, pseudo, -1)
    if RANK == 0:
        save_selection(out / "selection.png", x, keep, pseudo, y, data.classes)
    stats = {"unlabeled": len(x), "added": int(keep.sum()), "without_label": int((y < 0).sum())}
    stats |= selection_stats(keep, pseudo, y)
    print(
        f"  --select {args.select} labels {stats['added']:,} of the {len(x):,} unlabeled images; "
        f"{stats['without_label']:,} have no true label and are left out of the report"
    )
    stats["kept_per_class"] = torch.bincount(pseudo[keep], minlength=logits.shape[1]).tolist()
    accuracy = evaluate(average, data.x_scored, data.y_scored)
    found = {"pretrain_accuracy": accuracy, "table2": table2, "selection": stats}
    return found, (pseudo, logits.softmax(dim=1).amax(dim=1))


def save_selection(path, x, keep, pseudo, y, classes):
    """A row for each predicted class: up to 8 kept images and 8 rejected ones, drawn at random.

    x: uint8 [N, 3, H, W]; keep: bool [N]; pseudo, y: int64 [N]. Frames: green where the label is
    right, red where it is wrong, grey where the true one (-1) is not known.
    """
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
                at = left + (column + i) * side, 16 + row * side
                picture.paste(ImageOps.expand(tile, 2, colour), at)
    picture.save(path)


def save_labels(path, data, theta, final):
    """selection.csv: a row an unlabeled image. theta, final: (label, confidence), each [U]."""
    kept, text = data.labels[data.unlabeled] >= 0, io.StringIO()
    columns = [tensor.tolist() for tensor in (data.unlabeled, *theta, kept, *final)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow("file label confidence kept final_label final_confidence".split())
    for n, before, confidence, stands, after, final_confidence in zip(*columns):
        file, names = data.files[n] if data.files else n, data.classes
        row = [file, names[before], f"{confidence:.6f}", int(stands), names[after]]
        writer.writerow([*row, f"{final_confidence:.6f}"])
    save(text.getvalue(), path)


def train(learner, data, args, state, out):
    """Both phases, from where the state stands; a checkpoint an epoch. Changes the state."""
    settings = {**state["given"], "classes": data.classes}
    save(json.dumps(settings, indent=1, ensure_ascii=False), out / "args.json")
    save(Path(__file__).read_text(), out / Path(__file__).name)
    header, board = True, None
    if args.tensorboard and RANK == 0:
        board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(out)
    for phase in ("pretrain", "finetune") if state["phase"] == "pretrain" else ("finetune",):
        if phase == "finetune" and state["found"] is None:
            save(learner.average.state_dict(), out / "pretrain.pt")
            found, theta = select(learner.average, data, args, out)
            state |= {"phase": phase, "epoch": 0, "found": found, "theta": theta}
            if RANKS > 1:
                dist.broadcast(data.labels, 0)
            learner.model.load_state_dict(learner.average.state_dict())
            learner = learner._replace(optimizer=make_optimizer(learner.model, args))
        step = partial(training_step, learner, data, args)
        step = capture(step) if args.compile and args.device == "cuda" else step
        for epoch in range(state["epoch"] + 1, args.epochs + 1):
            row = train_epoch(step, learner, data, phase, epoch, args)
            print_row(row, args, header or epoch == 1)
            header = False
            state |= {"epoch": epoch, "rows": [*state["rows"], row], "labels": data.labels}
            state |= {name: getattr(learner, name).state_dict() for name in STATEFUL}
            lines = [row, *(row.values() for row in state["rows"])]
            text = "".join(",".join(map(str, line)) + "\n" for line in lines)
            save(text, out / "metrics.csv")  # first: after a kill it is ahead, never behind
            save(state, out / "checkpoint.pt")
            for name in row.keys() - {"phase", "epoch"} if board else ():
                board.add_scalar(f"{phase}/{name}", row[name], epoch)
    save(learner.average.state_dict(), out / "model.pt")
    final = predict(learner.average, data.images[data.unlabeled]).softmax(dim=1).max(dim=1)
    save_labels(out / "selection.csv", data, state["theta"], (final.indices, final.values))


def report(state, args, name, command):
    """What result.json holds, strict JSON."""
    rows, gpu = state["rows"], args.device == "cuda"
    ms = float(np.median([row["ms_per_step"] for row in rows]))
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    versions = {name: version(name) for name in ("torch", "torchvision", "numpy", "pillow")}
    result = {"method": METHOD, "data": name, "scored_on": "validation" if args.val else "test"}
    result |= {"select": args.select, "eps": args.eps, "seed": args.seed, **state["found"]}
    result |= {"final_accuracy": rows[-1]["accuracy"], "ms_per_step": ms}
    result["images_per_second"] = 1000 * args.batch_size * (1 + args.mu) / ms
    result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
    result["seconds"] = sum(row["seconds"] for row in rows)
    result |= {"device": torch.cuda.get_device_name() if gpu else cpu, "ranks": RANKS}
    result["versions"] = {"python": platform.python_version(), **versions}
    return {**result, "command": command, "args": vars(args)}


def print_tables(result, out):
    """The rows of Table 1 and Table 2 that a run measured; on CIFAR-10 beside the paper's."""
    select, paper = result["select"], (("", ""), {})
    if result["data"] == "CIFAR-10":
        paper = [f"   paper: {accuracy}" for accuracy in PAPER_TABLE1], PAPER_TABLE2
    added = {"fgsm": "SCAR", "none": "nothing (control)", "confidence": "most confident"}[select]
    print(f"\nTable 1: {result['scored_on']} accuracy (%) on {result['data']}")
    print(f"{TITLE:30}{result['pretrain_accuracy']:7.2f}{paper[0][0]}")
    after = paper[0][1] if select == "fgsm" else ""
    print(f"{TITLE + ' + ' + added:30}{result['final_accuracy']:7.2f}{after}")
    if select != "none":
        control = f"--select none --pretrained {out}/pretrain.pt --out {out}-control"
        print(f"What the selection did, the control tells:\n  {result['command']} {control}")
    print("\nTable 2     right of kept (sensitivity, %)     wrong of rejected (specificity, %)")
    for row in result["table2"]:
        counts = (row["kept_correct"], row["kept"]), (row["rejected_wrong"], row["rejected"])
        cells = [f"{100 * a / b:.2f} ({a}/{b})" if b else "none (0/0)" for a, b in counts]
        cells += ["   paper:", *paper[1][row["eps"]]] if row["eps"] in paper[1] else []
        print(f"eps {row['eps']:<8g}{cells[0]:35}", *cells[1:])
    print(f"\n{result['ms_per_step']:.1f} ms a step on {result['device']}; files in {out}")


def main(argv=None):
    """Does what the command line says, or goes on with it; returns what result.json holds.

    Exits with 2 when refused before training, 1 when training fails, 130 or 143 when stopped.
    """
    args, training = parse_args(argv), False
    given = {"method": METHOD, **vars(args)}
    command = shlex.join(["python", f"{METHOD}_scar.py", *(sys.argv[1:] if argv is None else argv)])
    name = Path(args.data_dir).resolve().name if args.data == "folder" else args.data
    args.out = args.out or f"runs/{METHOD}__{name}__{args.select}-eps{args.eps:g}__seed{args.seed}"
    name, out = TABLE_NAMES.get(name, name), Path(args.out)
    try:
        result, checkpoint = open_folder(out, given)
        if result is None:
            learner, data, state = prepare(args, given, checkpoint)
            stream = torch.cuda.Stream() if args.device == "cuda" else None  # graphs need their own
            out.mkdir(parents=True, exist_ok=True)
            with open(out / "lock", "a") as lock, torch.cuda.stream(stream):
                if RANK == 0:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                training = True
                train(learner, data, args, state, out)
                result = report(state, args, name, command)
                save(json.dumps(result, indent=1).replace(": NaN", ": null"), out / "result.json")
        print_tables(result, out)
        return result
    except (KeyboardInterrupt, SystemExit) as end:
        code, sentence = getattr(end, "code", 130), "stopped; the same command goes on"
    except BlockingIOError:
        code, sentence = 2, f"error: {out} is in use by another process; let it end, or stop it"
    except (RuntimeError, MemoryError) as error:
        text = " ".join(str(error).partition("\n\n")[0].split())
        code, sentence = 1, "error: out of memory on the device; lower --batch-size or --width"
        if "torch._" in type(error).__module__:
            sentence = f"error: torch.compile failed ({text}); --no-compile goes without it"
        elif isinstance(error, RuntimeError) and not re.search("memory|alloc", text.lower()):
            raise
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if training and isinstance(error, ValueError):
            raise  # a mistake in the code: its traceback helps
        code, sentence = (
            (1, f"error: {error}; files in {out}") if training else (2, f"error: {error}")
        )
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
