"""Form: what a site is stored as, as one value with a text that people read and write."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from tdpass.documents import Count, Size
from tdpass.errors import PlanError
from tdpass.flattening import Flattened
from tdpass.site import Site

Rank = tuple[int, ...]
_RANK = re.compile(r"[1-9]\d*(x[1-9]\d*)*")
_NUMBERS = re.compile(r"[a-z]+\d+(_[a-z0-9]+)?(/[a-z0-9]+)*")
ALL = "all"
DYNAMIC, STATIC = "dynamic", "static"
_SUPPORT = re.compile(r"all|[1-9]\d*:[1-9]\d*|[a-z]+([1-9]\d*x[1-9]\d*)?/([1-9]\d*|\d+(\.\d+)?%)")
_CHANNELS = re.compile(r"\b(in|out) (0|[1-9]\d*)(?= |$)")
_GRAMMAR = (
    "write a format, then its rank, channels, number types, support and activations where it has them, "
    "such as 'tucker2 16x24 int8' or 'dense 2:4'"
)
_ACTIVATIONS: Mapping[str, Literal["", "dynamic", "static"]] = {
    "": "",
    DYNAMIC: "dynamic",
    STATIC: "static",
}
_PRUNED, _CONSTANT = "pruned", "constant"


@dataclass(frozen=True)
class Form(Flattened):
    """The format that factors the weight, its rank, and how the factors are stored.

    `numbers` names the number type of each factor, in the format's order, or one for all of them; none is the
    type that the model's weights have, and single precision where a support is named.  `support` says of
    which entries of each factor the values are stored, one text for all factors or one for each, joined by
    commas: all of them (empty, or `all` beside others), `2:4`, `rows/8`, `columns/30%`, `blocks4x4/12`,
    `unstructured/500`.  `inputs` and `outputs` are how many channels are left of those that the site reads
    and makes, None for all: what stands there is a layer of the smaller site `on(site)`.  One that reads no
    channel answers with its bias.  `activations` says how what is multiplied with factors of eight-bit
    integers becomes integers too: not at all (empty), by its own range in every call (`dynamic`), or in a
    range that is stored with the layer (`static`).

    Files of version 1 say `pruned` with the channels for a rank, and `constant`.

    >>> Form.parse("tucker2 16x24 int8") == Form("tucker2", (16, 24), numbers=("int8",))
    True
    >>> str(Form("dense", (), support="2:4"))
    'dense 2:4'
    >>> str(Form("dense", (), inputs=12, outputs=6))
    'dense in 12 out 6'
    """

    format: str
    rank: tuple[Size, ...]
    numbers: tuple[str, ...] = ()
    support: str = ""
    inputs: Count | None = None
    outputs: Size | None = None
    activations: Literal["", "dynamic", "static"] = ""

    def __post_init__(self) -> None:
        if self.format == _PRUNED and len(self.rank) == 2:
            self._become("dense", inputs=self.rank[1], outputs=self.rank[0])
        elif self.format == _CONSTANT and not self.rank:
            self._become("dense", inputs=0, outputs=None)

    def _become(self, name: str, inputs: int, outputs: int | None) -> None:
        for key, value in {"format": name, "rank": (), "inputs": inputs, "outputs": outputs}.items():
            object.__setattr__(self, key, value)

    def __str__(self) -> str:
        parts = (self.format, self.size, ",".join(self.numbers), self.support, self.activations)
        return " ".join(filter(None, parts))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The rank, and how many channels are left in and out where it says so."""
        return (*self.rank, *(count for count in (self.inputs, self.outputs) if count is not None))

    @property
    def size(self) -> str:
        """The rank and the channels as text; empty for a dense layer of all channels."""
        return " ".join(part for part in ("x".join(map(str, self.rank)), self.channels) if part)

    @property
    def channels(self) -> str:
        """The channels that are left as text; empty where all are."""
        left = {"in": self.inputs, "out": self.outputs}
        return " ".join(f"{way} {count}" for way, count in left.items() if count is not None)

    @property
    def encoded(self) -> bool:
        """Whether factors are stored otherwise than as plain tensors of the type of the model's weights."""
        return bool(self.numbers or self.support)

    @property
    def family(self) -> str:
        """The text without rank and channels; `narrow` before it where some channels are left out."""
        family = str(replace(self.whole, rank=()))
        return f"narrow {family}" if self.narrow else family

    @property
    def whole(self) -> Form:
        """The form with all channels."""
        return replace(self, inputs=None, outputs=None)

    @property
    def narrow(self) -> bool:
        """Whether it says how many channels are left, which only makes sense together with neighbours."""
        return self.inputs is not None or self.outputs is not None

    @property
    def factored(self) -> bool:
        """Whether what stands there is made of factors."""
        return self.format != "dense"

    def left_of(self, before: Form) -> Form:
        """This form of a layer that had the channels of `before`, and has no fewer unless it says so."""
        if self.narrow or not before.narrow:
            return self
        return replace(self, inputs=before.inputs, outputs=before.outputs)

    def on(self, site: Site) -> Site:
        """The site that the layer in this form is one of: that with the channels that are left.

        Raises `PlanError` where the site has fewer, or groups of them.
        """
        if not self.narrow:
            return site
        inputs = site.i if self.inputs is None else self.inputs
        outputs = site.o if self.outputs is None else self.outputs
        divided = site.groups > 1 and (inputs > 0 or outputs < site.o)
        if inputs > site.i or outputs > site.o or divided:
            has = f"it has {site.i} channels in and {site.o} out, in {site.groups} groups"
            raise PlanError(f"'{self}' does not fit site {site.name!r}: {has}; plan again")
        return replace(site, shape=(outputs, inputs, *site.kernel))

    @classmethod
    def parse(cls, text: str) -> Form:
        """Read what `str` writes; raises `PlanError` for anything else."""
        channels = {way: int(count) for way, count in _CHANNELS.findall(text)}
        name, *parts = _CHANNELS.sub("", text).split() or [""]
        activations = parts.pop() if parts and parts[-1] in (DYNAMIC, STATIC) else ""
        rank = parts.pop(0) if parts and _RANK.fullmatch(parts[0]) else ""
        numbers = parts.pop(0).split(",") if parts and not _supports(parts[0]) else []
        support = parts.pop(0) if parts else ""
        if (
            not name
            or parts
            or not all(map(_NUMBERS.fullmatch, numbers))
            or (support and not _supports(support))
        ):
            raise PlanError(f"form {text!r} is not understood; {_GRAMMAR}")
        sizes = tuple(int(size) for size in rank.split("x") if size)
        left = channels.get("in"), channels.get("out")
        return cls(name, sizes, tuple(numbers), support, *left, _ACTIVATIONS[activations])


def _supports(text: str) -> bool:
    return all(map(_SUPPORT.fullmatch, text.split(",")))


DENSE = Form("dense", ())
"""A site as it is."""


class Formed:
    """What has a form: the two parts of it that are asked for most."""

    form: Form

    @property
    def format(self) -> str:
        """Name of the format."""
        return self.form.format

    @property
    def rank(self) -> Rank:
        """Rank of the format."""
        return self.form.rank
