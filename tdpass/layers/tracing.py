"""What torch does with a module that is called: whether it writes down, or transforms, what it runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_traced(x: Tensor) -> bool:
    """Whether the operators called on x are written down or looked at, rather than only run.

    Then what is packed of weights belongs into none of them: an edit of the weights would not reach it.
    """
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or type(x) is not Tensor:
        return True
    return bool(torch._C._is_tracing() or torch._C._len_torch_dispatch_stack())


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation goes through what is called.

    The fused operators have a rule for neither: `vmap` fails on them, and `jvp` takes them for constants.
    torch.compile is told what holds where it traces, and compiles again where something else does.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# what torch.compiler.assume_constant_result does, which imports Dynamo
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]
