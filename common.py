"""What the scripts share, and nothing else: the network, the images with their split, and FGSM.

WideResNet     Zagoruyko and Komodakis 2016, wired as in google-research/fixmatch (libml/models.py)
load_images    CIFAR-10, a folder of images, or drawn ones; split_labeled chooses the labeled ones
fgsm           Goodfellow et al. 2015, the attack of SCAR (Algorithm 1, line 6)
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.datasets import CIFAR10, ImageFolder

# --------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-activation residual block: bn-lrelu-conv-bn-lrelu-conv plus a shortcut.

    The shortcut takes the block's input as it is, through a 1x1 convolution where the number of
    channels changes. With activate_shortcut (the network's very first block) it takes the
    activated input.
    """

    def __init__(self, channels_in, channels_out, stride, activate_shortcut=False):
        super().__init__()
        self.activate_shortcut = activate_shortcut
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.shortcut = nn.Identity()
        if channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x):
        y = F.leaky_relu(self.bn1(x), 0.1)
        if self.activate_shortcut:
            x = y
        y = self.conv1(y)
        y = self.conv2(F.leaky_relu(self.bn2(y), 0.1))
        return self.shortcut(x) + y


class WideResNet(nn.Module):
    """Wide ResNet: three groups of (depth - 4) / 6 blocks with 16, 32, 64 times width channels.

    forward: float [N, 3, H, W] in [0, 1] -> logits [N, num_classes]; 1,467,610 parameters at 28-2.
    Raises ValueError for a depth that is not 6n + 4 with n >= 1, or a width below 1.
    Source: google-research/fixmatch, libml/models.py, for wiring, slope and initial weights. Two
    things differ: batch norm has PyTorch's momentum of 0.1, and convolutions pad by 1 on all sides
    (at stride 2, TensorFlow pads the right and the bottom alone).
    """

    def __init__(self, num_classes=10, depth=28, width=2):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 (10, 16, 22, 28, ...), not {depth}")
        if width < 1:
            raise ValueError(f"width must be at least 1, not {width}")
        channels = 16
        blocks = []
        for group in range(3):
            for i in range((depth - 4) // 6):
                stride = 2 if group > 0 and i == 0 else 1
                channels_out = 16 * width * 2**group
                blocks.append(Block(channels, channels_out, stride, activate_shortcut=not blocks))
                channels = channels_out
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # N(0, 2 / (k * k * out))
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.xavier_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        x = self.blocks(self.conv(x))
        x = F.leaky_relu(self.bn(x), 0.1)
        return self.linear(x.mean(dim=(2, 3)))


# --------------------------------------------------------------------------------------------------
# The images and their split
# --------------------------------------------------------------------------------------------------


def load_images(data, data_dir):
    """Loads a whole data set into memory: (x_train, y_train, x_test, y_test).

    x: uint8 [N, 3, 32, 32] in RGB; y: int64 [N]; both on the CPU.
    data: "cifar10"    torchvision's CIFAR10 in `data_dir`, downloaded when it is missing
          "folder"     data_dir/train/<class>/* and data_dir/test/<class>/*; classes in sorted
                       order, images of another size resized to 32 x 32
          "synthetic"  6,000 and 1,000 drawn images of ten shapes, the same every time; no file
    Raises ValueError with one sentence that says what is wrong and what to do.
    """
    if data == "cifar10":
        return *_load_cifar10(data_dir, train=True), *_load_cifar10(data_dir, train=False)
    if data == "folder":
        return _load_folders(Path(data_dir))
    if data == "synthetic":
        x, y = _draw_shapes(7000)
        return x[:6000], y[:6000], x[6000:], y[6000:]
    raise ValueError(f"unknown data '{data}': choose cifar10, folder or synthetic")


def _load_cifar10(data_dir, train):
    folder_is_new = not Path(data_dir).exists()
    try:
        dataset = CIFAR10(data_dir, train, download=True)
    except (OSError, RuntimeError) as error:
        if folder_is_new and Path(data_dir).exists() and not any(Path(data_dir).iterdir()):
            Path(data_dir).rmdir()
        raise ValueError(
            f"CIFAR-10 is not in {data_dir} and could not be downloaded ({error}): put "
            "cifar-10-python.tar.gz there, or use --data folder with images of your own, "
            "or --data synthetic, which needs no file"
        ) from None
    x = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return x, torch.tensor(dataset.targets)


def _load_folders(root):
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise ValueError(
                f"{root} has no folder {part}; --data folder reads train/<class>/*, test/<class>/*"
            )
    try:
        train, test = ImageFolder(root / "train"), ImageFolder(root / "test")
    except OSError as error:  # no class in it, or a class without images
        raise ValueError(f"{root}: {error}") from None
    if len(train.classes) < 2:
        raise ValueError(f"{root} has one class, {train.classes[0]}; there must be two or more")
    if train.classes != test.classes:
        names = ", ".join(sorted(set(train.classes) ^ set(test.classes)))
        raise ValueError(f"{root}: train and test must have the same classes; only one has {names}")
    return *_read_images(train.samples), *_read_images(test.samples)


def _read_images(samples):
    paths, labels = zip(*samples)
    images = np.stack([_read_image(path) for path in paths])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def _read_image(path):
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would cut its values off at 255
                raise ValueError(f"more than 8 bits a channel, mode {image.mode}")
            image = image.convert("RGB")
    except Exception as error:  # Pillow has a dozen kinds for a damaged file
        raise ValueError(f"cannot read {path} ({error}): repair it or take it out") from None
    return np.asarray(image if image.size == (32, 32) else image.resize((32, 32)))


def _draw_shapes(count):
    """Ten shapes (disk, ring, square, frame, triangle, plus, bar, two bars, half disk, four dots).

    Each has a place, size, angle, colour and contrast of its own, under noise: a small network
    takes some hundred steps to tell them apart, and stays in doubt about the faintest.
    Returns uint8 [count, 3, 32, 32] and int64 [count]; ten images in a row have all ten classes.
    """
    rng = np.random.default_rng(0)

    def draw(low, high, *shape):
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    label = rng.permuted(np.tile(np.arange(10), (count // 10, 1)), axis=1).reshape(-1)

    # u, v: each pixel in the shape's own frame, where the shape fills about [-1, 1] x [-1, 1]
    row, column = np.mgrid[:32, :32].astype(np.float32)
    x, y = column - draw(12.5, 18.5, 1, 1), row - draw(12.5, 18.5, 1, 1)
    angle, size = draw(-0.35, 0.35, 1, 1), draw(8, 13, 1, 1)
    u = (np.cos(angle) * x + np.sin(angle) * y) / size
    v = (np.cos(angle) * y - np.sin(angle) * x) / size

    # each shape is where its function is below 0
    radius, box = np.hypot(u, v), np.maximum(abs(u), abs(v))
    bar = np.maximum(abs(u) - 1, abs(v) - 0.35)
    upright = np.maximum(abs(v) - 1, abs(u) - 0.35)
    functions = [
        radius - 1,
        abs(radius - 0.75) - 0.25,
        box - 0.85,
        abs(box - 0.7) - 0.2,
        np.maximum(v - 0.7, 2 * abs(u) - v - 1.2),
        np.minimum(bar, upright),
        bar,
        np.maximum(abs(u) - 1, abs(abs(v) - 0.6) - 0.25),
        np.maximum(radius - 1, v),
        np.hypot(abs(u) - 0.55, abs(v) - 0.55) - 0.35,
    ]
    inside = np.choose(label[:, None, None], functions) * size
    cover = np.clip(0.5 - inside, 0, 1)[:, None]  # soft edges, one pixel wide

    background = draw(40, 120, 3, 1, 1) + draw(-1.5, 1.5, 3, 1, 1) * (row - 16)
    background = background + draw(-1.5, 1.5, 3, 1, 1) * (column - 16)
    brighter = draw(0.5, 1, 3, 1, 1) * draw(15, 120, 1, 1, 1)
    noise = 12 * rng.standard_normal((count, 3, 32, 32), dtype=np.float32)
    images = np.clip(background + cover * brighter + noise, 0, 255).astype(np.uint8)
    return torch.from_numpy(images), torch.from_numpy(label)


def split_labeled(y, num_labeled, seed):
    """Chooses the images whose labels training may see: (labeled_idx, unlabeled_idx).

    y: int64 [N], class labels. Returns two ascending int64 tensors on the CPU, disjoint, together
    0 .. N - 1. Each class gets num_labeled // C labels; of a remainder, classes drawn at random get
    one more each. Raises ValueError when a class has too few images or no image stays unlabeled.
    """
    y = y.cpu()
    counts = torch.bincount(y)
    num_classes = len(counts)
    if num_labeled < num_classes:
        raise ValueError(f"{num_labeled} labels are too few: there are {num_classes} classes")
    if num_labeled >= len(y):
        raise ValueError(f"{num_labeled} of {len(y)} labels leave no unlabeled image")
    generator = torch.Generator().manual_seed(seed)
    quota = torch.full((num_classes,), num_labeled // num_classes)
    quota[torch.randperm(num_classes, generator=generator)[: num_labeled % num_classes]] += 1
    labeled = torch.zeros(len(y), dtype=torch.bool)
    for label in range(num_classes):
        if counts[label] < quota[label]:
            raise ValueError(
                f"class {label} has {counts[label]} images, fewer than its {quota[label]} of "
                f"{num_labeled} labels: ask for fewer labels"
            )
        members = torch.nonzero(y == label).squeeze(1)
        labeled[members[torch.randperm(len(members), generator=generator)[: quota[label]]]] = True
    return torch.nonzero(labeled).squeeze(1), torch.nonzero(~labeled).squeeze(1)


# --------------------------------------------------------------------------------------------------
# The attack
# --------------------------------------------------------------------------------------------------


def fgsm(model, x, y, eps):
    """One signed-gradient step away from label y, within eps of x.

    x_adv = clip(x + eps * sign(gradient of cross_entropy(model(x), y) with respect to x), 0, 1)
    x: float32 [N, 3, H, W] in [0, 1]; y: int64 [N]; eps: on the scale of x. Returns x_adv like x.
    The model (not a compiled one) runs in eval mode, in float32 without TF32 or autocast, and comes
    back as it was: the mode of every submodule, batch-norm statistics, parameters' gradients.
    Source: PAPER, equation 3 with one step of alpha = eps from x (Algorithm 1, line 6).
    """
    modes = [(module, module.training) for module in model.modules()]
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    precisions = [backend.fp32_precision for backend in backends]
    try:
        model.eval()
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            x = x.detach().requires_grad_()
            logits = model(x)
            # Cross-entropy's gradient is 1 - p(y) times that of this margin: the same sign, but it
            # does not vanish where p(y) rounds to 1. Summed, so that images do not share a scale.
            others = logits.scatter(1, y[:, None], -torch.inf).logsumexp(dim=1)
            margin = others - logits.gather(1, y[:, None]).squeeze(1)
            (gradient,) = torch.autograd.grad(margin.sum(), x)
    finally:
        for module, training in modes:
            module.training = training
        for backend, precision in zip(backends, precisions):
            backend.fp32_precision = precision
    return (x.detach() + eps * gradient.sign()).clamp(0, 1)
