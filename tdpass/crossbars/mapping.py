"""Which weight lies in which cell of which array.

A file for those who program the chip, and the weights that follow from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tdpass.constraints.device_levels import DeviceLevels
from tdpass.crossbars.placement import Place, array_sets, placed_together
from tdpass.crossbars.states import device_levels, digit_weights, states_of
from tdpass.documents import Amount, Count, Document, Size, register_document
from tdpass.errors import InvalidModelError, PlanError, UsageError
from tdpass.files import replacing, write_text
from tdpass.form import DENSE
from tdpass.formats.layer import Layer
from tdpass.kinds import kind_of
from tdpass.layers.factorized import Factorized
from tdpass.models import ExampleInputs, Model, open_model
from tdpass.site import Site, selects
from tdpass.targets.crossbar import CrossbarArray
from tdpass.targets.workload import matrices_of

VERSION = 1
_CELLS = ("state", "weight", "sign")
_TURNS = 4


@dataclass(frozen=True)
class MappedMatrix:
    """One matrix `[depth, columns]` of a site.

    The `group`-th of its `product`-th matrix product, in the order the layer computes them. A weight is
    `scale` sum_j d_j g_j  over its cells, with the conductances g_j over the largest of all states, d_j =
    2^(c (D - 1 - j)) over the sum of all D of them, and the sign that its array or fragment has.
    """

    site: str
    product: Count
    group: Count
    depth: Size
    columns: Size
    scale: Amount
    places: tuple[Place, ...]


@dataclass(frozen=True)
class ArrayMap:
    """The document of a mapping.

    It holds the machine, every matrix with its places, how many sets of copies there are, and a digest of the
    cells beside it.
    """

    array: CrossbarArray
    matrices: tuple[MappedMatrix, ...]
    sets: Count
    cells: str


@dataclass(frozen=True)
class Mapped:
    """A model on arrays; all cells are `[arrays, rows, columns]`.

    `state`: the state that a cell is programmed to, from 1; 0 where it is absent.  `weight`: the row times
    columns plus column, in its matrix, of the weight that it holds a digit of; -1 where it is absent.
    `sign`: that of the weight.

    Array  s copies + k  is the k-th copy of set s: with weights in pairs the first half of the copies hold
    the positive ones, and within each sign there is one array for every digit, the most significant first,
    unless digits lie in adjacent columns.
    """

    map: ArrayMap
    state: Tensor
    weight: Tensor
    sign: Tensor

    def matrix(self, which: MappedMatrix) -> Tensor:
        """The weights `[depth, columns]` that follow from the cells."""
        array, made = self.map.array, torch.zeros(which.depth, which.columns, dtype=torch.float64)
        siemens = torch.tensor((0.0, *array.conductances), dtype=torch.float64)
        digits = digit_weights(array)
        for place in which.places:
            for copy, digit, cells in cells_of(place, array):
                held = siemens[self.state[copy][cells].long()] * digits[digit] * self.sign[copy][cells]
                made[torch.tensor(place.rows)[:, None], torch.tensor(place.columns)] += which.scale * held
        return made

    def save(self, path: Path | str) -> list[Path]:
        """Write `path`, a JSON file, and the cells beside it as safetensors; returns both.

        Raises `UsageError` for another suffix.
        """
        target = Path(path)
        if target.suffix != ".json":
            raise UsageError(
                f"the map {target.name!r} must end in .json; write {target.with_suffix('.json').name}"
            )
        cells = target.with_suffix(".safetensors")
        with replacing(cells) as temporary:
            save_file({name: getattr(self, name) for name in _CELLS}, temporary)
        write_text(target, _MAP.text(self.map) + "\n")
        return [target, cells]


def load_mapped(path: Path | str) -> Mapped:
    """Read what `Mapped.save` wrote.

    Raises `InvalidModelError` where a file is damaged or they do not belong together.
    """
    target = Path(path)
    found = _MAP.load(target)
    try:
        tensors = load_file(target.with_suffix(".safetensors"))
        mapped = Mapped(found, *(tensors[name] for name in _CELLS))
    except (OSError, KeyError, SafetensorError) as error:
        raise InvalidModelError(
            f"the cells beside {target} cannot be read: {error}; map the model again"
        ) from None
    if _digest([mapped.state, mapped.weight, mapped.sign]) != found.cells:
        raise InvalidModelError(
            f"the cells beside {target} are not those that it was written with; map the model again"
        )
    return mapped


def map_model(
    model: object,
    array: CrossbarArray,
    *,
    example_inputs: ExampleInputs = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> Mapped:
    """Every weight of the sites, in any format, on the nearest level of the array's devices, in cells.

    Weights nearer to zero than to the least level have no cell; those on levels already, as `Crossbar` leaves
    them, keep their values. Raises `PlanError` where an array for fragments of one sign would have to hold
    others, `UsageError` for no site or an array that keeps weights with an offset.
    """
    layers = layers_of(open_model(model, example_inputs), model)
    chosen = [layer for name, layer in layers.items() if selects(name, include, exclude)]
    if not chosen:
        raise UsageError(
            f"include={tuple(include)}, exclude={tuple(exclude)} leave no site to map; the model has: "
            f"{', '.join(layers) or 'none'}"
        )
    levels, matrices, values, sets = device_levels(array), list[MappedMatrix](), list[Tensor](), 0
    for layer in chosen:
        for number, (_, stack) in enumerate(matrices_of(layer)):
            found, made = _nearest(levels, stack)
            together = placed_together([matrix != 0 for matrix in made], array, sets)
            sets += array_sets(place for places in together for place in places)
            for group, (matrix, places) in enumerate(zip(made, together, strict=True)):
                depth, columns = matrix.shape
                matrices.append(
                    MappedMatrix(layer.site.name, number, group, depth, columns, found.scale or 0.0, places)
                )
                values.append(
                    torch.where(matrix == 0, 0, found.places(matrix) if found.scale else 0)
                    * matrix.sign().long()
                )
    cells = _filled(array, matrices, values, sets)
    return Mapped(ArrayMap(array, tuple(matrices), sets, _digest(cells)), *cells)


def _nearest(levels: DeviceLevels, weight: Tensor) -> tuple[DeviceLevels, Tensor]:
    """The levels of least squared error, and the nearest weight on them or at zero.

    What is left out decides on the scale, and the scale on that.
    """
    kept, found = weight, levels.frozen(weight)
    for _ in range(_TURNS):
        kept = torch.where(weight.abs() < 0.5 * levels.magnitudes[0] * (found.scale or 0.0), 0, weight)
        found = levels.frozen(kept)
    return found, found.project(kept)


def layers_of(opened: Model, model: object) -> dict[str, Layer]:
    """What stands at every site.

    The dense layer, or what replaced it, also where that was done before the model was opened.
    """
    found = {
        site.name: opened.layer(site.name)
        or Layer(site, DENSE, {"kernel": opened.weight(site.name)}, opened.bias(site.name))
        for site in opened.sites()
    }
    if isinstance(model, nn.Module):
        found |= {
            name: module.layer()
            for name, module in model.named_modules()
            if isinstance(module, Factorized) and name not in found
        }
    return {name: replace(layer, site=_seen(layer.site, name)) for name, layer in found.items()}


def _seen(site: Site, name: str) -> Site:
    """A site by that name, seen running once where it never was."""
    return replace(site, name=name, extents=site.extents or (kind_of(site).typical(site),))


def _filled(
    array: CrossbarArray, matrices: Iterable[MappedMatrix], values: Iterable[Tensor], sets: int
) -> list[Tensor]:
    """State, weight and sign of every cell, from the levels of the weights.

    Counted from 1, with their signs, 0 for none.
    """
    shape = (sets * array.copies, array.rows, array.columns)
    state, sign = torch.zeros(shape, dtype=torch.int16), torch.zeros(shape, dtype=torch.int8)
    weight, states = torch.full(shape, -1, dtype=torch.int32), states_of(array)
    for matrix, signed in zip(matrices, values, strict=True):
        for place in matrix.places:
            rows, columns = torch.tensor(place.rows)[:, None], torch.tensor(place.columns)
            level, number = signed[rows, columns], (rows * matrix.columns + columns).int()
            if array.signs == "fragments":
                _check_signs(level, place, matrix.site)
            for copy, digit, cells in cells_of(place, array):
                held = _held(level, copy, array)
                held_states = states[(level.abs() - 1).clamp_min(0), digit] + 1
                state[copy][cells] = torch.where(held, held_states, 0).short()
                weight[copy][cells] = torch.where(held, number, -1)
                sign[copy][cells] = torch.where(held, level.sign(), 0).to(torch.int8)
    return [state, weight, sign]


def _held(level: Tensor, copy: int, array: CrossbarArray) -> Tensor:
    """Which weights an array holds: those of its sign."""
    if array.signs != "pair":
        return level != 0
    return level > 0 if copy % array.copies < array.copies // 2 else level < 0


def cells_of(place: Place, array: CrossbarArray) -> list[tuple[int, int, tuple[slice, slice]]]:
    """The arrays with a copy of a block: number of the array, digit that it holds, and where."""
    first, rows = place.array * array.copies, slice(place.row, place.row + len(place.rows))
    start, stop, d = place.column, place.column + len(place.columns), array.digits
    if array.slices == "columns":
        return [
            (first + p, j, (rows, slice(start * d + j, stop * d, d)))
            for p in range(array.polarities)
            for j in range(d)
        ]
    return [
        (first + p * d + j, j, (rows, slice(start, stop))) for p in range(array.polarities) for j in range(d)
    ]


def _check_signs(level: Tensor, place: Place, site: str) -> None:
    for part in torch.split(level, list(place.groups)):
        if bool(((part > 0).any(0) & (part < 0).any(0)).any()):
            raise PlanError(
                f"site {site!r} has fragments with weights of both signs; train it with Crossbar for this "
                "array, or take an array with signs: pair"
            )


def _digest(cells: Iterable[Tensor]) -> str:
    found = hashlib.blake2b(digest_size=20)
    for tensor in cells:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def _check(found: ArrayMap) -> None:
    """Raises `ValueError` for a place outside its arrays or its matrix."""
    array = found.array
    array.sound()
    for matrix in found.matrices:
        for place in matrix.places:
            inside = (
                place.array < found.sets
                and place.row + len(place.rows) <= array.rows
                and place.column + len(place.columns) <= array.width
            )
            if (
                not inside
                or max(place.rows, default=0) >= matrix.depth
                or max(place.columns, default=0) >= matrix.columns
            ):
                raise ValueError(f"a block of {matrix.site!r} lies outside its arrays or its matrix: {place}")
            if sum(place.groups) != len(place.rows):
                raise ValueError(
                    f"{place.groups} rows of {matrix.site!r} are driven together, of {len(place.rows)}"
                )


_MAP = register_document(
    Document(
        "map of crossbar arrays",
        ArrayMap,
        InvalidModelError,
        "it is the .json that `tdpass map` writes",
        VERSION,
        sound=_check,
    )
)
