"""ComfyUI nodes: schema, call, report. No mathematics."""

from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io

from .closed_form import ClosedForm
from .concept import ErasureConcept
from .erase import EraseConcept
from .esd import TrainEsd
from .mine import MineNeighbors
from .report import ErasureReport
from .save import SaveCheckpoint, SaveLora
from .train import TrainLora
from .uce import UceEdit

NODES: list[type[io.ComfyNode]] = [
    ErasureConcept, MineNeighbors, ClosedForm, TrainLora, SaveLora, SaveCheckpoint, ErasureReport, EraseConcept,
    UceEdit, TrainEsd,
]  # fmt: skip


class RealEraExtension(ComfyExtension):
    """The pack as ComfyUI loads it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
