"""Processes that share a forward: how they are started, how they talk, and the collectives between them."""
