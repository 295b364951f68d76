"""The nodes by id, with the names that people see."""

from __future__ import annotations

DISPLAY = {
    "RealEra_Concept": "Erasure Concept", "RealEra_MineNeighbors": "Mine Neighbor Concepts",
    "RealEra_ClosedForm": "Closed-Form Edit W_K/W_V", "RealEra_TrainLora": "Train Erasure LoRA",
    "RealEra_SaveLora": "Save Erasure LoRA", "RealEra_SaveCheckpoint": "Save Erased Checkpoint",
    "RealEra_Report": "Erasure Report", "RealEra_Erase": "Erase Concept (RealEra)",
    "RealEra_BuildPrior": "Build Prior", "RealEra_SavePrior": "Save Prior", "RealEra_LoadPrior": "Load Prior",
    "RealEra_Refinement": "MACE Refinement", "RealEra_TrainSuppression": "Train Suppression LoRA",
    "RealEra_AddLora": "Add Erasure LoRA", "RealEra_FuseLoras": "Fuse Erasure LoRAs",
    "RealEra_EraseMany": "Erase Many Concepts",
    "RealEra_Uce": "UCE Edit", "RealEra_TrainEsd": "Train ESD",
}  # fmt: skip
