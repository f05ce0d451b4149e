"""A detector: torchvision's RetinaNet on a MobileNetV2 with a feature pyramid, on made-up scenes.

The model gives what RetinaNet's head gives, a dict of two tensors over all anchors; the loss and
the boxes are RetinaNet's own.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, StackDataset
from torchvision.models import mobilenet_v2
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

import adq

PIXELS = 64
KINDS = 3  # discs, squares, triangles
MOST = 4  # shapes in a scene, one in each quarter at most
NONE = -1  # the label where there is no shape
NOISE = 0.1
LEVELS = ("6", "13", "17")  # of MobileNetV2's features: 8, 16 and 32 pixels apart
ANCHORS = (
    (10, 14),
    (20, 26),
    (32, 40),
    (64, 80),
)  # pixels; the last level is pooled from the third
SIZES = (800, 200, 400)  # training, validation, test
Outputs = Mapping[str, Tensor]


def scenes(count: int, seed: int) -> StackDataset:
    """Images (3, 64, 64) of one to four shapes before noise, and {"boxes": (4, 4) in pixels,
    "labels": (4,)}.

    Each shape lies in a quarter of its own and has a colour that says nothing of its kind.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = partial(torch.rand, generator=generator)
    label = torch.randint(KINDS, (count, MOST), generator=generator)
    there = uniform(count, MOST) < 0.5
    there[torch.arange(count), torch.randint(MOST, (count,), generator=generator)] = True
    quarter = PIXELS // 2
    radius = 5 + 10 * uniform(count, MOST, 1)
    corner = quarter * torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    centre = corner + radius + (quarter - 2 * radius) * uniform(count, MOST, 2)
    line = torch.arange(PIXELS) + 0.5
    dx, dy = line - centre[..., :1], line - centre[..., 1:]  # (count, MOST, 64) each
    dx, dy, r = dx[..., None, :], dy[..., None], radius[..., None]
    kinds = (
        dx**2 + dy**2 <= r**2,
        (dx.abs() <= r) & (dy.abs() <= r),
        (dy.abs() <= r) & (dx.abs() <= (dy + r) / 2),
    )
    mask = torch.stack(kinds, 2).gather(
        2, label[..., None, None, None].expand(-1, -1, 1, PIXELS, PIXELS)
    )
    mask &= there[..., None, None, None]
    colour = uniform(count, MOST, 3, 1, 1) * 2 - 1
    images = (mask * colour).sum(1) + NOISE * torch.randn(
        count, 3, PIXELS, PIXELS, generator=generator
    )
    boxes = torch.cat([centre - radius, centre + radius], 2)
    targets = StackDataset(boxes=boxes, labels=label.where(there, NONE))
    return StackDataset(images, targets)


class Detector(RetinaNet):
    """RetinaNet from images (N, 3, 64, 64) to its head's outputs: "cls_logits" (N, anchors, KINDS)
    and "bbox_regression" (N, anchors, 4)."""

    def __init__(self, width: float, channels: int) -> None:
        features = mobilenet_v2(width_mult=width).features
        inputs = [features.get_submodule(name).out_channels for name in LEVELS]
        names = {name: str(level) for level, name in enumerate(LEVELS)}
        pyramid = BackboneWithFPN(features, names, inputs, channels)
        anchors = AnchorGenerator(ANCHORS, ((1.0,),) * len(ANCHORS))
        super().__init__(pyramid, KINDS, anchor_generator=anchors, score_thresh=0.3)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(images).values()))


class Scoring:
    """The loss, and how well boxes are found, by the rules of an untrained `Detector`."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector.eval()
        images = torch.zeros(1, 3, PIXELS, PIXELS)
        features = list(detector.backbone(images).values())
        sizes = ImageList(images, [(PIXELS, PIXELS)])
        (self.anchors,) = detector.anchor_generator(sizes, features)
        per_place = detector.anchor_generator.num_anchors_per_location()[0]
        self.levels = [per_place * f.shape[2] * f.shape[3] for f in features]

    def loss(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Focal loss of the classes and L1 of the boxes, each over an image's matched anchors."""
        shapes = [
            {"boxes": boxes[labels != NONE], "labels": labels[labels != NONE]}
            for boxes, labels in zip(targets["boxes"], targets["labels"], strict=True)
        ]
        anchors = [self.anchors.to(targets["boxes"].device)] * len(shapes)
        losses = self.detector.compute_loss(shapes, dict(outputs), anchors)
        return sum(losses.values())

    def f1(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """2·found/(boxes given + shapes there) of each image; a shape is found by a box of its kind
        that overlaps it by half (intersection over union)."""
        count = len(targets["labels"])
        by_level = {name: list(value.split(self.levels, 1)) for name, value in outputs.items()}
        anchors = list(self.anchors.to(targets["boxes"].device).split(self.levels))
        given = self.detector.postprocess_detections(
            by_level, [anchors] * count, [(PIXELS, PIXELS)] * count
        )
        scores = []
        for boxes, labels, box in zip(targets["boxes"], targets["labels"], given, strict=True):
            hit = (box_iou(boxes, box["boxes"]) >= 0.5) & (labels[:, None] == box["labels"])
            there = int((labels != NONE).sum())
            scores.append(2 * int(hit.any(1).sum()) / (len(box["labels"]) + there))
        return torch.tensor(scores)


def make_task(
    width: float = 0.25,
    channels: int = 16,
    sizes: tuple[int, int, int] = SIZES,
    epochs: int = 15,
) -> adq.Task:
    """Scenes of seeds 0, 1 and 2 for training, validation and test, and a `Detector`."""
    train, validation, test = (scenes(count, seed) for seed, count in enumerate(sizes))
    with torch.random.fork_rng():
        scoring = Scoring(Detector(width, channels))
    return adq.Task(
        model=partial(Detector, width, channels),
        loss=scoring.loss,
        train=DataLoader(train, 20, shuffle=True, drop_last=True),
        validation=DataLoader(validation, 200),
        test=DataLoader(test, 200),
        metric=scoring.f1,
        metric_name="F1 at IoU 0.5",
        fp32_epochs=epochs,
        fp32_lr=3e-3,
    )
