"""What the scripts import: the network, the images and their split, and FGSM."""

import hashlib
import json
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN

# -------------------------------------------------------------------------------------- The network


class Block(nn.Module):
    """bn-lrelu-conv-bn-lrelu-conv plus a shortcut, which may take the activated input instead."""

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
    Source: google-research/fixmatch, libml/models.py, including its batch-norm eps of 1e-3. Four
    things differ: inputs are not in [-1, 1], convolutions have no bias, batch norm's momentum is
    PyTorch's 0.1, and stride 2 pads all sides (TensorFlow's only the right and the bottom).
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

BENCHMARKS = {  # torchvision's class, what selects its training and test images, what it downloads
    "cifar10": (CIFAR10, True, False, "cifar-10-python.tar.gz"),
    "cifar100": (CIFAR100, True, False, "cifar-100-python.tar.gz"),
    "svhn": (SVHN, "train", "test", "train_32x32.mat and test_32x32.mat"),
    "stl10": (STL10, "train+unlabeled", "test", "stl10_binary.tar.gz"),
}
SHAPES = "disk,ring,square,frame,triangle,plus,bar,two bars,half disk,four dots".split(",")
# Pillow's extensions, except those that it can only write or has no decoder for
IMAGE_KINDS = set(Image.registered_extensions()) - {".pdf", ".palm", ".mpg", ".mpeg", ".h5", ".hdf"}
SYSTEM_FOLDERS = {"@eaDir", "__MACOSX", "lost+found"}  # they hold thumbnails and the like


class Images(NamedTuple):
    """A data set and its split, as load_split makes them; all tensors are on one device."""

    x: torch.Tensor  # uint8 [N, 3, size, size]: the training images
    y: torch.Tensor  # int64 [N]: their labels, -1 where there is none
    labeled: torch.Tensor  # int64, indices into x: the images whose labels training may see
    unlabeled: torch.Tensor  # int64, indices into x: the others, without those held out by val
    x_test: torch.Tensor  # uint8 [M, 3, size, size]: the test set, or the images held out
    y_test: torch.Tensor  # int64 [M]
    names: list  # of each image in x: its path below data_dir, or its number
    names_test: list
    classes: list  # the name of each label
    digest: str  # how many images the data set has, and a hash of them, their labels and names

    def to(self, device):
        """Returns the same with its tensors on the device."""
        tensors = {name: part for name, part in self._asdict().items() if torch.is_tensor(part)}
        return self._replace(**{name: tensor.to(device) for name, tensor in tensors.items()})


def load_split(data, data_dir, size=32, num_labeled=None, val=0, seed=0):
    """Loads a data set, splits it and prints what it found. Returns Images on the CPU.

    data, data_dir, size: see load_images. num_labeled, seed: see split_labeled; None means 4,000
    labels, or all those of a folder with unlabeled/. val: how many of the other training images,
    equally many of each class, to hold out and score in place of the test set.
    Raises ValueError with one sentence that says what is wrong and what to do.
    """
    print(f"Reading the images of {data} ({data_dir})", flush=True)
    (x, y, x_test, y_test), (names, names_test, classes, left_out) = _load(data, data_dir, size)
    sha = hashlib.sha256(json.dumps([classes, names, names_test]).encode())
    for tensor in (x, y, x_test, y_test):
        sha.update(tensor.numpy())
    digest = f"{len(x)} + {len(x_test)}, hash {sha.hexdigest()[:16]}"

    if num_labeled is None:
        num_labeled = 4000
        if data == "folder" and (y < 0).any():  # it has unlabeled/
            num_labeled = int((y >= 0).sum())
    labeled, unlabeled = split_labeled(y, num_labeled, seed, classes)
    scored = "test"
    if val > 0:
        scored = "validation"
        option = f"after --num-labeled {num_labeled}, --val"
        held_out, rest = split_labeled(y[unlabeled], val, seed, classes, option)
        held_out = unlabeled[held_out]
        unlabeled = unlabeled[rest]
        x_test = x[held_out]
        y_test = y[held_out]
        names_test = [names[n] for n in held_out.tolist()]
    elif len(x_test) == 0:
        raise ValueError(f"{data_dir} has no test/: use --val N to hold images out")

    print(f"{len(classes)} classes; {len(labeled):,} labeled, {len(unlabeled):,} unlabeled", end="")
    print(f" and {len(x_test):,} {scored} images")
    if left_out:
        print(f"Files left out: {len(left_out)} ({', '.join(left_out[:5])})")
    for kind, labels in {"unlabeled": y[unlabeled], scored: y_test}.items():
        present = set(labels.tolist())
        absent = [name for label, name in enumerate(classes) if label not in present]
        if absent and -1 not in present:  # an image without a label may be of any class
            print(f"Classes without {kind} images: {len(absent)} ({', '.join(absent[:5])})")
    return Images(x, y, labeled, unlabeled, x_test, y_test, names, names_test, classes, digest)


def split_labeled(y, num_labeled, seed, classes=None, option="--num-labeled"):
    """Chooses the images whose labels training may see: (labeled_idx, unlabeled_idx).

    y: int64 [N], -1 where there is no label. Returns two ascending int64 tensors on the CPU,
    disjoint, together 0 .. N - 1. Each class gets num_labeled // C labels; if that leaves a
    remainder, randomly chosen classes get one more. Where some images have no label, num_labeled
    may be the number of all labels; then all are taken, however uneven, if each class has one.
    Raises ValueError where that is impossible, naming the class (by `classes`; without them C is
    the largest label + 1) and the option that asked for the images (`option`).
    """
    y = y.cpu()
    counts = torch.bincount(y[y >= 0], minlength=len(classes or []))
    num_classes, total = len(counts), int(counts.sum())
    if num_labeled < num_classes:
        raise ValueError(f"{option} {num_labeled} is too few: there are {num_classes} classes")
    if num_labeled > total:
        raise ValueError(f"{option} {num_labeled} is too many: {total} labels are available")
    if num_labeled == len(y):
        raise ValueError(f"{option} {num_labeled} leaves no unlabeled image: {total - 1} at most")
    generator = torch.Generator().manual_seed(seed)
    quota = torch.full((num_classes,), num_labeled // num_classes)
    quota[torch.randperm(num_classes, generator=generator)[: num_labeled % num_classes]] += 1
    if num_labeled == total:
        quota = counts.clamp(min=1)
    labeled = torch.zeros(len(y), dtype=torch.bool)
    for label in range(num_classes):
        if counts[label] < quota[label]:
            name = classes[label] if classes else label
            raise ValueError(
                f"{option} {num_labeled} takes {quota[label]} of class {name}, which has "
                f"{counts[label]}: lower the number, or add images"
            )
        members = torch.nonzero(y == label).squeeze(1)
        labeled[members[torch.randperm(len(members), generator=generator)[: quota[label]]]] = True
    return torch.nonzero(labeled).squeeze(1), torch.nonzero(~labeled).squeeze(1)


def load_images(data, data_dir, size=32):
    """Loads a whole data set into memory: (x_train, y_train, x_test, y_test).

    x: uint8 [N, 3, size, size] in RGB, resized where needed; y: int64 [N], -1 where an image has no
    label (only in y_train, after the others); all on the CPU.
    data: one of BENCHMARKS    read from data_dir, downloaded if missing
          "folder"             data_dir/train/<class>/**, data_dir/test/<class>/** and, for images
                               without a label, data_dir/unlabeled/**; test may lack classes, or
                               be missing; links to folders below these are not followed;
                               transparent pixels turn white
          "synthetic"          6,000 training and 1,000 test images of ten drawn SHAPES, always the
                               same; needs no file
    Raises ValueError with one sentence that says what is wrong and what to do.
    """
    images, _ = _load(data, data_dir, size)
    return images


def _load(data, data_dir, size):
    """Returns load_images' tensors, and lists: names of train, of test, classes, files left out."""
    left_out = []
    if data == "folder":
        classes, train, test, left_out = _list_folder(Path(data_dir))
        names, x_train, y_train = _read_files(data_dir, train, size)
        names_test, x_test, y_test = _read_files(data_dir, test, size)
    elif data == "synthetic":
        x, y = _draw_shapes(7000)
        x_train, y_train, x_test, y_test = x[:6000], y[:6000], x[6000:], y[6000:]
        classes = SHAPES
    elif data in BENCHMARKS:
        x_train, y_train, classes = _read_benchmark(data, data_dir, test=False)
        x_test, y_test, _ = _read_benchmark(data, data_dir, test=True)
    else:
        raise ValueError(f"unknown data {data}: choose {', '.join(BENCHMARKS)}, folder, synthetic")
    if data != "folder":
        names = [str(n) for n in range(len(x_train))]
        names_test = [str(n) for n in range(len(x_test))]
    images = _resize(x_train, size), y_train, _resize(x_test, size), y_test
    return images, (names, names_test, classes, left_out)


def _resize(x, size):
    """uint8 [N, 3, H, W] -> uint8 [N, 3, size, size]."""
    if x.shape[2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bicubic", antialias=True)


def _read_benchmark(data, data_dir, test):
    """Returns (x, y, classes) of torchvision's data set, which is downloaded if it is missing."""
    kind, train_word, test_word, archive = BENCHMARKS[data]
    word = test_word if test else train_word
    try:
        dataset = _find_or_download(kind, data_dir, word)
    except ImportError as error:
        raise ValueError(f"--data {data}: {error}; install it, for instance with pip") from None
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{data} is not in {data_dir} and could not be downloaded ({error}): put {archive} "
            "there, or use --data folder for your own images or --data synthetic, which needs none"
        ) from None
    x = torch.from_numpy(dataset.data)
    if x.shape[3] == 3:  # CIFAR's channels come last
        x = x.permute(0, 3, 1, 2)
    x = x.contiguous()  # SVHN and STL-10 come with other strides
    y = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    y = torch.as_tensor(y, dtype=torch.int64)
    return x, y, getattr(dataset, "classes", list("0123456789"))  # SVHN's digits have no names


def _find_or_download(kind, data_dir, word):
    """Opens torchvision's data set. If it is missing, one process downloads it, others wait."""
    try:
        return kind(data_dir, word)
    except RuntimeError:  # it is missing or damaged, or another process is unpacking it
        folder = Path(data_dir).expanduser()  # as torchvision does
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "a") as file:
            _lock(file)
            return kind(data_dir, word, download=True)


def _lock(file):
    """Waits for other processes' locks on the file, then locks it, if the system has locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass


def _list_folder(root):
    """Lists a folder of images.

    Returns classes, two lists of (path below root, label) for training and testing, and the paths
    that are left out.
    """
    try:
        classes, places, left_out = _list_classes(root)
        images = {"train": {}, "test": {}}  # by resolved path, so a file linked twice counts once
        for part, label, folder in places:
            others = []
            count = len(images[part])
            for path in _files_below(folder):
                file = os.path.realpath(path)
                is_image = path.suffix.lower() in IMAGE_KINDS and not path.is_dir()
                if is_image and file not in images[part]:
                    images[part][file] = path.relative_to(root).as_posix(), label
                else:
                    others.append(path)
            if len(images[part]) == count:
                kinds = Counter(path.suffix or path.name for path in others)
                numbers = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(5))
                raise ValueError(
                    f"{folder} has no image (it has {numbers or 'nothing'}): put some there, or "
                    "remove the folder"
                )
            left_out += [path.relative_to(root).as_posix() for path in others]
    except OSError as error:
        raise ValueError(
            f"cannot read {error.filename} ({error.strerror}): it must be a readable folder"
        ) from None
    return classes, list(images["train"].values()), list(images["test"].values()), left_out


def _list_classes(root):
    """Returns classes, a list of (train or test, label, folder), and the paths left out."""
    names = {"train": [], "test": []}
    left_out = []
    for part in names:
        if not os.path.lexists(root / part):
            continue
        for entry in _visible(root / part):
            if entry.is_dir() and entry.name not in SYSTEM_FOLDERS:
                names[part].append(entry.name)
            else:
                left_out.append(f"{part}/{entry.name}")
    classes = names["train"]
    if len(classes) < 2:
        raise ValueError(f"{root / 'train'} needs two or more class folders; it has {len(classes)}")
    if os.path.lexists(root / "test") and not names["test"]:
        raise ValueError(f"{root / 'test'} has no class folder: add some of train's, or remove it")
    unknown = sorted(set(names["test"]) - set(classes))
    if unknown:
        raise ValueError(
            f"train lacks {len(unknown)} of the classes in {root / 'test'} "
            f"({', '.join(unknown[:5])}): rename them, or remove them"
        )
    places = [
        (part, classes.index(name), root / part / name) for part in names for name in names[part]
    ]
    if os.path.lexists(root / "unlabeled"):
        places.append(("train", -1, root / "unlabeled"))
    return classes, places, left_out


def _visible(folder):
    """The entries of a folder, sorted by name, without hidden ones."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        if entry.name != entry.name.encode("utf-8", "replace").decode():
            raise ValueError(f"{folder} has a name that is not UTF-8: rename {entry.name!r}")
    return [entry for entry in entries if not entry.name.startswith(".")]


def _files_below(folder):
    """Yields every file below a folder, sorted by name.

    Links to folders and SYSTEM_FOLDERS are yielded like files, not entered.
    """
    for entry in _visible(folder):
        if entry.is_dir(follow_symlinks=False) and entry.name not in SYSTEM_FOLDERS:
            yield from _files_below(entry.path)
        else:
            yield Path(entry.path)


def _read_files(root, files, size):
    """Reads images from a list of (path below root, label): (names, x, y) in its order.

    names: the paths; x: uint8 [N, 3, size, size]; y: int64 [N].
    """
    names = [name for name, _ in files]
    y = torch.tensor([label for _, label in files], dtype=torch.int64)
    x = np.empty((len(files), 3, size, size), dtype=np.uint8)

    def read(i):
        """Reads the i-th image into x; returns a sentence if that is impossible."""
        try:
            x[i] = _read_image(Path(root, names[i]), size).transpose(2, 0, 1)
        except Exception as error:  # a damaged file raises any of a dozen types
            return f"cannot read {Path(root, names[i])} ({error})"

    errors = []
    # Pillow decodes outside Python's global lock, so large files are read in parallel. Small ones
    # take their time within it, where threads would only wait for each other
    is_large = bool(files) and Path(root, names[0]).lstat().st_size > 2**14
    with ThreadPoolExecutor() as pool:
        read_all = pool.map if is_large else map
        for i, error in enumerate(read_all(read, range(len(files)))):
            if error is not None:
                errors.append(error)
            if sys.stdout.isatty() and i % 100 == 0:
                print(f"reading images: {i:,} of {len(files):,}", end="\033[K\r", flush=True)
    if errors:
        raise ValueError(
            f"damaged or unsupported images: {len(errors)} of {len(files)}; repair or remove "
            f"them: {'; '.join(errors[:5])}"
        )
    return names, torch.from_numpy(x), y


def _read_image(path, size):
    """Returns a NumPy array uint8 [size, size, 3], RGB."""
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):  # Pillow would clip their values at 255
            raise ValueError("more than 8 bits a channel")
        image = ImageOps.exif_transpose(image)
        if "A" in image.getbands() or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size))
    return np.asarray(image)


def _draw_shapes(count):
    """Draws SHAPES at random: uint8 [count, 3, 32, 32], int64 [count]."""
    rng = np.random.default_rng(0)

    def draw(low, high, *shape):
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    label = rng.permuted(np.tile(np.arange(10), (count // 10, 1)), axis=1).reshape(-1)

    # u, v: each pixel's coordinates in the shape's frame; the shape spans about -1 to 1
    row, column = np.mgrid[:32, :32].astype(np.float32)
    x, y = column - draw(12.5, 18.5, 1, 1), row - draw(12.5, 18.5, 1, 1)
    angle, size = draw(-0.35, 0.35, 1, 1), draw(8, 13, 1, 1)
    u = (np.cos(angle) * x + np.sin(angle) * y) / size
    v = (np.cos(angle) * y - np.sin(angle) * x) / size

    # each shape lies where its function is below 0
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


# --------------------------------------------------------------------------------------- The attack


def fgsm(model, x, y, eps):
    """Takes one signed-gradient step away from label y, within eps of x.

    x: float32 [N, 3, H, W] in [0, 1]; y: int64 [N]; eps: on the scale of x. Returns x_adv like x.
    The model (not a compiled one) runs in eval mode without autocast and is left as it was: the
    mode of every submodule, batch-norm statistics, gradients of the parameters. The caller must
    turn TF32 off (torch.backends.cudnn.allow_tf32): it could flip the signs of small gradients.
    Source: PAPER, equation 3 with one step of alpha = eps from x (Algorithm 1, line 6).
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.detach().requires_grad_()
        logits = model(x)
        # Cross-entropy's gradient is 1 - p(y) times that of this margin: the signs agree, but the
        # margin's does not vanish where p(y) rounds to 1. A sum, so no image scales another's.
        others = logits.scatter(1, y[:, None], -torch.inf).logsumexp(dim=1)
        margin = others - logits.gather(1, y[:, None])[:, 0]
        (gradient,) = torch.autograd.grad(margin.sum(), x)
    for module, training in modes.items():
        module.training = training
    return (x.detach() + eps * gradient.sign()).clamp(0, 1)
