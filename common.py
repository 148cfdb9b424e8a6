"""What the scripts share, and nothing else: the network, the images with their split, and FGSM."""

import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN

# -------------------------------------------------------------------------------------- The network


class Block(nn.Module):
    """bn-lrelu-conv-bn-lrelu-conv and a shortcut; the first block's takes the activated input."""

    def __init__(self, channels_in, channels_out, stride, activate_shortcut=False):
        super().__init__()
        self.activate_shortcut = activate_shortcut
        self.bn1 = nn.BatchNorm2d(channels_in, eps=1e-3)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out, eps=1e-3)
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
    Source: google-research/fixmatch, libml/models.py, with its eps of 1e-3 in batch norm. Three
    things differ: convolutions have no bias, batch norm's momentum is PyTorch's 0.1, and at stride
    2 all sides are padded (TensorFlow pads the right and the bottom alone).
    """

    def __init__(self, num_classes=10, depth=28, width=2):
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(
                f"depth must be 6n + 4 (10, 16, ...), width 1 or more: {depth}, {width}"
            )
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
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)
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


# ----------------------------------------------------------------------- The images and their split

BENCHMARKS = {  # torchvision's class, its words for training and test images, what it downloads
    "cifar10": (CIFAR10, True, False, "cifar-10-python.tar.gz"),
    "cifar100": (CIFAR100, True, False, "cifar-100-python.tar.gz"),
    "svhn": (SVHN, "train", "test", "train_32x32.mat and test_32x32.mat"),
    "stl10": (STL10, "train+unlabeled", "test", "stl10_binary.tar.gz"),
}
SHAPES = "disk,ring,square,frame,triangle,plus,bar,two bars,half disk,four dots".split(",")
# Pillow's extensions but for those that it only writes or has no decoder for
IMAGE_KINDS = set(Image.registered_extensions()) - {".pdf", ".palm", ".mpg", ".mpeg", ".h5", ".hdf"}


def load_images(data, data_dir, size=32):
    """Loads a whole data set into memory: (x_train, y_train, x_test, y_test).

    x: uint8 [N, 3, size, size] in RGB, other sizes resized; y: int64 [N], -1 where an image has no
    label (in x_train alone, after the others); all on the CPU.
    data: one of BENCHMARKS in `data_dir`, downloaded when it is missing;
          "folder"     data_dir/train/<class>/**, data_dir/test/<class>/** and, for images without a
                       label, data_dir/unlabeled/**; links to folders below these are not followed
          "synthetic"  6,000 and 1,000 drawn images of ten SHAPES, the same every time; no file
    Raises ValueError with one sentence that says what is wrong and what to do.
    """
    if data == "synthetic":
        x, y = _draw_shapes(7000)
        x_train, y_train, x_test, y_test = x[:6000], y[:6000], x[6000:], y[6000:]
    elif data == "folder":
        _, train, test, _ = _list_folder(Path(data_dir))
        x_train, y_train = _read_files(data_dir, train, size)
        x_test, y_test = _read_files(data_dir, test, size)
    elif data in BENCHMARKS:
        x_train, y_train, _ = _read_benchmark(data, data_dir, test=False)
        x_test, y_test, _ = _read_benchmark(data, data_dir, test=True)
    else:
        raise ValueError(f"unknown data {data}: choose {', '.join(BENCHMARKS)}, folder, synthetic")
    return _resize(x_train, size), y_train, _resize(x_test, size), y_test


def _resize(x, size):
    """uint8 [N, 3, H, W] -> uint8 [N, 3, size, size]."""
    if x.shape[2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bicubic", antialias=True)


def image_names(data, data_dir):
    """Returns (classes, files, left_out): the names of the labels, in their order; with "folder",
    the path below data_dir of each image of x_train; and the paths that are not read."""
    if data == "folder":
        classes, train, _, left_out = _list_folder(Path(data_dir))
        return classes, [name for name, _ in train], left_out
    if data == "synthetic":
        return SHAPES, [], []
    _, _, classes = _read_benchmark(data, data_dir, test=True)
    return classes, [], []


def _read_benchmark(data, data_dir, test):
    """Returns (x, y, classes) of torchvision's data set, which is downloaded when it is missing."""
    kind, train_word, test_word, archive = BENCHMARKS[data]
    word = test_word if test else train_word
    is_new = not Path(data_dir).exists()
    try:
        dataset = kind(data_dir, word, download=True)
    except ImportError as error:
        raise ValueError(f"--data {data}: {error}; install it, for instance with pip") from None
    except (OSError, RuntimeError) as error:
        if is_new:
            shutil.rmtree(data_dir, ignore_errors=True)
        raise ValueError(
            f"{data} is not in {data_dir} and could not be downloaded ({error}): put {archive} "
            "there, or use --data folder with your own images, or --data synthetic without a file"
        ) from None
    x = torch.from_numpy(dataset.data)
    if x.shape[3] == 3:  # CIFAR's channels come last
        x = x.permute(0, 3, 1, 2).contiguous()
    y = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    y = torch.as_tensor(y, dtype=torch.int64)
    return x, y, getattr(dataset, "classes", list("0123456789"))  # SVHN's digits have no names


def _list_folder(root):
    """Returns classes, (path below root, label) of training and test images, and paths left out."""
    shown = {part: sorted((root / part).glob("[!.]*")) for part in ("train", "test")}
    classes = {part: [path.name for path in shown[part] if path.is_dir()] for part in shown}
    for part, names in classes.items():
        if len(names) < 2:
            raise ValueError(f"{root / part} has {len(names)} class folders; it needs two or more")
    if classes["train"] != classes["test"]:
        only_one = ", ".join(sorted(set(classes["train"]) ^ set(classes["test"])))
        raise ValueError(
            f"{root}: train and test must have the same classes; only one has {only_one}"
        )
    names = classes["train"]
    folders = [(part, i, root / part / name) for part in shown for i, name in enumerate(names)]
    if os.path.lexists(root / "unlabeled"):
        folders.append(("train", -1, root / "unlabeled"))
    left_out = [f"{part}/{path.name}" for part in shown for path in shown[part] if path.is_file()]
    images = {"train": {}, "test": {}}  # by resolved path: a file that is linked twice counts once
    for part, label, folder in folders:
        count = len(images[part])
        for path in sorted(folder.rglob("*"), key=os.path.split):
            name = path.relative_to(root).as_posix()
            file = os.path.realpath(path)
            if "/." in name or (path.is_dir() and not path.is_symlink()):
                continue  # hidden, or a folder whose files come by themselves
            if path.is_dir() or path.suffix.lower() not in IMAGE_KINDS or file in images[part]:
                left_out.append(name)
            else:
                images[part][file] = name, label
        if len(images[part]) == count:
            raise ValueError(f"{folder} has no image: put some there, or take the folder out")
    return names, list(images["train"].values()), list(images["test"].values()), left_out


def _read_files(root, files, size):
    """Returns uint8 [N, 3, size, size] and int64 [N] for a list of (path below root, label)."""
    x = np.stack([_read_image(Path(root, name), size) for name, _ in files])
    y = torch.tensor([label for _, label in files])
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), y


def _read_image(path, size):
    """uint8 array [size, size, 3] in RGB; ValueError where Pillow cannot read the file as that."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would cut values off at 255
                raise ValueError("more than 8 bits a channel")
            image = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow has a dozen kinds for a damaged file
        raise ValueError(f"cannot read {path} ({error}): repair it or take it out") from None
    if image.size != (size, size):
        image = image.resize((size, size))
    return np.asarray(image)


def _draw_shapes(count):
    """SHAPES at any place, size, angle, colour: uint8 [count, 3, 32, 32], int64 [count]."""
    rng = np.random.default_rng(0)

    def draw(low, high, *shape):
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    label = rng.permuted(np.tile(np.arange(10), (count // 10, 1)), axis=1).reshape(-1)

    # u, v: each pixel in the shape's own frame, which it fills from about -1 to 1
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


def split_labeled(y, num_labeled, seed, classes=None):
    """Chooses the images whose labels training may see: (labeled_idx, unlabeled_idx).

    y: int64 [N], -1 without a label. Returns two ascending int64 tensors on the CPU, disjoint,
    together 0 .. N - 1. Each class gets num_labeled // C labels; if that leaves a remainder,
    randomly chosen classes get one more. If some images have no label, num_labeled may be the
    number of all labels: then all are taken, however uneven the classes.
    Raises ValueError, with the class's name from `classes`, when there are too few images.
    """
    y = y.cpu()
    counts = torch.bincount(y[y >= 0])
    num_classes, total = len(counts), int(counts.sum())
    most = min(total, len(y) - 1)  # an image stays unlabeled
    if num_labeled < num_classes:
        raise ValueError(f"--num-labeled {num_labeled} is too few: there are {num_classes} classes")
    if num_labeled > most:
        raise ValueError(f"--num-labeled {num_labeled} leaves no unlabeled image: {most} at most")
    generator = torch.Generator().manual_seed(seed)
    quota = torch.full((num_classes,), num_labeled // num_classes)
    quota[torch.randperm(num_classes, generator=generator)[: num_labeled % num_classes]] += 1
    quota = counts if num_labeled == total else quota
    labeled = torch.zeros(len(y), dtype=torch.bool)
    for label in range(num_classes):
        if counts[label] < quota[label]:
            name = f"class {classes[label] if classes else label} has {counts[label]} images"
            raise ValueError(f"{name}, not {quota[label]}: lower --num-labeled {num_labeled}")
        members = torch.nonzero(y == label).squeeze(1)
        labeled[members[torch.randperm(len(members), generator=generator)[: quota[label]]]] = True
    return torch.nonzero(labeled).squeeze(1), torch.nonzero(~labeled).squeeze(1)


# --------------------------------------------------------------------------------------- The attack


def fgsm(model, x, y, eps):
    """One signed-gradient step away from label y, within eps of x.

    x: float32 [N, 3, H, W] in [0, 1]; y: int64 [N]; eps: on the scale of x. Returns x_adv like x.
    The model (not a compiled one) runs in eval mode and without autocast, and comes back as it was:
    the mode of every submodule, batch-norm statistics, gradients of the parameters. The caller
    switches TF32 off (torch.backends.cudnn.allow_tf32): it could flip signs of small gradients.
    Source: PAPER, equation 3 with one step of alpha = eps from x (Algorithm 1, line 6).
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.detach().requires_grad_()
        logits = model(x)
        # Cross-entropy's gradient is 1 - p(y) times that of this margin: the same sign, but it does
        # not vanish where p(y) rounds to 1. Summed, so that images do not share a scale.
        others = logits.scatter(1, y[:, None], -torch.inf).logsumexp(dim=1)
        margin = others - logits.gather(1, y[:, None])[:, 0]
        (gradient,) = torch.autograd.grad(margin.sum(), x)
    for module, training in modes.items():
        module.training = training
    return (x.detach() + eps * gradient.sign()).clamp(0, 1)
