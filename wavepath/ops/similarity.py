"""How alike two things are: contrastive similarity between embeddings."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wavepath.ops import collectives


def unit(x: Float[Array, "*b d"], eps: float = 1e-12) -> Float[Array, "*b d"]:
    """Vectors of length 1; a zero vector stays zero."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, eps))


def info_nce(
    query: Float[Array, "b d"], key: Float[Array, "b d"], temperature: float, symmetric: bool = False
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """InfoNCE of each example against all keys of the global batch, row i of `query` belonging to row i of `key`.

    `-log( exp(q_i.k_i / t) / sum_j exp(q_i.k_j / t) )` with unit vectors; j runs over the whole batch, also where it lies on several devices.

    Args:
        query: [b, d], this shard's rows, of any length.
        key: [b, d], their partners.
        temperature: t.
        symmetric: the mean of this loss and the same with the roles exchanged.

    Returns:
        Loss [b], and [b] whether the partner was the nearest key (1 or 0). Their means over shards are those over the batch.

    Source: METHODS 1.5 and 3.2.
    """
    query, key = unit(query), unit(key)
    loss, hit = _one_way(query, key, temperature)
    if symmetric:
        back, back_hit = _one_way(key, query, temperature)
        loss, hit = (loss + back) / 2, (hit + back_hit) / 2
    return loss, hit


def _one_way(query: Float[Array, "b d"], key: Float[Array, "b d"], temperature: float) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    everyone = collectives.all_gather(key)
    # Float32 products: on accelerators the default precision would round similarities that are then divided by a small temperature.
    logits = jnp.matmul(query, everyone.T, precision=jax.lax.Precision.HIGHEST) / temperature
    own = jnp.arange(query.shape[0]) + collectives.index() * query.shape[0]
    positive = jnp.take_along_axis(logits, own[:, None], axis=1)[:, 0]
    hit = (jnp.argmax(logits, axis=1) == own).astype(logits.dtype)
    return jax.nn.logsumexp(logits, axis=1) - positive, hit
