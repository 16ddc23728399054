"""MLP layers in flax.nnx: SwiGLU, and a mixture of SwiGLU experts.

In shapes, X is the number of experts, F their hidden units, and A the number of
experts that each token goes to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from msa_jax.checks import (
  check_choice,
  check_integer,
  check_precision,
  check_sizes,
  compute_dtype,
  require,
)
from msa_jax.layers import Sharding

Activation = Literal["swiglu", "swiglu_oai"]
Router = Literal["sigmoid", "softmax"]


def gated(
  gate: Float[Array, "*S F"],
  up: Float[Array, "*S F"],
  activation: Activation,
  alpha: float,
  limit: float,
) -> Float[Array, "*S F"]:
  """The gated product of a SwiGLU, which its down projection takes.

  "swiglu": silu(gate) up. "swiglu_oai": with g = min(gate, limit) and
  u = clip(up, -limit, limit), (u + 1) g sigmoid(alpha g).
  """
  if activation == "swiglu":
    return nnx.silu(gate) * up
  gate = jnp.minimum(gate, limit)
  up = jnp.clip(up, -limit, limit)
  return (up + 1) * gate * nnx.sigmoid(alpha * gate)


class SwiGLU(nnx.Module):
  """down(gated(gate(x), up(x))); see `gated`.

  Args:
    in_features: size of the input's and the output's last axis, E.
    hidden_features: hidden units, F.
    activation: "swiglu" or "swiglu_oai".
    alpha, limit: constants of "swiglu_oai".
    dtype: dtype of the computation.
    param_dtype: dtype of the parameters.
    sharding: mesh axes of the parameters; None adds no annotations.
    rngs: a stream named "params".
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    activation: Activation = "swiglu",
    alpha: float = 1.702,
    limit: float = 7.0,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    sharding: Sharding | None = None,
    rngs: nnx.Rngs,
  ):
    check_precision(dtype, param_dtype)
    sharding = sharding and sharding.present()

    def linear(sizes, names):
      init = nnx.initializers.lecun_normal()
      if sharding is not None:
        init = nnx.with_partitioning(init, names)
      return nnx.Linear(
        *sizes,
        use_bias=False,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=init,
        rngs=rngs,
      )

    outer, inner = (
      (sharding.embed, sharding.heads) if sharding else (None, None)
    )
    sizes = check_sizes(
      in_features=in_features, hidden_features=hidden_features
    )
    self.gate = linear(sizes, (outer, inner))
    self.up = linear(sizes, (outer, inner))
    self.down = linear(sizes[::-1], (inner, outer))
    self.activation: Activation = activation
    self.alpha = alpha
    self.limit = limit

  def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    options = (self.activation, self.alpha, self.limit)
    hidden = gated(self.gate(x), self.up(x), *options)
    return self.down(checkpoint_name(hidden, "mlp_hidden"))


class MixtureOfExperts(nnx.Module):
  """A router over SwiGLU experts, and a shared expert beside them.

  With s = sigmoid(x Wr), computed in float32, a token goes to the A experts
  whose s + choice_bias is largest (ties to the lower expert), with the weights
  s / sum of the chosen s:

    out = routed_scale * sum of weight * expert(x) + shared(x)

  The choice bias changes the choice and not the weights. It has no gradient;
  training moves it after each step so that all experts get equally many tokens
  (`balance`). With router="softmax", s = softmax(x Wr) over all experts, and
  there is no choice bias.

  Tokens are sorted by expert and multiplied by `jax.lax.ragged_dot`; no token
  is dropped. On a CPU, XLA computes ragged_dot as a dense product for every
  expert. Under a mesh, the axis `sharding.expert` splits the experts and
  `sharding.heads` their hidden units. If the expert axis splits the batch too,
  tokens are gathered over it, and the sums are scattered back.

  Args:
    in_features: size of the input's and the output's last axis, E.
    num_experts: number of experts, X.
    top_k: experts that each token goes to, A.
    expert_dim: hidden units of an expert, F.
    shared_dim: hidden units of the shared expert; 0 makes none.
    routed_scale: factor of the sum over the chosen experts.
    router: "sigmoid" or "softmax".
    normalize_weights: whether the weights are divided by their sum.
    activation, alpha, limit, dtype, param_dtype, sharding, rngs: as in
      `SwiGLU`. The choice bias is float32 whatever param_dtype is.

  Raises:
    ValueError: a size is wrong, or top_k exceeds num_experts.
  """

  def __init__(
    self,
    in_features: int,
    *,
    num_experts: int,
    top_k: int,
    expert_dim: int,
    shared_dim: int = 0,
    routed_scale: float = 1.0,
    router: Router = "sigmoid",
    normalize_weights: bool = True,
    activation: Activation = "swiglu",
    alpha: float = 1.702,
    limit: float = 7.0,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    sharding: Sharding | None = None,
    rngs: nnx.Rngs,
  ):
    check_choice("router", router, Router)
    check_precision(dtype, param_dtype)
    in_features, num_experts, expert_dim, top_k = check_sizes(
      in_features=in_features,
      num_experts=num_experts,
      expert_dim=expert_dim,
      top_k=top_k,
    )
    shared_dim = check_integer("shared_dim", shared_dim, 0)
    require(
      top_k <= num_experts,
      "top_k",
      f"at most num_experts = {num_experts}",
      top_k,
    )
    self.num_experts = num_experts
    self.top_k = top_k
    self.routed_scale = routed_scale
    self.router_kind: Router = router
    self.normalize_weights = normalize_weights
    self.dtype = dtype
    self.sharding = sharding = sharding and sharding.present()

    def param(init: Callable, shape, names, dtype=param_dtype) -> nnx.Param:
      if sharding is not None:
        init = nnx.with_partitioning(init, names)
      return nnx.Param(init(rngs.params(), shape, dtype))

    expert, outer, inner = (
      (sharding.expert, sharding.embed, sharding.heads)
      if sharding
      else (None, None, None)
    )
    lecun = nnx.initializers.lecun_normal
    self.router = param(lecun(), (in_features, num_experts), (outer, None))
    zeros = nnx.initializers.zeros_init()
    self.choice_bias = (
      param(zeros, (num_experts,), (None,), jnp.float32)
      if router == "sigmoid"
      else None
    )
    inward = (num_experts, in_features, expert_dim)
    outward = (num_experts, expert_dim, in_features)
    init = lecun(batch_axis=(0,))
    self.gate = param(init, inward, (expert, outer, inner))
    self.up = param(init, inward, (expert, outer, inner))
    self.down = param(init, outward, (expert, inner, outer))
    self.activation: Activation = activation
    self.alpha = alpha
    self.limit = limit
    shared = functools.partial(
      SwiGLU,
      in_features,
      shared_dim,
      activation=activation,
      alpha=alpha,
      limit=limit,
      dtype=dtype,
      param_dtype=param_dtype,
      sharding=sharding,
      rngs=rngs,
    )
    self.shared = shared() if shared_dim else None

  def route(
    self, x: Float[Array, "*S E"]
  ) -> tuple[Float[Array, "*S A"], Int32[Array, "*S A"]]:
    """Weights and ids of each token's experts, in order of s + choice_bias."""
    return self._route(x, self.router[...], self._bias())

  def _bias(self) -> Array | None:
    return None if self.choice_bias is None else self.choice_bias[...]

  def _route(self, x: Array, router: Array, bias: Array | None):
    dtype = compute_dtype(x.dtype)
    logits = jnp.matmul(
      x.astype(dtype), router.astype(dtype), precision=lax.Precision.HIGHEST
    )
    if self.router_kind == "softmax":
      scores = jax.nn.softmax(logits, axis=-1)
    else:
      scores = nnx.sigmoid(logits)
    choice = scores
    if bias is not None:
      choice += lax.expand_dims(bias.astype(dtype), range(x.ndim - 1))
    _, experts = lax.top_k(lax.stop_gradient(choice), self.top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if self.normalize_weights:
      weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, experts

  def __call__(
    self, x: Float[Array, "B T E"]
  ) -> tuple[Float[Array, "B T E"], Int32[Array, "B T A"]]:
    """The output, and the experts that each token went to.

    Raises:
      ValueError: the mesh does not divide the experts.
    """
    weights = (self.gate, self.up, self.down)
    out, experts = self._over_mesh(*x.shape[:2])(
      x.astype(self.dtype),
      self.router[...],
      self._bias(),
      *(weight[...].astype(self.dtype) for weight in weights),
    )
    if self.shared is not None:
      out = out + self.shared(x)
    return out, experts

  def _over_mesh(self, batch_size: int, length: int) -> Callable:
    """Maps `_local` over each device's tokens and experts."""
    mesh = jax.sharding.get_abstract_mesh()
    if self.sharding is None or mesh.empty:
      return self._local
    names = mesh.axis_names
    batch = self.sharding.batch_axes(mesh, batch_size)
    expert, heads = (
      axis if axis in names else None
      for axis in (self.sharding.expert, self.sharding.heads)
    )
    if expert is not None:
      require(
        self.num_experts % mesh.shape[expert] == 0,
        "num_experts",
        f"a multiple of mesh axis {expert!r} = {mesh.shape[expert]}",
        self.num_experts,
      )
    context = self.sharding.context_axis(mesh, length)
    tokens = PartitionSpec(batch, context, None)
    return jax.shard_map(
      functools.partial(
        self._local, expert=expert, heads=heads, gather=expert in batch
      ),
      in_specs=(
        tokens,
        PartitionSpec(None, None),
        PartitionSpec(None),
        PartitionSpec(expert, None, heads),
        PartitionSpec(expert, None, heads),
        PartitionSpec(expert, heads, None),
      ),
      out_specs=(tokens, tokens),
      check_vma=False,
    )

  def _local(
    self,
    x: Array,
    router: Array,
    bias: Array | None,
    gate: Array,
    up: Array,
    down: Array,
    *,
    expert: str | None = None,
    heads: str | None = None,
    gather: bool = False,
  ) -> tuple[Array, Array]:
    """The routed experts for one device's tokens and experts."""
    weights, experts = self._route(x, router, bias)
    work = (x, weights, experts)
    if gather:
      work = tuple(lax.all_gather(a, expert, axis=0, tiled=True) for a in work)
    tokens, weights, chosen = (a.reshape(-1, a.shape[-1]) for a in work)
    if expert is not None:
      chosen = chosen - lax.axis_index(expert) * gate.shape[0]
    out = self._experts(tokens, weights, chosen, gate, up, down)
    out = out.reshape(work[0].shape)
    if heads is not None:
      out = lax.psum(out, heads)
    if gather:
      out = lax.psum_scatter(out, expert, scatter_dimension=0, tiled=True)
    elif expert is not None:
      out = lax.psum(out, expert)
    return (self.routed_scale * out).astype(x.dtype), experts

  def _experts(
    self,
    x: Float[Array, "N E"],
    weights: Float[Array, "N A"],
    experts: Int32[Array, "N A"],
    gate: Float[Array, "X E F"],
    up: Float[Array, "X E F"],
    down: Float[Array, "X F E"],
  ) -> Float[Array, "N E"]:
    """Sum of weight * expert(x) over the experts 0 to X - 1, in float32.

    Expert ids outside that range belong to other devices and add nothing.
    """
    num_experts = gate.shape[0]
    choices = experts.size
    ids = experts.reshape(-1)
    ids = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    order = jnp.argsort(ids, stable=True)
    sizes = jnp.sum(
      ids[:, None] == jnp.arange(num_experts)[None], axis=0, dtype=jnp.int32
    )
    # Both directions gather by a permutation, so each token's experts are added
    # in a fixed order. A scatter-add would use atomics, whose order varies.
    rows = jnp.broadcast_to(x[:, None], (*experts.shape, x.shape[-1]))
    rows = _permute(rows.reshape(choices, -1), order)
    dot = functools.partial(
      lax.ragged_dot,
      group_sizes=sizes,
      preferred_element_type=compute_dtype(x.dtype),
    )
    options = (self.activation, self.alpha, self.limit)
    hidden = gated(dot(rows, gate), dot(rows, up), *options)
    out = dot(hidden.astype(x.dtype), down)
    # ragged_dot does not promise zeros in the rows behind the last group.
    out = jnp.where((jnp.arange(choices) < jnp.sum(sizes))[:, None], out, 0)
    out = _permute(out, jnp.argsort(order)).reshape(*experts.shape, -1)
    return jnp.sum(out * weights[..., None], axis=1)


def _permute(x: Array, order: Array) -> Array:
  return x.at[order].get(unique_indices=True, mode="promise_in_bounds")


def expert_load(
  experts: Int32[Array, "*L B T A"], num_experts: int
) -> Int32[Array, "*L X"]:
  """How many tokens chose each expert."""
  one_hot = experts[..., None] == jnp.arange(num_experts)
  return jnp.sum(one_hot, axis=(-4, -3, -2), dtype=jnp.int32)


def balance(
  choice_bias: Float[Array, "*L X"], load: Int32[Array, "*L X"], rate: float
) -> Float[Array, "*L X"]:
  """The choice bias after a step: +rate below the mean load, -rate above it.

  This balances the experts without a loss term, so that the router's gradient
  comes from the language model's loss alone.
  """
  load = load.astype(choice_bias.dtype)
  mean = jnp.mean(load, axis=-1, keepdims=True)
  return choice_bias + rate * jnp.sign(mean - load)
