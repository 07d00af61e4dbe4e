"""The PyTorch side of the comparison on Fashion-MNIST: CNN-JEPA or SimCLR, trained and judged.

    python peer_train.py --method simclr --seed 0 --train train.h5 --val test.h5

It is the configuration of configs/<method>_fashion_mnist.toml, built of timm's residual blocks, lightly's projection
head, NT-Xent loss and schedules, torchvision's transforms, and the masked encoder of peer_step.py. Prints one JSON
object with linear and kNN top-1 at initialisation and after training.
"""

import argparse
import io
import json
import random
import time

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from PIL import Image
from timm.models.resnet import BasicBlock
from torch import nn
from torchvision import transforms as T

from peer_step import CnnJepa, ResNet, update_targets

SIZE, CELLS, BATCH = 28, 7, 128
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def arguments():
    parser = argparse.ArgumentParser(description="Trains CNN-JEPA or SimCLR in PyTorch on Fashion-MNIST.")
    parser.add_argument("--method", choices=("cnn_jepa", "simclr"), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--train", required=True, help="packed HDF5 file")
    parser.add_argument("--val", required=True, help="packed HDF5 file")
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's own choice")
    return parser.parse_args()


class Images(torch.utils.data.Dataset):
    """Grey PNG images of a packed file, kept decoded; an item is one tensor (3, S, S) for each transform."""

    def __init__(self, path, views):
        with h5py.File(path) as file:
            data, offsets = file["bytes"][:].tobytes(), file["offsets"][:]
            self.labels = torch.from_numpy(file["labels"][:].astype(np.int64))
        pairs = zip(offsets[:-1], offsets[1:], strict=True)
        self.images = [Image.open(io.BytesIO(data[a:b])).convert("L") for a, b in pairs]
        self.views = views

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return [view(self.images[index]) for view in self.views]


def normalised():
    """Grey (1, S, S) to three equal channels with ImageNet's mean and standard deviation."""
    return [T.ToTensor(), T.Lambda(lambda x: x.expand(3, -1, -1)), T.Normalize(MEAN, STD)]


def views_of(method):
    bilinear, bicubic = T.InterpolationMode.BILINEAR, T.InterpolationMode.BICUBIC
    if method == "cnn_jepa":
        return [T.Compose([T.RandomResizedCrop(SIZE, (0.2, 1.0), interpolation=bicubic), T.RandomHorizontalFlip(), *normalised()])]
    jitter = T.RandomApply([T.ColorJitter(brightness=0.4, contrast=0.4)], 0.8)
    crop = T.RandomResizedCrop(SIZE, (0.2, 1.0), interpolation=bilinear)
    return [T.Compose([crop, T.RandomHorizontalFlip(), jitter, *normalised()])] * 2


def block_size(u, scale, aspect):
    between = lambda low, high: low + u * (high - low)  # noqa: E731
    area = int(CELLS**2 * between(*scale))
    side = lambda square: min(max(round(square**0.5), 1), CELLS)  # noqa: E731
    return side(area * between(*aspect)), side(area / between(*aspect))


def masks(batch):
    """(B, 1, f, f) floats, 1 is context: multi-block with probability 0.75, else random."""
    if random.random() >= 0.75:
        visible = round(CELLS**2 * 0.4)
        order = torch.rand(batch, CELLS**2).argsort(1)
        return torch.zeros(batch, CELLS**2).scatter_(1, order[:, :visible], 1.0).view(batch, 1, CELLS, CELLS)
    height, width = block_size(random.random(), (0.15, 0.2), (0.75, 1.5))
    mask = torch.ones(batch, 1, CELLS, CELLS)
    for image in mask:
        blocks = [(random.randint(0, CELLS - height), random.randint(0, CELLS - width)) for _ in range(4)]
        # Four blocks may leave too little context: then fewer are taken.
        while True:
            image.fill_(1.0)
            for top, left in blocks:
                image[:, top : top + height, left : left + width] = 0.0
            if image.sum() > 5:
                break
            blocks.pop()
    return mask


def initialised(backbone):
    """As timm begins: convolutions by He's rule, and every residual block as the identity."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, BasicBlock):
            module.zero_init_last()
    return backbone


class SimClr(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.projector = SimCLRProjectionHead(backbone.channels, 256, 64)
        self.criterion = NTXentLoss(temperature=0.1)

    def loss(self, views):
        a, b = (self.projector(self.backbone(view).mean((2, 3))) for view in views)
        return self.criterion(a, b)

    def encoder(self):
        return self.backbone


class Jepa(CnnJepa):
    def loss(self, views):
        (images,) = views
        return self(images, masks(len(images)))

    def encoder(self):
        return self.target


@torch.no_grad()
def features(encoder, images):
    """Pooled features (N, C) of whole images, in evaluation mode."""
    encoder.eval()
    loader = torch.utils.data.DataLoader(images, batch_size=256)
    x = torch.cat([encoder(view).mean((2, 3)) for (view,) in loader])
    encoder.train()
    return x, images.labels


def linear(train, val, seed, epochs=30, lr=0.01):
    """Best top-1 over the epochs of a linear classifier."""
    torch.manual_seed(seed)
    (x, y), (x_val, y_val) = train, val
    probe = nn.Linear(x.shape[1], 10)
    optimizer = torch.optim.Adam(probe.parameters(), lr)
    best = 0.0
    for _ in range(epochs):
        for at in torch.randperm(len(x)).split(256):
            optimizer.zero_grad()
            F.cross_entropy(probe(x[at]), y[at]).backward()
            optimizer.step()
        with torch.no_grad():
            best = max(best, (probe(x_val).argmax(1) == y_val).float().mean().item())
    return best


def knn(train, val, k=20, temperature=0.1):
    (x, y), (x_val, y_val) = train, val
    bank, right = F.normalize(x, dim=1), 0
    for queries, labels in zip(F.normalize(x_val, dim=1).split(500), y_val.split(500), strict=True):
        similarity, places = (queries @ bank.T).topk(k, 1)
        votes = torch.zeros(len(queries), 10).scatter_add_(1, y[places], (similarity / temperature).exp())
        right += (votes.argmax(1) == labels).sum().item()
    return right / len(x_val)


def judge(encoder, train, val, seed):
    bank, queries = features(encoder, train), features(encoder, val)
    return {"linear_top1": linear(bank, queries, seed), "knn_top1": knn(bank, queries)}


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    backbone = initialised(ResNet("resnet18", "small", 16, (1, 1, 1)))
    model = (Jepa if args.method == "cnn_jepa" else SimClr)(backbone).train()
    whole = [T.Compose(normalised())]
    images, train, val = Images(args.train, views_of(args.method)), Images(args.train, whole), Images(args.val, whole)
    loader = torch.utils.data.DataLoader(images, BATCH, shuffle=True, drop_last=True)

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.01)
    steps = args.epochs * len(loader)
    schedule = CosineWarmupScheduler(optimizer, len(loader) // 2, steps, end_value=0.001)
    before = judge(model.encoder(), train, val, args.seed)
    began = time.perf_counter()
    for epoch in range(args.epochs):
        momentum = cosine_schedule(epoch, args.epochs, 0.99, 0.999)
        for views in loader:
            if args.method == "cnn_jepa":
                update_targets(model, momentum)
            optimizer.zero_grad()
            model.loss(views).backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - began
    after = judge(model.encoder(), train, val, args.seed)
    report = {"method": args.method, "seed": args.seed, "epochs": args.epochs, "before": before, "after": after}
    print(json.dumps(report | {"train_s": round(seconds), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
