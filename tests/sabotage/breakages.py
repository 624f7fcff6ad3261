"""The named ways in which `__main__.py` breaks the package, each with the tests that should be red."""

from typing import NamedTuple


class Break(NamedTuple):
    file: str
    old: str
    new: str
    tests: str


BREAKS = {
    "the shift is 0": Break(
        "jbn/_core/shift.py",
        "return _exact_mean(subsample(x, axes).astype(dtype), axes)",
        "return 0 * _exact_mean(subsample(x, axes).astype(dtype), axes)",
        "tests/core/test_numerics.py",
    ),
    "rows that are masked make the shift": Break(
        "jbn/_core/shift.py",
        "key = jnp.where(share > 0, key",
        "key = jnp.where(share >= 0, key",
        "tests/core/test_shift.py",
    ),
    "x is normalized by the unbiased variance": Break(
        "jbn/_core/statistics.py",
        "_not_negative(divide_by_count(second, weight) - delta * delta)",
        "_not_negative(divide_by_count(second, weight - 1) - delta * delta)",
        "tests/core/test_forward.py",
    ),
    "epsilon is left out": Break(
        "jbn/_core/statistics.py",
        "square = var + np.asarray(epsilon, var.dtype)",
        "square = var + np.asarray(0, var.dtype)",
        "tests/core/test_forward.py",
    ),
    "a constant channel without epsilon is NaN": Break(
        "jbn/_core/statistics.py",
        "positive = square != 0",
        "positive = square == square",
        "tests/core/test_numerics.py",
    ),
    "devices weigh the same": Break(
        "jbn/_core/statistics.py",
        "share = weight / safe_count(total)[None]",
        "share = jnp.ones_like(weight) / weight.shape[0]",
        "tests/core/test_laws.py",
    ),
    "the variance of the means is forgotten": Break(
        "jbn/_core/statistics.py",
        "jnp.zeros_like(var)) + real_product(from_mean, from_mean)",
        "jnp.zeros_like(var))",
        "tests/core/test_laws.py",
    ),
    "devices keep their moments to themselves": Break(
        "jbn/_core/statistics.py", "reduction.psum(table)", "table", "tests/core/test_devices.py"
    ),
    "many devices keep their moments to themselves": Break(
        "jbn/_core/statistics.py",
        "weight, num_valid, first, second = reduction.psum(sums)",
        "weight, num_valid, first, second = sums",
        "tests/core/test_devices.py",
    ),
    "the gradient forgets the other devices": Break(
        "jbn/_core/statistics.py",
        "divide_by_count(reduction.pmean(sums), weight / reduction.size)",
        "divide_by_count(sums, weight / reduction.size)",
        "tests/core/test_devices.py",
    ),
    "groups of devices are one batch": Break(
        "jbn/_core/devices.py",
        'groups = {} if self.groups is None else {"axis_index_groups": self.groups}',
        "groups = {}",
        "tests/core/test_axis_names.py",
    ),
    "sums by pairs lose the second": Break(
        "jbn/_core/xla.py",
        "return plain_sum_pair(lax.real(both), lax.imag(both), axes)",
        "return plain_sum_pair(lax.real(both), lax.real(both), axes)",
        "tests/core/test_xla.py",
    ),
    "a hint far from the mean is good enough": Break(
        "jbn/_core/statistics.py",
        "is_near = jnp.all(found.delta * found.delta <= found.var)",
        "is_near = jnp.asarray(True)",
        "tests/core/test_shift_hint.py",
    ),
    "what is masked counts": Break(
        "jbn/_core/statistics.py",
        "num_valid = repeats * jnp.sum(is_valid(weights), axes",
        "num_valid = repeats * jnp.sum(jnp.ones_like(weights), axes",
        "tests/core/test_laws.py",
    ),
    "fractional weights count as whole": Break(
        "jbn/_core/weights.py",
        "if weights is not None and weights.dtype != bool:\n        values = values",
        "if False:\n        values = values",
        "tests/core/test_forward.py",
    ),
    "statistics are in half precision": Break(
        "jbn/_core/dtypes.py",
        "np.float64 if double else np.float32)",
        "np.float64 if double else np.float16)",
        "tests/core/test_numerics.py",
    ),
    "the gradient forgets the mean": Break(
        "jbn/_core/normalize.py",
        "constant = -a * mean_dot.astype(dtype)",
        "constant = 0 * a * mean_dot.astype(dtype)",
        "tests/core/test_gradients.py",
    ),
    "the gradient forgets the variance": Break(
        "jbn/_core/normalize.py",
        "slope = -a * (r * r * half_var_dot).astype(dtype)",
        "slope = -a * (0 * r * r * half_var_dot).astype(dtype)",
        "tests/core/test_gradients.py",
    ),
    "the gradient forgets delta": Break(
        "jbn/_core/normalize.py",
        "constant = constant - measured.delta.astype(dtype) * slope",
        "constant = constant - 0 * measured.delta.astype(dtype) * slope",
        "tests/core/test_gradients.py",
    ),
    "the second derivative forgets the moments": Break(
        "jbn/_core/normalize.py",
        "constant._replace(delta=mean_dot, var=var_dot)",
        "constant",
        "tests/core/test_higher_order.py",
    ),
    "what is masked has a gradient": Break(
        "jbn/_core/normalize.py",
        "zero_masked(x_dot_term, inputs.weights) + xla.zero_masked_apart(affine_term, inputs.weights)",
        "x_dot_term + affine_term",
        "tests/core/test_gradients.py",
    ),
    "what is masked may be NaN": Break(
        "jbn/_core/weights.py",
        "return jnp.where(is_valid(weights), x, constants)",
        "return x",
        "tests/core/test_gradients.py",
    ),
    "relu passes the gradient where residual and y cancel": Break(
        "jbn/_core/normalize.py",
        "xla.read_again(relu_output) > 0",
        "xla.read_again(relu_output) >= 0",
        "tests/core/test_epilogue.py",
    ),
    "a sum of the backward pass leaves out the activation": Break(
        "jbn/_core/normalize.py",
        "derivative(2) * constant + derivative(3) * (slope * offset)",
        "derivative(2) * constant + slope * offset",
        "tests/core/test_activation.py",
    ),
    "a masked entry has a derivative of its activation": Break(
        "jbn/_core/normalize.py",
        "derivative = zero_masked(derivative, inputs.weights)",
        "pass",
        "tests/core/test_activation.py",
    ),
    "an activation may combine entries": Break(
        "jbn/_core/activation.py",
        'return name == "scan" and inputs.count(_PROBE) != inner[0].count(_PROBE)',
        "return False",
        "tests/core/test_activation.py",
    ),
    "momentum weighs the new statistics": Break(
        "jbn/_core/running.py",
        "for part in (momentum, 1 - momentum))",
        "for part in (1 - momentum, momentum))",
        "tests/core/test_running.py",
    ),
    "a batch without rows updates statistics": Break(
        "jbn/_core/running.py",
        "name: jnp.where(update_mask, v, batch_stats[name].astype(v.dtype))",
        "name: v",
        "tests/core/test_running.py",
    ),
    "a weak type is lost": Break(
        "jbn/_core/running.py",
        "new = jnp.vectorize(lax.full_like)(old, new)",
        "pass",
        "tests/core/test_running.py",
    ),
    "the stored variance is biased": Break(
        "jbn/_core/running.py",
        "return moments.var * _bessel(moments.count) if unbiased else moments.var",
        "return moments.var",
        "tests/core/test_running_options.py",
    ),
    "a variance that is inf updates statistics": Break(
        "jbn/_core/running.py",
        '(("mean", moments.mean), ("var", _stored_var(moments, unbiased)))',
        '(("mean", moments.mean),)',
        "tests/core/test_running_options.py",
    ),
    "debiasing is one update behind": Break(
        "jbn/_core/running.py",
        "log_share = jnp.maximum(count, 1)",
        "log_share = jnp.maximum(count + 1, 1)",
        "tests/core/test_running_debiased.py",
    ),
    "statistics have gradients": Break(
        "jbn/_core/forward.py",
        "return y, lax.stop_gradient(new_stats), moments",
        "return y, new_stats, moments",
        "tests/layers/test_flax_differences.py",
    ),
    "groups take every so many-th example": Break(
        "jbn/_core/normalize.py",
        "examples = (1, 1) if is_shared else (groups, shape[batch] // groups)",
        "examples = (1, 1) if is_shared else (shape[batch] // groups, groups)",
        "tests/core/test_groups.py",
    ),
    "the correction of renorm has a gradient": Break(
        "jbn/_core/renorm.py",
        "r = lax.stop_gradient(jnp.where(has_rows, jnp.clip(r, r_min, r_max), jnp.ones_like(r)))",
        "r = jnp.where(has_rows, jnp.clip(r, r_min, r_max), jnp.ones_like(r))",
        "tests/core/test_renorm.py",
    ),
    "a frozen layer has gradients": Break(
        "jbn/linen/_layer.py",
        "params = jax.lax.stop_gradient(params)",
        "pass",
        "tests/linen/test_layer_options.py",
    ),
    "a folded layer does not know how its batch norm's scale was rounded": Break(
        "jbn/tools/_fold/arrays.py",
        'inner = {"scale": multiply(scale, 1 / step)}',
        'inner = {"scale": multiply(scale, jnp.ones_like(step))}',
        "tests/tools/fold/test_fold_proof.py",
    ),
    "a pair is folded that no output shows": Break(
        "jbn/tools/_fold/proof.py",
        "if by_call and moves(",
        "if not by_call and moves(",
        "tests/tools/fold/test_fold_proof_cases.py",
    ),
    "x has no name for a policy": Break(
        "jbn/_core/forward.py",
        "checkpoint_name(inputs.x, X_NAME)",
        "inputs.x",
        "tests/core/test_checkpoint.py",
    ),
    "the moments have no name for a policy": Break(
        "jbn/_core/normalize.py",
        "lambda part: checkpoint_name(part, MOMENTS_NAME)",
        "lambda part: part",
        "tests/core/test_checkpoint.py",
    ),
}
