"""Every modelled machine: constants described, sourced and sound, and the page of them up to date."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

import tdpass
from tdpass.errors import UsageError
from tdpass.targets import TARGETS, open_target
from tdpass.targets.constants import Constants
from tdpass.targets.modelled import ModelledTarget
from tdpass.views.machines import page

KINDS = sorted(Constants.__subclasses__(), key=lambda kind: kind.noun)
MACHINES = [pytest.param(kind, name, id=name) for kind in KINDS for name in kind.presets()]
PAGE = Path(tdpass.__file__).parents[1] / "docs" / "machines.md"


def test_every_modelled_target_is_one_of_constants() -> None:
    modelled = [target for target in TARGETS if issubclass(target, ModelledTarget)]
    assert len(modelled) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.noun)
def test_every_constant_has_a_unit_and_a_meaning(kind: type[Constants]) -> None:
    wanted = [entry.name for entry in fields(kind) if entry.name not in {"source", "sources"}]
    assert sorted(kind.described()) == sorted(wanted)
    assert all(len(meaning) > 3 for _, meaning in kind.described().values())
    for name, (unit, _) in kind.described().items():
        assert (unit.startswith("J")) is name.endswith("_joules"), name
        assert (unit == "s") is name.endswith("_seconds"), name


@pytest.mark.parametrize(("kind", "name"), MACHINES)
def test_every_figure_of_a_machine_has_a_source(kind: type[Constants], name: str) -> None:
    machine = kind.load(name)
    assert machine.source
    named = {
        field
        for field, value in machine.figures().items()
        if field.endswith(("_joules", "_area", "watts")) and value
    }
    general = "energ" in machine.source or "read" in machine.source
    assert general or named <= set(machine.sources)


@pytest.mark.parametrize(("kind", "name"), MACHINES)
def test_machines_are_read_from_files_and_what_is_none_is_an_error(
    kind: type[Constants], name: str, tmp_path: Path
) -> None:
    text = kind.presets()[name].read_text()
    own = tmp_path / "own.yaml"
    own.write_text(text)
    assert kind.load(str(own)) == kind.load(name)
    target = next(
        target.name
        for target in TARGETS
        if issubclass(target, ModelledTarget) and kind.__module__ == target.__module__
    )
    assert isinstance(open_target(f"{target}:{own}", "torch"), ModelledTarget)
    own.write_text(text.replace("sources:", "sources:\n  colour: red", 1))
    with pytest.raises(UsageError, match="names 'colour', which is no constant"):
        kind.load(str(own))
    own.write_text(
        "\n".join(line if not line.startswith("rows:") else "rows: 0" for line in text.splitlines())
    )
    with pytest.raises(UsageError, match="rows is 0"):
        kind.load(str(own))
    with pytest.raises(UsageError, match=", ".join(kind.presets())):
        kind.load("nowhere")


def test_the_page_of_constants_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "write it anew: python -m tdpass.views.machines > docs/machines.md"
