"""Which rank holds which tokens, and the hooks that cut and gather them."""
