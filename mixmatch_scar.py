# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5.1", "torchvision>=0.20.1", "numpy"]
# ///
r"""MixMatch with SCAR (Selecting Clean samples with Adversarial Robustness).

Pretrains a WideResNet with MixMatch on 4,000 labels, then fine-tunes it with SCAR: the pretrained
model, theta~ (the moving average of the weights), labels every unlabeled image, and FGSM attacks
it. Images that keep their label under the attack join the labeled set, and MixMatch continues from
theta~ for as many epochs again. The second command is the control: the same, but nothing is added.

    python mixmatch_scar.py --eps 1 --epochs 200
    python mixmatch_scar.py --eps 1 --epochs 200 --select none \
        --pretrained runs/mixmatch__cifar10__fgsm-eps1__seed0/pretrain.pt

"PAPER" is Yang, Kim and Kim, "Improving Performance of Semi-Supervised Learning by Adversarial
Attacks", which reports 89.99 % for MixMatch and 92.99 % with SCAR. MixMatch: Berthelot et al. 2019,
arXiv:1905.02249, and google-research/mixmatch.
Measured on CIFAR-10 (JPEG) after 9 + 9 epochs (seed 0, one H100, bf16, torch 2.11, batch norm's eps
still 1e-5, lambda_u at full weight after 40 % of pretraining): MixMatch 78.56 %, SCAR 80.74 %,
control 79.74 %. A step takes 4.1 ms alone on the GPU.
"""

import argparse
import copy
import csv
import hashlib
import importlib.util
import io
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
from PIL import Image, ImageDraw, ImageFont
from torch.func import functional_call

from common import WideResNet, fgsm, image_names, load_images, split_labeled

METHOD = "mixmatch"
TITLE = "MixMatch"

# torchrun starts several processes and tells each one how many there are and its own number
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if WORLD_SIZE > 1 else 0

# ---------------------------------------------------------------------------------------- Arguments


def parse_args(argv=None):
    """Parses the command line; exits with code 2 and a message if it makes no sense."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--option value ...]   (--help lists the options)",
        description=f"Pretrains a WideResNet with {TITLE}, then fine-tunes it with SCAR.",
        epilog="The same command resumes an interrupted run.",
        formatter_class=argparse.MetavarTypeHelpFormatter,
        allow_abbrev=False,
    )
    on_off = argparse.BooleanOptionalAction

    def option(name, default, sentence, **more):
        """Adds an option to the current group; its default sets its type and ends its help."""
        sentence += f" (default: {default})"
        group.add_argument(name, default=default, type=type(default), help=sentence, **more)

    group = parser.add_argument_group("Data")
    option(
        "--data",
        "cifar10",
        "Images to train on; folder: your own; synthetic: drawn shapes",
        choices=["cifar10", "cifar100", "svhn", "stl10", "folder", "synthetic"],
    )
    option("--data-dir", "data", "Folder that holds the images, or to download them to")
    option("--image-size", 32, "Side of the square images in pixels; others are resized")
    group.add_argument(
        "--flip", action=on_off, help="Mirror images at random (default: yes, except for svhn)"
    )
    group.add_argument(
        "--num-labeled",
        type=int,
        help="Labels to use, equally many of each class (default: 4000; all with unlabeled/)",
    )
    option("--val", 0, "Hold out this many training images; score on them, not on the test set")

    group = parser.add_argument_group("Model")
    option("--depth", 28, "Depth of the WideResNet, 6n + 4")
    option("--width", 2, "Width of the WideResNet: it has 16, 32, 64 times this many channels")
    option("--ema-decay", 0.999, "Decay of the moving average of the weights, which is evaluated")

    group = parser.add_argument_group("Training")
    option("--epochs", 200, "Epochs of pretraining, and as many of fine-tuning")
    option("--steps-per-epoch", 1024, "Training steps in an epoch")
    option("--batch-size", 64, "Labeled images in a training step, and as many unlabeled ones")
    option("--lr", 0.002, "Learning rate of Adam, constant")
    option("--weight-decay", 0.02, "Each step scales conv and linear weights by 1 - lr * this")
    option("--seed", 0, "Seed of the labeled set, the initial weights and all random draws")

    group = parser.add_argument_group(TITLE)
    option("--lambda-u", 0.75, "Weight of the unlabeled loss; rises over 2^20 labeled images drawn")
    option("--temperature", 0.5, "T: a guessed label is sharpened to p^(1/T)")
    option("--alpha", 0.75, "MixUp draws its weights from Beta(alpha, alpha); 0 switches it off")
    parser.set_defaults(mu=1)  # unlabeled images in a step, for each labeled one

    group = parser.add_argument_group("SCAR")
    option("--eps", 1.0, "Step of FGSM in units of 1/255; 0 keeps every image")
    option(
        "--select",
        "fgsm",
        "fgsm: add what withstands it; none: the control; confidence: as many of the surest",
        choices=["fgsm", "none", "confidence"],
    )
    group.add_argument(
        "--table2-eps",
        type=float,
        nargs="+",
        default=[1.0, 2.0, 3.0, 4.0, 6.0],
        help="Sizes of the attack in Table 2, besides --eps (default: 1 2 3 4 6)",
    )
    group.add_argument(
        "--pretrained", type=str, help="Skip pretraining: start from an earlier run's pretrain.pt"
    )

    group = parser.add_argument_group("Run")
    group.add_argument(
        "--out",
        type=str,
        help="Output folder (default: runs/<method>__<data>__<select>-eps<eps>__seed<seed>)",
    )
    option("--device", "auto", "auto: the GPU, if there is one", choices=["auto", "cpu", "cuda"])
    option(
        "--precision",
        "auto",
        "auto: bf16 on a GPU that supports it, otherwise fp32",
        choices=["auto", "bf16", "fp32"],
    )
    group.add_argument(
        "--compile",
        action=on_off,
        help="Use torch.compile, and a CUDA graph on one GPU (default: on a GPU)",
    )
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="Also write TensorBoard events (needs the package tensorboard)",
    )

    args = parser.parse_args(argv)
    if args.temperature == 0:
        parser.error("--temperature must be above 0; near 0 each guess is a single class")
    if 0 < args.alpha < 0.01:
        parser.error("--alpha must be 0 (no MixUp) or at least 0.01; below, its samples underflow")
    check_ranges(parser, args)
    resolve_defaults(parser, args)
    return args


def check_ranges(parser, args):
    """Exits with a message if a number is out of its range."""
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} must be a finite number and not negative: {value}")
    counts = {
        "--width": args.width,
        "--epochs": args.epochs,
        "--steps-per-epoch": args.steps_per_epoch,
        "--batch-size": args.batch_size,
        "--mu": args.mu,
    }
    for flag, value in counts.items():
        if value < 1:
            parser.error(f"{flag} must be at least 1: {value}")
    if args.depth < 10 or (args.depth - 4) % 6 != 0:
        parser.error(f"--depth must be 6n + 4 (10, 16, 22, 28, ...): {args.depth}")
    if args.image_size < 16:
        parser.error(f"--image-size must be at least 16: {args.image_size}")
    if args.ema_decay > 1:
        parser.error(f"--ema-decay must be from 0 to 1: {args.ema_decay}")
    for eps in [args.eps] + args.table2_eps:
        if not 0 <= eps <= 255:
            parser.error(f"--eps and --table2-eps must be from 0 to 255: {eps}")
    if args.batch_size % WORLD_SIZE != 0:
        parser.error(f"--batch-size {args.batch_size} is not divisible by {WORLD_SIZE} processes")


def resolve_defaults(parser, args):
    """Fills in "auto" and omitted options; exits if a GPU or package asked for is missing."""
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard needs the package tensorboard: pip install tensorboard")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no NVIDIA GPU; use --device cpu")
    if args.precision == "auto":
        args.precision = "fp32"
        if args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            args.precision = "bf16"
    if args.compile is None:
        args.compile = args.device == "cuda"
    if args.flip is None:
        args.flip = args.data != "svhn"  # as in the methods' papers: no mirrored digits
    if args.out is None:
        selection = f"{args.select}-eps{args.eps:g}"
        args.out = f"runs/{METHOD}__{data_name(args)}__{selection}__seed{args.seed}"


def data_name(args):
    """The data set's name for the output folder; with --data folder, the name of --data-dir."""
    return Path(args.data_dir).resolve().name if args.data == "folder" else args.data


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
        position = torch.arange(size, device=x.device) + shift
        return (size - 1) - ((size - 1) - position.abs()).abs()  # -1 -> 1, size -> size - 2

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


# ---------------------------------------------------------------------------------- MixMatch's loss


def forward_untracked(model, x):
    """Computes model(x) without changing batch norm's running statistics: only copies move."""
    copies = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return functional_call(model, copies, x)


def draw_mix(count, alpha, device):
    """Draws max(l, 1 - l), float [count], with l from Beta(alpha, alpha); alpha 0 gives ones.

    alpha: 0, or at least 0.01. l is one of two Gamma samples, divided by their sum. The samples
    are float64: in float32, with a small alpha, both may underflow to the same number.
    """
    if alpha == 0:
        return torch.ones(count, device=device)
    shape = torch.full((2, count), alpha, dtype=torch.float64, device=device)
    gamma = torch.distributions.Gamma(shape, torch.ones_like(shape), validate_args=False).sample()
    return (gamma.amax(dim=0) / gamma.sum(dim=0)).float()


def mixmatch_loss(
    model, x_l, y_l, x_u1, x_u2, temperature, alpha, lambda_u, *, mix=None, perm=None
):
    """Cross-entropy on mixed labeled images + lambda_u * squared error on mixed unlabeled ones.

    x_l: float [B, 3, H, W] in [0, 1]; y_l: int64 [B]; x_u1, x_u2: float [B, 3, H, W], two weak
    views of the same images; temperature: above 0; alpha: see draw_mix, 0 switches MixUp off;
    lambda_u: float or 0-dim tensor. mix: float [3B] in [0.5, 1], the weight of each image in its
    own mixture; perm: int64 [3B], the image it is mixed with; both are drawn if None.
    Returns (loss, metrics): a scalar, and detached scalars loss_labeled and loss_unlabeled (without
    lambda_u; the mean over images and classes).
    Source: MixMatch, algorithm 1 and equations 2 to 5; google-research/mixmatch, mixmatch.py.
    """
    with torch.no_grad():  # the guess: the mean prediction of both views, sharpened
        prob = forward_untracked(model, torch.cat([x_u1, x_u2])).float().softmax(dim=1)
        prob = prob.view(2, len(x_u1), -1).mean(dim=0)
        guess = (prob.log() / temperature).softmax(dim=1)  # p^(1/T), rescaled to sum 1

    # MixUp: every image, labeled or not, is mixed with a random one of the step
    x = torch.cat([x_l, x_u1, x_u2])
    target = torch.cat([F.one_hot(y_l, guess.shape[1]), guess, guess])
    if mix is None:
        mix = draw_mix(len(x), alpha, x.device)
    if perm is None:
        perm = torch.rand(len(x), device=x.device).argsort()
    mix = mix.float()
    x = mix[:, None, None, None] * x + (1 - mix[:, None, None, None]) * x[perm]
    target = mix[:, None] * target + (1 - mix[:, None]) * target[perm]

    logits_l, logits_u = model(x).float().tensor_split([len(x_l)])
    target_l, target_u = target.tensor_split([len(x_l)])
    loss_labeled = F.cross_entropy(logits_l, target_l)
    loss_unlabeled = F.mse_loss(logits_u.softmax(dim=1), target_u)
    metrics = {
        "loss_labeled": loss_labeled.detach(),
        "loss_unlabeled": loss_unlabeled.detach(),
    }
    return loss_labeled + lambda_u * loss_unlabeled, metrics


def batch_loss(model, x_l, y_l, x_u, lambda_u, args):
    """MixMatch on uint8 images: augments, then mixmatch_loss. torch.compile compiles this."""
    x_l = to_float(weak_augment(x_l, args.flip))
    x_u1 = to_float(weak_augment(x_u, args.flip))
    x_u2 = to_float(weak_augment(x_u, args.flip))
    # The cache is off because, before PyTorch's pull request 165068, the training forward reused
    # the bf16 weights that the guess had cast without gradient
    bf16 = args.precision == "bf16"
    with torch.autocast(x_l.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
        return mixmatch_loss(model, x_l, y_l, x_u1, x_u2, args.temperature, args.alpha, lambda_u)


# --------------------------------------------------------------------------------- SCAR's selection


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
    specificity is rejected_wrong / rejected in percent, elsewhere NPV; nan where nothing is kept or
    rejected.
    Source: PAPER, equations 5 and 6.
    """
    correct = pseudo == y
    kept = keep & (y >= 0)
    rejected = ~keep & (y >= 0)
    stats = {
        "kept": int(kept.sum()),
        "kept_correct": int((kept & correct).sum()),
        "rejected": int(rejected.sum()),
        "rejected_wrong": int((rejected & ~correct).sum()),
    }
    stats["sensitivity"] = percent(stats["kept_correct"], stats["kept"])
    stats["specificity"] = percent(stats["rejected_wrong"], stats["rejected"])
    return stats


def percent(part, whole):
    """100 * part / whole; nan if the whole is 0."""
    return 100 * part / whole if whole > 0 else math.nan


# -------------------------------------------------------------- Optimizer, schedule, moving average


def make_optimizer(model, args):
    """AdamW: each step multiplies convolution and linear weights by 1 - lr * weight_decay."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, fused=True, capturable=True)


def schedule(step, total_steps, phase, args):
    """(lr, lambda_u) at a step: a constant lr; lambda_u rises in pretraining, then is constant.

    It rises over 2^20 labeled images, 16,384 steps at batch 64, however long the run is: see
    warmup_kimg in google-research/mixmatch, mixmatch.py.
    """
    ramp = 1.0
    if phase == "pretrain":
        ramp = min(1.0, step * args.batch_size / 2**20)
    return args.lr, ramp * args.lambda_u


def update_average(average, model, decay):
    """average = decay * average + (1 - decay) * model, in place; integer buffers are copied.

    decay: float or 0-dim tensor. Batch-norm statistics are averaged too. The foreach functions take
    all tensors at once: a few kernels on a GPU instead of hundreds.
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


# ---------------------------------------------------------------- Helpers, the same in every script


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


def draw_batches(pool, count, size, generator):
    """Draws `count` batches of `size` entries from pool, int64 [M], reshuffled for each pass.

    Returns int64 [count, size].
    """
    passes = math.ceil(count * size / len(pool))
    order = torch.rand(passes, len(pool), generator=generator, device=pool.device).argsort(dim=1)
    return pool[order.flatten()[: count * size]].view(count, size)


def capture(function, warmup_calls=3):
    """Turns a function of tensors into a CUDA graph; each call overwrites the last one's result.

    The first calls run normally: they compile, let cuDNN choose its algorithms and create the
    optimizer's state, none of which a graph can record.
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


def average_over_processes(tensors):
    """Averages float tensors, in place, over torchrun's processes; all of them in one exchange."""
    if WORLD_SIZE == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, mean in zip(tensors, (flat / WORLD_SIZE).split(sizes)):
        tensor.copy_(mean.view_as(tensor))


def save(content, path):
    """Writes text, a picture or (torch.save) anything else to a temporary file, then renames it.

    A reader thus finds the old file or the new one, never half of it. The process id in the
    temporary name keeps two runs in one folder apart. Only process 0 of torchrun writes.
    """
    if RANK > 0:
        return
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    if isinstance(content, str):
        # bytes of file names that are not UTF-8 are written as they were read
        temporary.write_text(content, encoding="utf-8", errors="surrogateescape")
    elif isinstance(content, Image.Image):
        content.save(temporary)
    else:
        with open(temporary, "wb") as file:  # given a path, torch.save hides a full disk
            torch.save(content, file)
    os.replace(temporary, path)


def load(path):
    """Loads a file of torch.save to the CPU; exits with a message if it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        sys.exit(f"error: cannot read {path}: {error.strerror}")
    except Exception:  # a damaged file raises any of a dozen types
        sys.exit(
            f"error: cannot read {path}: it is damaged or holds no tensors; replace or delete it"
        )


def load_json(path):
    """Loads a .json file; exits with a message if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"error: cannot read {path} ({error}); repair it, or choose another folder")


def check_same_settings(folder, settings, names):
    """Exits with a message if the folder holds a run that differs in one of the named settings."""
    if not (folder / "args.json").exists():
        return
    saved = load_json(folder / "args.json")
    differences = []
    for name in names:
        if saved.get(name) != settings[name]:
            was, now = str(saved.get(name)), str(settings[name])
            differences.append(f"{name} was {was[:100]}, now {now[:100]}")
    if differences:
        differences = "; ".join(differences)
        sys.exit(
            f"error: {folder} holds a run with other settings ({differences}); "
            "use the same settings, or choose another folder"
        )


def fingerprint(tensors, words=()):
    """A hash, as 16 hex digits, of the shapes and values of tensors and of words.

    tensors: an iterable, on any device; words: strings in lists, nested to any depth.
    """
    digest = hashlib.sha256(json.dumps(words).encode())
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def begin_folder(out, settings):
    """Creates the run's folder, with its settings and a copy of this script, if it is new."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "args.json").exists():
            save(json.dumps(settings, indent=1), out / "args.json")
        script = Path(__file__)
        if not (out / script.name).exists():
            save(script.read_text(encoding="utf-8"), out / script.name)
    except OSError as error:
        sys.exit(f"error: cannot write to {out} ({error}); choose another --out")


# ------------------------------------------------------- Files and tables, the same in every script


def data_title(args):
    """The data set's name in tables: a folder has its own, but cifar10-jpeg a title."""
    titles = {"cifar10": "CIFAR-10", "cifar10-jpeg": "CIFAR-10 (JPEG)"}
    return titles.get(data_name(args), data_name(args))


def command_line(argv):
    """The command, quoted for a shell. argv: main's; None stands for Python's own arguments."""
    options = sys.argv[1:] if argv is None else argv
    return shlex.join(["python", os.path.relpath(__file__), *options])


def machine_info(args):
    """Device, peak memory, number of processes and versions, for result.json."""
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    peak_memory = None
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
        peak_memory = torch.cuda.max_memory_allocated() / 2**30
    return {
        "peak_memory_gib": peak_memory,
        "device": name,
        "ranks": WORLD_SIZE,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
    }


def weights_of(model):
    """The state_dict on the CPU, so that a file made on a GPU loads anywhere."""
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def csv_text(rows):
    """Turns a list of dictionaries with the same keys into the text of a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def without_nan(stats):
    """Replaces nan with None, which becomes null: strict JSON has no nan."""
    return {name: None if math.isnan(value) else value for name, value in stats.items()}


def table2_rows(model, x, y, eps_values):
    """PAPER's Table 2 on images x with true labels y: selection_stats at each eps, in 1/255."""
    rows = []
    for eps in sorted(eps_values):
        keep, pseudo = select_clean(model, x, eps / 255)
        rows.append({"eps": eps, **without_nan(selection_stats(keep, pseudo, y))})
    return rows


def selection_picture(x, keep, pseudo, y, classes):
    """Shows, for each pseudo-label, up to 8 kept and 8 rejected images, drawn at random.

    x: uint8 [N, 3, H, W]; keep: bool [N]; pseudo, y: int64 [N], predicted and true labels. Returns
    a Pillow image. Frames are green where the label is right, red where it is wrong, gray where y
    is -1. Only the first 100 classes are shown, and large images are reduced to 96 x 96 pixels.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    classes = classes[:100]
    size = min(x.shape[3], 96)
    side = size + 6
    font = ImageFont.load_default()
    left = 12 + round(max(font.getlength(name) for name in classes))
    picture = Image.new("RGB", (left + 17 * side, 16 + len(classes) * side), "white")
    pen = ImageDraw.Draw(picture)
    for label, name in enumerate(classes):
        pen.text((4, 10 + label * side + side // 2), name, "black")
    for left_edge, title, group in ((left, "kept", keep), (left + 9 * side, "rejected", ~keep)):
        pen.text((left_edge, 2), title, "black")
        for label in range(len(classes)):
            in_row = group & (pseudo == label)
            members = order[in_row[order]]  # in random order
            for i, n in enumerate(members[:8].tolist()):
                color = "green" if y[n] == label else "red"
                if y[n] < 0:
                    color = "gray"
                corner = left_edge + i * side, 16 + label * side
                far_corner = corner[0] + side - 3, corner[1] + side - 3
                pen.rectangle([corner, far_corner], color)
                image = Image.fromarray(x[n].permute(1, 2, 0).cpu().numpy()).resize((size, size))
                picture.paste(image, (corner[0] + 2, corner[1] + 2))
    return picture


def selection_rows(names, classes, kept, label, confidence, final_logits):
    """Makes the rows of selection.csv, one for each unlabeled image.

    names: file names or indices; kept: bool [N]; label, confidence: int64 and float [N], theta~'s;
    final_logits: float [N, C], the final model's.
    """
    final_confidence, final_label = final_logits.softmax(dim=1).max(dim=1)
    kept, label, confidence = kept.tolist(), label.tolist(), confidence.tolist()
    final_label, final_confidence = final_label.tolist(), final_confidence.tolist()
    rows = []
    for i, name in enumerate(names):
        row = {
            "file": name,
            "label": classes[label[i]],
            "confidence": f"{confidence[i]:.6f}",
            "kept": int(kept[i]),
            "final_label": classes[final_label[i]],
            "final_confidence": f"{final_confidence[i]:.6f}",
        }
        rows.append(row)
    return rows


def print_absent_classes(kind, y, classes):
    """Prints which classes have no image of this kind. y: int64 [N], the labels of those images."""
    present = set(y.tolist())
    absent = [name for label, name in enumerate(classes) if label not in present]
    if absent and -1 not in present:  # an image without a label may be of any class
        names = ", ".join(absent[:5])
        print(f"Classes without {kind} images: {len(absent)} of {len(classes)} ({names})")


def progress_lines(row, losses, seconds_left):
    """Two lines of the table that a run prints while it trains: its heading and an epoch's row.

    row: the epoch's row of metrics.csv; losses: the names in it of means over the training steps.
    """
    time_left = f"{seconds_left / 60:.1f} min"
    if seconds_left >= 90 * 60:
        time_left = f"{seconds_left / 3600:.1f} h"
    cells = {"epoch": f"{row['phase']} {row['epoch']:3}"}
    for name in losses:
        cells[name.removeprefix("loss_")] = f"{row[name]:.4f}"
    cells["accuracy"] = f"{row['accuracy']:.2f}"
    cells["ms/step"] = f"{row['ms_per_step']:.0f}"
    cells["left"] = time_left
    smallest_width = {"epoch": 12, "left": 8}
    heading, line = [], []
    for name, cell in cells.items():
        width = max(len(name), smallest_width.get(name, 6))
        heading.append(name.rjust(width))
        line.append(cell.rjust(width))
    return "  ".join(heading), "  ".join(line)


def print_tables(result, out):
    """Prints the rows of PAPER's tables that the run in the folder `out` has measured."""
    eps = result["eps"]
    added = {
        "fgsm": f"SCAR (eps {eps:g})" if eps > 0 else "every pseudo-label (eps 0)",
        "none": "nothing (control)",
        "confidence": f"the most confident (as many as eps {eps:g} keeps)",
    }
    fine_tuned = f"{TITLE} + {added[result['select']]}"
    width = len(fine_tuned) + 4
    print(f"\nTable 1: {result['scored_on']} accuracy (%) on {result['data']}")
    print(f"{TITLE:{width}}{result['pretrain_accuracy']:6.2f}")
    print(f"{fine_tuned:{width}}{result['final_accuracy']:6.2f}")

    print(f"\nTable 2: the pretrained {TITLE} on the {result['scored_on']} images (%)")
    print("           sensitivity: right among kept    specificity: wrong among rejected")
    for row in result["table2"]:
        sensitivity = rate(row["kept_correct"], row["kept"])
        specificity = rate(row["rejected_wrong"], row["rejected"])
        print(f"eps {row['eps']:<7g}{sensitivity:33}{specificity}")

    print(f"\nOutput files: {out}")
    # run_all.sh sets this where it runs the control itself
    if result["select"] != "none" and "CONTROL_FOLLOWS" not in os.environ:
        theta, folder = shlex.quote(f"{out}/pretrain.pt"), shlex.quote(f"{out}-control")
        print("To see what the added images changed, run the control, which adds none:")
        print(f"{result['command']} --select none --pretrained {theta} --out {folder}")


def rate(part, whole):
    """A share in percent and the numbers behind it, as text."""
    return f"{percent(part, whole):.2f} ({part}/{whole})" if whole > 0 else "none (0/0)"


# ---------------------------------------------------------------- The run, the same in every script


def main(argv=None):
    """Runs or resumes what the command line says; returns the content of result.json."""
    args = parse_args(argv)
    # for result.json; taken now, because the working directory may change
    command = command_line(argv)
    title = data_title(args)
    out = Path(args.out)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # else convolutions use TF32; fgsm needs fp32
    if WORLD_SIZE > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")  # process 0 prints for all
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    if args.device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot record a CUDA graph

    print(f"Reading the images of {title}", flush=True)

    # All images, on the device, and the labels that training may see; -1 hides the others
    try:
        x, y, x_test, y_test = load_images(args.data, args.data_dir, args.image_size)
        classes, files, left_out = image_names(args.data, args.data_dir)
        if files and len(files) != len(x):
            raise ValueError(f"{args.data_dir} changed while it was read: run the command again")
        digest = fingerprint([x, y, x_test, y_test], [classes, files])
        images = f"{len(x)} + {len(x_test)}, hash {digest}"
        x, y = x.to(args.device), y.to(args.device)
        x_test, y_test = x_test.to(args.device), y_test.to(args.device)
        if args.num_labeled is None:
            args.num_labeled = 4000
            if args.data == "folder" and y.min() < 0:  # it has unlabeled/
                args.num_labeled = int((y >= 0).sum())
        labeled, unlabeled = split_labeled(y, args.num_labeled, args.seed, classes)
        scored_on = "test"
        if args.val == 0 and len(x_test) == 0:
            raise ValueError(f"{args.data_dir} has no test/: use --val N to hold images out")
        if args.val > 0:
            scored_on = "validation"
            option = f"after --num-labeled {args.num_labeled}, --val"
            held_out, rest = split_labeled(y[unlabeled], args.val, args.seed, classes, option)
            x_test, y_test = x[unlabeled[held_out]], y[unlabeled[held_out]]
            unlabeled = unlabeled[rest]
    except ValueError as error:
        sys.exit(f"error: {error}")
    unlabeled = unlabeled.to(args.device)
    labels = torch.full_like(y, -1)
    labels[labeled] = y[labeled]
    settings = {
        "method": METHOD,
        **vars(args),
        "classes": classes,
        "images": images,
        "pretrained_weights": None,  # with --pretrained: their hash, see below
    }

    # The model and its moving average, which is evaluated; after pretraining that is theta~
    torch.manual_seed(args.seed)
    model = WideResNet(len(classes), args.depth, args.width)
    model = model.to(args.device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    if args.pretrained is not None:
        # theta~ must come from the same method, network, images, flips and split
        must_agree = "method depth width data classes image_size flip num_labeled val seed images"
        check_same_settings(Path(args.pretrained).parent, settings, must_agree.split())
        try:
            average.load_state_dict(load(Path(args.pretrained)))
        except (RuntimeError, TypeError):
            sys.exit(f"error: {args.pretrained} does not hold weights of this network")
        if not (Path(args.pretrained).parent / "args.json").exists():
            print(f"No args.json beside {args.pretrained}: its images cannot be checked")
        settings["pretrained_weights"] = fingerprint(average.state_dict().values())

    # The run's folder must be new, or hold this same run
    may_differ = ["device", "out", "data_dir", "compile", "tensorboard", "pretrained"]
    check_same_settings(out, settings, [name for name in settings if name not in may_differ])
    if any(out.glob("[!.]*")) and not (out / "args.json").exists():
        sys.exit(f"error: {out} is not empty and holds no run; choose another --out")
    if (out / "result.json").exists():
        result = load_json(out / "result.json")
        print_tables(result, out)
        return result
    print(f"{len(classes)} classes; {len(labeled):,} labeled, {len(unlabeled):,} unlabeled", end="")
    print(f" and {len(x_test):,} {scored_on} images")
    if left_out:
        print(f"Files left out: {len(left_out)} ({', '.join(left_out[:5])})")
    print_absent_classes("unlabeled", y[unlabeled], classes)
    print_absent_classes(scored_on, y_test, classes)
    print(f"WRN-{args.depth}-{args.width} on {args.device} in {args.precision}; files in {out}")

    # The training step
    optimizer = make_optimizer(model, args)
    loss_function = torch.compile(batch_loss) if args.compile else batch_loss

    def training_step(index_l, index_u, lr, lambda_u, decay):
        """One update. Nothing in it waits for the device, so that a CUDA graph can record it.

        index_l, index_u: int64 [B], [mu * B], the images of the step; the rest: 0-dim float32.
        """
        x_l, y_l = x[index_l], labels[index_l]
        loss, metrics = loss_function(model, x_l, y_l, x[index_u], lambda_u, args)
        loss.backward()
        average_over_processes([p.grad for p in model.parameters() if p.grad is not None])
        for group in optimizer.param_groups:
            group["lr"] = lr  # a tensor, so that a recorded step reads its current value
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, model, decay)
        return {"loss": loss.detach(), **metrics}

    # The checkpoint, if there is one
    rows = []  # of metrics.csv
    report = {}  # on theta~ and its selection, for result.json
    pseudo = None  # theta~'s labels of the unlabeled images
    confidence = None
    if (out / "checkpoint.pt").exists():
        checkpoint = load(out / "checkpoint.pt")
        try:
            model.load_state_dict(checkpoint["model"])
            average.load_state_dict(checkpoint["average"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            labels.copy_(checkpoint["labels"])
            rows = checkpoint["rows"]
            report = checkpoint["report"]
            pseudo, confidence = checkpoint["pseudo"], checkpoint["confidence"]
            print(f"Resuming after {rows[-1]['phase']} epoch {rows[-1]['epoch']}")
        except (KeyError, RuntimeError, TypeError, ValueError):
            sys.exit(
                f"error: {out}/checkpoint.pt does not fit, perhaps from another version of "
                "this script; choose another --out"
            )
    begin_folder(out, settings)
    board = None
    if args.tensorboard and RANK == 0:
        board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(out)

    steps = args.steps_per_epoch
    phases = ["pretrain", "finetune"] if args.pretrained is None else ["finetune"]
    for phase in phases:
        epochs_done = len([row for row in rows if row["phase"] == phase])
        if phase == "finetune" and epochs_done == 0:
            # ---- SCAR: PAPER, Algorithm 1. The paper selects in every epoch, but theta~ is fixed,
            # so one selection before the first epoch gives the same images.
            # Lines 5 to 8: theta~ labels every unlabeled image, FGSM attacks it, and the image is
            # kept if its label withstands the attack
            print(f"Attacking the {len(unlabeled):,} unlabeled images", flush=True)
            keep, pseudo = select_clean(average, x[unlabeled], args.eps / 255)
            logits = predict(average, x[unlabeled])
            if args.select == "confidence":  # the baseline: as many images, the most confident
                keep = select_confident(logits, int(keep.sum()))
            elif args.select == "none":  # the control
                keep = torch.zeros_like(keep)
            # Lines 9 and 10: kept images join the labeled set, and stay in the unlabeled one too
            labels[unlabeled] = torch.where(keep, pseudo, -1)
            if WORLD_SIZE > 1:
                # batch-norm statistics differ between processes, so selections may: use process 0's
                dist.broadcast(labels, 0)
            # Line 11: training continues from theta~; training_step now uses the new optimizer
            model.load_state_dict(average.state_dict())
            optimizer = make_optimizer(model, args)

            # ---- The report. Training never uses the true labels of the unlabeled images
            save(weights_of(average), out / "pretrain.pt")
            picture = selection_picture(x[unlabeled], keep, pseudo, y[unlabeled], classes)
            save(picture, out / "selection.png")
            confidence = logits.softmax(dim=1).amax(dim=1)
            del logits  # with a thousand classes they are larger than the images
            report = {
                "theta": fingerprint(average.state_dict().values()),
                "pretrain_accuracy": evaluate(average, x_test, y_test),
                "selection": {  # selection_stats alone leaves out images without a true label
                    "unlabeled": len(unlabeled),
                    "added": int(keep.sum()),
                    **without_nan(selection_stats(keep, pseudo, y[unlabeled])),
                    "kept_per_class": pseudo[keep].bincount(minlength=len(classes)).tolist(),
                },
                "table2": table2_rows(average, x_test, y_test, set(args.table2_eps) | {args.eps}),
            }
            print(f"Pretraining reached {report['pretrain_accuracy']:.2f} % accuracy;", end=" ")
            print(f"{int(keep.sum()):,} of {len(keep):,} unlabeled images join the labeled set")

        known = (labels >= 0).nonzero()[:, 0]  # labeled images; in fine-tuning the kept ones too
        step = training_step
        if args.device == "cuda" and args.compile and WORLD_SIZE == 1:  # not across processes
            step = capture(training_step)
        for epoch in range(epochs_done + 1, args.epochs + 1):
            started = time.perf_counter()
            model.train()
            # All draws of an epoch follow from (seed, phase, epoch), so that a run resumed on the
            # same device repeats them. Batches come from a generator of their own, seeded alike in
            # every process. Unlabeled ones are drawn first, so that they do not depend on the
            # number of labeled images: a run and its control see the same unlabeled images in the
            # same views.
            epoch_seed = np.random.SeedSequence([args.seed, int(phase == "finetune"), epoch])
            augmentation_seed, batch_seed = epoch_seed.generate_state(2)
            torch.manual_seed(int(augmentation_seed) + RANK)
            generator = torch.Generator(args.device).manual_seed(int(batch_seed))
            batches_u = draw_batches(unlabeled, steps, args.mu * args.batch_size, generator)
            batches_l = draw_batches(known, steps, args.batch_size, generator)
            batches_u = batches_u[:, RANK::WORLD_SIZE]  # this process's share of each batch
            batches_l = batches_l[:, RANK::WORLD_SIZE]
            rates = []
            for t in range((epoch - 1) * steps, epoch * steps):
                lr, lambda_u = schedule(t, args.epochs * steps, phase, args)
                decay = min(args.ema_decay, (1 + t) / (10 + t))  # warm-up, in each phase
                rates.append((lr, lambda_u, decay))
            rates_on_device = torch.tensor(rates, device=args.device)

            totals = {}
            steps_started = time.perf_counter()
            for i in range(steps):
                lr, lambda_u, decay = rates_on_device[i]
                metrics = step(batches_l[i], batches_u[i], lr, lambda_u, decay)
                for name, value in metrics.items():
                    totals[name] = totals.get(name, 0) + value
                if sys.stdout.isatty() and i % 10 == 0:
                    print(f"{phase} {epoch}: step {i} of {steps}", end="\033[K\r", flush=True)
            average_over_processes(list(totals.values()))
            # float() waits for the device
            means = {name: float(total) / steps for name, total in totals.items()}
            ms_per_step = 1000 * (time.perf_counter() - steps_started) / steps
            if not math.isfinite(means["loss"]):
                sys.exit(f"error: {phase} {epoch}: loss is nan or inf; lower --lr, change --out")

            accuracy = evaluate(average, x_test, y_test)
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
            save(csv_text(rows), out / "metrics.csv")
            checkpoint = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "labels": labels,
                "rows": rows,
                "report": report,
                "pseudo": pseudo,
                "confidence": confidence,
            }
            save(checkpoint, out / "checkpoint.pt")
            seconds_left = seconds * (len(phases) * args.epochs - len(rows))
            heading, line = progress_lines(row, means, seconds_left)
            if epoch == epochs_done + 1:
                print(heading)
            print(line, flush=True)
            if board is not None:
                for name in row.keys() - {"phase", "epoch"}:
                    board.add_scalar(f"{phase}/{name}", row[name], epoch)
                board.flush()
        del step  # and with it the memory of its CUDA graph

    # The files of a finished run, and the tables
    save(weights_of(average), out / "model.pt")
    names = [files[n] if files else n for n in unlabeled.tolist()]
    kept = labels[unlabeled] >= 0
    final_logits = predict(average, x[unlabeled])
    selection = selection_rows(names, classes, kept, pseudo, confidence, final_logits)
    save(csv_text(selection), out / "selection.csv")
    ms_per_step = float(np.median([row["ms_per_step"] for row in rows]))
    result = {
        "method": METHOD,
        "data": title,
        "images": images,
        "scored_on": scored_on,
        "select": args.select,
        "eps": args.eps,
        "seed": args.seed,
        **report,
        "final_accuracy": rows[-1]["accuracy"],
        "ms_per_step": ms_per_step,
        "images_per_second": 1000 * args.batch_size * (1 + args.mu) / ms_per_step,
        "seconds": sum(row["seconds"] for row in rows),
        **machine_info(args),
        "command": command,
        "args": vars(args),
    }
    save(json.dumps(result, indent=1), out / "result.json")
    print_tables(result, out)
    return result


if __name__ == "__main__":
    main()
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
