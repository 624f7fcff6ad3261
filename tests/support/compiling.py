"""How the tests compile: quickly where they compare mathematics, as users do where they measure.

Compilation is most of what the tests cost. Without what makes programs fast, XLA compiles a layer with its
gradients in an eighth of the time (38 instead of 307 ms; two thirds from JAX 0.12 on, which lacks one of the
flags), and they compute the same to rounding. Accuracy, and what a program does, are measured in what users
run: that is what `optimized` is for.
"""

import functools

import jax

# By flag: what users have, what is fast. XLA ends a process for a flag that it does not know, so they are
# given to versions that have been seen to know them.
_OPTIONS = {
    "xla_backend_optimization_level": (3, 0),
    "xla_llvm_disable_expensive_passes": (False, True),
    "xla_cpu_parallel_codegen_split_count": (32, 1),
}
if jax.__version_info__ < (0, 12):
    _OPTIONS["xla_cpu_use_fusion_emitters"] = (True, False)
if jax.__version_info__ >= (0, 13):
    _OPTIONS = {}

FAST_FLAGS = " ".join(f"--{name}={str(fast).lower()}" for name, (_, fast) in _OPTIONS.items())

optimized = functools.partial(
    jax.jit, compiler_options={name: usual for name, (usual, _) in _OPTIONS.items()}
)
