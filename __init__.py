"""RealEra nodes: the one place where ComfyUI enters. The nodes themselves are not written yet; see README.md."""
