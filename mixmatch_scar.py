"""MixMatch -> SCAR on CIFAR-10, in one file.

Pretrains a WideResNet with MixMatch on 4,000 labels; attacks it with FGSM on every unlabeled image;
adds the images whose predicted label withstands the attack, under that label, to the labeled set;
trains on from there with MixMatch for as long again (SCAR).

    the paper's run, on a GPU
        python mixmatch_scar.py --eps 1 --epochs 200
    its control: the same fine-tuning from the same pretraining, nothing added
        python mixmatch_scar.py --eps 1 --epochs 200 --select none \\
            --pretrained runs/mixmatch__cifar10__fgsm-eps1__seed0/pretrain.pt
    a few minutes on two CPU cores, no download
        python mixmatch_scar.py --data synthetic --num-labeled 250 --depth 10 --width 1 \\
            --batch-size 32 --epochs 4 --steps-per-epoch 60

Sources: SCAR is Yang, Kim and Kim, "Improving Performance of Semi-Supervised Learning by
Adversarial Attacks" (PAPER below); MixMatch is Berthelot et al. 2019, arXiv:1905.02249, and the
code google-research/mixmatch.
Measured so far only at CPU size: CIFAR-10 (JPEG), 4,000 labels, WRN-10-1, 6 + 6 epochs of 500
steps, batch 32, seed 0, bf16, torch 2.14, x86-64 CPU: 62.54 % after MixMatch, 61.41 % with SCAR,
67.16 % in the control. See the README; the paper's run is still to come.
"""

import argparse
import copy
import csv
import fcntl
import importlib.util
import io
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
import zlib
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.func import functional_call
from torchvision.utils import make_grid, save_image

from common import WideResNet, fgsm, load_images, split_labeled

METHOD, TITLE = "mixmatch", "MixMatch"
PAPER_TABLE1 = ("89.99", "92.99")  # accuracy (%) without and with SCAR
PAPER_TABLE2 = {1.0: ("98.91 (6054/6124)", "24.13 (936/3879)")}  # eps: sensitivity, specificity
CHUNK = 500  # images at a time through a network that is not being trained

# ==================================================================================================
# The method: arguments, augmentation, MixMatch's loss, SCAR's selection, the training step
# ==================================================================================================


def parse_args(argv=None):
    """The command line, checked; exits with code 2 and one sentence where it makes no sense."""
    parser = argparse.ArgumentParser(
        description=f"{TITLE}, then SCAR.",
        usage="%(prog)s [--option value ...]   (--help lists the options)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", default="cifar10", choices=["cifar10", "folder", "synthetic"], help="images")
    add("--data-dir", default="data", help="CIFAR-10's place, or a folder with train/ and test/")
    add("--num-labeled", type=int, default=4000, help="labels, the same number for each class")
    add("--val", type=int, default=0, help="score on so many training images, not the test set")
    add("--seed", type=int, default=0, help="of the split, the initial weights and every draw")
    add("--depth", type=int, default=28, help="of the WideResNet, 6n + 4")
    add("--width", type=int, default=2, help="of the WideResNet")
    add("--epochs", type=int, default=200, help="of pretraining, and again of fine-tuning")
    add("--steps-per-epoch", type=int, default=1024, help="training steps an epoch")
    add("--batch-size", type=int, default=64, help="labeled images a step, and unlabeled ones")
    add("--lr", type=float, default=0.002, help="learning rate")
    add("--weight-decay", type=float, default=0.02, help="w *= 1 - lr * this, conv and linear")
    add("--ema-decay", type=float, default=0.999, help="decay of the evaluated, averaged model")
    add("--lambda-u", type=float, default=0.75, help="weight of the unlabeled loss, after its ramp")
    add("--temperature", type=float, default=0.5, help="sharpens guessed labels: p^(1/T), rescaled")
    add("--alpha", type=float, default=0.75, help="of MixUp's Beta(alpha, alpha); 0: no MixUp")
    add("--eps", type=float, default=1.0, help="FGSM's step in 1/255; 0 keeps every image")
    add("--select", default="fgsm", choices=["fgsm", "none", "confidence"], help="what is added "
        "to the labeled set: images that withstand FGSM (SCAR), none (the control), or the most "
        "confident ones, as many as withstand FGSM")  # fmt: skip
    add("--true-share", type=float, metavar="SHARE", help="of true labels in a labeled batch of "
        "fine-tuning; None: as many as come, drawn from all labels alike")  # fmt: skip
    add("--table2-eps", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0, 6.0], metavar="EPS",
        help="the rows of Table 2")  # fmt: skip
    add("--pretrained", metavar="PATH", help="start at the selection, from this pretrain.pt")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: CUDA if present")
    add("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="auto: bf16 if fast")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; None: if on CUDA")
    add("--tensorboard", action="store_true", help="write TensorBoard events as well")
    add("--out", help="run folder; None: runs/<method>__<data>__<select>-eps<eps>__seed<seed>")
    args = parser.parse_args(argv)

    for fine, problem in [
        (args.num_labeled >= 1, "--num-labeled must be at least 1"),
        (args.val >= 0, "--val must not be negative"),
        (0 <= args.seed < 2**63, "--seed must be at least 0 and below 2^63"),
        (args.depth in range(10, 1000, 6), "--depth must be 6n + 4: 10, 16, 22, 28, ..."),
        (1 <= args.width <= 10**6, "--width must be between 1 and a million"),
        (1 <= args.epochs <= 10**6, "--epochs must be between 1 and a million"),
        (1 <= args.steps_per_epoch <= 10**6, "--steps-per-epoch must be between 1 and a million"),
        (1 <= args.batch_size <= 10**6, "--batch-size must be between 1 and a million"),
        (0 < args.lr < math.inf, "--lr must be above 0"),
        (0 <= args.weight_decay < math.inf, "--weight-decay must be at least 0"),
        (0 <= args.ema_decay < 1, "--ema-decay must be at least 0 and below 1"),
        (0 <= args.lambda_u <= 1e30, "--lambda-u must be between 0 and 1e30"),
        (0 < args.temperature < math.inf, "--temperature must be above 0"),
        (0 <= args.alpha < math.inf, "--alpha must be at least 0"),
        (0 <= args.eps <= 255, "--eps is in units of 1/255 and must be between 0 and 255"),
        (all(0 <= eps <= 255 for eps in args.table2_eps), "--table2-eps must be between 0 and 255"),
        (
            args.true_share is None or 0 < args.true_share <= 1,
            "--true-share must be above 0 and at most 1",
        ),
        (args.pretrained != "", "--pretrained needs the path of a pretrain.pt"),
    ]:
        if not fine:
            parser.error(problem)
    return args


def gather_pixels(x, index):
    """x [N, C, H, W] at index, int64 [N, H, W] of row * W + column -> [N, C, H, W]."""
    n, c, h, w = x.shape
    return x.flatten(2).gather(2, index.view(n, 1, h * w).expand(n, c, h * w)).view(n, c, h, w)


def weak_augment(x):
    """Flips each image with probability 1/2 and moves it by up to 4 pixels, the border reflected.

    x: uint8 [N, 3, H, W] -> the same. Source: FixMatch, section 2.3.
    """
    n, _, h, w = x.shape
    shift = torch.randint(-4, 5, (2, n, 1), device=x.device)
    row = torch.arange(h, device=x.device) + shift[0]
    row = (h - 1) - ((h - 1) - row.abs()).abs()  # what lies beyond an end is reflected at it
    column = torch.arange(w, device=x.device) + shift[1]
    column = (w - 1) - ((w - 1) - column.abs()).abs()
    flip = torch.rand(n, 1, device=x.device) < 0.5
    column = torch.where(flip, (w - 1) - column, column)
    return gather_pixels(x, row[:, :, None] * w + column[:, None, :])


def to_float(x):
    """uint8 [N, 3, H, W] -> float32 in [0, 1], channels_last: the layout that is fastest."""
    return x.to(torch.float32, memory_format=torch.channels_last) / 255


def forward_untracked(model, x):
    """model(x), batch norm's running statistics left as they are: only copies of them move."""
    copies = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return functional_call(model, copies, x)


def draw_mix(count, alpha, device):
    """float [count]: max(l, 1 - l) with l from Beta(alpha, alpha); 1 when alpha is 0."""
    ones = torch.ones(count, device=device)
    if alpha == 0:
        return ones
    share = torch.distributions.Beta(alpha * ones, alpha * ones, validate_args=False).sample()
    return torch.maximum(share, 1 - share)


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
    prob = sum(forward_untracked(model, x).float().softmax(dim=1) for x in (x_u1, x_u2)) / 2
    guess = (prob.detach().log() / temperature).softmax(dim=1)  # p^(1/T), rescaled to sum 1

    # MixUp: every image, labeled or not, with any other of the step
    x = torch.cat([x_l, x_u1, x_u2])
    target = torch.cat([F.one_hot(y_l, guess.shape[1]), guess, guess])
    mix = draw_mix(len(x), alpha, x.device) if mix is None else mix
    perm = torch.randperm(len(x), device=x.device) if perm is None else perm
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

    model: float [N, 3, H, W] in [0, 1] -> logits, used in eval mode; x: uint8 [N, 3, H, W], not
    augmented; eps: FGSM's step on the [0, 1] scale. Returns (keep, pseudo): bool [N], int64 [N].
    Source: PAPER, Algorithm 1, lines 5 to 8.
    """
    keep, pseudo = [], []
    with eval_mode(model), torch.no_grad():
        for chunk in x.split(CHUNK):
            chunk = to_float(chunk)
            label = model(chunk).argmax(dim=1)  # line 5
            attacked = fgsm(model, chunk, label, eps)  # line 6
            keep.append(model(attacked).argmax(dim=1) == label)  # lines 7 and 8
            pseudo.append(label)
    return torch.cat(keep), torch.cat(pseudo)


def select_confident(model, x, count):
    """SCAR's rival (PAPER, section III.A): keeps the `count` most confident images -> bool [N].

    model, x: as for select_clean. Compared by log-odds, which rise with the confidence and still
    differ where that rounds to 1.
    """
    log_odds = []
    with eval_mode(model), torch.no_grad():
        for chunk in x.split(CHUNK):
            logits = model(to_float(chunk))
            top, label = logits.max(dim=1)
            log_odds.append(top - logits.scatter(1, label[:, None], -torch.inf).logsumexp(dim=1))
    keep = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    keep[torch.cat(log_odds).topk(count).indices] = True
    return keep


def selection_stats(keep, pseudo, y):
    """How well a selection tells right pseudo-labels from wrong ones, in Python numbers.

    keep: bool [N]; pseudo, y: int64 [N], predicted and true labels. sensitivity is kept_correct /
    kept, specificity rejected_wrong / rejected, in percent; nan when nothing was kept or rejected.
    Source: PAPER, equations 5 and 6. Elsewhere these two are called the positive and the negative
    predictive value (PPV, NPV): the precision of the kept and of the rejected.
    """
    wrong = pseudo != y
    kept, kept_correct = int(keep.sum()), int((keep & ~wrong).sum())
    rejected, rejected_wrong = int((~keep).sum()), int((~keep & wrong).sum())
    return {
        "sensitivity": 100 * kept_correct / kept if kept else math.nan,
        "specificity": 100 * rejected_wrong / rejected if rejected else math.nan,
        "kept": kept,
        "kept_correct": kept_correct,
        "rejected": rejected,
        "rejected_wrong": rejected_wrong,
    }


def unlabeled_batch_size(args):
    """Unlabeled images a step."""
    return args.batch_size


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

    lr is constant. lambda_u rises linearly in pretraining, over the 16,384 steps of MixMatch's code
    or 40 % of a shorter phase; fine-tuning has it in full from the start.
    """
    ramp = 1.0 if phase == "finetune" else min(1.0, step / min(16384, 0.4 * total_steps))
    return args.lr, ramp * args.lambda_u


def batch_loss(model, x_l, y_l, x_u, lambda_u, args):
    """MixMatch on stored images: augments, then mixmatch_loss. This is what torch.compile compiles.

    x_l, x_u: uint8 [B, 3, H, W], y_l: int64 [B]. Returns (loss, metrics).
    """
    x_l, x_u1, x_u2 = (to_float(weak_augment(x)) for x in (x_l, x_u, x_u))
    with torch.autocast(x_l.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        return mixmatch_loss(model, x_l, y_l, x_u1, x_u2, args.temperature, args.alpha, lambda_u)


def average_decay(step, args):
    """Decay of the average at step 0, 1, ... of a phase; young, it follows faster."""
    return min(args.ema_decay, (1 + step) / (10 + step))


def update_average(average, model, decay):
    """average = decay * average + (1 - decay) * model, in place, batch-norm statistics included.

    decay: float or 0-dim tensor.
    """
    pairs = list(zip(average.state_dict().values(), model.state_dict().values()))
    ours, theirs = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
    change = torch._foreach_sub(theirs, ours)
    torch._foreach_mul_(change, 1 - decay)
    torch._foreach_add_(ours, change)
    counters = [pair for pair in pairs if not pair[0].is_floating_point()]
    if counters:  # of batches, in batch norm
        torch._foreach_copy_(*zip(*counters))


def training_step(run, args, index_l, index_u, lr, lambda_u, decay):
    """One update of run.model and of its average, in place.

    index_l: int64 [B], index_u: int64 [U], images of the step, with several processes this one's
    share of them; lr, lambda_u, decay: 0-dim float32.
    All are tensors on the device, and nothing here waits for it, so that the whole step can be
    captured in a CUDA graph. Returns the metrics, detached scalars on the device.
    """
    x_l, y_l, x_u = run.images[index_l], run.labels[index_l], run.images[index_u]
    loss, metrics = run.batch_loss(run.model, x_l, y_l, x_u, lambda_u, args)
    run.optimizer.zero_grad()
    loss.backward()
    average_over_ranks([p.grad for p in run.model.parameters()])
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    update_average(run.average, run.model, decay)
    return {"loss": loss.detach(), **metrics}


# ==================================================================================================
# Plumbing, the same in every script: evaluation, the epoch, the log, the run folder, main
# ==================================================================================================

PHASES = ("pretrain", "finetune")
STATEFUL = ("model", "average", "optimizer")
CHECKPOINT = (*STATEFUL, "given", "phase", "epoch", "rows", "found", "labels")
RESULT = (
    "data scored_on seed select pretrain_accuracy final_accuracy table2 ms_per_step "
    "images_per_second peak_memory_gib device args"
).split()
# What may change when a run goes on. Its images may not: they are compared once they are loaded.
MAY_CHANGE = {"device", "out", "data_dir", "compile", "tensorboard", "images_crc32"}


@contextmanager
def eval_mode(model):
    """Every submodule in eval mode inside, and in its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def predict(model, x):
    """Labels, int64 [N], that the model in eval mode gives to uint8 images [N, 3, H, W]."""
    with eval_mode(model), torch.no_grad():
        return torch.cat([model(to_float(chunk)).argmax(dim=1) for chunk in x.split(CHUNK)])


def evaluate(model, x, y):
    """Accuracy in percent on uint8 images [N, 3, H, W] with labels int64 [N], in eval mode."""
    return 100 * int((predict(model, x) == y).sum()) / len(x)


def by_torchrun():
    """Whether torchrun has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def join(args):
    """Joins the processes that torchrun has started; started otherwise, this one stays alone.

    Raises ValueError with one sentence.
    """
    if not by_torchrun() or dist.is_initialized():
        return
    cuda = torch.cuda.is_available() and args.device != "cpu"
    if cuda:
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"there are {torch.cuda.device_count()} GPUs; lower torchrun's --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
    store, rank, count = next(dist.rendezvous("env://"))
    if os.environ["GROUP_WORLD_SIZE"] == "1":
        # else restarted processes find the addresses of those before (PyTorch's issue 135712)
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=count,
        timeout=timedelta(hours=1),
    )


def ranks():
    """(number of this process, number of processes); the one with number 0 speaks and writes."""
    alone = not dist.is_available() or not dist.is_initialized()
    return (0, 1) if alone else (dist.get_rank(), dist.get_world_size())


def share(value):
    """What process 0 gives, on every process. The others may give anything."""
    box = [value]
    if ranks()[1] > 1:
        dist.broadcast_object_list(box)
    return box[0]


def average_over_ranks(tensors):
    """Replaces each tensor by its mean over the processes: all of them in one exchange.

    tensors: without gaps in memory, of one dtype, laid out alike in all processes.
    """
    if ranks()[1] == 1:
        return
    # as they lie in memory, channels_last or not, so that there is nothing to reorder
    parts = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]
    flat = torch.cat(parts)
    dist.all_reduce(flat)
    torch._foreach_copy_(parts, (flat / ranks()[1]).split([len(part) for part in parts]))


def all_ranks(fine, device):
    """Whether it is fine in all processes."""
    share_fine = torch.tensor(float(fine), device=device)
    average_over_ranks([share_fine])
    return share_fine.item() == 1


def settle_ranks(run):
    """At the end of an epoch: averages batch norm's statistics, the only part of the state that
    differs between processes. Raises FloatingPointError if another part does too.
    """
    if ranks()[1] == 1:
        return
    modules = (run.model, run.average)
    buffers = [b for module in modules for b in module.buffers() if b.is_floating_point()]
    average_over_ranks(buffers)
    sums = [t.double().sum() for module in modules for t in module.state_dict().values()]
    highest = torch.stack(sums + [-s for s in sums])
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    if not torch.equal(highest, torch.stack(sums + [-s for s in sums])):
        raise FloatingPointError("the processes have come to different weights")


def draw_batches(pool, count, size, generator):
    """int64 [count, size] out of pool, int64 [M]: shuffled passes, each entry once a pass."""
    passes = -(-count * size // len(pool))
    order = torch.rand(passes, len(pool), generator=generator, device=pool.device).argsort(dim=1)
    return pool[order.flatten()[: count * size]].view(count, size)


def draw_labeled(run, steps, args, generator):
    """int64 [steps, batch size] out of the images that have a label, true or by selection.

    With --true-share that share of each batch has true labels, as long as there are others.
    """
    known = torch.nonzero(run.labels >= 0).squeeze(1)
    selected = known[~torch.isin(known, run.labeled)]
    if args.true_share is None or len(selected) == 0:
        return draw_batches(known, steps, args.batch_size, generator)
    true = round(args.true_share * args.batch_size)
    return torch.cat(
        [
            draw_batches(run.labeled, steps, true, generator),
            draw_batches(selected, steps, args.batch_size - true, generator),
        ],
        dim=1,
    )


def time_mark(device):
    """A moment in the device's time, which nothing waits for: an event on CUDA, else seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    mark = torch.cuda.Event(enable_timing=True)
    mark.record()
    return mark


def median_step_ms(marks):
    """Median time between neighbouring marks, without the first two steps, which warm up."""
    if isinstance(marks[0], float):
        steps = [1000 * (after - before) for before, after in zip(marks, marks[1:])]
    else:
        torch.cuda.synchronize()
        steps = [before.elapsed_time(after) for before, after in zip(marks, marks[1:])]
    return float(np.median(steps[2:] or steps))


def first_line(error):
    """What an error says in short."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def compile_loss(run, args):
    """batch_loss compiled and tried once; as it is, with a notice, where that does not work."""
    before = copy.deepcopy(run.model.state_dict())
    x_l, x_u = (
        run.images[torch.arange(size // ranks()[1], device=run.images.device) % len(run.images)]
        for size in (args.batch_size, unlabeled_batch_size(args))
    )
    y_l = torch.zeros(len(x_l), dtype=torch.int64, device=x_l.device)
    compiled = torch.compile(batch_loss)
    run.model.train()
    try:
        torch.compile(torch.neg)(y_l)  # fails at once where there is no C++ compiler or Triton
        loss, _ = compiled(run.model, x_l, y_l, x_u, torch.zeros((), device=x_l.device), args)
        loss.backward()
        problem = None
    except Exception as error:  # of a dozen kinds
        problem = first_line(error)
    if not all_ranks(problem is None, x_l.device):
        say(f"no torch.compile here, going on without it ({problem or 'in another process'})")
        compiled = batch_loss
    run.model.load_state_dict(before)  # batch norm's statistics have moved
    run.optimizer.zero_grad()
    return compiled


def capture(run, args, inputs):
    """training_step as a CUDA graph, so that all its kernels are one launch.

    inputs: a step's, tensors on the device. Returns a function of inputs; what that returns is
    overwritten by its next call. Here nothing is computed: steps must have run before, on the
    current stream, which must not be the default one. Where there can be no graph, it says so and
    returns the step as it is.
    """
    static, groups = [tensor.clone() for tensor in inputs], run.optimizer.param_groups
    run.optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    try:
        for group in groups:
            group["capturable"] = True  # Adam insists; to a fused one it makes no difference
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            metrics = training_step(run, args, *static)
        problem = None
    except RuntimeError as error:
        problem = first_line(error.__context__ or error)  # the end of the capture fails as well
    for group in groups:
        group["capturable"] = False
    if not all_ranks(problem is None, run.images.device):
        say(f"no CUDA graph here, going on without it ({problem or 'in another process'})")
        return partial(training_step, run, args)

    def replay(*inputs):
        torch._foreach_copy_(static, inputs)
        graph.replay()
        return metrics

    return replay


def train_epoch(run, phase, epoch, args, estimate):
    """One epoch; returns its row of metrics.csv. All it draws follows from (seed, phase, epoch).

    estimate: say after ten steps how long the run will take. Raises FloatingPointError when the
    loss or the averaged weights are not finite.
    """
    device, steps, started = run.images.device, args.steps_per_epoch, time.perf_counter()
    rank, count = ranks()
    seeds = (
        np.random.SeedSequence([args.seed, PHASES.index(phase), epoch]).generate_state(2).tolist()
    )
    torch.manual_seed(seeds[0] + rank)
    # batches have a generator of their own, so that a larger labeled set moves no augmentation
    generator = torch.Generator(device).manual_seed(seeds[1])
    batches_u = draw_batches(run.unlabeled, steps, unlabeled_batch_size(args), generator)
    batches_l = draw_labeled(run, steps, args, generator)
    # every process draws the whole batches and takes its share
    batches_l, batches_u = batches_l[:, rank::count], batches_u[:, rank::count]
    first = (epoch - 1) * steps
    numbers = [
        (*schedule(step, args.epochs * steps, phase, args), average_decay(step, args))
        for step in range(first, first + steps)
    ]
    lr, lambda_u, decay = torch.tensor(numbers, device=device).unbind(1)

    run.model.train()
    step = run.replay or partial(training_step, run, args)
    totals, marks, shown = {}, [time_mark(device)], started
    for i, inputs in enumerate(zip(batches_l, batches_u, lr, lambda_u, decay)):
        if i == 3 and args.compile and device.type == "cuda" and not run.replay:
            step = run.replay = capture(run, args, inputs)
        metrics = step(*inputs)
        totals = {name: totals.get(name, 0) + value for name, value in metrics.items()}
        marks.append(time_mark(device))
        if estimate and i + 1 == min(10, steps):
            ms = median_step_ms(marks)
            seconds = round(epochs_left(phase, epoch - 1, args) * steps * ms / 1000)
            say(f"{ms:.0f} ms a step: about {timedelta(seconds=seconds)} to go")
        if sys.stdout.isatty() and rank == 0 and time.perf_counter() - shown > 0.5:
            shown = time.perf_counter()
            print(f"\r{phase} {epoch}: step {i + 1} of {steps}\033[K", end="", flush=True)

    finite = [tensor.isfinite().all() for tensor in run.average.state_dict().values()]
    finite = torch.stack(finite).all().float()
    average_over_ranks([finite, *totals.values()])
    means = {name: float(total) / steps for name, total in totals.items()}
    if not math.isfinite(means["loss"]) or finite < 1:
        raise FloatingPointError(
            f"loss or weights are not finite in {phase} epoch {epoch}; lower --lr"
        )
    settle_ranks(run)
    accuracy = share(evaluate(run.average, *run.scored) if rank == 0 else None)
    row = {"phase": phase, "epoch": epoch, "lr": numbers[-1][0], **means}
    row |= {"accuracy": accuracy, "ms_per_step": median_step_ms(marks)}
    return {**row, "seconds": time.perf_counter() - started}


def say(text):
    """Prints a line, on a terminal over the live line."""
    if ranks()[0] == 0:
        print("\r\033[K" + text if sys.stdout.isatty() else text, flush=True)


def epochs_left(phase, epoch, args):
    """Epochs of both phases still to come after this one."""
    return args.epochs - epoch + (args.epochs if phase == "pretrain" else 0)


def print_row(row, seconds_left, header):
    """An aligned line for an epoch; header: the columns' names above it."""
    names = [name for name in row if name not in ("phase", "epoch", "seconds")]
    if header:
        say("phase    epoch " + " ".join(f"{name:>8}" for name in names) + "  time left")
    digits = {"accuracy": 2, "ms_per_step": 1}
    values = " ".join(f"{row[name]:{max(8, len(name))}.{digits.get(name, 4)}f}" for name in names)
    say(f"{row['phase']} {row['epoch']:5} {values}  {timedelta(seconds=round(seconds_left))}")


def tables(result):
    """A run's rows of Table 1 and Table 2 beside the paper's, as text; result: see result.json."""
    args, select = result["args"], result["select"]
    added = {"fgsm": "SCAR", "none": "nothing (control)", "confidence": "most confident"}[select]
    before = f"epochs of {args['pretrained']}" if args["pretrained"] else args["epochs"]
    paper = (PAPER_TABLE1[0], PAPER_TABLE1[1] if select == "fgsm" else "")
    lines = [
        f"{result['data']}, {result['scored_on']} images, {args['num_labeled']} labels, "
        f"WRN-{args['depth']}-{args['width']}, {before} + {args['epochs']} epochs of "
        f"{args['steps_per_epoch']} steps, seed {result['seed']}\n",
        f"{'Table 1: accuracy (%)':32}{'paper':>8}{'here':>8}",
        f"{TITLE:32}{paper[0]:>8}{result['pretrain_accuracy']:8.2f}",
        f"{TITLE + ' + ' + added:32}{paper[1]:>8}{result['final_accuracy']:8.2f}\n",
        f"{'Table 2':24}{'sensitivity (%)':>24}{'specificity (%)':>24}",
    ]
    for row in result["table2"]:
        counts = (row["kept_correct"], row["kept"]), (row["rejected_wrong"], row["rejected"])
        here = [f"{100 * a / b:.2f} ({a}/{b})" if b else "none (0/0)" for a, b in counts]
        name = f"{TITLE} (eps = {row['eps']:g})"
        lines.append(f"{name:24}{here[0]:>24}{here[1]:>24}")
        if row["eps"] in PAPER_TABLE2:
            lines.append("{:>24}{:>24}{:>24}".format("paper", *PAPER_TABLE2[row["eps"]]))
    peak = result["peak_memory_gib"]
    lines.append(
        f"\n{result['ms_per_step']:.1f} ms a step, {result['images_per_second']:,.0f} images/s, "
        f"{f'at most {peak:.2f} GiB, ' if peak else ''}{result['device']}"
    )
    return "\n".join(lines)


def save_selection(path, x, keep, pseudo, y):
    """A picture with a row for each predicted class: up to 8 kept images, a gap, up to 8 rejected.

    x: uint8 [N, 3, 32, 32]; keep: bool [N]; pseudo, y: int64 [N]. The frame is green where the
    predicted label is the true one, and red elsewhere.
    """
    tiles = torch.full((int(y.max()) + 1, 17, 3, 36, 36), 255, dtype=torch.uint8)
    for label, row in enumerate(tiles):
        for start, group in ((0, keep), (9, ~keep)):
            found = torch.nonzero(group & (pseudo == label)).flatten()[:8]
            for tile, n in zip(row[start:], found):
                colour = [0, 160, 0] if pseudo[n] == y[n] else [220, 0, 0]
                tile[:] = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)
                tile[:, 2:-2, 2:-2] = x[n]
    save_image(make_grid(tiles.flatten(0, 1) / 255, nrow=17, pad_value=1), path)


def save(content, path):
    """Writes text, or anything else by torch.save, beside the file, then moves it into place."""
    if ranks()[0] > 0:
        return
    if isinstance(content, str):
        data = content.encode()
    else:
        buffer = io.BytesIO()  # written by Python, a full disk is an OSError
        torch.save(content, buffer)
        data = buffer.getbuffer()
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # or the move could reach the disk before the content
    os.replace(partial, path)


def as_csv(rows):
    """Dicts with the same keys as CSV text, the keys first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def load(path, *names):
    """What a .json or a torch.save file holds, on the CPU; runs nothing that it may hide.

    names: the entries that it must have. Raises ValueError with one sentence when it cannot be read
    or is something else.
    """
    try:
        if Path(path).suffix == ".json":
            content = json.loads(Path(path).read_text())
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        for name in names:
            content[name]
        return content
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except Exception as error:  # torch.load has a dozen kinds for a damaged file
        kind = type(error).__name__
        raise ValueError(
            f"{path} is damaged or another kind of file ({kind}); delete or replace it"
        ) from None


def find_run(out, given):
    """(result or None, checkpoint or None): what the run folder holds of this very run.

    given: the command line, a dict. Raises ValueError for a folder that must be left alone.
    """
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out {out}: {path} is a file; choose another folder")
    begun_at_most = {"lock", "args.json.partial"}  # by a run that was killed as it began
    if not out.exists() or {path.name for path in out.iterdir()} <= begun_at_most:
        return None, None
    if not any((out / name).exists() for name in ("args.json", "checkpoint.pt")):
        raise ValueError(f"{out} is not empty and holds no run; choose another --out")
    result = checkpoint = None
    if (out / "result.json").exists():
        result = load(out / "result.json", *RESULT)
    elif (out / "checkpoint.pt").exists():
        checkpoint = load(out / "checkpoint.pt", *CHECKPOINT)
    begun = checkpoint["given"] if checkpoint else load(out / "args.json", "method")
    changed = settings_changed(begun, given, (begun.keys() | given.keys()) - MAY_CHANGE)
    if changed:
        raise ValueError(
            f"{out} holds a run with other settings ({changed}); choose another --out, or delete "
            "the folder to start over"
        )
    return result, checkpoint


def last_written(out):
    """When each file that decides how a run goes on was written; None for one that is not there."""
    paths = [out / name for name in ("args.json", "checkpoint.pt", "result.json")]
    return [path.stat().st_mtime_ns if path.exists() else None for path in paths]


def settings_changed(begun, given, names):
    """Which of the named settings differ between two command lines, in words; "" if none does."""
    return "; ".join(
        f"{name} was {begun.get(name)}, now {given.get(name)}"
        for name in sorted(names)
        if begun.get(name) != given.get(name)
    )


def load_pretrained(path, given):
    """The weights in a pretrain.pt, of a run with the same method and labels where that is known.

    Raises ValueError with one sentence.
    """
    weights, beside = load(path), Path(path).with_name("args.json")
    if beside.exists():
        begun = load(beside, "method")
        names = ("method", "data", "images_crc32", "num_labeled", "seed")
        changed = settings_changed(begun, given, names)
        if changed:
            raise ValueError(
                f"--pretrained {path} is of a run with another method or other labels ({changed}); "
                "give one that fits"
            )
    return weights


def lock(out):
    """Keeps other processes out of the run folder until this one ends, however it ends."""
    file = open(out / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{out} is in use by another process; let it end, or stop it") from None
    except OSError:
        pass  # a file system without locks
    return file


def prepare(args):
    """Everything before training: the run as a SimpleNamespace. Makes the run folder and locks it.

    Settles args.out, .device, .precision and .compile. Raises ValueError or OSError, one sentence.
    """
    given = {"method": METHOD, **vars(args)}
    if args.pretrained:  # with its run folder, wherever that is by now
        given["pretrained"] = "/".join(Path(args.pretrained).resolve().parts[-2:])
    data = Path(args.data_dir).resolve().name if args.data == "folder" else args.data
    if args.out is None:
        args.out = f"runs/{METHOD}__{data}__{args.select}-eps{args.eps:g}__seed{args.seed}"
    join(args)
    rank, count = ranks()
    if args.batch_size % count:
        raise ValueError(f"--batch-size {args.batch_size} must be a multiple of {count} processes")
    written = last_written(Path(args.out))
    result, checkpoint = share(find_run(Path(args.out), given) if rank == 0 else None)
    if result is not None:
        return SimpleNamespace(out=Path(args.out), result=result, stream=None)

    cuda = torch.cuda.is_available()
    if args.device == "auto":
        args.device = "cuda" if cuda else "cpu"
    if args.device == "cuda" and not cuda:
        raise ValueError("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    if args.precision == "auto":
        on_gpu = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        on_cpu = torch.cpu._is_avx512_bf16_supported()
        args.precision = "bf16" if (on_gpu if args.device == "cuda" else on_cpu) else "fp32"
    if args.compile is None:
        args.compile = args.device == "cuda"
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs tensorboard; install it, or leave the option out")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; matrix products have it off already
    device = torch.device(args.device)

    say(f"loading {data}")
    if rank > 0:
        dist.barrier()  # until process 0 has downloaded what was missing
    x, y, x_scored, y_scored = load_images(args.data, args.data_dir)
    if rank == 0 and count > 1:
        dist.barrier()
    given["images_crc32"] = 0
    for part in (x, y, x_scored, y_scored):
        given["images_crc32"] = zlib.crc32(part.numpy(), given["images_crc32"])
    if share(given["images_crc32"]) != given["images_crc32"]:
        raise ValueError(f"--data-dir {args.data_dir} has other images than process 0 has")
    if checkpoint and checkpoint["given"].get("images_crc32") != given["images_crc32"]:
        raise ValueError(
            f"--data-dir {args.data_dir} has other images than those {args.out} began with; give "
            "those, or choose another --out"
        )
    pretrained = None
    if args.pretrained and not checkpoint and rank == 0:
        pretrained = load_pretrained(args.pretrained, given)
    labeled, unlabeled = split_labeled(y, args.num_labeled, args.seed)
    if args.val:
        try:
            held_out, rest = split_labeled(y[unlabeled], args.val, args.seed)
        except ValueError as error:
            raise ValueError(f"--val {args.val}: {error}") from None
        x_scored, y_scored = x[unlabeled[held_out]], y[unlabeled[held_out]]
        unlabeled = unlabeled[rest]
    labels = torch.full_like(y, -1)
    labels[labeled] = y[labeled]

    torch.manual_seed(args.seed)
    model = WideResNet(int(y.max()) + 1, args.depth, args.width)
    if pretrained is not None:
        try:
            model.load_state_dict(pretrained)
        except (RuntimeError, TypeError, AttributeError):
            raise ValueError(
                f"--pretrained {args.pretrained} does not hold the weights of a WRN-{args.depth}-"
                f"{args.width} for {int(y.max()) + 1} classes"
            ) from None
        if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise ValueError(f"--pretrained {args.pretrained} holds weights that are not finite")
    model.load_state_dict(share(model.state_dict()))
    model = model.to(device, memory_format=torch.channels_last)
    run = SimpleNamespace(
        out=Path(args.out),
        result=None,
        lock=None,
        given=given,
        checkpoint=checkpoint,
        data={"cifar10": "CIFAR-10", "cifar10-jpeg": "CIFAR-10 (JPEG)"}.get(data, data),
        images=x.to(device),  # uint8 [N, 3, 32, 32]
        true_labels=y.to(device),  # int64 [N], for the report alone
        labels=labels.to(device),  # int64 [N], what training knows: -1 where it does not
        labeled=labeled.to(device),  # int64 [L], whose true labels training knows
        unlabeled=unlabeled.to(device),  # int64 [U], the unlabeled pool
        scored=(x_scored.to(device), y_scored.to(device)),
        model=model,
        average=copy.deepcopy(model).requires_grad_(False).eval(),
        optimizer=make_optimizer(model, args),
        batch_loss=batch_loss,
        replay=None,  # the training step as a CUDA graph
        stream=torch.cuda.Stream() if args.device == "cuda" else None,  # graphs need their own
    )
    if checkpoint:
        try:
            for name in STATEFUL:
                getattr(run, name).load_state_dict(checkpoint[name])
            run.labels.copy_(checkpoint["labels"])
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError):
            raise ValueError(
                f"{run.out / 'checkpoint.pt'} does not fit this run; delete it to start over"
            ) from None
    if rank == 0:
        run.out.mkdir(parents=True, exist_ok=True)
        run.lock = lock(run.out)
        if last_written(run.out) != written:
            raise ValueError(
                f"another process has just written to {run.out}; give the command again"
            )
    if run.stream:
        run.stream.wait_stream(torch.cuda.current_stream())
    return run


def device_name(args):
    """The GPU's name, or the CPU's architecture and the threads in use."""
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    return torch.cuda.get_device_name() if args.device == "cuda" else cpu


def announce(run, args):
    """Says what the run is about to do."""
    state = "new"
    if run.checkpoint:
        state = f"going on after {run.checkpoint['phase']} epoch {run.checkpoint['epoch']}"
    phases = f"{args.epochs} epochs" if args.pretrained else f"{args.epochs} + {args.epochs} epochs"
    parameters = sum(p.numel() for p in run.model.parameters())
    say(f"{TITLE} + SCAR")
    say(f"  data       {run.data}: {args.num_labeled:,} labeled, {len(run.unlabeled):,} unlabeled "
        f"training images, scored on {len(run.scored[0]):,} "
        f"{'validation' if args.val else 'test'} images")  # fmt: skip
    say(f"  network    WRN-{args.depth}-{args.width}, {parameters:,} parameters, "
        f"from {args.pretrained or 'random weights'}")  # fmt: skip
    say(f"  training   {phases} of {args.steps_per_epoch} steps, {args.batch_size} labeled and "
        f"{unlabeled_batch_size(args)} unlabeled images each")  # fmt: skip
    say(f"  selection  {args.select}, eps {args.eps:g}/255")
    compiled = ", compiled" if args.compile else ""
    processes = f"{ranks()[1]} processes on " if ranks()[1] > 1 else ""
    say(f"  device     {processes}{device_name(args)}, {args.precision}{compiled}")
    say(f"  folder     {run.out} ({state})")


def add_labels(run, args):
    """Labels the unlabeled images that --select chooses with run.average as it is, and no others.

    Changes run.labels. Returns (keep, pseudo, stats): see select_clean and selection_stats.
    """
    x, y = run.images[run.unlabeled], run.true_labels[run.unlabeled]
    if args.select == "none":
        pseudo = predict(run.average, x)
        keep = torch.zeros_like(pseudo, dtype=torch.bool)
    else:
        keep, pseudo = select_clean(run.average, x, args.eps / 255)
    if args.select == "confidence":
        keep = select_confident(run.average, x, int(keep.sum()))
    run.labels[run.unlabeled] = torch.where(keep, pseudo, -1)
    stats = selection_stats(keep, pseudo, y)
    share_kept = 100 * stats["kept"] / len(x)
    right = f"{stats['kept_correct']:,} of them right ({stats['sensitivity']:.2f} %)"
    added = (
        f"{stats['kept']:,} images ({share_kept:.2f} %), {right}" if stats["kept"] else "nothing"
    )
    say(f"  {args.select} adds {added}")
    return keep, pseudo, stats


def select(run, args):
    """Between the phases: scores theta~, which is run.average, and labels the images to be added.

    Returns what result.json says of it; changes run.labels; writes selection.png.
    """
    started = time.perf_counter()
    x, y = run.scored
    found = {"pretrain_accuracy": evaluate(run.average, x, y), "table2": []}
    say(f"theta~ attacked on the {len(x):,} scored images (Table 2)")
    for eps in sorted({args.eps, *args.table2_eps}):
        stats = selection_stats(*select_clean(run.average, x, eps / 255), y)
        found["table2"].append({"eps": eps, **stats})
        say(f"  eps {eps:g}: kept {stats['kept']:,}, {stats['kept_correct']:,} of them right")

    if args.select != "none":
        say(f"theta~ attacked on the {len(run.unlabeled):,} unlabeled images")
    keep, pseudo, stats = add_labels(run, args)
    found["selection"] = {
        "unlabeled": len(keep),
        **{name: stats[name] for name in ("kept", "kept_correct", "rejected", "rejected_wrong")},
        "kept_per_class": torch.bincount(pseudo[keep], minlength=int(y.max()) + 1).tolist(),
    }
    x, y = run.images[run.unlabeled], run.true_labels[run.unlabeled]
    save_selection(run.out / "selection.png", x, keep, pseudo, y)
    return {**found, "seconds": time.perf_counter() - started}


def train(run, args, command):
    """Both phases, from wherever the run stands. Returns what result.json holds."""
    announce(run, args)
    save(json.dumps(run.given, indent=1), run.out / "args.json")
    save(Path(__file__).read_text(), run.out / Path(__file__).name)
    board = None
    if args.tensorboard and ranks()[0] == 0:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(run.out, flush_secs=10)

    state = run.checkpoint or {
        "phase": "finetune" if args.pretrained else "pretrain",
        "epoch": 0,
        "rows": [],
        "found": None,
        "given": run.given,
    }

    if args.compile:
        say("compiling")
        run.batch_loss = compile_loss(run, args)
        args.compile = run.batch_loss is not batch_loss
    first = True
    for phase in PHASES[PHASES.index(state["phase"]) :]:
        if phase == "finetune" and not state["found"]:
            save(run.average.state_dict(), run.out / "pretrain.pt")
            state |= {"phase": phase, "epoch": 0, "found": None}
            state["found"] = share(select(run, args) if ranks()[0] == 0 else None)
            run.labels.copy_(share(run.labels.cpu()))
            run.model.load_state_dict(run.average.state_dict())
            run.optimizer, run.replay = make_optimizer(run.model, args), None
        for epoch in range(state["epoch"] + 1, args.epochs + 1):
            row = train_epoch(run, phase, epoch, args, estimate=first and args.device == "cpu")
            seconds_left = epochs_left(phase, epoch, args) * row["seconds"]
            print_row(row, seconds_left, header=first or epoch == 1)
            first = False
            state |= {"epoch": epoch, "rows": [*state["rows"], row], "labels": run.labels}
            state |= {name: getattr(run, name).state_dict() for name in STATEFUL}
            # in this order: metrics.csv of a run killed in between is ahead, never behind
            save(as_csv(state["rows"]), run.out / "metrics.csv")
            save(state, run.out / "checkpoint.pt")
            for name in row.keys() - {"phase", "epoch"} if board else ():
                board.add_scalar(f"{phase}/{name}", row[name], epoch)
    if board:
        board.close()

    save(run.average.state_dict(), run.out / "model.pt")
    rows, found = state["rows"], state["found"]
    ms_per_step = float(np.median([row["ms_per_step"] for row in rows]))
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None
    result = {
        "method": METHOD,
        "data": run.data,
        "scored_on": "validation" if args.val else "test",
        "select": args.select,
        "eps": args.eps,
        "seed": args.seed,
        "pretrain_accuracy": found["pretrain_accuracy"],
        "final_accuracy": rows[-1]["accuracy"],
        "selection": found["selection"],
        "table2": [
            {name: None if value != value else value for name, value in row.items()}  # null for nan
            for row in found["table2"]
        ],
        "ms_per_step": ms_per_step,
        "images_per_second": 1000 * (args.batch_size + unlabeled_batch_size(args)) / ms_per_step,
        "peak_memory_gib": peak,
        "seconds": found["seconds"] + sum(row["seconds"] for row in rows),
        "device": device_name(args),
        "ranks": ranks()[1],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "torchvision", "numpy", "pillow")},
        },
        "command": command,
        "args": vars(args),
    }
    save(json.dumps(result, indent=1, allow_nan=False), run.out / "result.json")
    return result


def main(argv=None):
    """Does what the command line says, or goes on with it; returns what result.json holds.

    Exits with 2 when refused before training, 1 when training fails, 130 or 143 when stopped.
    """
    args = parse_args(argv)
    launcher = ["python"]
    if by_torchrun():
        nodes, per_node = os.environ["GROUP_WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]
        launcher = ["torchrun", "--nnodes", nodes, "--nproc-per-node", per_node]
    options = sys.argv[1:] if argv is None else argv
    command = shlex.join([*launcher, f"{METHOD}_scar.py", *options])

    def leave(code, sentence):
        speaker = f"process {ranks()[0]}: " if ranks()[0] > 0 else ""
        print(speaker + sentence, file=sys.stderr)
        raise SystemExit(code)

    run = None
    try:
        run = prepare(args)
        with torch.cuda.stream(run.stream):
            result = train(run, args, command) if run.result is None else run.result
    except KeyboardInterrupt as signal_received:
        code = 143 if signal_received.args else 130
        leave(code, "stopped; the same command goes on after the last finished epoch")
    except (RuntimeError, MemoryError) as error:
        message = str(error).lower()
        if ranks()[1] > 1 and (isinstance(error, dist.DistError) or "gloo" in message):
            leave(1, "error: another process has ended, or cannot be reached; the same command "
                  f"goes on after the last finished epoch ({first_line(error)})")  # fmt: skip
        if isinstance(error, RuntimeError) and not ("memory" in message or "alloc" in message):
            raise
        leave(1, "error: out of memory on the device; lower --batch-size or --width")
    except (ValueError, OSError, FloatingPointError) as error:
        if run and isinstance(error, ValueError):
            raise  # in training that is a mistake in the code, and the traceback helps
        leave(1 if run else 2, f"error: {error}")
    finally:
        if run and run.result is None and run.lock:
            run.lock.close()
    say(f"\n{tables(result)}\n\nmodel.pt, result.json, metrics.csv, selection.png: in {run.out}")
    if by_torchrun() and dist.is_initialized():
        run.replay = None  # NCCL waits for graphs that hold its exchanges (PyTorch's issue 115388)
        dist.destroy_process_group()
    return result


def stop(*_):
    """SIGTERM, which clusters send when the time is up, stops a run as Ctrl-C does."""
    raise KeyboardInterrupt("SIGTERM")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    main()
