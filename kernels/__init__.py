"""Kernels: fused operators, each with a reference that every implementation is checked against."""

from __future__ import annotations

if (
    __name__ == "kernels"
):  # imported from the repository root, where this folder hides PyPI's package of that name

    def __getattr__(name: str) -> object:
        """Refuse every use, but not the bare import.

        Transformers imports `kernels` only to ask for its version.
        """
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"kernels/ is a part of tdpass: import tdpass.kernels; to get {name!r} from PyPI's kernels, "
            "leave this folder or use `python -P`"
        )
