"""A kernel that does nothing for a while: what a message looks like to the card that waits for it."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer


@triton.jit(do_not_specialize=["nanoseconds"])  # each length would be compiled anew
def wait(nanoseconds):
    begin = globaltimer()
    now = begin
    while now - begin < nanoseconds.to(tl.int64):
        now = globaltimer()
