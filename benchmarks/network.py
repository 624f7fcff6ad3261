"""Training steps of whole networks in plain JAX, so that every contestant's layer can stand in them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from benchmarks.contestants import Setting

BATCH, CLASSES = 128, 1000


class Network:
    """Built by a first call, with shapes only, that makes the variables; then `step` trains.

    A network says in `loss` what it computes of its inputs, by means of `weight`, `conv` and `norm`, and what
    its regions are: "block", "stage" and "whole". `around` says what a kind of region is wrapped in, such as
    `{"block": jax.checkpoint}`.
    """

    def __init__(self, contestant, dtype, inputs, around=None):
        self.contestant, self.dtype, self.inputs = contestant, dtype, inputs
        self.layers, self.params, self.state = {}, {}, {}
        self.around = {}
        self.have, self.new = (self.params, self.state), {}
        jax.eval_shape(self.loss, *inputs)
        self.around = around or {}

    def step(self, params, state, *inputs):
        """Gradient descent: new parameters, new statistics, the loss."""

        def loss(params):
            self.have, self.new = (params, state), {}
            return self.loss(*inputs), self.new

        loss = self.around.get("whole", lambda loss: loss)(loss)
        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - (0.1 * g).astype(p.dtype), params, grads), new, value

    def region(self, kind, function, *arrays):
        """The function's output; new statistics leave a region that is wrapped as outputs of it."""
        if kind not in self.around:
            return function(*arrays)

        def run(*arrays):
            outside, self.new = self.new, {}
            y = function(*arrays)
            new, self.new = self.new, outside
            return y, new

        y, new = self.around[kind](run)(*arrays)
        self.new |= new
        return y

    def weight(self, name, shape):
        if name not in self.params:
            self.params[name] = np.zeros(shape, np.float32)
        return self.have[0][name].astype(self.dtype)

    def conv(self, name, x, features, size=1, stride=1, padding="SAME", depthwise=False):
        """A convolution over all axes between the first and the last."""
        axes, groups = x.ndim - 2, x.shape[-1] if depthwise else 1
        kernel = self.weight(name, (*[size] * axes, x.shape[-1] // groups, features))
        spatial = "HW"[-axes:]
        return lax.conv_general_dilated(
            x,
            kernel,
            [stride] * axes,
            padding,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            feature_group_count=groups,
        )

    def norm(self, name, x, **options):
        if name not in self.layers:
            with jax.ensure_compile_time_eval():  # real variables, although the network around it is traced
                self.layers[name] = made = self.contestant.make(Setting(x.shape, self.dtype))
            self.params[name], self.state[name] = made.params, made.state
        params, state = self.have
        y, self.new[name] = self.layers[name].apply(params[name], state[name], x, **options)
        return y

    def cross_entropy(self, x, labels):
        """Of a dense layer on the mean over all pixels."""
        x = jnp.mean(x, (1, 2))
        logits = x @ self.weight("head", (x.shape[-1], CLASSES))
        picked = jax.nn.log_softmax(logits.astype(jnp.float32)) * jax.nn.one_hot(labels, CLASSES)
        return -jnp.mean(jnp.sum(picked, -1))


def images(dtype, batch=BATCH, size=224):
    """Images and their labels."""
    return jax.ShapeDtypeStruct((batch, size, size, 3), dtype), jax.ShapeDtypeStruct((batch,), jnp.int32)


class ResNet50(Network):
    def __init__(self, contestant, dtype, batch=BATCH, blocks=(3, 4, 6, 3), around=None):
        self.blocks = blocks
        super().__init__(contestant, dtype, images(dtype, batch), around)

    def loss(self, x, labels):
        x = self.region("stage", self._stem, x)
        for number, blocks in enumerate(self.blocks):
            x = self.region("stage", functools.partial(self._stage, number, blocks), x)
        return self.cross_entropy(x, labels)

    def _stem(self, x):
        x = self.norm("stem", self.conv("stem.a", x, 64, 7, 2, [(3, 3), (3, 3)]), relu=True)
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")

    def _stage(self, number, blocks, x):
        for i in range(blocks):
            stride = 2 if number and not i else 1
            x = self.region(
                "block", functools.partial(self._block, f"{number}.{i}", 64 * 2**number, stride), x
            )
        return x

    def _block(self, name, features, stride, x):
        y = self.norm(f"{name}.1", self.conv(f"{name}.a", x, features), relu=True)
        y = self.norm(f"{name}.2", self.conv(f"{name}.b", y, features, 3, stride), relu=True)
        y = self.conv(f"{name}.c", y, 4 * features)
        if x.shape != y.shape:
            x = self.norm(f"{name}.0", self.conv(f"{name}.d", x, 4 * features, 1, stride))
        return self.norm(f"{name}.3", y, residual=x, relu=True)


class MobileNetV2(Network):
    """The relu6 is outside of every layer."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2))

    def __init__(self, contestant, dtype, around=None):
        super().__init__(contestant, dtype, images(dtype), around)

    def loss(self, x, labels):
        x = self._relu6("stem", self.conv("stem.a", x, 32, 3, 2))
        for number, (expansion, features, blocks, stride) in enumerate((*self.STAGES, (6, 320, 1, 1))):
            stage = functools.partial(self._stage, number, expansion, features, blocks, stride)
            x = self.region("stage", stage, x)
        x = self._relu6("last", self.conv("last.a", x, 1280))
        return self.cross_entropy(x, labels)

    def _stage(self, number, expansion, features, blocks, stride, x):
        for i in range(blocks):
            arguments = f"{number}.{i}", expansion, features, 1 if i else stride
            x = self.region("block", functools.partial(self._block, *arguments), x)
        return x

    def _block(self, name, expansion, features, stride, x):
        y, wide = x, expansion * x.shape[-1]
        if expansion > 1:
            y = self._relu6(f"{name}.1", self.conv(f"{name}.a", y, wide))
        y = self._relu6(f"{name}.2", self.conv(f"{name}.b", y, wide, 3, stride, depthwise=True))
        residual = x if stride == 1 and x.shape[-1] == features else None
        return self.norm(f"{name}.3", self.conv(f"{name}.c", y, features), residual=residual)

    def _relu6(self, name, x):
        return jax.nn.relu6(self.norm(name, x))


class DenseNet121(Network):
    """What batch norms take is put together of pieces, which a policy of its own can save by their name."""

    PIECE, GROWTH = "piece", 32

    def __init__(self, contestant, dtype, around=None):
        super().__init__(contestant, dtype, images(dtype), around)

    def loss(self, x, labels):
        x = self.region("stage", self._stem, x)
        for number, blocks in enumerate((6, 12, 24, 16)):
            x = self.region("stage", functools.partial(self._stage, number, blocks), x)
        return self.cross_entropy(self.norm("last", x, relu=True), labels)

    def _stem(self, x):
        x = self._piece("stem.a", x, 64, 7, 2, [(3, 3), (3, 3)])
        x = self.norm("stem", x, relu=True)
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")

    def _stage(self, number, blocks, x):
        if number:  # halves the features and each side
            x = self.norm(f"{number}", x, relu=True)
            x = self.conv(f"{number}.a", x, x.shape[-1] // 2)
            x = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
        pieces = [checkpoint_name(x, self.PIECE)]
        for i in range(blocks):
            pieces.append(self.region("block", functools.partial(self._block, f"{number}.{i}"), *pieces))
        return jnp.concatenate(pieces, -1)

    def _block(self, name, *pieces):
        y = self.norm(f"{name}.1", jnp.concatenate(pieces, -1), relu=True)
        y = self.norm(f"{name}.2", self._piece(f"{name}.a", y, 4 * self.GROWTH), relu=True)
        return self._piece(f"{name}.b", y, self.GROWTH, 3)

    def _piece(self, *arguments):
        return checkpoint_name(self.conv(*arguments), self.PIECE)


class Conformer(Network):
    """16 convolution modules on [batch, time, features], with a mask over time; the swish is outside."""

    def __init__(self, contestant, dtype, around=None):
        shape = (64, 400, 512)
        inputs = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((*shape[:2], 1), jnp.bool_)
        super().__init__(contestant, dtype, inputs, around)

    def loss(self, x, mask):
        for number in range(4):
            x = self.region("stage", functools.partial(self._stage, number), x, mask)
        return jnp.mean(jnp.square(x.astype(jnp.float32)), where=mask)

    def _stage(self, number, x, mask):
        for i in range(4):
            x = self.region("block", functools.partial(self._block, f"{number}.{i}"), x, mask)
        return x

    def _block(self, name, x, mask):
        features = x.shape[-1]
        y = jax.nn.standardize(x.astype(jnp.float32)).astype(x.dtype)
        y, gate = jnp.split(self.conv(f"{name}.a", y, 2 * features), 2, -1)
        y = jnp.where(mask, y * jax.nn.sigmoid(gate), 0)
        y = self.conv(f"{name}.b", y, features, 31, depthwise=True)
        y = jax.nn.silu(self.norm(f"{name}.1", y, mask=mask))
        return x + self.conv(f"{name}.c", y, features)


class Stack(Network):
    """20 times convolution, batch norm and relu on one shape."""

    def __init__(self, contestant, dtype, around=None):
        super().__init__(contestant, dtype, (jax.ShapeDtypeStruct((BATCH, 56, 56, 64), dtype),), around)

    def loss(self, x):
        for number in range(4):
            x = self.region("stage", functools.partial(self._stage, number), x)
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    def _stage(self, number, x):
        for i in range(5):
            x = self.region("block", functools.partial(self._block, f"{number}.{i}"), x)
        return x

    def _block(self, name, x):
        return self.norm(name, self.conv(f"{name}.a", x, x.shape[-1], 3), relu=True)
