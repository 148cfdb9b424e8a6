"""The tests: no network, no GPU; those for CUDA skip themselves where there is none."""

import ast
import csv
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

import common
import fixmatch_scar
from common import WideResNet, fgsm, load_images, split_labeled
from fixmatch_scar import (
    RANDAUGMENT_OPS,
    fixmatch_loss,
    randaugment_op,
)

SCRIPTS = [fixmatch_scar]
SMALL = (
    "--data synthetic --depth 10 --width 1 --num-labeled 100 --batch-size 8 --mu 2 --epochs 2 "
    "--steps-per-epoch 4"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(scope="session")
def images():
    """The synthetic set: (x_train, y_train, x_test, y_test)."""
    return load_images("synthetic", None)


@pytest.fixture
def few_images(images, monkeypatch):
    """Makes the scripts see 600 training and 200 test images of the synthetic set, for speed."""
    x_train, y_train, x_test, y_test = images
    few = x_train[:600], y_train[:600], x_test[:200], y_test[:200]
    for script in SCRIPTS:
        monkeypatch.setattr(script, "load_images", lambda data, data_dir: few)
    return few


def plain_net():
    """A small network without batch norm, so that images do not influence each other."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 15 * 15, 10)
    )


# ------------------------------------------------------------------------------------------ network


def test_parameter_count():
    assert sum(p.numel() for p in WideResNet(10, 28, 2).parameters()) == 1_467_610


def plain_wide_resnet(weights, x, depth, training):
    """The network once more, straight from its description, on a state_dict."""

    def bn_lrelu(x, name):
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        x = x * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]
        return torch.where(x > 0, x, 0.1 * x)

    x = F.conv2d(x, weights["conv.weight"], padding=1)
    per_group = (depth - 4) // 6
    for i in range(3 * per_group):
        stride = 2 if i in (per_group, 2 * per_group) else 1
        y = bn_lrelu(x, f"blocks.{i}.bn1")
        residual = y if i == 0 else x
        if f"blocks.{i}.shortcut.weight" in weights:
            residual = F.conv2d(residual, weights[f"blocks.{i}.shortcut.weight"], stride=stride)
        y = F.conv2d(y, weights[f"blocks.{i}.conv1.weight"], stride=stride, padding=1)
        y = F.conv2d(bn_lrelu(y, f"blocks.{i}.bn2"), weights[f"blocks.{i}.conv2.weight"], padding=1)
        x = residual + y
    x = bn_lrelu(x, "bn").mean((2, 3))
    return x @ weights["linear.weight"].T + weights["linear.bias"]


@pytest.mark.parametrize("depth, width", [(10, 1), (16, 2)])
@pytest.mark.parametrize("training", [False, True])
def test_wiring(depth, width, training):
    torch.manual_seed(0)
    model = WideResNet(7, depth, width).double()
    for module in model.modules():  # statistics and scales unlike their initial ones
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.rand(5, 3, 32, 32, dtype=torch.double)
    expected = plain_wide_resnet(weights, x, depth, training)
    torch.testing.assert_close(model.train(training)(x), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_gradients_reach_every_parameter(images, precision):
    """Also under autocast, which hands weights on from a forward to the next."""
    torch.manual_seed(0)
    model = WideResNet(10, 10, 1)
    args = fixmatch_scar.parse_args(["--precision", precision, "--threshold", "0.01"])
    x, y = images[0][:8], images[1][:8]
    loss, _ = fixmatch_scar.batch_loss(model, x, y, x, 1.0, args)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_initial_weights():
    torch.manual_seed(0)
    model = WideResNet(10, 28, 2)
    weight = model.blocks[-1].conv2.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)
    assert model.linear.weight.std().item() == pytest.approx(math.sqrt(2 / (128 + 10)), rel=0.1)
    assert not model.linear.bias.any()


@pytest.mark.parametrize("depth", [4, 9, 11, 27])
def test_depth_must_be_6n_plus_4(depth):
    with pytest.raises(ValueError, match="6n \\+ 4"):
        WideResNet(10, depth, 1)


# ----------------------------------------------------------------------------------- data and split


def test_synthetic_images(images):
    x_train, y_train, x_test, y_test = images
    assert x_train.shape == (6000, 3, 32, 32) and x_test.shape == (1000, 3, 32, 32)
    assert x_train.dtype == torch.uint8 and y_train.dtype == torch.int64
    assert torch.bincount(y_train).tolist() == [600] * 10
    assert torch.bincount(y_test).tolist() == [100] * 10
    assert torch.equal(load_images("synthetic", "nowhere")[0], x_train)


def write_folder(root, classes=("ant", "bee")):
    for part in ("train", "test"):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(3):
                pixels = np.full((32, 32, 3), 60 * label + 10 * i, np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def test_folder_images(tmp_path):
    root = write_folder(tmp_path)
    Image.new("L", (50, 40), 200).save(root / "test" / "bee" / "9.jpg")  # grey, another size
    x_train, y_train, x_test, y_test = load_images("folder", root)
    assert y_train.tolist() == [0, 0, 0, 1, 1, 1] and y_test.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert x_train[:, 1, 7, 9].tolist() == [0, 10, 20, 60, 70, 80]
    assert x_test.shape == (7, 3, 32, 32) and (x_test[-1].int() - 200).abs().max() <= 1


def test_cifar10_archive(tmp_path, monkeypatch):
    """load_images hands on what torchvision's CIFAR10 holds, channels first."""

    class FakeCifar10:
        def __init__(self, root, train, download):
            self.data = np.arange(2 * 32 * 32 * 3).reshape(2, 32, 32, 3).astype(np.uint8)
            self.targets = [3, 5] if train else [7, 1]

    monkeypatch.setattr(common, "CIFAR10", FakeCifar10)
    x_train, y_train, _, y_test = load_images("cifar10", tmp_path)
    assert y_train.tolist() == [3, 5] and y_test.tolist() == [7, 1]
    assert torch.equal(
        x_train[1, 2], torch.from_numpy(FakeCifar10("", True, True).data[1, :, :, 2])
    )


def test_split_is_balanced_disjoint_and_complete():
    y = torch.arange(10).repeat(50)
    labeled, unlabeled = split_labeled(y, 43, 0)
    assert sorted(torch.cat([labeled, unlabeled]).tolist()) == list(range(500))
    assert len(labeled) == 43 and sorted(torch.bincount(y[labeled]).tolist()) == [4] * 7 + [5] * 3
    assert torch.equal(labeled, split_labeled(y, 43, 0)[0])
    assert not torch.equal(labeled, split_labeled(y, 43, 1)[0])


@pytest.mark.parametrize(
    "num_labeled, sentence", [(2, "too few"), (12, "class 2 has 2 images"), (22, "no unlabeled")]
)
def test_split_refuses(num_labeled, sentence):
    y = torch.tensor([0] * 10 + [1] * 10 + [2] * 2)
    with pytest.raises(ValueError, match=sentence):
        split_labeled(y, num_labeled, 0)


# --------------------------------------------------------------------------------------------- FGSM


def test_fgsm_is_its_formula():
    model = plain_net()
    x, y, eps = torch.rand(6, 3, 32, 32), torch.arange(6), 0.02
    expected = []
    for image, label in zip(x, y):
        image = image[None].clone().requires_grad_()
        F.cross_entropy(model(image), label[None]).backward()
        expected.append((image + eps * image.grad.sign()).clamp(0, 1).detach())
    for parameter in model.parameters():
        parameter.grad = None
    attacked = fgsm(model, x, y, eps)
    # a gradient component can be so near zero that its sign is a matter of rounding
    assert (attacked != torch.cat(expected)).float().mean() < 1e-3
    assert (attacked - x).abs().max() <= eps + 1e-6 and attacked.min() >= 0 and attacked.max() <= 1
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not attacked.requires_grad


def test_fgsm_moves_images_of_a_very_confident_model():
    class Confident(nn.Module):
        def forward(self, x):
            score = 1e3 * (x.mean((1, 2, 3)) - 0.4)  # margin 200: float32 softmax is exactly 1
            return torch.stack([score, -score], 1)

    x = torch.full((2, 3, 32, 32), 0.5)
    attacked = fgsm(Confident(), x, torch.tensor([0, 0]), 0.1)
    torch.testing.assert_close(attacked, torch.full_like(x, 0.4))


def test_fgsm_computes_in_full_precision():
    """Whatever the caller does: autocast around it, TF32 allowed."""

    class Witness(nn.Conv2d):
        def forward(self, x):
            backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
            seen.append([backend.fp32_precision for backend in backends])
            return super().forward(x).mean((2, 3))

    torch.manual_seed(0)
    seen, model, x, y = [], Witness(3, 10, 3), torch.rand(4, 3, 8, 8), torch.arange(4)
    expected = fgsm(model, x, y, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        attacked = fgsm(model, x, y, 0.1)
    assert attacked.dtype == torch.float32 and torch.equal(attacked, expected)
    assert seen == [["ieee", "ieee"]] * 2


def test_fgsm_leaves_the_model_as_it_was():
    model = WideResNet(10, 10, 1).train()
    model.blocks[1].eval()  # a frozen block
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    precision = torch.backends.cudnn.conv.fp32_precision
    with torch.no_grad():
        fgsm(model, torch.rand(2, 3, 32, 32), torch.tensor([1, 2]), 0.1)
    with pytest.raises(RuntimeError):
        fgsm(model, torch.rand(2, 4, 32, 32), torch.tensor([1, 2]), 0.1)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.backends.cudnn.conv.fp32_precision == precision


# ------------------------------------------------------------------------------------- augmentation


def pillow_op(image, name, value):
    """The reference: RandAugment's operations by Pillow alone."""
    width, height = image.size

    def affine(*coefficients):
        return image.transform(image.size, Image.Transform.AFFINE, coefficients)

    operations = {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Brightness": lambda: ImageEnhance.Brightness(image).enhance(value),
        "Color": lambda: ImageEnhance.Color(image).enhance(value),
        "Contrast": lambda: ImageEnhance.Contrast(image).enhance(value),
        "Equalize": lambda: ImageOps.equalize(image),
        "Identity": lambda: image,
        "Posterize": lambda: ImageOps.posterize(image, int(value)),
        "Rotate": lambda: image.rotate(value),
        "Sharpness": lambda: ImageEnhance.Sharpness(image).enhance(value),
        "ShearX": lambda: affine(1, value, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, value, 1, 0),
        "Solarize": lambda: ImageOps.solarize(image, 256 * value),
        "TranslateX": lambda: affine(1, 0, value * width, 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, value * height),
    }
    return operations[name]()


@pytest.fixture(scope="module")
def varied_images(images):
    """Images of different contrast, smoothness and range, some of one colour."""
    x = images[0][:240].clone()
    x[40:80] = F.avg_pool2d(x[40:80].float(), 5, 1, 2).to(torch.uint8)  # smooth
    x[80:120] = x[80:120] // 8 + 90  # faint
    x[120:160] = x[120:160] // 64 * 85  # four levels, from 0 to 255
    x[160:170] = torch.arange(30).view(10, 3, 1, 1) * 8  # one colour
    return x


@pytest.mark.parametrize("index", range(14), ids=[name for name, _, _ in RANDAUGMENT_OPS])
def test_randaugment_is_pillows(varied_images, index):
    x = varied_images
    name, low, high = RANDAUGMENT_OPS[index]
    level = torch.rand(len(x), generator=torch.Generator().manual_seed(index))
    level[:2] = torch.tensor([0.0, 1.0])
    ours = randaugment_op(x, torch.full((len(x),), index), level).permute(0, 2, 3, 1).int()
    assert ours.shape == (len(x), 32, 32, 3)
    pillows = []
    for image, value in zip(
        x.permute(0, 2, 3, 1).numpy(), (low + (high - low) * level.double()).tolist()
    ):
        pillows.append(np.asarray(pillow_op(Image.fromarray(image), name, value)))
    difference = (ours - torch.from_numpy(np.stack(pillows)).int()).abs()
    pixels_off = (difference.amax(3) > 0).float().mean().item()
    if name.startswith(("Rotate", "Shear", "Translate")):
        assert pixels_off <= 0.01
    else:
        assert difference.max() <= 1 and pixels_off <= 0.001
    if name != "Identity":
        assert (ours != x.permute(0, 2, 3, 1)).any()


def test_randaugment_mixes_operations_in_a_batch(varied_images):
    """An image gets its own operation, whatever the others get."""
    x = varied_images[:140]
    op, level = torch.arange(140) % 14, torch.linspace(0, 1, 140)
    together = randaugment_op(x, op, level)
    alone = [randaugment_op(x[i : i + 1], op[i : i + 1], level[i : i + 1]) for i in range(140)]
    assert torch.equal(together, torch.cat(alone))


def test_randaugment_ops_are_table_12():
    assert [name for name, _, _ in RANDAUGMENT_OPS] == (
        "AutoContrast Brightness Color Contrast Equalize Identity Posterize Rotate Sharpness "
        "ShearX ShearY Solarize TranslateX TranslateY"
    ).split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_weak_augment_flips_and_moves(script):
    """Every output is one of the 2 * 9 * 9 crops of the reflected image; all of them occur."""
    image = torch.arange(3 * 32 * 32).view(3, 32, 32).remainder(251).to(torch.uint8)
    padded = F.pad(image.float()[None], (4, 4, 4, 4), mode="reflect")[0].to(torch.uint8)
    crops = {}
    for flip in (False, True):
        for i in range(9):
            for j in range(9):
                crop = padded[:, i : i + 32, j : j + 32]
                crops[(crop.flip(2) if flip else crop).numpy().tobytes()] = (flip, i, j)
    torch.manual_seed(0)
    outputs = script.weak_augment(image.expand(4000, 3, 32, 32))
    seen = [crops[output.numpy().tobytes()] for output in outputs]
    assert len(set(seen)) == 162
    assert 0.45 < np.mean([flip for flip, _, _ in seen]) < 0.55


def test_strong_augment_cuts_a_square_out(images, monkeypatch):
    monkeypatch.setattr(fixmatch_scar, "randaugment_op", lambda x, op, level: x)
    x = images[0][:500] // 2 + 128  # so that 127 is the square's alone
    torch.manual_seed(0)
    weak = fixmatch_scar.weak_augment(x)
    torch.manual_seed(0)
    cut = fixmatch_scar.strong_augment(x)
    hit = (cut == 127).all(1)
    assert torch.equal(torch.where(hit[:, None], weak, cut), weak)
    rows, columns = hit.any(2).sum(1), hit.any(1).sum(1)
    assert torch.equal(hit.sum((1, 2)), rows * columns)  # a rectangle
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(8, 17))


def test_strong_augment_draws_for_each_image(images):
    x = images[0][:1].expand(400, 3, 32, 32)
    torch.manual_seed(0)
    views = fixmatch_scar.strong_augment(x)
    assert views.dtype == torch.uint8 and views.shape == x.shape
    assert len({view.numpy().tobytes() for view in views}) > 390


# ---------------------------------------------------------------------------------- FixMatch's loss


def test_fixmatch_loss_and_gradient_sample_by_sample():
    model = plain_net()
    with torch.no_grad():
        model[3].weight *= 25  # confident on some images, not on others
    torch.manual_seed(2)
    x_l, y_l = torch.rand(4, 3, 32, 32), torch.tensor([3, 1, 4, 1])
    x_weak, x_strong = torch.rand(12, 3, 32, 32), torch.rand(12, 3, 32, 32)
    threshold, lambda_u = 0.7, 0.6

    labeled = [-torch.log_softmax(model(x[None])[0], 0)[y] for x, y in zip(x_l, y_l)]
    unlabeled, counted = [], 0
    for weak, strong in zip(x_weak, x_strong):
        prob = torch.softmax(model(weak[None])[0], 0).detach()
        if prob.max() >= threshold:
            counted += 1
            unlabeled.append(-torch.log_softmax(model(strong[None])[0], 0)[prob.argmax()])
    assert 0 < counted < 12
    expected = sum(labeled) / 4 + lambda_u * sum(unlabeled) / 12
    expected_gradient = torch.autograd.grad(expected, list(model.parameters()))

    loss, metrics = fixmatch_loss(model, x_l, y_l, x_weak, x_strong, threshold, lambda_u)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    assert metrics["mask_rate"].item() == pytest.approx(counted / 12)
    torch.testing.assert_close(
        metrics["loss_labeled"] + lambda_u * metrics["loss_unlabeled"], loss.detach()
    )
    assert not any(metric.requires_grad for metric in metrics.values())


def test_fixmatch_mask_includes_the_threshold():
    class Undecided(nn.Module):  # two equal logits: a confidence of exactly 1/2
        def forward(self, x):
            return torch.zeros(len(x), 2)

    x = torch.zeros(4, 3, 8, 8)
    for threshold, rate in ((0.5, 1.0), (0.51, 0.0)):
        _, metrics = fixmatch_loss(Undecided(), x, torch.zeros(4).long(), x, x, threshold, 1.0)
        assert metrics["mask_rate"] == rate


def test_batch_loss_hands_each_view_to_its_place(monkeypatch):
    seen = {}

    def spy(model, x_l, y_l, x_weak, x_strong, threshold, lambda_u):
        seen.update(x_l=x_l, y_l=y_l, weak=x_weak, strong=x_strong, t=threshold, u=lambda_u)

    monkeypatch.setattr(fixmatch_scar, "fixmatch_loss", spy)
    monkeypatch.setattr(fixmatch_scar, "weak_augment", lambda x: x + 1)
    monkeypatch.setattr(fixmatch_scar, "strong_augment", lambda x: x + 2)
    args = fixmatch_scar.parse_args(["--threshold", "0.8"])
    x_l = torch.full((2, 3, 4, 4), 10, dtype=torch.uint8)
    x_u = torch.full((6, 3, 4, 4), 20, dtype=torch.uint8)
    fixmatch_scar.batch_loss(None, x_l, torch.tensor([3, 4]), x_u, 0.3, args)
    shapes = {
        name: (len(seen[name]), round(255 * seen[name].mean().item(), 3))
        for name in ("x_l", "weak", "strong")
    }
    assert shapes == {"x_l": (2, 11), "weak": (6, 21), "strong": (6, 22)}
    assert seen["y_l"].tolist() == [3, 4] and (seen["t"], seen["u"]) == (0.8, 0.3)


def test_fixmatch_schedule_optimizer_and_average():
    args = fixmatch_scar.parse_args([])
    lr = [fixmatch_scar.schedule(step, 100, "pretrain", args)[0] for step in (0, 50, 99)]
    assert lr == pytest.approx([0.03 * math.cos(7 * math.pi * k / 1600) for k in (0, 50, 99)])
    model, average = WideResNet(10, 10, 1), WideResNet(10, 10, 1)
    decayed = [
        p
        for g in fixmatch_scar.make_optimizer(model, args).param_groups
        if g["weight_decay"]
        for p in g["params"]
    ]
    modules = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert {id(p) for p in decayed} == {id(m.weight) for m in modules}
    model.bn.running_mean += 1
    model.bn.num_batches_tracked += 7
    before = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    fixmatch_scar.update_average(average, model, 0.9)
    for name, tensor in average.state_dict().items():
        theirs = model.state_dict()[name]
        torch.testing.assert_close(
            tensor, 0.9 * before[name] + 0.1 * theirs if tensor.is_floating_point() else theirs
        )


def test_training_step_by_hand():
    """Two steps of SGD with Nesterov momentum and decay on one weight matrix, and their average."""
    args = fixmatch_scar.parse_args(["--epochs", "1", "--steps-per-epoch", "4", "--lr", "0.1"])
    model, average = nn.Linear(3, 2), nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in (*model.parameters(), *average.parameters()):
            parameter.fill_(1.0)
    run = SimpleNamespace(
        model=model,
        average=average,
        optimizer=fixmatch_scar.make_optimizer(model, args),
        # gradient 2 everywhere
        batch_loss=lambda model, *_: (2 * sum(p.sum() for p in model.parameters()), {"rate": 3}),
    )
    weight, bias, momenta, averaged = 1.0, 1.0, [0.0, 0.0], [1.0, 1.0]
    for step in range(2):
        metrics = fixmatch_scar.training_step(run, None, None, None, step, "pretrain", args)
        assert metrics["loss"].item() == pytest.approx(2 * (6 * weight + 2 * bias))
        assert metrics["rate"] == 3 and not metrics["loss"].requires_grad
        lr = 0.1 * math.cos(7 * math.pi * step / (16 * 4))
        gradients = [2 + 5e-4 * weight, 2.0]
        momenta = [0.9 * m + g for m, g in zip(momenta, gradients)]
        weight -= lr * (gradients[0] + 0.9 * momenta[0])
        bias -= lr * (gradients[1] + 0.9 * momenta[1])
        decay = (1 + step) / (10 + step)
        averaged = [decay * a + (1 - decay) * b for a, b in zip(averaged, (weight, bias))]
    for module, expected in ((model, (weight, bias)), (average, averaged)):
        torch.testing.assert_close(module.weight, torch.full((2, 3), expected[0]))
        torch.testing.assert_close(module.bias, torch.full((2,), expected[1]))


# --------------------------------------------------------------------------------- SCAR's selection


class Brightness(nn.Module):
    """Class 1 above a mean of 0.5, else class 0; no parameters. FGSM flips what is within eps."""

    def forward(self, x):
        score = 100 * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-score, score], 1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_select_clean_on_a_known_model(script):
    grey = torch.arange(20, 240, dtype=torch.uint8)
    x = grey.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    keep, pseudo = script.select_clean(Brightness(), x, 10 / 255)
    assert pseudo.tolist() == (grey > 127).long().tolist()
    assert keep.tolist() == ((grey.float() - 127.5).abs() > 10).tolist()
    assert script.select_clean(Brightness(), x, 0.0)[0].all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_selection_goes_in_chunks_and_leaves_the_model_alone(script):
    x = torch.randint(0, 256, (4100, 3, 8, 8), dtype=torch.uint8)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)
    ).train()
    keep, pseudo = script.select_clean(model, x, 0.01)
    assert all(module.training for module in model.modules())
    assert (
        keep.shape == pseudo.shape == (4100,)
        and keep.dtype == torch.bool
        and pseudo.dtype == torch.int64
    )
    part_keep, part_pseudo = script.select_clean(model, x[3990:4010], 0.01)
    assert torch.equal(keep[3990:4010], part_keep) and torch.equal(pseudo[3990:4010], part_pseudo)
    assert script.evaluate(model, x, pseudo) == 100.0


@pytest.mark.parametrize("script", SCRIPTS)
def test_select_confident_takes_the_surest(script):
    grey = torch.tensor(
        [0, 130, 255, 120, 60, 250]
    )  # in float32 the ends have the same confidence, 1
    x = grey.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    for count, expected in ((0, []), (2, [0, 2]), (3, [0, 2, 5]), (6, range(6))):
        keep = script.select_confident(Brightness(), x, count)
        assert torch.nonzero(keep).squeeze(1).tolist() == list(expected)


# Rows of Table 2: kept correct, kept, rejected wrong, rejected, and the percentages as printed. Two
# do not add up in the paper and are left out: MixMatch (6124 + 3879 is not 10,000), and VAT at
# eps 4 (its specificity, 1396/5205, is 26.82 and not 26.81).
PAPER_COUNTS = [
    (7587, 8227, 835, 1773, 92.22, 47.10),
    (6543, 6833, 1185, 3167, 95.76, 37.42),
    (5494, 5636, 1333, 4364, 97.48, 30.55),
    (3684, 3724, 1435, 6276, 98.93, 22.86),
    (6385, 6411, 561, 3589, 99.59, 15.63),
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "kept_correct, kept, rejected_wrong, rejected, sensitivity, specificity", PAPER_COUNTS
)
def test_equations_5_and_6(
    script, kept_correct, kept, rejected_wrong, rejected, sensitivity, specificity
):
    keep = torch.arange(kept + rejected) < kept
    correct = torch.ones(kept + rejected, dtype=torch.bool)
    correct[kept_correct:kept] = False
    correct[kept : kept + rejected_wrong] = False
    y = torch.arange(kept + rejected) % 10
    stats = script.selection_stats(keep, torch.where(correct, y, (y + 1) % 10), y)
    # the paper cuts or rounds the second digit
    assert stats["sensitivity"] == pytest.approx(sensitivity, abs=0.01)
    assert stats["specificity"] == pytest.approx(specificity, abs=0.01)
    counts = [stats[name] for name in ("kept_correct", "kept", "rejected_wrong", "rejected")]
    assert counts == [kept_correct, kept, rejected_wrong, rejected]
    assert stats["kept_correct"] + stats["rejected"] - stats["rejected_wrong"] == int(correct.sum())


@pytest.mark.parametrize("script", SCRIPTS)
def test_selection_stats_of_nothing(script):
    stats = script.selection_stats(
        torch.zeros(3, dtype=torch.bool), torch.zeros(3).long(), torch.zeros(3).long()
    )
    assert math.isnan(stats["sensitivity"]) and stats["specificity"] == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_draw_batches_takes_each_image_once_a_pass(script):
    pool = torch.arange(100, 120)
    batches = script.draw_batches(pool, 7, 6, torch.Generator().manual_seed(0))
    assert batches.shape == (7, 6)
    flat = batches.flatten().tolist()
    assert sorted(flat[:20]) == sorted(flat[20:40]) == pool.tolist() and flat[:20] != flat[20:40]


# ------------------------------------------------------------------------------------ the whole run


def interrupt_at(monkeypatch, script, function, call):
    """Makes the n-th call of one of the script's functions end as Ctrl-C would."""
    original, calls = getattr(script, function), []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(script, function, interrupted)


def read_rows(out):
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("script", SCRIPTS)
def test_resumed_run_is_the_uninterrupted_one(script, few_images, tmp_path, monkeypatch, capsys):
    """Stopped in pretraining, in the selection, in fine-tuning, it ends with the same weights."""
    one_go = script.main([*SMALL.split(), "--out", str(tmp_path / "one_go")])
    command = [*SMALL.split(), "--out", str(tmp_path / "in_pieces")]
    for function, call in (("training_step", 6), ("select_clean", 1), ("training_step", 7)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            interrupt_at(patch, script, function, call)
            script.main(command)
        assert stopped.value.code == 130
        assert not (tmp_path / "in_pieces" / "result.json").exists()
    capsys.readouterr()
    in_pieces = script.main(command)
    assert "going on after finetune epoch 1" in capsys.readouterr().out

    for name in ("pretrain.pt", "model.pt"):
        first, second = (
            torch.load(tmp_path / run / name, weights_only=True) for run in ("one_go", "in_pieces")
        )
        assert all(torch.equal(first[key], second[key]) for key in first | second)
    timing = {"ms_per_step", "images_per_second", "seconds", "command", "args"}
    assert {k: v for k, v in one_go.items() if k not in timing} == {
        k: v for k, v in in_pieces.items() if k not in timing
    }
    timing = {"ms_per_step", "seconds"}
    first, second = (
        [{k: v for k, v in row.items() if k not in timing} for row in read_rows(tmp_path / run)]
        for run in ("one_go", "in_pieces")
    )
    assert first == second
    assert [(row["phase"], row["epoch"]) for row in first] == [
        ("pretrain", "1"),
        ("pretrain", "2"),
        ("finetune", "1"),
        ("finetune", "2"),
    ]

    # the schedule starts again with fine-tuning; the row has the rate of the epoch's last step
    expected = [0.03 * math.cos(7 * math.pi * step / (16 * 8)) for step in (3, 7, 3, 7)]
    assert [float(row["lr"]) for row in first] == pytest.approx(expected)

    # a finished run shows its result and trains no more
    interrupt_at(monkeypatch, script, "training_step", 1)
    assert script.main(command) == in_pieces
    assert "Table 1" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_fine_tunings_from_one_pretraining_differ_in_the_selection_alone(
    script, few_images, tmp_path, monkeypatch
):
    unlabeled_batches, at_start = {}, {}
    original = script.training_step

    def spy(run, x_l, y_l, x_u, step, phase, args):
        key = args.select, args.eps, phase
        unlabeled_batches.setdefault(key, []).append((x_u, torch.get_rng_state()))
        if key not in at_start:
            weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
            average = {name: tensor.clone() for name, tensor in run.average.state_dict().items()}
            momentum = len(run.optimizer.state)
            at_start[key] = step, run.labels.clone(), weights, average, momentum
        assert (y_l >= 0).all()
        return original(run, x_l, y_l, x_u, step, phase, args)

    monkeypatch.setattr(script, "training_step", spy)
    results = {}
    for select, eps in (("fgsm", 2.0), ("none", 2.0), ("confidence", 2.0), ("fgsm", 0.0)):
        out = tmp_path / f"{select}{eps:g}"
        options = ["--select", select, "--eps", str(eps), "--table2-eps", "1", "--out", str(out)]
        if results:
            options += ["--pretrained", str(tmp_path / "fgsm2" / "pretrain.pt")]
        results[select, eps] = script.main([*SMALL.split(), *options])
    first = results["fgsm", 2.0]
    assert len({result["pretrain_accuracy"] for result in results.values()}) == 1
    assert 0 < first["selection"]["kept"] < 500
    assert results["none", 2.0]["selection"]["kept"] == 0
    assert results["confidence", 2.0]["selection"]["kept"] == first["selection"]["kept"]
    assert results["fgsm", 0.0]["selection"]["kept"] == first["selection"]["unlabeled"] == 500
    assert [row["eps"] for row in first["table2"]] == [1.0, 2.0]
    for batches in (unlabeled_batches[select, eps, "finetune"] for select, eps in results):
        for (x_u, state), (x_first, state_first) in zip(
            batches, unlabeled_batches["fgsm", 2.0, "finetune"], strict=True
        ):
            assert torch.equal(x_u, x_first) and torch.equal(state, state_first)

    # each starts from theta~, with a new optimizer, knowing the true labels and those of the kept
    theta = WideResNet(10, 10, 1)
    theta_weights = torch.load(tmp_path / "fgsm2" / "pretrain.pt", weights_only=True)
    theta.load_state_dict(theta_weights)
    x, y = few_images[:2]
    labeled, pool = split_labeled(y, 100, 0)
    for select, eps in results:
        keep, pseudo = script.select_clean(theta, x[pool], eps / 255)
        if select == "none":
            keep[:] = False
        if select == "confidence":
            keep = script.select_confident(theta, x[pool], int(keep.sum()))
        known = torch.full_like(y, -1)
        known[labeled], known[pool[keep]] = y[labeled], pseudo[keep]
        step, labels, weights, average, momentum = at_start[select, eps, "finetune"]
        assert step == 0 and momentum == 0 and torch.equal(labels, known)
        for name, tensor in theta_weights.items():
            assert torch.equal(weights[name], tensor) and torch.equal(average[name], tensor)
    known_before = at_start["fgsm", 2.0, "pretrain"][1] >= 0
    assert torch.nonzero(known_before).squeeze(1).tolist() == labeled.tolist()
    rows = read_rows(tmp_path / "none2")
    assert [row["phase"] for row in rows] == ["finetune", "finetune"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_epoch_phase_and_seed_draws_its_own(script, few_images, tmp_path, monkeypatch):
    first_batches = []
    original = script.training_step

    def spy(run, x_l, y_l, x_u, step, phase, args):
        if step % args.steps_per_epoch == 0:
            first_batches.append(x_u.numpy().tobytes())
        return original(run, x_l, y_l, x_u, step, phase, args)

    monkeypatch.setattr(script, "training_step", spy)
    for seed in ("0", "1"):
        options = ["--seed", seed, "--table2-eps", "1", "--out", str(tmp_path / seed)]
        script.main([*SMALL.split(), *options])
    assert len(first_batches) == len(set(first_batches)) == 8
    weights = [torch.load(tmp_path / seed / "pretrain.pt", weights_only=True) for seed in "01"]
    assert not torch.equal(weights[0]["conv.weight"], weights[1]["conv.weight"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_sigterm_stops_with_a_sentence(script, few_images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "train_epoch", lambda *args, **kwargs: script.stop(15, None))
    with pytest.raises(SystemExit) as stopped:
        script.main([*SMALL.split(), "--out", str(tmp_path / "run")])
    assert stopped.value.code == 143
    assert (
        capsys.readouterr().err
        == "stopped; the same command goes on after the last finished epoch\n"
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_resuming_with_other_images_is_refused(script, few_images, tmp_path, monkeypatch, capsys):
    command = [*SMALL.split(), "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_at(patch, script, "training_step", 6)
        script.main(command)
    x_train, y_train, x_test, y_test = few_images
    other = x_train.flip(0), y_train.flip(0), x_test, y_test
    monkeypatch.setattr(script, "load_images", lambda data, data_dir: other)
    capsys.readouterr()
    assert "other images" in refusal(capsys, *command, script=script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_labels_of_unlabeled_images_are_not_used(script, images, few_images, tmp_path, monkeypatch):
    """With other true labels on the unlabeled images, theta~ and the final model are the same."""
    x_train, y_train, x_test, y_test = few_images
    labeled, _ = split_labeled(y_train, 100, 0)
    finals = []
    for shift in (0, 1):
        wrong = (y_train + shift) % 10
        wrong[labeled] = y_train[labeled]
        monkeypatch.setattr(
            script, "load_images", lambda data, data_dir: (x_train, wrong, x_test, y_test)
        )
        monkeypatch.setattr(
            script,
            "split_labeled",
            lambda y, num_labeled, seed: split_labeled(y_train, num_labeled, seed),
        )
        script.main([*SMALL.split(), "--table2-eps", "1", "--out", str(tmp_path / str(shift))])
        finals.append(torch.load(tmp_path / str(shift) / "model.pt", weights_only=True))
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


def test_whole_run_learns_selects_and_leaves_its_files(tmp_path, capsys):
    """The README's small run, shorter: real synthetic images, everything on."""
    command = (
        "--data synthetic --num-labeled 500 --depth 10 --width 1 --batch-size 32 --mu 1 "
        "--epochs 2 --steps-per-epoch 75 --table2-eps 1 4"
    )
    result = fixmatch_scar.main([*command.split(), "--out", str(tmp_path / "run")])
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "args.json",
        "fixmatch_scar.py",
        "checkpoint.pt",
        "pretrain.pt",
        "model.pt",
        "selection.png",
        "metrics.csv",
        "result.json",
    }
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert (
        result["method"] == "fixmatch"
        and result["data"] == "synthetic"
        and result["scored_on"] == "test"
    )
    assert (
        result["pretrain_accuracy"] > 40 and result["final_accuracy"] > result["pretrain_accuracy"]
    )

    selection, (weak_attack, strong_attack) = result["selection"], result["table2"]
    assert selection["kept"] + selection["rejected"] == selection["unlabeled"] == 5500
    assert selection["kept"] == sum(selection["kept_per_class"]) > 0 and selection["rejected"] > 0
    assert selection["kept_correct"] / selection["kept"] > result["pretrain_accuracy"] / 100
    assert (
        weak_attack["kept"] > strong_attack["kept"]
        and weak_attack["sensitivity"] < strong_attack["sensitivity"]
    )
    for row in result["table2"]:
        right = row["kept_correct"] + row["rejected"] - row["rejected_wrong"]
        assert right == pytest.approx(10 * result["pretrain_accuracy"])

    output = capsys.readouterr().out
    assert "94.13" in output and "95.17" in output and "99.59 (6385/6411)" in output
    assert (
        f"{result['final_accuracy']:.2f}" in output
        and "a step: about" in output
        and "\r" not in output
    )
    rows = read_rows(tmp_path / "run")
    assert list(rows[0]) == [
        "phase",
        "epoch",
        "lr",
        "loss",
        "loss_labeled",
        "loss_unlabeled",
        "mask_rate",
        "accuracy",
        "ms_per_step",
        "seconds",
    ]
    assert float(rows[-1]["accuracy"]) == result["final_accuracy"]

    # what the README shows: load model.pt and classify
    model = WideResNet(10, 10, 1)
    model.load_state_dict(torch.load(tmp_path / "run" / "model.pt", weights_only=True))
    _, _, x_test, y_test = load_images("synthetic", None)
    assert fixmatch_scar.evaluate(model, x_test, y_test) == pytest.approx(
        result["final_accuracy"], abs=0.2
    )


def test_validation_images_come_from_the_unlabeled_pool(few_images, tmp_path):
    result = fixmatch_scar.main(
        [*SMALL.split(), "--val", "50", "--table2-eps", "1", "--out", str(tmp_path / "run")]
    )
    assert result["scored_on"] == "validation"
    assert result["selection"]["unlabeled"] == 450
    assert sum(result["table2"][0][name] for name in ("kept", "rejected")) == 50


def test_tensorboard(few_images, tmp_path):
    pytest.importorskip("tensorboard")
    fixmatch_scar.main(
        [*SMALL.split(), "--tensorboard", "--table2-eps", "1", "--out", str(tmp_path / "run")]
    )
    assert list((tmp_path / "run").glob("events*"))


@needs_cuda
@pytest.mark.parametrize("script", SCRIPTS)
def test_whole_run_on_cuda(script, few_images, tmp_path):
    for compiled in ("--compile", "--no-compile"):
        out = tmp_path / compiled
        result = script.main(
            [*SMALL.split(), "--device", "cuda", compiled, "--table2-eps", "1", "--out", str(out)]
        )
        assert result["peak_memory_gib"] > 0


@needs_cuda
def test_fgsm_on_cuda_is_that_of_the_cpu():
    torch.manual_seed(0)
    model, x, y = WideResNet(10, 10, 1), torch.rand(16, 3, 32, 32), torch.arange(16) % 10
    on_cpu = fgsm(model, x, y, 0.05)
    on_cuda = fgsm(model.cuda(), x.cuda(), y.cuda(), 0.05).cpu()
    assert ((on_cpu - on_cuda).abs() > 1e-6).float().mean() < 0.01


@needs_cuda
@pytest.mark.parametrize("index", range(14), ids=[name for name, _, _ in RANDAUGMENT_OPS])
def test_randaugment_on_cuda_is_that_of_the_cpu(varied_images, index):
    x, level = varied_images, torch.linspace(0, 1, len(varied_images))
    op = torch.full((len(x),), index)
    difference = (
        randaugment_op(x.cuda(), op.cuda(), level.cuda()).cpu().int()
        - randaugment_op(x, op, level).int()
    )
    assert (difference != 0).any(1).float().mean() <= 0.01


# ---------------------------------------------------------------------------------------- bad input


def refusal(capsys, *argv, script=fixmatch_scar, code=2):
    """The one sentence with which a command line is turned down."""
    with pytest.raises(SystemExit) as stopped:
        script.main([str(word) for word in argv])
    assert stopped.value.code == code
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count("error:") == 1
    sentence = error.split("error:")[1].strip()
    assert sentence and "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--depth 27", "6n + 4"),
        ("--depth 4", "6n + 4"),
        ("--width 0", "--width"),
        ("--eps -1", "--eps"),
        ("--eps nan", "--eps"),
        ("--table2-eps 1 -2", "--table2-eps"),
        ("--threshold 0", "--threshold"),
        ("--threshold 1.01", "--threshold"),
        ("--epochs 0", "--epochs"),
        ("--steps-per-epoch 0", "--steps-per-epoch"),
        ("--batch-size 0", "--batch-size"),
        ("--mu 0", "--mu"),
        ("--lr 0", "--lr"),
        ("--lr inf", "--lr"),
        ("--weight-decay -1", "--weight-decay"),
        ("--ema-decay 1", "--ema-decay"),
        ("--lambda-u -1", "--lambda-u"),
        ("--val -1", "--val"),
        ("--seed -1", "--seed"),
        ("--num-labeled 0", "--num-labeled"),
        ("--num-labeled 9", "too few"),
        ("--num-labeled 6000", "no unlabeled image"),
        ("--num-labeled 5990 --val 10", "no unlabeled image"),
        ("--val 5", "--val 5: "),
        ("--data imagenet", "imagenet"),
        ("--epoch 3", "--epoch"),
        ("--pretrained=", "--pretrained"),
        ("--pretrained nowhere/pretrain.pt", "nowhere/pretrain.pt"),
        ("--pretrained README.md", "README.md"),
    ],
)
def test_refuses(options, sentence, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fixmatch_scar, "load_images", lambda data, data_dir: images)
    out = tmp_path / "run"
    assert sentence in refusal(capsys, "--data", "synthetic", "--out", out, *options.split())
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_refuses_cuda_without_one(tmp_path, capsys):
    assert "--device cpu" in refusal(
        capsys, "--data", "synthetic", "--device", "cuda", "--out", tmp_path / "run"
    )


def test_refuses_missing_cifar10(tmp_path, monkeypatch, capsys):
    def no_network(root, *args, **kwargs):
        Path(root).mkdir()  # as torchvision does first
        raise OSError("no network")

    monkeypatch.setattr(common, "CIFAR10", no_network)
    sentence = refusal(capsys, "--data-dir", tmp_path / "data", "--out", tmp_path / "run")
    assert "--data synthetic" in sentence and "--data folder" in sentence
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fault", ["no test", "other classes", "empty class", "unreadable", "too few"]
)
def test_refuses_folder(fault, tmp_path, capsys):
    root = write_folder(tmp_path / "data")
    sentence = {
        "no test": "no folder test",
        "other classes": "wasp",
        "empty class": "wasp",
        "too few": "class 0",
    }.get(fault)
    if fault == "no test":
        (root / "test").rename(root / "check")
    elif fault == "other classes":
        (root / "test" / "bee").rename(root / "test" / "wasp")
    elif fault == "empty class":
        (root / "train" / "wasp").mkdir()
    elif fault == "unreadable":
        broken = root / "train" / "ant" / "1.png"
        broken.write_bytes(broken.read_bytes()[:60])
        sentence = str(broken)
    command = [
        "--data",
        "folder",
        "--data-dir",
        root,
        "--num-labeled",
        8 if fault == "too few" else 2,
    ]
    if fault == "too few":
        (root / "train" / "ant" / "0.png").unlink()
        for i in range(10, 20):
            Image.new("RGB", (32, 32)).save(root / "train" / "bee" / f"{i}.png")
    assert sentence in refusal(capsys, *command, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_refuses_a_folder_that_is_not_this_run(few_images, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("precious")
    assert "is a file" in refusal(capsys, *SMALL.split(), "--out", file)
    assert "is a file" in refusal(capsys, *SMALL.split(), "--out", file / "below")
    assert "not empty" in refusal(capsys, *SMALL.split(), "--out", tmp_path)
    assert file.read_text() == "precious" and list(tmp_path.iterdir()) == [file]

    out = tmp_path / "run"
    fixmatch_scar.main([*SMALL.split(), "--table2-eps", "1", "--out", str(out)])
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    sentence = refusal(
        capsys, *SMALL.split(), "--table2-eps", "1", "--lr", 0.1, "--seed", 5, "--out", out
    )
    assert "lr was 0.03, now 0.1" in sentence and "seed was 0, now 5" in sentence
    assert before == {path: path.read_bytes() for path in out.iterdir()}
    assert "WRN-16-1" in refusal(
        capsys,
        *SMALL.split(),
        "--depth",
        16,
        "--pretrained",
        out / "pretrain.pt",
        "--out",
        tmp_path / "other",
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_keeps_the_last_checkpoint(few_images, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_at(patch, fixmatch_scar, "training_step", 6)
        fixmatch_scar.main([*SMALL.split(), "--out", str(out)])
    before = (out / "checkpoint.pt").read_bytes()
    (out / "checkpoint.pt.partial").symlink_to("/dev/full")
    capsys.readouterr()
    assert "No space left" in refusal(capsys, *SMALL.split(), "--out", out, code=1)
    assert (out / "checkpoint.pt").read_bytes() == before


def test_stops_when_the_loss_is_not_finite(few_images, tmp_path, capsys):
    with np.errstate(all="ignore"):
        sentence = refusal(capsys, *SMALL.split(), "--lr", 1e30, "--out", tmp_path / "run", code=1)
    assert "not finite" in sentence and "--lr" in sentence


# ---------------------------------------------------------------------------------------- the house


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_keeps_the_rules(script):
    """It imports the three packages alone, fits 100 columns, and documents every function."""
    text = Path(script.__file__).read_text()
    allowed = {*sys.stdlib_module_names, "torch", "torchvision", "numpy", "common"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        if isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in allowed
    assert max(len(line) for line in text.splitlines()) <= 100
    for node in ast.parse(text).body:
        assert not isinstance(node, ast.FunctionDef) or ast.get_docstring(node), node.name
