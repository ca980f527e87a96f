"""Running one forward of a model through its hooks: what rank 0 and every sidecar do alike."""
