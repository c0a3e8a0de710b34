"""tdpass: a compiler-style transformation of neural networks into smaller and faster ones."""

from __future__ import annotations

import tdpass.kernels.gpu as _gpu
import tdpass.passes as _passes
from tdpass.artifact import Artifact as Artifact
from tdpass.artifact import load_plan as load_plan
from tdpass.cost import Budget as Budget
from tdpass.cost import Cost as Cost
from tdpass.data import as_batches as as_batches
from tdpass.deploy import deploy as deploy
from tdpass.deploy import load_deployed as load_deployed
from tdpass.dynamo.backend import invalidate as invalidate
from tdpass.dynamo.backend import register as _register_backend
from tdpass.errors import BudgetError as BudgetError
from tdpass.errors import DifferenceError as DifferenceError
from tdpass.errors import InvalidModelError as InvalidModelError
from tdpass.errors import PassError as PassError
from tdpass.errors import PlanError as PlanError
from tdpass.errors import TdpassError as TdpassError
from tdpass.errors import TrainingError as TrainingError
from tdpass.errors import UnsupportedError as UnsupportedError
from tdpass.errors import UsageError as UsageError
from tdpass.kernels.binding import load_cached as _load_binding
from tdpass.kernels.native import onnx_ops_path as onnx_ops_path
from tdpass.layers.adaptive import set_bits as set_bits
from tdpass.layers.adaptive import set_rank as set_rank
from tdpass.layers.adaptive import set_width as set_width
from tdpass.machine import installed_version as _installed_version
from tdpass.methods.run import train as train
from tdpass.models import Batch as Batch
from tdpass.models import dequantize as dequantize
from tdpass.models import open_attention as open_attention
from tdpass.models import open_bilinear as open_bilinear
from tdpass.models import open_embedding_bags as open_embedding_bags
from tdpass.models import open_model as open_model
from tdpass.models import open_recurrent as open_recurrent
from tdpass.models.torch.ordinary import ordinary as ordinary
from tdpass.pipeline import Pass as Pass
from tdpass.pipeline import Pipeline as Pipeline
from tdpass.pipeline import register_pass as register_pass
from tdpass.planner.divergence import Divergence as Divergence
from tdpass.planner.rank_plan import RankPlan as RankPlan
from tdpass.planner.trials import Promise as Promise
from tdpass.raw import Raw as Raw
from tdpass.report import Report as Report
from tdpass.sources.saved import load as load
from tdpass.verbs import compress as compress
from tdpass.verbs import make_plan as make_plan
from tdpass.verbs import verify as verify

__version__ = _installed_version()
__all__ = [
    "Artifact",
    "Batch",
    "Budget",
    "BudgetError",
    "Cost",
    "DifferenceError",
    "Divergence",
    "InvalidModelError",
    "Pass",
    "PassError",
    "Pipeline",
    "PlanError",
    "Promise",
    "RankPlan",
    "Raw",
    "Report",
    "TdpassError",
    "TrainingError",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "as_batches",
    "compress",
    "deploy",
    "dequantize",
    "invalidate",
    "load",
    "load_deployed",
    "load_plan",
    "make_plan",
    "onnx_ops_path",
    "open_attention",
    "open_bilinear",
    "open_embedding_bags",
    "open_model",
    "open_recurrent",
    "ordinary",
    "register_pass",
    "set_bits",
    "set_rank",
    "set_width",
    "train",
    "verify",
]

_register_backend()
_load_binding()
del _gpu, _installed_version, _load_binding, _passes, _register_backend
