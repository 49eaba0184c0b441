"""Multiple-instance learning: one answer for a bag of tiles. Mean and max pooling, ABMIL (Ilse et al., 2018), CLAM (Lu et al., 2021).

All modules take features [b, n, d] and a mask [b, n], true for real tiles, and give a dictionary with

* `logits` [b, c], float32 or wider;
* `attention` [b, n] (CLAM-MB [b, c, n], a row for each class), float32 or wider: not negative, 1 in sum over a bag's real tiles, 0 on the others.

What stands in the features of padded tiles, NaN included, changes neither values nor gradients, and a bag has the same answer in every padded
size (dropout apart, whose draws depend on the shape). A bag without a single tile has attention 0 everywhere and the logits of a representation
of zeros, which is to say the head's bias: finite, and the same whatever the slide. Leave such bags out of training; they are nobody's answer.
`TransMIL` is in `models.transmil`. Source: METHODS 5.3 and 5.4.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wavepath.errors import ConfigError
from wavepath.models.linear import dense

POOLS = ("mean", "max")


def real_tiles(features: Float[Array, "b n d"], mask: Bool[Array, "b n"], dtype: Any) -> Float[Array, "b n d"]:
    """The features with zeros in place of padded tiles: a product with a weight of 0 would let NaN through, and 0 * inf into gradients."""
    return jnp.where(mask[..., None], features, 0).astype(dtype)


def masked_softmax(scores: Float[Array, "*b n"], mask: Bool[Array, "*#b n"]) -> Float[Array, "*b n"]:
    """Softmax over the last axis among the true places, in float32 or wider; 0 elsewhere, and everywhere if no place is true."""
    return jax.nn.softmax(widened(scores), axis=-1, where=mask)


def widened(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """As float32, or as it is if wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class TileScores(nn.Module):
    """Attention before the softmax: w^T (tanh(V h) * sigmoid(U h)), or w^T tanh(V h) if not gated; all three with bias.

    Attributes:
        branches: rows of w, one for each softmax.
        hidden: rows of V and U.
        gated: whether there is U.
        dropout: on either branch, in training.
        dtype, param_dtype: compute and parameter type.
    """

    branches: int = 1
    hidden: int = 128
    gated: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: Float[Array, "b n d"], *, train: bool = False) -> Float[Array, "b k n"]:
        types = (self.dtype, self.param_dtype)
        product = nn.Dropout(self.dropout, deterministic=not train)(jnp.tanh(dense(self.hidden, *types, name="tanh")(h)))
        if self.gated:
            gate = jax.nn.sigmoid(dense(self.hidden, *types, name="sigmoid")(h))
            product = product * nn.Dropout(self.dropout, deterministic=not train)(gate)
        return dense(self.branches, *types, name="score")(product).swapaxes(1, 2)


class PooledMIL(nn.Module):
    """Mean or maximum over the tiles, by feature, then a linear layer: the floor that attention has to rise above.

    `attention` of the mean is the same for all tiles; of the maximum it is the share of features for which a tile holds it. Tiles that hold
    it together, as ReLU makes them do at 0, divide a feature and its gradient evenly.

    Attributes:
        classes: outputs c.
        pool: one of `POOLS`.
        width: if not 0, a linear layer of this width with ReLU and dropout comes first, as in CLAM.
        dropout: behind that layer, in training.
        dtype, param_dtype: compute and parameter type.
    """

    classes: int
    pool: str = "mean"
    width: int = 0
    dropout: float = 0.25
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"], *, train: bool = False) -> dict[str, Array]:
        """See the module's head; dropout draws from the stream `dropout`."""
        if self.pool not in POOLS:
            raise ConfigError(f"pool={self.pool!r} is unknown; choose one of {', '.join(POOLS)}")
        types = (self.dtype, self.param_dtype)
        h = real_tiles(features, mask, self.dtype)
        if self.width:
            h = nn.Dropout(self.dropout, deterministic=not train)(jax.nn.relu(dense(self.width, *types, name="embed")(h)))
        if self.pool == "mean":
            attention = masked_softmax(jnp.zeros(mask.shape, jnp.promote_types(self.dtype, jnp.float32)), mask)
            pooled = _weighted_sum(attention[:, None], h)[:, 0]
        else:
            among = jnp.where(mask[..., None], h, -jnp.inf)
            most = among.max(axis=1, keepdims=True)
            pooled = jnp.where(mask.any(axis=1)[:, None], most[:, 0], 0)
            held = widened((mask[..., None] & (among == most)).astype(self.dtype))
            attention = jnp.mean(held / jnp.maximum(held.sum(axis=1, keepdims=True), 1), axis=-1)
        return {"logits": widened(dense(self.classes, *types, name="head")(pooled)), "attention": attention}


class ABMIL(nn.Module):
    """Attention pooling: a = softmax(scores(h)), z = sum_n a_n h_n, logits = W z + b (METHODS 5.3).

    Attributes:
        classes: outputs c.
        project: width of a linear layer (no activation) that the features pass first; 0: the features as they are, as published.
        hidden: width inside the attention.
        gated: the gated form, or tanh alone.
        dropout: on the attention's branches, in training; published without.
        dtype, param_dtype: compute and parameter type.
    """

    classes: int
    project: int = 128
    hidden: int = 128
    gated: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"], *, train: bool = False) -> dict[str, Array]:
        """See the module's head; dropout draws from the stream `dropout`."""
        types = (self.dtype, self.param_dtype)
        h = real_tiles(features, mask, self.dtype)
        if self.project:
            h = dense(self.project, *types, name="project")(h)
        scores = TileScores(1, self.hidden, self.gated, self.dropout, *types, name="attention")(h, train=train)
        attention = masked_softmax(scores, mask[:, None])
        z = _weighted_sum(attention, h)[:, 0]
        return {"logits": widened(dense(self.classes, *types, name="head")(z)), "attention": attention[:, 0]}


class CLAM(nn.Module):
    """Clustering-constrained attention, with a single branch (SB) or one for each class (MB); METHODS 5.4.

    h = dropout(relu(W x)); attention over h with dropout in both branches of the gate; SB: one z = sum_n a_n h_n and a linear layer to all
    classes; MB: z_c from the attention of class c, and class c's logit from z_c alone. Beside the common outputs there is `instance_logits`
    [b, c, n, 2], float32 or wider, 0 on padded tiles: whether a tile is evidence for class c (index 1) or not (0), for `instance_loss`.

    Attributes:
        classes: outputs c.
        multi_branch: MB instead of SB.
        width: of h.
        hidden: width inside the attention; 256, or 384 in the published `big` size.
        gated: the gated form of attention, or tanh alone.
        dropout: in training.
        dtype, param_dtype: compute and parameter type.
    """

    classes: int
    multi_branch: bool = False
    width: int = 512
    hidden: int = 256
    gated: bool = True
    dropout: float = 0.25
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"], *, train: bool = False) -> dict[str, Array]:
        """See the module's head; dropout draws from the stream `dropout`."""
        types = (self.dtype, self.param_dtype)
        h = jax.nn.relu(dense(self.width, *types, name="embed")(real_tiles(features, mask, self.dtype)))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        branches = self.classes if self.multi_branch else 1
        scores = TileScores(branches, self.hidden, self.gated, self.dropout, *types, name="attention")(h, train=train)
        attention = masked_softmax(scores, mask[:, None])
        logits = dense(self.classes, *types, name="head")(_weighted_sum(attention, h))
        # Column c of the head's kernel is the linear layer of class c; the other classes' products with z_c cost next to nothing.
        logits = jnp.diagonal(logits, axis1=1, axis2=2) if self.multi_branch else logits[:, 0]
        evidence = dense(2 * self.classes, *types, name="instance")(h).reshape(*mask.shape, self.classes, 2)
        return {
            "logits": widened(logits),
            "attention": attention if self.multi_branch else attention[:, 0],
            "instance_logits": widened(jnp.where(mask[:, :, None, None], evidence, 0).swapaxes(1, 2)),
        }


def _weighted_sum(attention: Float[Array, "b k n"], h: Float[Array, "b n d"]) -> Float[Array, "b k d"]:
    return jnp.einsum("bkn,bnd->bkd", attention.astype(h.dtype), h)


def instance_loss(
    instance_logits: Float[Array, "b c n 2"],
    labels: Int[Array, "b"],
    attention: Float[Array, "b n"] | Float[Array, "b c n"],
    mask: Bool[Array, "b n"],
    *,
    top: int = 8,
    subtyping: bool = False,
    margin: float = 0.0,
) -> Float[Array, "b"]:
    """CLAM's loss on tiles, for each bag: attention names the evidence, a two-way classifier for each class has to agree.

    For the bag's class the k tiles with most attention are taken as evidence and the k with least as none, and the loss is the mean over the 2k.
    With `subtyping`, where classes exclude each other, the k tiles with most attention are in every other class's eyes no evidence (mean over
    k), and the sum over classes is divided by their number. The choice of tiles has no gradient.

    k = `top`, in a bag of N < 2 `top` tiles N // 2, so that no tile stands on both sides; at least 1, so that the one tile of a bag of one
    stands on both (the public code fails on bags smaller than `top`; METHODS 7). A bag without tiles has the loss 0.

    Args:
        instance_logits: [b, c, n, 2], as `CLAM` gives them.
        labels: [b], the bags' classes.
        attention: [b, n], or [b, c, n] with a row for each class, as `CLAM` gives it.
        mask: [b, n], true for real tiles.
        top: B, tiles on either side.
        subtyping: see above.
        margin: added to the wrong answer's logit. 0 is cross-entropy; 1 is the smooth top-1 SVM at temperature 1 (Berrada et al., 2018).

    Returns:
        [b]. Published total: 0.7 times the bag's cross-entropy and 0.3 times this.

    Raises:
        ConfigError: `top` below 1.
    """
    if top < 1:
        raise ConfigError(f"top={top} tiles on either side are too few for an instance loss; give 1 or more")
    b, classes, n, _ = instance_logits.shape
    tiles = mask.sum(axis=1)
    k = jnp.clip(tiles // 2, 1, top)
    counted = (jnp.arange(min(top, n)) < k[:, None]) & (tiles > 0)[:, None]
    ranking = jax.lax.stop_gradient(attention.reshape(b, -1, n))

    def mean_loss(ranking: Array, answer: int) -> Array:
        """[b, c]: mean over the first k tiles of the ranking of the loss against `answer`."""
        _, places = jax.lax.top_k(jnp.where(mask[:, None], ranking, -jnp.inf), min(top, n))
        places = jnp.broadcast_to(places, (b, classes, places.shape[-1]))
        logits = jnp.take_along_axis(instance_logits, places[..., None], axis=2)
        loss = jax.nn.softplus(logits[..., 1 - answer] + margin - logits[..., answer])
        return jnp.where(counted[:, None], loss, 0).sum(axis=-1) / k[:, None]

    positive = jax.nn.one_hot(labels, classes, dtype=instance_logits.dtype)
    total = jnp.sum(positive * (mean_loss(ranking, 1) + mean_loss(-ranking, 0)) / 2, axis=1)
    if not subtyping:
        return total
    return (total + jnp.sum((1 - positive) * mean_loss(ranking, 0), axis=1)) / classes
