"""Targets that measure single layers here and now, and remember what they measured."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tdpass.errors import UsageError
from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import cost_of, storage_of
from tdpass.formats.lines import lines_left
from tdpass.models.base import Batch, Model
from tdpass.site import Site
from tdpass.targets.base import Setting, TimedTarget, Timing
from tdpass.targets.layers import make_layer
from tdpass.targets.runtimes import Runtime
from tdpass.targets.runtimes.base import Call
from tdpass.timings import Key, Row, TimingTable, geometry_of

ROUNDS, CAREFUL_ROUNDS, MODEL_ROUNDS = 7, 25, 15
_TOGETHER_BYTES = 2**29


@dataclass(frozen=True)
class _Case:
    """A form in a runtime."""

    form: Form
    runtime: Runtime


class MeasuredTarget(TimedTarget):
    """A device, the runtimes that divide a model's layers among them, and the table of what was measured.

    Times of one call of a layer are kept per runtime.  What is measured later than the dense layer is put on
    the scale of its first time: both are measured again, and only their ratio counts, so that a busier or
    slower moment does not.
    """

    margin = 0.02

    def __init__(self, runtimes: Sequence[Runtime], cache: Path | None) -> None:
        super().__init__()
        self.runtimes = tuple(runtimes)
        self.table = TimingTable(cache)
        self.notes = self.table.notes

    @cached_property
    @abstractmethod
    def device(self) -> str:
        """What the times are good for: the name of the processor."""

    @abstractmethod
    def clock(self, calls: Sequence[Call], threads: int, rounds: int) -> list[float]:
        """Seconds of each call, all measured in turn."""

    def time(
        self, site: Site, forms: Sequence[Form], setting: Setting, careful: bool = False
    ) -> list[Timing]:
        """Seconds per form in the runtime that is fastest over all calls of the site."""
        if not site.seen:
            raise UsageError(
                f"site {site.name!r} cannot be timed: the model was not seen running; pass data= or "
                "example_inputs="
            )
        wanted = list(dict.fromkeys(forms))
        sums = {(form, runtime.name): 0.0 for form in wanted for runtime in self.runtimes}
        for extent, count in Counter(site.extents).items():
            for case, seconds in self._time_call(
                replace(site, extents=(extent,)), wanted, setting, careful
            ).items():
                sums[case.form, case.runtime.name] += count / site.samples * seconds
        best = {
            form: min((sums[form, runtime.name], runtime.name) for runtime in self.runtimes)
            for form in wanted
        }
        return [
            Timing(best[form][0], best[form][1] if math.isfinite(best[form][0]) else "") for form in forms
        ]

    def time_models(
        self, models: Sequence[Model], batch: Batch, setting: Setting, yardstick: Site | None = None
    ) -> list[float]:
        calls = [self._prepared(model, batch, setting) for model in models]
        ruler = (
            None
            if yardstick is None
            else self._ruler(replace(yardstick, extents=yardstick.extents[:1]), setting)
        )
        if ruler is None:
            return self.clock(calls, setting.threads, MODEL_ROUNDS)
        known, layer = ruler
        *times, now = self.clock([*calls, layer], setting.threads, MODEL_ROUNDS)
        return [seconds * known / now for seconds in times]

    def _ruler(self, site: Site, setting: Setting) -> tuple[float, Call] | None:
        """What one call of the dense layer took before where it is fastest, and that call.

        None where no runtime here serves it.
        """
        for case, seconds in sorted(
            self._time_call(site, [DENSE], setting, careful=False).items(), key=lambda item: item[1]
        ):
            call = case.runtime.prepare(
                make_layer(site, DENSE, setting.dtype), setting.batch, setting.threads
            )
            if call is not None and math.isfinite(seconds):
                return seconds, call
        return None

    def _prepared(self, model: Model, batch: Batch, setting: Setting) -> Call:
        for runtime in self.runtimes:
            call = runtime.prepare_model(model, batch, setting.threads)
            if call is not None:
                return call
        names = ", ".join(runtime.name for runtime in self.runtimes)
        raise UsageError(
            f"a model that came through {model.frontend} does not run in {names}; leave the runtime out of "
            "target, or export the model for it"
        )

    def _time_call(
        self, site: Site, forms: Sequence[Form], setting: Setting, careful: bool
    ) -> dict[_Case, float]:
        """Seconds of one call in each runtime; what the table lacks is measured."""
        cases = [_Case(form, runtime) for form in forms for runtime in self.runtimes]
        keys = {case: self._key(site, case, setting) for case in (*cases, *self._rulers())}
        known = self.table.get(keys.values())
        missing = [
            case
            for case in cases
            if keys[case] not in known or (careful and case.form != DENSE and not _settled(known[keys[case]]))
        ]
        for part in self._portions(site, missing):
            self._measure(site, part, setting, careful, keys)
        known = self.table.get(keys.values())
        return {case: known[keys[case]].seconds for case in cases}

    def _rulers(self) -> list[_Case]:
        return [_Case(DENSE, runtime) for runtime in self.runtimes]

    def _portions(self, site: Site, cases: Sequence[_Case]) -> Iterator[list[_Case]]:
        """Cases whose weights fit into memory together."""
        portion: list[_Case] = []
        size = 0
        for case in cases:
            held = cost_of(site, case.form).bytes
            if portion and size + held > _TOGETHER_BYTES:
                yield portion
                portion, size = [], 0
            portion.append(case)
            size += held
        if portion:
            yield portion

    def _measure(
        self, site: Site, cases: Sequence[_Case], setting: Setting, careful: bool, keys: dict[_Case, Key]
    ) -> None:
        """Measure the cases and every runtime's dense layer in turn.

        Keep the times on the scale of the first dense ones.
        """
        calls: dict[_Case, Call] = {}
        for case in dict.fromkeys((*self._rulers(), *cases)):
            call = case.runtime.prepare(
                make_layer(site, case.form, setting.dtype), setting.batch, setting.threads
            )
            if call is not None:
                calls[case] = call
        times = (
            dict(
                zip(
                    calls,
                    self.clock(list(calls.values()), setting.threads, CAREFUL_ROUNDS if careful else ROUNDS),
                    strict=True,
                )
            )
            if calls
            else {}
        )
        before = self.table.get(keys[case] for case in self._rulers())
        scales = {
            case.runtime.name: before[keys[case]].seconds / times[case]
            for case in self._rulers()
            if case in times and keys[case] in before
        }
        # a runtime that does not serve the dense layer is held against one that does
        common = next(iter(scales.values()), 1.0)
        rows: dict[Key, Row] = {}
        for case in dict.fromkeys((*self._rulers(), *cases)):
            if case.form == DENSE and keys[case] in before:
                continue
            scale = scales.get(case.runtime.name, common)
            rows[keys[case]] = (
                Row(times[case] * scale, careful) if case in times else Row(math.inf, careful=True)
            )
        self.table.put(rows)

    def _key(self, site: Site, case: _Case, setting: Setting) -> Key:
        form, runtime = case.form, case.runtime
        smaller = form.encoded and lines_left(form.on(site), form, storage_of(site, form)) is not None
        version = FORMATS.get(form.format).version
        stored = f"{form.whole.family} {version}" + " of fewer lines" * smaller
        dtype = str(setting.dtype).removeprefix("torch.")
        geometry = geometry_of(form.on(site))
        return Key(
            self.device,
            f"{runtime.name} {runtime.version()}",
            setting.threads,
            setting.batch,
            dtype,
            geometry,
            stored,
            form.rank,
        )


def _settled(row: Row) -> bool:
    """Whether measuring it again would tell nothing new."""
    return row.careful or math.isinf(row.seconds)
