"""The named ways in which `sabotage.py` breaks the package, each with the tests that should be red."""

from typing import NamedTuple


class Break(NamedTuple):
    file: str
    old: str
    new: str
    tests: str


BREAKS = {
    "the shift is 0": Break(
        "jbn/_core/shift.py",
        "return _exact_mean(_some_rows(x, axes).astype(dtype), axes)",
        "return 0 * _exact_mean(_some_rows(x, axes).astype(dtype), axes)",
        "tests/test_numerics.py",
    ),
    "x is normalized by the unbiased variance": Break(
        "jbn/_core/statistics.py",
        "_not_negative(per_row(second, total) - rest * rest)",
        "_not_negative(per_row(second, total - 1) - rest * rest)",
        "tests/test_forward.py",
    ),
    "epsilon is left out": Break(
        "jbn/_core/statistics.py",
        "square = var + np.asarray(epsilon, var.dtype)",
        "square = var + np.asarray(0, var.dtype)",
        "tests/test_forward.py",
    ),
    "a constant channel without epsilon is NaN": Break(
        "jbn/_core/statistics.py",
        "positive = square != 0",
        "positive = square == square",
        "tests/test_numerics.py",
    ),
    "devices weigh the same": Break(
        "jbn/_core/statistics.py",
        "share = total / or_one(all_rows)[None]",
        "share = jnp.ones_like(total) / total.shape[0]",
        "tests/test_laws.py",
    ),
    "the spread of the means is forgotten": Break(
        "jbn/_core/statistics.py",
        "jnp.zeros_like(var)) + dot(apart, apart)",
        "jnp.zeros_like(var))",
        "tests/test_laws.py",
    ),
    "devices keep their moments to themselves": Break(
        "jbn/_core/statistics.py", "reduction.psum(table)", "table", "tests/test_devices.py"
    ),
    "many devices keep their moments to themselves": Break(
        "jbn/_core/statistics.py",
        "total, values, first, second = reduction.psum(sums)",
        "total, values, first, second = sums",
        "tests/test_devices.py",
    ),
    "the gradient forgets the other devices": Break(
        "jbn/_core/statistics.py",
        "per_row(reduction.pmean(sums), total / reduction.size)",
        "per_row(sums, total / reduction.size)",
        "tests/test_devices.py",
    ),
    "groups of devices are one batch": Break(
        "jbn/_core/devices.py",
        'groups = {} if self.groups is None else {"axis_index_groups": self.groups}',
        "groups = {}",
        "tests/test_axis_names.py",
    ),
    "sums by pairs lose the second": Break(
        "jbn/_core/xla.py",
        "return plain_sums(lax.real(both), lax.imag(both), axes)",
        "return plain_sums(lax.real(both), lax.real(both), axes)",
        "tests/test_sums.py",
    ),
    "a guess far from the mean is good enough": Break(
        "jbn/_core/statistics.py",
        "near_it = jnp.all(sums.rest * sums.rest <= sums.var)",
        "near_it = jnp.asarray(True)",
        "tests/test_guess.py",
    ),
    "what is masked counts": Break(
        "jbn/_core/statistics.py",
        "values = repeats * jnp.sum(used(weights), axes",
        "values = repeats * jnp.sum(jnp.ones_like(weights), axes",
        "tests/test_laws.py",
    ),
    "fractional weights count as whole": Break(
        "jbn/_core/shift.py",
        "if weights is not None and weights.dtype != bool:\n        values = values",
        "if False:\n        values = values",
        "tests/test_forward.py",
    ),
    "statistics are in half precision": Break(
        "jbn/_core/dtypes.py",
        "np.float64 if double else np.float32)",
        "np.float64 if double else np.float16)",
        "tests/test_numerics.py",
    ),
    "the gradient forgets the mean": Break(
        "jbn/_core/normalize.py",
        "constant = -a * mean_dot.astype(kind)",
        "constant = 0 * a * mean_dot.astype(kind)",
        "tests/test_gradients.py",
    ),
    "the gradient forgets the variance": Break(
        "jbn/_core/normalize.py",
        "slope = -a * (r * r * half_var_dot).astype(kind)",
        "slope = -a * (0 * r * r * half_var_dot).astype(kind)",
        "tests/test_gradients.py",
    ),
    "the gradient forgets the rest of the mean": Break(
        "jbn/_core/normalize.py",
        "constant = constant - measured.rest.astype(kind) * slope",
        "constant = constant - 0 * measured.rest.astype(kind) * slope",
        "tests/test_gradients.py",
    ),
    "the second derivative forgets the moments": Break(
        "jbn/_core/normalize.py",
        "still._replace(rest=mean_dot, var=var_dot)",
        "still",
        "tests/test_higher_order.py",
    ),
    "what is masked has a gradient": Break(
        "jbn/_core/normalize.py",
        "y_dot = zeroed(own + shared, weights)",
        "y_dot = (own + shared)",
        "tests/test_gradients.py",
    ),
    "what is masked may be NaN": Break(
        "jbn/_core/affine.py",
        "return jnp.where(used(weights), x, lax.stop_gradient(finite))",
        "return x",
        "tests/test_gradients.py",
    ),
    "relu passes the gradient where residual and y cancel": Break(
        "jbn/_core/normalize.py",
        "lax.optimization_barrier(positive) > 0",
        "lax.optimization_barrier(positive) >= 0",
        "tests/test_after.py",
    ),
    "momentum weighs the new statistics": Break(
        "jbn/_core/running.py",
        "(momentum, 1 - momentum)",
        "(1 - momentum, momentum)",
        "tests/test_running.py",
    ),
    "a batch without rows is remembered": Break(
        "jbn/_core/running.py",
        "name: jnp.where(seen, v, batch_stats[name].astype(v.dtype))",
        "name: v",
        "tests/test_running.py",
    ),
    "a weak type is lost": Break(
        "jbn/_core/running.py",
        "new = jnp.vectorize(lax.full_like)(old, new)",
        "pass",
        "tests/test_running.py",
    ),
    "the stored variance is biased": Break(
        "jbn/_core/running.py",
        "return moments.var * _bessel(moments.count) if unbiased else moments.var",
        "return moments.var",
        "tests/test_remembering.py",
    ),
    "a variance that is inf is remembered": Break(
        "jbn/_core/running.py",
        '(("mean", moments.mean), ("var", _stored(moments, unbiased)))',
        '(("mean", moments.mean),)',
        "tests/test_remembering.py",
    ),
    "debiasing is one update behind": Break(
        "jbn/_core/running.py",
        "log_share = jnp.maximum(count, 1)",
        "log_share = jnp.maximum(count + 1, 1)",
        "tests/test_remembering_debiased.py",
    ),
    "statistics have gradients": Break(
        "jbn/_core/forward.py",
        "return y, lax.stop_gradient(new_stats), moments",
        "return y, new_stats, moments",
        "tests/test_flax_differences.py",
    ),
    "groups take every so many-th example": Break(
        "jbn/_core/ghost.py",
        "examples = (1, 1) if of_all else (groups, shape[batch] // groups)",
        "examples = (1, 1) if of_all else (shape[batch] // groups, groups)",
        "tests/test_groups.py",
    ),
    "the correction of renorm has a gradient": Break(
        "jbn/_core/renorm.py",
        "r = lax.stop_gradient(jnp.where(some, jnp.clip(r, r_min, r_max), jnp.ones_like(r)))",
        "r = jnp.where(some, jnp.clip(r, r_min, r_max), jnp.ones_like(r))",
        "tests/test_renorm.py",
    ),
    "a frozen layer has gradients": Break(
        "jbn/linen/_layer.py",
        "params = jax.lax.stop_gradient(params)",
        "pass",
        "tests/test_layer_options.py",
    ),
}
