"""A short fine-tuning with distillation: two epochs towards the dense outputs, the best point kept."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cifar


def distil(
    model: nn.Module,
    teacher: nn.Module,
    epochs: int = 2,
    rate: float = 1e-4,
    batch: int = 128,
    temperature: float = 2.0,
    checks: int = 8,
    seed: int = 0,
) -> nn.Module:
    """A fine-tuned copy, judged `checks` times on crops and flips of the tuning images.

    The model as it came is among what is judged. The judge is the divergence from the teacher, since the
    networks classify nearly every image of the training split correctly and accuracy on it tells little.

    AdamW with a short warm-up and a cosine schedule, gradients clipped, random crops and flips, the loss the
    KL divergence from the teacher's softened class probabilities; no labels.  Batch-norms are folded into the
    weights by then, and plain SGD at a usual rate diverges.
    """
    model, teacher = copy.deepcopy(model), teacher.eval()
    data = cifar.data()
    pixels = data.training.inputs
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(pixels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    warm_up = steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    tuning = data.prepared(data.augment(data.tuning.inputs, torch.Generator().manual_seed(2)))
    best, kept = _divergence(model, teacher, tuning), copy.deepcopy(model.state_dict())
    step = 0
    for _ in range(epochs):
        model.train()
        for chosen in torch.randperm(len(pixels), generator=generator).split(batch):
            if len(chosen) < batch:
                continue
            x = data.prepared(data.augment(pixels[chosen], generator))
            with torch.no_grad():
                target = F.log_softmax(teacher(x) / temperature, 1)
            optimizer.zero_grad()
            loss = F.kl_div(
                F.log_softmax(model(x) / temperature, 1), target, reduction="batchmean", log_target=True
            )
            (temperature**2 * loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % (steps // checks) == 0:
                score = _divergence(model, teacher, tuning)
                model.train()
                if score < best:
                    best, kept = score, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return model.eval()


@torch.inference_mode()
def _divergence(model: nn.Module, teacher: nn.Module, images: Tensor, batch: int = 250) -> float:
    """Mean KL divergence of the teacher's class probabilities from the model's."""
    model.eval()
    total = 0.0
    for x in images.to(memory_format=torch.channels_last).split(batch):
        total += float(
            F.kl_div(
                F.log_softmax(model(x), 1), F.log_softmax(teacher(x), 1), reduction="sum", log_target=True
            )
        )
    return total / len(images)
