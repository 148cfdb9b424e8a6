# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5.1", "torchvision>=0.20.1", "numpy"]
# ///
r"""VAT with SCAR (Selecting Clean samples with Adversarial Robustness).

Pretrains a WideResNet with VAT on 4,000 labels, then fine-tunes it with SCAR: the pretrained
model, theta~ (the moving average of the weights), labels every unlabeled image, and FGSM attacks
it. Images that keep their label under the attack join the labeled set, and VAT continues from
theta~ for as many epochs again. The second command is the control: the same, but nothing is added.

    python vat_scar.py --eps 6 --epochs 200
    python vat_scar.py --eps 6 --epochs 200 --select none \
        --pretrained runs/vat__cifar10__fgsm-eps6__seed0/pretrain.pt

"PAPER" is Yang, Kim and Kim, "Improving Performance of Semi-Supervised Learning by Adversarial
Attacks", which reports 85.25 % for VAT and 86.79 % with SCAR. VAT: Miyato et al. 2017,
arXiv:1704.03976. The settings are those of vat.py in google-research/mixmatch (its vat_eps is 6 for
images in [-1, 1], so 3 here), but xi is 1, not 1e-6, and the weight of the entropy 0, not 0.06.
Measured on CIFAR-10 (JPEG) after 9 + 9 epochs (seed 0, one H100, bf16, torch 2.11, batch norm's eps
still 1e-5): VAT 76.68 %, SCAR 75.20 %, control 78.42 %. After such a short pretraining SCAR did
worse than its control. A step takes 5.3 ms alone on the GPU.
"""

import argparse
import copy
import csv
import hashlib
import json
import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.func import functional_call, grad
from torchvision.utils import make_grid

from common import WideResNet, fgsm, load_split

METHOD = "vat"
TITLE = "VAT"

# torchrun starts several processes and tells each one how many there are and its own number (some
# clusters set RANK alone, for other purposes)
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if WORLD_SIZE > 1 else 0

# ------------------------------------------------------------------------------------------ Options


def parse_args(argv=None):
    """The options as a namespace; exits with code 2 and a sentence if they make no sense."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--option value ...]   (--help lists the options)",
        description=f"Pretrains a WideResNet with {TITLE}, then fine-tunes it with SCAR.",
        epilog="The same command resumes an interrupted run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    on_off = argparse.BooleanOptionalAction

    option = parser.add_argument_group("Data").add_argument
    sources = ["cifar10", "cifar100", "svhn", "stl10", "folder", "synthetic"]
    option("--data", default="cifar10", choices=sources, help="images; folder: your own")
    option("--data-dir", default="data", help="folder of the images, or to download them to")
    option("--image-size", type=int, default=32, help="side in pixels, to which images are resized")
    option("--flip", action=on_off, help="mirror images at random; None: yes, except for svhn")
    option("--num-labeled", type=int, help="labels; None: 4000, or all if there is unlabeled/")
    option("--val", type=int, default=0, help="training images to hold out and score")

    option = parser.add_argument_group("Model").add_argument
    option("--depth", type=int, default=28, help="depth of the WideResNet: 6n + 4")
    option("--width", type=int, default=2, help="its width: 16, 32, 64 channels times this")
    option("--ema-decay", type=float, default=0.999, help="decay of the average that is evaluated")

    option = parser.add_argument_group("Training").add_argument
    option("--epochs", type=int, default=200, help="epochs of pretraining, and of fine-tuning")
    option("--steps-per-epoch", type=int, default=1024, help="training steps in an epoch")
    option("--batch-size", type=int, default=64, help="labeled images per step; as many unlabeled")
    option("--lr", type=float, default=0.002, help="learning rate of AdamW, constant")
    option("--weight-decay", type=float, default=0.02, help="each step: weights *= 1 - lr * this")
    option("--seed", type=int, default=0, help="seed of the labeled set and of all draws")

    option = parser.add_argument_group(TITLE).add_argument
    option("--lambda-u", type=float, default=0.3, help="weight of the unlabeled loss, once risen")
    option("--vat-eps", type=float, default=3.0, help="L2 length of VAT's perturbation")
    option("--xi", type=float, default=1.0, help="length of the step that probes for its direction")
    option("--power-iterations", type=int, default=1, help="iterations for it; 0: random")
    option("--entropy-weight", type=float, default=0.0, help="weight of the predictions' entropy")

    option = parser.add_argument_group("SCAR").add_argument
    selections = ["fgsm", "none", "confidence"]
    table2_eps = [1.0, 2.0, 3.0, 4.0, 6.0]
    option("--eps", type=float, default=6.0, help="step of FGSM, in 1/255; 0 keeps all images")
    option("--select", default="fgsm", choices=selections, help="what to add; none: the control")
    option("--table2-eps", type=float, nargs="+", default=table2_eps, help="eps in Table 2")
    option("--pretrained", help="start at the selection, from an earlier run's pretrain.pt")

    option = parser.add_argument_group("Run").add_argument
    precisions = ["auto", "bf16", "fp32"]
    option("--out", help="folder; None: runs/<method>__<data>__<select>-eps<eps>__seed<seed>")
    option("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU, if any")
    option("--precision", default="auto", choices=precisions, help="auto: bf16 if the GPU has it")
    option("--compile", action=on_off, help="torch.compile and a CUDA graph; None: on a GPU")
    option("--tensorboard", action="store_true", help="also write TensorBoard events")

    parser.set_defaults(mu=1)  # as many unlabeled images as labeled ones; FixMatch has an option
    args = parser.parse_args(argv)
    at_least_1 = "image_size width epochs steps_per_epoch batch_size mu".split()
    for name, value in vars(args).items():
        least = 1 if name in at_least_1 else 0
        if isinstance(value, (int, float)) and not least <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be a number, at least {least}: {value}")
    if args.ema_decay > 1:
        parser.error(f"--ema-decay must be at most 1: {args.ema_decay}")
    if args.xi == 0:
        parser.error("--xi must be above 0: at 0 there is no direction to find")
    if not all(0 <= eps <= 255 for eps in args.table2_eps + [args.eps]):
        parser.error("--eps and --table2-eps are in units of 1/255, from 0 to 255")
    if args.batch_size % WORLD_SIZE != 0:
        parser.error(f"--batch-size {args.batch_size} is not divisible by {WORLD_SIZE} processes")

    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.precision == "auto":
        args.precision = "fp32"
        if args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            args.precision = "bf16"
    if args.compile is None:
        args.compile = args.device == "cuda"
    if args.flip is None:
        args.flip = args.data != "svhn"  # as in the methods' papers: no mirrored digits
    if args.out is None:
        run = f"{METHOD}__{data_name(args)}__{args.select}-eps{args.eps:g}__seed{args.seed}"
        args.out = f"runs/{run}"
    return args


# ------------------------------------------------------------------------------------- Augmentation


def weak_augment(x, flip=True):
    """Flips each image with probability 1/2 and shifts it by up to an eighth of its side each way.

    Reflection fills the gap. x: uint8 [N, 3, H, W]; anything else raises ValueError. Returns the
    same shape and type. flip: False where a mirror image means something else, as with digits.
    Source: FixMatch, section 2.3.
    """
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"uint8 images [N, 3, H, W] are needed, not {x.dtype} {list(x.shape)}")
    n, _, h, w = x.shape

    def source_of(size):
        """int64 [N, size]: for each output row (or column), the input row (or column) it shows."""
        shift = torch.randint(-(size // 8), size // 8 + 1, (n, 1), device=x.device)
        position = (torch.arange(size, device=x.device) + shift).abs()  # -1 -> 1
        return torch.where(position < size, position, 2 * (size - 1) - position)  # size -> size - 2

    row = source_of(h)
    column = source_of(w)
    if flip:
        mirrored = torch.rand(n, 1, device=x.device) < 0.5
        column = torch.where(mirrored, (w - 1) - column, column)
    pixel = (row[:, :, None] * w + column[:, None, :]).view(n, 1, h * w)
    return x.flatten(2).gather(2, pixel.expand(n, 3, h * w)).view(n, 3, h, w)


def to_float(x):
    """uint8 [N, 3, H, W] -> float32 in [0, 1], channels_last; float images pass unchanged."""
    if x.is_floating_point():
        return x
    return x.to(torch.float32, memory_format=torch.channels_last) / 255


# --------------------------------------------------------------------------------------- VAT's loss


def forward_untracked(model, x):
    """Computes model(x) without changing batch norm's running statistics: only copies move."""
    copies = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return functional_call(model, copies, x)


def vat_direction(model, x, prob, xi, power_iterations, d0=None):
    """Finds, for each image, the direction in which the predictions change the fastest.

    x: float [N, 3, H, W] in [0, 1]; prob: float [N, C], the model's predictions for x; xi: L2
    length at which a direction is probed; power_iterations: how many times it is refined, 0 leaves
    it random; d0: float like x, where the search starts, drawn from N(0, 1) if None.
    Returns float like x, with an L2 norm of 1 for each image.
    Source: VAT, section 3.3, algorithm 1. KL(prob || p(x + r)) has its minimum at r = 0, so for a
    small xi its gradient at xi * d is nearly the Hessian times xi * d, a step of power iteration.
    In bf16, xi = 0.01 is too small and finds noise (results/README.md).
    """

    def divergence(r):
        logits = forward_untracked(model, x + r)
        # KL without the entropy of prob, which does not depend on r; in float64, so that small
        # differences are not rounded away here
        return F.cross_entropy(logits.double(), prob.double(), reduction="sum")

    if d0 is None:
        d0 = torch.randn_like(x)
    d = F.normalize(d0, dim=(1, 2, 3))
    for _ in range(power_iterations):
        with torch.no_grad():  # grad() differentiates all the same, but keeps no graph of it
            gradient = grad(divergence)(xi * d)
        scale = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)  # or small squares would be 0
        d = torch.where(scale > 0, F.normalize(gradient / scale, dim=(1, 2, 3)), d)
    return d


def vat_loss(
    model, x_l, y_l, x_u, xi, vat_eps, power_iterations, lambda_u, entropy_weight, *, d0=None
):
    """Cross-entropy of the labels + lambda_u * KL(p(x) || p(x + r)), r in the worst direction.

    x_l: float [B, 3, H, W] in [0, 1]; y_l: int64 [B]; x_u: float [N, 3, H, W]; vat_eps: L2 length
    of r; xi, power_iterations, d0: see vat_direction; lambda_u: float or 0-dim tensor;
    entropy_weight: weight of the entropy of p(x). x + r is not clipped to [0, 1].
    Returns (loss, metrics): a scalar, and detached scalars loss_labeled, loss_unlabeled (the KL,
    without lambda_u) and entropy.
    Source: VAT, equations 5 to 8. Batch norm as in google-research/mixmatch, vat.py, where only the
    labeled images move the running statistics (and the KL is taken the other way round).
    """
    loss_labeled = F.cross_entropy(model(x_l).float(), y_l)

    log_prob = forward_untracked(model, x_u).float().log_softmax(dim=1)
    prob = log_prob.exp()
    d = vat_direction(model, x_u, prob.detach(), xi, power_iterations, d0)
    log_prob_r = forward_untracked(model, x_u + vat_eps * d).float().log_softmax(dim=1)
    loss_unlabeled = F.kl_div(log_prob_r, log_prob.detach(), reduction="batchmean", log_target=True)
    entropy = -(prob * log_prob).sum(dim=1).mean()

    loss = loss_labeled + lambda_u * loss_unlabeled
    if entropy_weight > 0:  # otherwise p(x) needs no backward pass
        loss = loss + entropy_weight * entropy
    metrics = {
        "loss_labeled": loss_labeled.detach(),
        "loss_unlabeled": loss_unlabeled.detach(),
        "entropy": entropy.detach(),
    }
    return loss, metrics


def batch_loss(model, x_l, y_l, x_u, lambda_u, args):
    """VAT on uint8 images: augments, then vat_loss. torch.compile compiles this.

    x_l: uint8 [B, 3, H, W]; y_l: int64 [B]; x_u: uint8 [B, 3, H, W]; lambda_u: 0-dim tensor.
    """
    x_l = to_float(weak_augment(x_l, args.flip))
    x_u = to_float(weak_augment(x_u, args.flip))
    with torch.autocast(x_l.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        return vat_loss(
            model,
            x_l,
            y_l,
            x_u,
            xi=args.xi,
            vat_eps=args.vat_eps,
            power_iterations=args.power_iterations,
            lambda_u=lambda_u,
            entropy_weight=args.entropy_weight,
        )


# ------------------------------------------------------------------- SCAR's selection, evaluation


@torch.no_grad()  # fgsm turns gradients on for itself
def select_clean(model, x, eps):
    """SCAR: keeps the images whose predicted label withstands FGSM.

    model: float [N, 3, H, W] in [0, 1] -> logits; it is left in eval mode. x: uint8, or float in
    [0, 1], [N, 3, H, W], not augmented; eps: FGSM's step on the [0, 1] scale. Returns (keep,
    pseudo): bool [N], int64 [N]. Source: PAPER, Algorithm 1, lines 5 to 8.
    """
    model.eval()
    keep, pseudo = [], []
    # as many pixels as in 64 images of 32 x 32, so that larger ones need no more memory
    images_at_once = max(1, 64 * 32 * 32 // (x.shape[2] * x.shape[3]))
    for images in x.split(images_at_once):
        images = to_float(images)
        label = model(images).argmax(dim=1)  # line 5
        attacked = fgsm(model, images, label, eps)  # line 6
        keep.append(model(attacked).argmax(dim=1) == label)  # lines 7 and 8
        pseudo.append(label)
    return torch.cat(keep), torch.cat(pseudo)


def select_confident(logits, count):
    """The baseline for SCAR: keeps the `count` most confident images.

    logits: float [N, C]. Returns keep, bool [N]. Source: PAPER, section III.A.
    """
    confidence = logits.double().softmax(dim=1).amax(dim=1)  # in float32 many round to 1
    keep = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    keep[confidence.topk(count).indices] = True
    return keep


def selection_stats(keep, pseudo, y):
    """How well a selection separates right pseudo-labels from wrong ones, in Python numbers.

    keep: bool [N]; pseudo, y: int64 [N], predicted and true labels. Images with y = -1 do not
    count. sensitivity is kept_correct / kept in percent, elsewhere called precision or PPV;
    specificity is rejected_wrong / rejected in percent, elsewhere NPV; None where nothing is kept
    or rejected. Source: PAPER, equations 5 and 6.
    """
    correct = pseudo == y
    kept = keep & (y >= 0)
    rejected = ~keep & (y >= 0)
    stats = {
        "kept": int(kept.sum()),
        "kept_correct": int((kept & correct).sum()),
        "rejected": int(rejected.sum()),
        "rejected_wrong": int((rejected & ~correct).sum()),
        "sensitivity": None,
        "specificity": None,
    }
    if stats["kept"] > 0:
        stats["sensitivity"] = 100 * stats["kept_correct"] / stats["kept"]
    if stats["rejected"] > 0:
        stats["specificity"] = 100 * stats["rejected_wrong"] / stats["rejected"]
    return stats


def predict(model, x):
    """Logits [N, C] for images [N, 3, H, W], uint8 or float; leaves the model in eval mode."""
    model.eval()
    # twice as many as in select_clean, because nothing is kept for a gradient
    images_at_once = max(1, 128 * 32 * 32 // (x.shape[2] * x.shape[3]))
    with torch.no_grad():
        return torch.cat([model(to_float(images)) for images in x.split(images_at_once)])


def evaluate(model, x, y):
    """Accuracy in percent on images [N, 3, H, W], uint8 or float, with labels int64 [N]."""
    return 100 * int((predict(model, x).argmax(dim=1) == y).sum()) / len(x)


def table2_rows(model, x, y, eps_values):
    """PAPER's Table 2 on images x with labels y, at each eps in 1/255: selection_stats.

    confidence_correct: right labels among as many images as FGSM keeps, the most confident ones.
    """
    logits = predict(model, x)
    rows = []
    for eps in sorted(set(eps_values)):
        keep, pseudo = select_clean(model, x, eps / 255)
        confident = select_confident(logits, int(keep.sum()))
        row = {"eps": eps, **selection_stats(keep, pseudo, y)}
        row["confidence_correct"] = int((confident & (pseudo == y)).sum())
        rows.append(row)
    return rows


# ----------------------------------------------------- Optimizer, schedule, moving average, batches


def make_optimizer(model, args):
    """AdamW: each step multiplies convolution and linear weights by 1 - lr * weight_decay.

    capturable: it counts its steps on the device, so that a CUDA graph can record them.
    """
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, fused=True, capturable=True)


def schedule(step, total_steps, phase, args):
    """(lr, lambda_u) at a step: constant lr; lambda_u rises over the first 40 % of pretraining."""
    ramp = 1.0 if phase == "finetune" else min(1.0, step / (0.4 * total_steps))
    return args.lr, ramp * args.lambda_u


def update_average(average, model, decay):
    """average = decay * average + (1 - decay) * model, in place; integer buffers are copied.

    average, model: two modules of one architecture; decay: float or 0-dim tensor. Batch-norm
    statistics are averaged too. state_dict has the tensors themselves, not copies. The foreach
    functions take all of them at once: a few kernels on a GPU instead of hundreds.
    """
    old, new = average.state_dict(), model.state_dict()
    floats = [name for name in old if old[name].is_floating_point()]
    old_floats = [old[name] for name in floats]
    change = torch._foreach_sub([new[name] for name in floats], old_floats)
    torch._foreach_mul_(change, 1 - decay)
    torch._foreach_add_(old_floats, change)
    for name in old:
        if not old[name].is_floating_point():
            old[name].copy_(new[name])


def draw_batches(pool, count, size, generator):
    """Draws `count` batches of `size` entries from pool, int64 [M], reshuffled for each pass.

    Returns int64 [count, size].
    """
    passes = math.ceil(count * size / len(pool))
    order = torch.rand(passes, len(pool), generator=generator, device=pool.device).argsort(dim=1)
    return pool[order.flatten()[: count * size]].view(count, size)


# ---------------------------------------------------------------- The run, the same in every script


def main(argv=None):
    """Runs PAPER's Algorithm 1, or what an interrupted run left of it; returns result.json."""
    args = parse_args(argv)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # else convolutions use TF32; fgsm needs float32
    if WORLD_SIZE > 1:
        join_processes(args.device)
    if args.device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot record a CUDA graph

    # The images, the labels that training may see (-1 hides the others), the network
    torch.manual_seed(args.seed)
    try:
        images = load_split(
            args.data, args.data_dir, args.image_size, args.num_labeled, args.val, args.seed
        )
        model = WideResNet(len(images.classes), args.depth, args.width)
    except ValueError as error:
        sys.exit(f"error: {error}")
    images = images.to(args.device)
    args.num_labeled = len(images.labeled)  # for args.json, where None would say nothing
    unlabeled = images.unlabeled
    labels = torch.full_like(images.y, -1)
    labels[images.labeled] = images.y[images.labeled]
    model = model.to(args.device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)  # the moving average; this is evaluated

    # The run's folder: another run's is refused, a finished run is printed
    out = Path(args.out)
    theta_file = out / "pretrain.pt"
    settings = {"method": METHOD, **vars(args), "classes": images.classes, "images": images.digest}
    settings["pretrained_weights"] = None
    if args.pretrained is not None:
        theta_file = Path(args.pretrained)
        settings["pretrained_weights"] = check_pretrained(theta_file, average, settings)
    may_differ = ["device", "out", "data_dir", "compile", "tensorboard", "pretrained"]
    refuse_other_settings(out, settings, [name for name in settings if name not in may_differ])
    if any(out.glob("[!.]*")) and not (out / "args.json").exists():
        sys.exit(f"error: {out} is not empty and holds no run; choose another --out")
    if (out / "result.json").exists():
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        print_tables(result, out)
        return result
    out.mkdir(parents=True, exist_ok=True)
    script = Path(__file__)
    if not (out / "args.json").exists():
        save(json.dumps(settings, indent=1), out / "args.json")
    if not (out / script.name).exists():
        save(script.read_text(encoding="utf-8"), out / script.name)
    print(f"WRN-{args.depth}-{args.width} on {args.device} in {args.precision}; files in {out}")

    # Algorithm 1, line 1: pretraining. The average at its end is theta~
    if theta_file.exists():
        average.load_state_dict(torch.load(theta_file, weights_only=True))
    else:
        train("pretrain", model, average, images, labels, args)
        save(weights_of(average), theta_file)
    theta_hash = fingerprint(average)
    pretrain_accuracy = evaluate(average, images.x_test, images.y_test)
    test_logits = predict(average, images.x_test)
    table2 = table2_rows(average, images.x_test, images.y_test, args.table2_eps + [args.eps])

    # Lines 5 to 8: theta~ labels every unlabeled image, and those whose label withstands FGSM are
    # kept. PAPER selects in every epoch, but theta~ is fixed, so one selection serves them all
    print(f"Selecting from the {len(unlabeled):,} unlabeled images", flush=True)
    keep, pseudo = select_clean(average, images.x[unlabeled], args.eps / 255)
    logits = predict(average, images.x[unlabeled])
    if args.select == "confidence":  # the baseline: as many images, the most confident
        keep = select_confident(logits, int(keep.sum()))
    elif args.select == "none":  # the control
        keep = torch.zeros_like(keep)

    # Lines 9 and 10: kept images join the labeled set, and stay in the unlabeled one too
    labels[unlabeled] = torch.where(keep, pseudo, -1)
    if WORLD_SIZE > 1:  # batch-norm statistics differ between processes: use process 0's labels
        dist.broadcast(labels, 0)
    print(f"{int(keep.sum()):,} of {len(keep):,} unlabeled images join the labeled set", flush=True)
    save(selection_picture(images, keep, pseudo), out / "selection.png")
    print(f"selection.png: kept, then rejected; its rows: {', '.join(images.classes)}", flush=True)

    # Lines 2 and 11: training continues from theta~
    model.load_state_dict(average.state_dict())
    rows = train("finetune", model, average, images, labels, args)

    # What the run leaves. Only reports use the true labels of unlabeled images
    save(weights_of(average), out / "model.pt")
    added = labels[unlabeled] >= 0  # what training used: if resumed, the checkpoint's labels
    pseudo = torch.where(added, labels[unlabeled], pseudo)
    final_logits = predict(average, images.x[unlabeled])
    save(selection_rows(images, added, pseudo, logits, final_logits), out / "selection.csv")
    save(test_rows(images, test_logits, predict(average, images.x_test)), out / "test.csv")
    options = sys.argv[1:] if argv is None else argv
    modules = {"torch": torch, "torchvision": torchvision, "numpy": np, "pillow": PIL}
    versions = {name: module.__version__ for name, module in modules.items()}
    result = {
        "method": METHOD,
        "data": data_name(args),
        "images": images.digest,
        "scored_on": "validation" if args.val > 0 else "test",
        "select": args.select,
        "eps": args.eps,
        "seed": args.seed,
        "theta": theta_hash,
        "pretrain_accuracy": pretrain_accuracy,
        "final_accuracy": rows[-1]["accuracy"],
        "selection": {
            "unlabeled": len(unlabeled),
            "added": int(added.sum()),  # the counts below leave out images without a true label
            **selection_stats(added, pseudo, images.y[unlabeled]),
            "kept_per_class": pseudo[added].bincount(minlength=len(images.classes)).tolist(),
        },
        "table2": table2,
        "ms_per_step": float(np.median([row["ms_per_step"] for row in rows])),
        "seconds": sum(row["seconds"] for row in rows),
        "peak_memory_gib": None,
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)",
        "ranks": WORLD_SIZE,
        "versions": {"python": platform.python_version(), **versions},
        "command": shlex.join(["python", script.name] + options),
        "args": vars(args),
    }
    if args.device == "cuda":
        result["device"] = torch.cuda.get_device_name()
        result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    save(json.dumps(result, indent=1), out / "result.json")
    print_tables(result, out)
    return result


def train(phase, model, average, images, labels, args):
    """Trains for args.epochs with a new optimizer, or goes on after checkpoint.pt.

    phase: "pretrain" or "finetune"; model, average: where it starts, trained in place; labels:
    int64 [N], -1 where training may not see one. From a checkpoint of this phase all three are
    loaded. Returns the rows of metrics.csv, a dictionary an epoch, of both phases so far.
    """
    optimizer = make_optimizer(model, args)
    loss_function = torch.compile(batch_loss) if args.compile else batch_loss

    def training_step(index_l, index_u, lr, lambda_u, decay):
        """One update. Nothing in it waits for the device, so that a CUDA graph can record it.

        index_l, index_u: int64 [B], [mu * B], the images of the step; the rest: 0-dim float32.
        Returns the loss and the method's metrics, detached scalars.
        """
        x_l, y_l, x_u = images.x[index_l], labels[index_l], images.x[index_u]
        loss, metrics = loss_function(model, x_l, y_l, x_u, lambda_u, args)
        loss.backward()
        average_over_processes([p.grad for p in model.parameters() if p.grad is not None])
        for group in optimizer.param_groups:
            group["lr"] = lr  # a tensor, so that a recorded step reads its current value
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, model, decay)
        return {"loss": loss.detach(), **metrics}

    out = Path(args.out)
    rows = []
    epochs_done = 0
    if (out / "checkpoint.pt").exists():
        checkpoint = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
        rows = checkpoint["rows"]
        if rows[-1]["phase"] == phase:
            model.load_state_dict(checkpoint["model"])
            average.load_state_dict(checkpoint["average"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            labels.copy_(checkpoint["labels"])
            epochs_done = rows[-1]["epoch"]
            print(f"Resuming after {phase} epoch {epochs_done}")
    board = None
    if args.tensorboard and RANK == 0:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(out)

    run_step = training_step
    if args.device == "cuda" and args.compile and WORLD_SIZE == 1:  # not across processes
        run_step = capture(training_step)
    steps = args.steps_per_epoch
    known = (labels >= 0).nonzero()[:, 0]  # the labeled images; in fine-tuning the kept ones too
    for epoch in range(epochs_done + 1, args.epochs + 1):
        started = time.perf_counter()
        model.train()
        # All draws of an epoch follow from (seed, phase, epoch), so a resumed run repeats them.
        # Batches have a generator of their own, the same in all processes. Unlabeled ones are drawn
        # first, so that they do not depend on the labeled set: a run and its control share them.
        epoch_seed = np.random.SeedSequence([args.seed, int(phase == "finetune"), epoch])
        augmentation_seed, batch_seed = epoch_seed.generate_state(2)
        torch.manual_seed(int(augmentation_seed) + RANK)
        generator = torch.Generator(args.device).manual_seed(int(batch_seed))
        batches_u = draw_batches(images.unlabeled, steps, args.mu * args.batch_size, generator)
        batches_l = draw_batches(known, steps, args.batch_size, generator)
        batches_u = batches_u[:, RANK::WORLD_SIZE]  # this process's share of each batch
        batches_l = batches_l[:, RANK::WORLD_SIZE]
        rates = []
        for t in range((epoch - 1) * steps, epoch * steps):
            lr, lambda_u = schedule(t, args.epochs * steps, phase, args)
            decay = min(args.ema_decay, (1 + t) / (10 + t))  # warm-up, in each phase
            rates.append((lr, lambda_u, decay))
        rates_on_device = torch.tensor(rates, device=args.device)  # where a CUDA graph reads them

        totals = {}
        steps_started = time.perf_counter()
        for i in range(steps):
            lr, lambda_u, decay = rates_on_device[i]
            metrics = run_step(batches_l[i], batches_u[i], lr, lambda_u, decay)
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0) + value
            if sys.stdout.isatty() and i % 10 == 0:
                print(f"{phase} {epoch}: step {i} of {steps}", end="\033[K\r", flush=True)
        average_over_processes(list(totals.values()))  # in place
        # float() waits for the device
        means = {name: float(total) / steps for name, total in totals.items()}
        ms_per_step = 1000 * (time.perf_counter() - steps_started) / steps
        if not math.isfinite(means["loss"]):
            sys.exit(f"error: {phase} {epoch}: loss is nan or inf; lower --lr, with another --out")

        accuracy = evaluate(average, images.x_test, images.y_test)
        seconds = time.perf_counter() - started
        row = {
            "phase": phase,
            "epoch": epoch,
            "lr": rates[-1][0],
            **means,
            "accuracy": accuracy,
            "ms_per_step": ms_per_step,
            "seconds": seconds,
        }
        rows.append(row)
        save(rows, out / "metrics.csv")
        checkpoint = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "labels": labels,
            "rows": rows,
        }
        save(checkpoint, out / "checkpoint.pt")
        losses = ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        minutes_left = seconds * (args.epochs - epoch) / 60
        print(f"{phase} {epoch}: {losses}, accuracy {accuracy:.2f} %,", end=" ")
        print(f"{ms_per_step:.1f} ms a step, {minutes_left:.0f} min left in this phase", flush=True)
        if board is not None:
            for name in row.keys() - {"phase", "epoch"}:
                board.add_scalar(f"{phase}/{name}", row[name], epoch)
            board.flush()
    return rows


# --------------------------------------------------------- Bookkeeping, the same in every script


def capture(function, warmup_calls=3):
    """Turns a function of tensors into a CUDA graph. The current stream must not be the default.

    The first calls run normally: they compile, let cuDNN choose its algorithms and create the
    optimizer's state, none of which a graph can record. The next one records the function. Each
    call from then on replays it on a copy of its inputs and overwrites the last one's result.
    """
    graph = torch.cuda.CUDAGraph()
    calls = 0
    static_inputs = None
    outputs = None

    def call(*inputs):
        nonlocal calls, static_inputs, outputs
        calls += 1
        if calls <= warmup_calls:
            return function(*inputs)
        if static_inputs is None:
            static_inputs = [tensor.clone() for tensor in inputs]
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                outputs = function(*static_inputs)  # recorded, not computed
        for static, tensor in zip(static_inputs, inputs):
            static.copy_(tensor)
        graph.replay()
        return outputs

    return call


def join_processes(device):
    """Joins torchrun's process group, with a GPU of its own; only process 0 prints."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


def average_over_processes(tensors):
    """Averages float tensors, in place, over torchrun's processes; all of them in one exchange."""
    if WORLD_SIZE == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, mean in zip(tensors, (flat / WORLD_SIZE).split(sizes)):
        tensor.copy_(mean.view_as(tensor))


def data_name(args):
    """The data set's name for the run's folder and tables; a folder of images has its own name."""
    return Path(args.data_dir).resolve().name if args.data == "folder" else args.data


def weights_of(model):
    """The state_dict on the CPU, so that a file made on a GPU loads anywhere."""
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def fingerprint(model):
    """A hash, as 16 hex digits, of a model's weights and buffers."""
    sha = hashlib.sha256()
    for tensor in weights_of(model).values():
        sha.update(tensor.contiguous().numpy())
    return sha.hexdigest()[:16]


def save(content, path):
    """Writes tensors (.pt), rows (.csv), a picture (.png) or text to another file, then renames it.

    A reader thus finds the old file or the new one, never half of it. The process id in the
    temporary name keeps two runs in one folder apart. Only process 0 of torchrun writes.
    """
    if RANK > 0:
        return
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    if path.suffix == ".pt":
        with open(temporary, "wb") as file:  # given a path, torch.save does not report a full disk
            torch.save(content, file)
    elif path.suffix == ".csv":
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, content[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(content)
    elif path.suffix == ".png":
        Image.fromarray(content.permute(1, 2, 0).numpy()).save(temporary)
    else:
        temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


def refuse_other_settings(folder, settings, names):
    """Exits with a sentence if the folder holds a run that differs in one of the named settings."""
    path = folder / "args.json"
    if not path.exists():
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    differences = [
        f"{name} was {saved.get(name)}, now {settings[name]}"
        for name in names
        if saved.get(name) != settings[name]
    ]
    if differences:
        sys.exit(
            f"error: {folder} holds a run with other settings ({'; '.join(differences)}); use its "
            "settings, or another folder"
        )


def check_pretrained(path, model, settings):
    """Loads another run's theta~ into the model and returns its hash.

    Exits with a sentence if it is of another network, other images or another split than those in
    settings, which are this run's, as in args.json.
    """
    must_agree = "method depth width data classes image_size flip num_labeled val seed images"
    refuse_other_settings(path.parent, settings, must_agree.split())
    try:
        model.load_state_dict(torch.load(path, weights_only=True))
    except Exception as error:  # a damaged file raises any of a dozen types
        sys.exit(f"error: {path} holds no weights of this network ({type(error).__name__})")
    if not (path.parent / "args.json").exists():
        print(f"No args.json beside {path}: whether it had the same images cannot be checked")
    return fingerprint(model)


def selection_rows(images, kept, label, logits, final_logits):
    """Makes the rows of selection.csv, one for each unlabeled image.

    kept: bool [N]; label, logits: int64 [N] and float [N, C], theta~'s; final_logits: those of the
    final model.
    """
    confidence = logits.softmax(dim=1).amax(dim=1)
    final_confidence, final_label = final_logits.softmax(dim=1).max(dim=1)
    columns = {
        "file": [images.names[n] for n in images.unlabeled.tolist()],
        "label": [images.classes[n] for n in label.tolist()],
        "confidence": [f"{value:.6f}" for value in confidence.tolist()],
        "kept": kept.int().tolist(),
        "final_label": [images.classes[n] for n in final_label.tolist()],
        "final_confidence": [f"{value:.6f}" for value in final_confidence.tolist()],
    }
    return rows_of(columns)


def test_rows(images, logits, final_logits):
    """Makes the rows of test.csv, one for each image that is scored.

    logits, final_logits: float [M, C], theta~'s and the final model's.
    """
    label, final_label = logits.argmax(dim=1), final_logits.argmax(dim=1)
    columns = {
        "file": images.names_test,
        "true_label": [images.classes[n] for n in images.y_test.tolist()],
        "label": [images.classes[n] for n in label.tolist()],
        "final_label": [images.classes[n] for n in final_label.tolist()],
    }
    return rows_of(columns)


def rows_of(columns):
    """Turns a dictionary of equally long lists into a list of dictionaries, one for each row."""
    count = len(columns["file"])
    return [{name: column[i] for name, column in columns.items()} for i in range(count)]


def selection_picture(images, keep, pseudo):
    """Shows, in a row for each pseudo-label, up to 8 kept images, a gap, and up to 8 rejected ones.

    keep: bool [N], pseudo: int64 [N], for the unlabeled images. They are drawn at random. Frames
    are green where the label is right, red where it is wrong, gray where the true label is not
    known. Of many classes only the first 100 are shown. Returns uint8 [3, H, W].
    """
    x, y = images.x[images.unlabeled], images.y[images.unlabeled]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    rows = min(len(images.classes), 100)
    tiles = torch.full((rows, 17, 3, x.shape[2] + 4, x.shape[3] + 4), 255, dtype=torch.uint8)
    for label in range(rows):
        for first, group in ((0, keep), (9, ~keep)):
            members = order[(group & (pseudo == label))[order]]
            for i, n in enumerate(members[:8].tolist()):
                color = (255, 0, 0)
                if y[n] == label:
                    color = (0, 128, 0)
                elif y[n] < 0:
                    color = (128, 128, 128)
                tile = tiles[label, first + i]
                tile[:] = torch.tensor(color)[:, None, None]
                tile[:, 2:-2, 2:-2] = x[n]
    return make_grid(tiles.flatten(0, 1), nrow=17, padding=1, pad_value=255)


def print_tables(result, out):
    """Prints the rows of PAPER's tables that the run in the folder `out` has measured."""
    select, eps, scored_on = result["select"], result["eps"], result["scored_on"]
    print(f"\nTable 1: {scored_on} accuracy (%) on {result['data']}")
    print(f"{result['pretrain_accuracy']:6.2f}  {TITLE}")
    print(f"{result['final_accuracy']:6.2f}  {TITLE}, fine-tuned (--select {select} --eps {eps:g})")
    print(f"\nTable 2: the pretrained {TITLE} on the {scored_on} images (%)")
    for row in result["table2"]:
        right, kept = row["kept_correct"], row["kept"]
        wrong, rejected = row["rejected_wrong"], row["rejected"]
        sensitivity = 100 * right / max(1, kept)
        specificity = 100 * wrong / max(1, rejected)
        print(f"eps {row['eps']:<4g} sensitivity {sensitivity:.2f} ({right}/{kept} kept),", end=" ")
        print(f"specificity {specificity:.2f} ({wrong}/{rejected} rejected)")
    print(f"\nOutput files: {out}")
    if select != "none":
        theta_file = result["args"]["pretrained"] or f"{out}/pretrain.pt"
        print("To see what the added images changed, run the control: the same command with")
        print(f"--select none --pretrained {theta_file}")


if __name__ == "__main__":
    main()
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
