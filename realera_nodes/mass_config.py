"""Settings of a mass erasure."""

from __future__ import annotations

from dataclasses import dataclass, field

from .core.alignment import AlignmentConfig
from .core.errors import ErasureError
from .core.neighbors import NeighborConfig
from .core.refinement import RefinementConfig
from .core.suppression import SuppressionConfig

METHODS = ("mace", "realera-mass")
FUSIONS = ("closed-form", "sum", "none")


@dataclass(frozen=True)
class MassConfig:
    """Everything a mass erasure is told beside its concepts.

    Attributes:
        method: "mace", or "realera-mass": neighbors join the refinement, and noise alignment trains the LoRAs
        refine: do the closed-form refinement
        fusion: "closed-form" (Eq. 7), "sum" (Eq. 6, the ablation), or "none": no LoRA is trained, the refinement is all
        suppression: of "mace"; alignment, neighbors: of "realera-mass"
    """

    method: str = "mace"
    refine: bool = True
    fusion: str = "closed-form"
    refinement: RefinementConfig = field(default_factory=RefinementConfig)
    suppression: SuppressionConfig = field(default_factory=SuppressionConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    neighbors: NeighborConfig = field(default_factory=NeighborConfig)

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("fusion", FUSIONS)):
            if getattr(self, name) not in known:
                raise ErasureError(f'{name} is "{getattr(self, name)}": choose one of {", ".join(known)}.')
        if not self.refine and self.fusion == "none":
            raise ErasureError("refine is off and fusion is none: nothing would be erased; switch one of them on.")

    @property
    def training(self) -> SuppressionConfig | AlignmentConfig:
        """Settings of the LoRAs."""
        return self.suppression if self.method == "mace" else self.alignment
