"""What tests of inference share: the compiler is told to hurry, since compiling is most of what those that use jax take."""

import os

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
