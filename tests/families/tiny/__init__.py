"""Tiny models of every family, one file a family, built from ComfyUI's own classes, and calls of them.

Sizes are odd on purpose: tokens, heads and frames that no number of ranks divides. A builder is called with what differs
from the plain model, and returns (model, call). cases.py beside this folder lists what is tested.
"""

from .common import Tiny, mask, noise, times

__all__ = ["Tiny", "mask", "noise", "times"]
