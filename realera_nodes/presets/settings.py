"""A preset's printed hyper-parameters as a config."""

from __future__ import annotations

from ..core.refinement import RefinementConfig
from ..core.suppression import SuppressionConfig
from ..mass_config import MassConfig
from . import Preset


def preset_config(preset: Preset, method: str = "mace") -> MassConfig:
    """The paper's settings for a preset; what its tables do not print is by its concepts' kind."""
    kind, m = preset.concepts[0].kind, preset.method
    if m.prior == "weights":  # the object variant: lambda_1 is the weight of ||W' - W||^2
        refinement = RefinementConfig.for_kind(kind, lambda_1=0.0, lambda_2=0.0, mu=m.lambda_1)
    else:
        refinement = RefinementConfig.for_kind(kind, lambda_1=m.lambda_1, lambda_2=m.lambda_2, lambda_3=m.lambda_3 or 0.0)
    suppression = SuppressionConfig.for_kind(
        kind, steps=m.steps, lr=m.lr, rank=m.rank, images=m.images, t1=m.t1, t2=m.t2, gamma=m.gamma
    )
    return MassConfig(method, refinement=refinement, suppression=suppression)
