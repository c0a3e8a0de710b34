"""Joint changes: what several sites become together.  Importing this package registers all of them."""

from __future__ import annotations

import importlib
import pkgutil

from tdpass.planner.joint.base import JOINT_CHANGES as JOINT_CHANGES
from tdpass.planner.joint.base import Carries as Carries
from tdpass.planner.joint.base import JointChange as JointChange
from tdpass.planner.joint.base import Network as Network
from tdpass.planner.joint.base import Variant as Variant
from tdpass.planner.joint.base import always as always
from tdpass.planner.joint.base import register_joint_change as register_joint_change
from tdpass.planner.joint.carrying import carries as carries
from tdpass.planner.joint.carrying import put as put
from tdpass.planner.joint.options import JointOption as JointOption
from tdpass.planner.joint.options import Together as Together
from tdpass.planner.joint.options import joint_layers as joint_layers
from tdpass.planner.joint.options import joint_options as joint_options
from tdpass.planner.joint.unoffered import unoffered as unoffered

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
