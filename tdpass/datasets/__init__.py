"""Labelled images to train on, held in memory and cut once into parts; one file per source.

`open_dataset` takes the name of a set (`digits`, `mnist`, `cifar10`, `cifar100`), a folder of images, an
`.npz` file, `torchvision:NAME` or `hf:NAME`.  `digits` comes with tdpass and needs nothing.
"""

from __future__ import annotations

import tdpass.datasets.digits
import tdpass.datasets.hugging_face
import tdpass.datasets.image_folder
import tdpass.datasets.npz
import tdpass.datasets.published
import tdpass.datasets.torchvision  # noqa: F401  # these register their sources
from tdpass.datasets.augment import Augment as Augment
from tdpass.datasets.base import PARTS as PARTS
from tdpass.datasets.base import SOURCES as SOURCES
from tdpass.datasets.base import Dataset as Dataset
from tdpass.datasets.base import Examples as Examples
from tdpass.datasets.base import Source as Source
from tdpass.datasets.base import is_dataset as is_dataset
from tdpass.datasets.base import open_dataset as open_dataset
from tdpass.datasets.base import register_source as register_source
from tdpass.datasets.base import source_of as source_of
