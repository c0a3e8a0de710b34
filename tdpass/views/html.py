"""HTML built as values, so that text is escaped unless it is already markup."""

from __future__ import annotations

import html
from collections.abc import Iterable

from tdpass.views.units import plain

_VOID = frozenset({"input", "wbr"})


class Html(str):
    """Finished markup; only `tag` and `join` make it."""

    __slots__ = ()


def text(value: object) -> Html:
    """Text as markup: control characters made visible, special characters escaped."""
    return Html(html.escape(plain(value), quote=True))


def tag(element: str, /, *children: Html | str | None, **attributes: object) -> Html:
    """An element.

    Children that are not markup are escaped and None is left out.  An attribute is left out when None or
    False and bare when True; `class_` stands for `class` and `_` for `-`, so `aria_label` is `aria-label`.
    """
    parts = [element]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-")
        parts.append(label if value is True else f'{label}="{text(value)}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening) if element in _VOID else Html(f"{opening}{join(children)}</{element}>")


def join(parts: Iterable[Html | str | None], between: str = "") -> Html:
    """Markup and texts one after another."""
    return Html(
        between.join(part if isinstance(part, Html) else text(part) for part in parts if part is not None)
    )


def table(headers: Iterable[Html], rows: Iterable[Html], label: str, **attributes: object) -> Html:
    """A table in a box of its own that scrolls sideways, and can be scrolled from the keyboard."""
    body = tag(
        "table",
        tag("caption", label, class_="unseen"),
        tag("thead", tag("tr", *headers)),
        tag("tbody", *rows),
        **attributes,
    )
    return tag("div", body, class_="scroll", tabindex="0", role="region", aria_label=label)


def column(title: str, number: bool = False) -> Html:
    """A column header."""
    return tag("th", title, scope="col", class_="number" if number else None)


def spaced(value: str) -> Html:
    """A short text that must not break, such as a number and its unit."""
    return tag("span", value, class_="keep")
