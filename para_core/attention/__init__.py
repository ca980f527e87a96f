"""Attention on cut tokens: local kernels, and the exchange between ranks around them."""
