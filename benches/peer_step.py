"""The PyTorch side of the step benchmark: training steps of a method, timed.

    python peer_step.py --method cnn_jepa --backbone resnet50 --size 224 --batch 8

A step is what jepa-host does in one: the target network, if there is one, follows by EMA, forward, loss, backward, AdamW.
Eager PyTorch, timm's own blocks, lightly's heads and losses. CNN-JEPA's context encoder is a masked dense emulation: every
convolution and max-pool (of a ConvNeXt, every layer norm and MLP too) runs on the whole map and its output is multiplied by
the mask of visible cells, and batch norm takes the visible positions out, normalises them, and puts them back. The input is one random batch, so no time goes into
data.

Prints one JSON object: `step_s`, the seconds of every step from the first on, and what was run.
"""

import argparse
import copy
import json
import resource
import time

import timm
import torch
import torch.nn.functional as F
from lightly.loss import NegativeCosineSimilarity, NTXentLoss, VICRegLoss
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, SimCLRProjectionHead
from lightly.models.modules.heads import VICRegProjectionHead
from timm.layers import LayerNorm, LayerNorm2d, Mlp
from timm.models.resnet import BasicBlock, Bottleneck, make_blocks
from torch import nn

# Block and blocks in each stage of a ResNet.
ARCHITECTURES = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
CONVNEXTS = ("convnext_tiny",)


def arguments():
    parser = argparse.ArgumentParser(description="Times training steps in PyTorch.")
    parser.add_argument("--method", choices=list(METHODS), default="cnn_jepa")
    parser.add_argument("--backbone", choices=[*ARCHITECTURES, *CONVNEXTS], default="resnet50")
    parser.add_argument("--stem", choices=("imagenet", "small"), default="imagenet", help="of a ResNet")
    parser.add_argument("--width", type=int, default=64, help="of a ResNet, channels of the stem and of the first stage")
    parser.add_argument("--depths", type=json.loads, help="of a ResNet, blocks in each stage, such as [1,1,1]")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--mask-ratio", type=float, default=0.6, help="share of the cells that are hidden")
    parser.add_argument("--channels-last", action="store_true", help="keep images and weights as (B, H, W, C) in memory")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model, with its default settings")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="threads to compute with; 0: PyTorch's own choice")
    parser.add_argument("--steps", type=int, default=10)
    return parser.parse_args()


class ResNet(nn.Module):
    """timm's ResNet up to its last feature map, at any width, with one to four stages and either stem."""

    def __init__(self, name, stem, width, depths):
        super().__init__()
        block, full_depths = ARCHITECTURES[name]
        depths = depths or full_depths
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        planes = tuple(width * 2**stage for stage in range(len(depths)))
        stages, _ = make_blocks(
            (block,) * len(depths), planes, tuple(depths), width, act_layer=nn.ReLU, norm_layer=nn.BatchNorm2d
        )
        self.stages = nn.Sequential(*(stage for _, stage in stages))
        self.channels, self.norm = planes[-1] * block.expansion, nn.BatchNorm2d
        # Pixels of a side for one cell of the last map.
        self.downsample = (4 if stem == "imagenet" else 1) * 2 ** (len(depths) - 1)

    def forward(self, x):
        return self.stages(self.maxpool(F.relu(self.bn1(self.conv1(x)))))


class ConvNeXt(nn.Module):
    """timm's ConvNeXt up to its last feature map."""

    def __init__(self, name):
        super().__init__()
        whole = timm.create_model(name)
        self.stem, self.stages = whole.stem, whole.stages
        self.channels, self.downsample, self.norm = whole.num_features, 32, LayerNorm2d

    def forward(self, x):
        return self.stages(self.stem(x))


class VisibleCells:
    """The mask (B, 1, f, f) that all layers of a masked network look at: 1 is visible."""

    mask = None

    def at(self, side):
        """The mask at the resolution of a map of this side."""
        repeat = side // self.mask.shape[-1]
        return self.mask.repeat_interleave(repeat, 2).repeat_interleave(repeat, 3)


class Masked(nn.Module):
    """A layer whose output is zero at hidden positions."""

    def __init__(self, layer, visible):
        super().__init__()
        self.layer, self.visible = layer, visible

    def forward(self, x):
        y = self.layer(x)
        # A block of ConvNeXt has its channels last, (B, H, W, C), between its depthwise convolution and its sum.
        mask = self.visible.at(y.shape[2])
        return y * (mask.permute(0, 2, 3, 1) if isinstance(self.layer, CHANNELS_LAST) else mask)


class MaskedBatchNorm(nn.Module):
    """Batch norm of the visible positions, zero at the others."""

    def __init__(self, norm, visible):
        super().__init__()
        # Its weights and running statistics; as a 1-D norm, for rows of channels.
        self.norm = nn.BatchNorm1d(norm.num_features)
        self.norm.load_state_dict(norm.state_dict())
        self.visible = visible

    def forward(self, x):
        positions = self.visible.at(x.shape[2]).squeeze(1).nonzero(as_tuple=True)
        x = x.permute(0, 2, 3, 1)
        rows = self.norm(x[positions])
        y = torch.zeros_like(x, dtype=rows.dtype)
        y[positions] = rows
        return y.permute(0, 3, 1, 2)


# LayerNorm2d, which stands outside of blocks, is none of the first.
CHANNELS_LAST = (LayerNorm, Mlp)
MASKED = (nn.Conv2d, nn.MaxPool2d, LayerNorm2d, *CHANNELS_LAST)


def mask_layers(module, visible):
    """Replaces, in place, every layer that would let hidden positions be seen."""
    for name, child in module.named_children():
        if isinstance(child, MASKED):
            setattr(module, name, Masked(child, visible))
        elif isinstance(child, nn.BatchNorm2d):
            # timm's blocks use a plain norm, with the activation behind it.
            setattr(module, name, MaskedBatchNorm(child, visible))
        else:
            mask_layers(child, visible)
    return module


def predictor(channels, norm):
    """Three depthwise-separable 3x3 layers."""
    layers = []
    for _ in range(3):
        layers += [
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.Conv2d(channels, channels, 1),
            norm(channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class CnnJepa(nn.Module):
    """Context encoder (masked), mask token and predictor, and the target encoder that follows."""

    def __init__(self, backbone):
        super().__init__()
        self.visible = VisibleCells()
        self.target = copy.deepcopy(backbone).requires_grad_(False)
        self.context = mask_layers(backbone, self.visible)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, backbone.channels, 1, 1))
        self.predictor = predictor(backbone.channels, backbone.norm)

    def forward(self, images, mask):
        """The loss, for a float mask (B, 1, f, f) in which 1 is context."""
        self.visible.mask = mask
        context = self.context(images * self.visible.at(images.shape[2]))
        filled = torch.where(mask.bool(), context, self.mask_token.to(context.dtype))
        prediction = self.predictor(filled)
        with torch.no_grad():
            target = self.target(images)
        return loss_of(prediction, target, mask)

    def pairs(self):
        return [(self.context, self.target)]


class Pooled(nn.Module):
    """A backbone's features (B, C): the mean over its last map."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images):
        return self.backbone(images).mean((2, 3))


class Byol(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.online = nn.Sequential(Pooled(backbone), BYOLProjectionHead(backbone.channels, 1024, 256))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = BYOLPredictionHead(256, 1024, 256)
        self.loss = NegativeCosineSimilarity()

    def forward(self, first, second):
        predictions = [self.predictor(self.online(view)) for view in (first, second)]
        with torch.no_grad():
            targets = [self.target(view) for view in (first, second)]
        return (self.loss(predictions[0], targets[1]) + self.loss(predictions[1], targets[0])) / 2

    def pairs(self):
        return [(self.online, self.target)]


class TwoViews(nn.Module):
    """SimCLR and VICReg: both views through one network, and a loss of the two."""

    def __init__(self, backbone, head, loss):
        super().__init__()
        self.network, self.loss = nn.Sequential(Pooled(backbone), head), loss

    def forward(self, first, second):
        return self.loss(self.network(first), self.network(second))

    def pairs(self):
        return []


class Supervised(nn.Module):
    def __init__(self, backbone, classes=10):
        super().__init__()
        self.network = nn.Sequential(Pooled(backbone), nn.Linear(backbone.channels, classes))

    def forward(self, images, labels):
        return F.cross_entropy(self.network(images), labels)

    def pairs(self):
        return []


METHODS = {
    "cnn_jepa": CnnJepa,
    "byol": Byol,
    "simclr": lambda backbone: TwoViews(backbone, SimCLRProjectionHead(backbone.channels), NTXentLoss(temperature=0.1)),
    "vicreg": lambda backbone: TwoViews(backbone, VICRegProjectionHead(backbone.channels), VICRegLoss()),
    "supervised": Supervised,
}


@torch.no_grad()
def update_targets(model, momentum):
    for online, target in model.pairs():
        for source, follower in zip(online.parameters(), target.parameters(), strict=True):
            follower.mul_(momentum).add_(source, alpha=1 - momentum)


def loss_of(prediction, target, mask):
    """Smooth-L1 between unit vectors, averaged over the hidden cells."""
    prediction, target = F.normalize(prediction.float(), dim=1), F.normalize(target.float(), dim=1)
    per_cell = F.smooth_l1_loss(prediction, target, reduction="none").sum(1, keepdim=True)
    hidden = 1 - mask
    return (per_cell * hidden).sum() / (hidden.sum() + 1e-8)


def random_mask(batch, cells, ratio, device):
    """(B, 1, f, f): in each image the same number of random cells is visible."""
    visible = round(cells**2 * (1 - ratio))
    order = torch.rand(batch, cells**2, device=device).argsort(1)
    mask = torch.zeros(batch, cells**2, device=device)
    return mask.scatter_(1, order[:, :visible], 1.0).view(batch, 1, cells, cells)


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.backbone in CONVNEXTS:
        backbone = ConvNeXt(args.backbone)
    else:
        backbone = ResNet(args.backbone, args.stem, args.width, args.depths)
    if args.size % backbone.downsample:
        raise SystemExit(f"--size {args.size} does not divide into cells of {backbone.downsample} px")
    model = METHODS[args.method](backbone).train().to(args.device)
    images, others = torch.randn(2, args.batch, 3, args.size, args.size, device=args.device)
    if args.channels_last:
        model, images, others = (x.to(memory_format=torch.channels_last) for x in (model, images, others))
    labels = torch.randint(10, (args.batch,), device=args.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    network = torch.compile(model) if args.compile else model

    def step():
        mask = random_mask(args.batch, args.size // backbone.downsample, args.mask_ratio, args.device)
        inputs = {"cnn_jepa": (images, mask), "supervised": (images, labels)}.get(args.method, (images, others))
        update_targets(model, 0.996)
        optimizer.zero_grad()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = network(*inputs)
        loss.backward()
        optimizer.step()
        return loss.item(), mask.mean().item()

    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        loss, context_share = step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({
        "step_s": seconds,
        "arguments": vars(args),
        "loss": loss,
        "context_share": context_share,
        "trained_parameters": sum(p.numel() for p in trained),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }))


if __name__ == "__main__":
    main()
