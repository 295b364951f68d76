"""Models behind one small protocol, and its implementations. Everything host-specific about a model is here."""
