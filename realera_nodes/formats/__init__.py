"""Names and files: key maps, LoRA and checkpoint writers, metadata, streaming safetensors."""
