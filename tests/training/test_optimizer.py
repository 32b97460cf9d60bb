"""The optimisers: their learning rates, what they keep, and Muon against singular values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megjax.errors import MegError
from megjax.training.optimizer import make_optimizer, matrices
from megjax.training.step import init_state, make_step


def test_the_learning_rate_warms_up_and_stays_or_falls():
    def sizes(**kwargs):
        optimizer = make_optimizer(0.1, 40, warmup=4, weight_decay=0.0, **kwargs)
        params, found = jnp.ones(()), []
        state = optimizer.init(params)
        for _ in range(40):
            update, state = optimizer.update(jnp.ones(()), state, params)
            found.append(-float(update))  # AdamW's steps have the learning rate's size at a constant gradient
        return np.asarray(found)

    np.testing.assert_allclose(sizes(decay=False)[[0, 2, 4, 39]], [0.0, 0.05, 0.1, 0.1], rtol=1e-4)
    falling = sizes()
    np.testing.assert_allclose(falling[[0, 4]], [0.0, 0.1], rtol=1e-4)
    assert np.all(np.diff(falling[4:]) < 0)
    assert falling[39] < 1e-3


@pytest.mark.parametrize("decay", [True, False])
def test_without_a_warm_up_the_first_step_has_the_whole_learning_rate(decay):
    optimizer = make_optimizer(0.1, 40, warmup=0, weight_decay=0.0, decay=decay)
    update, _ = optimizer.update(jnp.ones(()), optimizer.init(jnp.ones(())), jnp.ones(()))
    np.testing.assert_allclose(update, -0.1, rtol=1e-4)


def test_settings_that_fit_no_rule_are_refused():
    with pytest.raises(MegError, match="warmup -1: must be at least 0"):
        make_optimizer(0.1, 40, warmup=-1)
    with pytest.raises(MegError, match="moments bfloat16: adafactor keeps no first moment"):
        make_optimizer(0.1, 40, warmup=1, rule="adafactor", moments="bfloat16")


@pytest.mark.parametrize(
    ("rule", "moments", "size"),
    [
        ("adamw", "float32", 2.0),
        ("adamw", "bfloat16", 1.5),
        ("adafactor", "float32", 0.01),
        ("muon", "float32", 1.0),
        ("muon", "bfloat16", 0.5),
    ],
)
def test_each_rule_keeps_what_it_says_and_descends(rule, moments, size):
    # The others' steps have the learning rate's size at a constant gradient, Muon's a fifth of it.
    learning_rate = 0.1 if rule == "muon" else 0.02
    optimizer = make_optimizer(learning_rate, 200, warmup=1, rule=rule, moments=moments, weight_decay=0.0)
    target = jax.random.normal(jax.random.key(1), (256, 192))

    def loss(params, key, batch):
        return jnp.mean(jnp.square(params["w"] - batch)), {}

    state = init_state({"w": jnp.zeros((256, 192))}, optimizer)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)) / state.params["w"].nbytes
    assert kept == pytest.approx(size, abs=0.01)
    step = jax.jit(make_step(loss, optimizer, 0.9))
    _, first = step(state, jax.random.key(0), target)
    for _ in range(100):
        state, metrics = step(state, jax.random.key(0), target)
    assert metrics["loss"] < 0.1 * first["loss"]


@pytest.mark.parametrize("depth", [None, 0, 1])
@pytest.mark.parametrize("shape", [(48, 32), (3, 3, 16, 32)])
def test_muons_update_is_the_gradients_orthogonal_factor(shape, depth):
    lr = 1e-3
    optimizer = make_optimizer(lr, 10, warmup=0, rule="muon", clip=1e9, weight_decay=0.0, decay=False)
    stack = shape if depth is None else (2, *shape)
    params = {"transformer_blocks" if len(stack) > len(shape) else "conv": {"w": jnp.zeros(stack)}}
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)
    update, _ = optimizer.update(grads, optimizer.init(params), params)
    g, u = (
        np.asarray(x if depth is None else x[depth], np.float64).reshape(-1, shape[-1])
        for x in (*jax.tree.leaves(grads), *jax.tree.leaves(update))
    )
    left, _, right = np.linalg.svd(g, full_matrices=False)
    scale = 0.2 * lr * max(g.shape) ** 0.5
    # In the gradient's own directions and no other; the iteration leaves values between 0.7 and 1.2.
    along = -(left.T @ u @ right.T) / scale
    values = np.diagonal(along)
    assert np.all((values > 0.65) & (values < 1.25))
    assert np.abs(along - np.diag(values)).max() < 1e-3
    # As large as AdamW's steps are in training.
    assert np.sqrt(np.mean(u**2)) == pytest.approx(0.2 * lr, rel=0.2)


def test_muon_leaves_vectors_and_narrow_layers_to_adamw():
    params = {
        "bias": jnp.ones(32),
        "first": jnp.ones((3, 3, 4, 32)),
        "last": jnp.ones((3, 3, 32, 4)),
        "table": jnp.ones((5, 6, 32)),
        "dense": jnp.ones((32, 16)),
        "kernel": jnp.ones((3, 3, 16, 32)),
        "layers": {"norm": jnp.ones((16, 32))},  # of sixteen layers, and not a matrix
    }
    chosen = matrices(params)
    assert chosen.pop("layers") == {"norm": None}
    assert {name for name, axes in chosen.items() if axes} == {"dense", "kernel"}
    assert (chosen["kernel"].reduction_axis, chosen["kernel"].output_axis) == ((0, 1, 2), 3)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(2), p.shape), params)
    optimizer = make_optimizer(1e-3, 10, warmup=0, rule="muon", clip=1e9, decay=False)
    adamw = optax.adamw(1e-3, weight_decay=0.01, nesterov=True)
    updates, wanted = (rule.update(grads, rule.init(params), params)[0] for rule in (optimizer, adamw))
    assert np.allclose(updates["layers"]["norm"], wanted["layers"]["norm"], rtol=1e-4)
    for name in chosen:
        same = np.allclose(updates[name], wanted[name], rtol=1e-4)
        assert same == (name not in {"dense", "kernel"}), name
