"""RealEra nodes: the one place where ComfyUI enters."""

from __future__ import annotations

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI after it has loaded the pack. Imported here, so that tools may read the folder without ComfyUI."""
    from .realera_nodes.nodes import RealEraExtension

    return RealEraExtension()
