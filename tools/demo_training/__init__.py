"""Everything that made the embedded model, stage by stage. See docs/demo-model.md for the commands."""
