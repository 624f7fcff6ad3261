"""How the tests compile: quickly where they compare mathematics, as users do where they measure.

Compilation is nearly all that the tests cost. Of a layer with its gradients, XLA needs an eighth of the time
without its two layers of code generation that make programs fast (307 and 38 ms), and computes the same to
rounding. Accuracy, collectives and what is kept for the backward pass are measured in what users run: that
is what `optimized` is for.
"""

import functools

import jax

_AS_USERS_DO = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
    "xla_cpu_parallel_codegen_split_count": 32,
}
_FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": 1,
}
FAST_FLAGS = " ".join(f"--{name}={value}" for name, value in _FAST.items())

optimized = functools.partial(jax.jit, compiler_options=_AS_USERS_DO)
