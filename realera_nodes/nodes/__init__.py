"""ComfyUI nodes: schema, call, report. No mathematics."""

from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io

from .closed_form import ClosedForm
from .concept import ErasureConcept
from .erase import EraseConcept
from .erase_many import EraseMany
from .esd import TrainEsd
from .fuse import AddLora, FuseLoras
from .mine import MineNeighbors
from .prior import BuildPrior, LoadPrior, SavePrior
from .refinement import Refinement
from .report import ErasureReport
from .save import SaveCheckpoint, SaveLora
from .suppression import TrainSuppression
from .train import TrainLora
from .uce import UceEdit

NODES: list[type[io.ComfyNode]] = [
    ErasureConcept, MineNeighbors, ClosedForm, TrainLora, SaveLora, SaveCheckpoint, ErasureReport, EraseConcept,
    BuildPrior, SavePrior, LoadPrior, Refinement, TrainSuppression, AddLora, FuseLoras, EraseMany,
    UceEdit, TrainEsd,
]  # fmt: skip


class RealEraExtension(ComfyExtension):
    """The pack as ComfyUI loads it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
