"""One training step of ResNet-50 in plain JAX, so that every contestant's layer can stand in it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.contestants import Setting

BLOCKS = (3, 4, 6, 3)
BATCH, CLASSES = 128, 1000
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


class ResNet50:
    """Built by a first call, with shapes only, that makes the variables; then `__call__` runs it."""

    def __init__(self, contestant, dtype, batch=BATCH, size=224, blocks=BLOCKS):
        self.contestant, self.dtype, self.blocks = contestant, dtype, blocks
        self.x = jax.ShapeDtypeStruct((batch, size, size, 3), dtype)
        self.labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
        self.layers, self.params, self.state = {}, {}, {}
        jax.eval_shape(lambda x: self._network(x, making=True), self.x)

    def __call__(self, params, state, x):
        return self._network(x, params=params, state=state)

    def step(self, params, state, x, labels, around=None):
        """Gradient descent on the cross entropy: new parameters, new statistics, the loss.

        `around` is what the loss is wrapped in, such as `jax.checkpoint`.
        """

        def loss(params):
            logits, new = self(params, state, x)
            picked = jax.nn.log_softmax(logits.astype(jnp.float32)) * jax.nn.one_hot(labels, CLASSES)
            return -jnp.mean(jnp.sum(picked, -1)), new

        loss = loss if around is None else around(loss)
        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - (0.1 * g).astype(p.dtype), params, grads), new, value

    def _network(self, x, making=False, params=None, state=None):
        new = {}

        def weight(name, shape):
            if making:
                self.params[name] = np.zeros(shape, np.float32)
            return (self.params if making else params)[name].astype(self.dtype)

        def conv(name, x, features, size, stride=1, padding="SAME"):
            kernel = weight(name, (size, size, x.shape[-1], features))
            return lax.conv_general_dilated(
                x, kernel, (stride, stride), padding, dimension_numbers=DIMENSIONS
            )

        def norm(name, x, **options):
            if making:
                self.layers[name] = made = made_once(self.contestant, x.shape, self.dtype)
                self.params[name], self.state[name] = made.params, made.state
            have = (self.params, self.state) if making else (params, state)
            y, new[name] = self.layers[name].apply(have[0][name], have[1][name], x, **options)
            return y

        def block(name, x, features, stride):
            y = norm(f"{name}.1", conv(f"{name}.a", x, features, 1), relu=True)
            y = norm(f"{name}.2", conv(f"{name}.b", y, features, 3, stride), relu=True)
            y = conv(f"{name}.c", y, 4 * features, 1)
            if x.shape != y.shape:
                x = norm(f"{name}.0", conv(f"{name}.d", x, 4 * features, 1, stride))
            return norm(f"{name}.3", y, residual=x, relu=True)

        x = norm("stem", conv("stem.a", x, 64, 7, 2, [(3, 3), (3, 3)]), relu=True)
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        for stage, blocks in enumerate(self.blocks):
            for i in range(blocks):
                x = block(f"{stage}.{i}", x, 64 * 2**stage, 2 if stage and not i else 1)
        x = jnp.mean(x, (1, 2))
        return x @ weight("head", (x.shape[-1], CLASSES)), new


def made_once(contestant, shape, dtype):
    """A layer with real variables, although the network around it is traced."""
    with jax.ensure_compile_time_eval():
        return contestant.make(Setting(shape, dtype))
