"""What is read from a compiled program, against programs whose collectives and loops are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_jax import hlo, shard

ROWS = 64


def _sent(function, mesh, *specs):
    args = [jax.ShapeDtypeStruct((ROWS, ROWS), jnp.float32, sharding=NamedSharding(mesh, spec)) for spec in specs]
    out = NamedSharding(mesh, PartitionSpec())
    return hlo.read(jax.jit(function, out_shardings=out).lower(*args).compile().as_text()).sent


def test_a_gather_and_a_reduction_are_counted_as_rings_send_them():
    mesh = shard.mesh({"fsdp": 4})
    array = ROWS * ROWS * 4
    assert _sent(lambda x: x, mesh, PartitionSpec("fsdp")) == array * 3 / 4
    assert _sent(lambda x: x.sum(0), mesh, PartitionSpec("fsdp")) == 2 * ROWS * 4 * 3 / 4
    assert _sent(lambda x: x, shard.mesh({"tensor": 8}), PartitionSpec(None, "tensor")) == array * 7 / 8


def test_the_body_of_a_scan_counts_as_often_as_it_runs():
    mesh = shard.mesh({"fsdp": 4})
    whole, rows = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("fsdp")))

    def body(x, _):
        cut = jnp.tanh(jax.lax.with_sharding_constraint(x, rows))
        return jax.lax.with_sharding_constraint(cut, whole), None

    for n in (3, 12):
        sent = _sent(lambda x, n=n: jax.lax.scan(body, x, None, length=n)[0], mesh, PartitionSpec())
        assert (
            sent == (n + 1) * ROWS * ROWS * 4 * 3 / 4
        )  # the compiler puts rows back together before every tanh, and at the end


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", 4),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", 4),
    ],
)
def test_cycles_and_loops_of_the_tpu_compiler(groups, size):
    text = f"""HloModule m
%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {{
  %fusion.1 = bf16[8,128]{{1,0:T(8,128)(2,1)}} fusion(%x), kind=kLoop, calls=%fused, backend_config={{"estimated_cycles":"100"}}
  %fusion.2 = bf16[8,128]{{1,0:T(8,128)(2,1)}} fusion(%x), kind=kLoop, calls=%fused, backend_config={{"estimated_cycles":"20"}}
}}
%fused (p: bf16[8,128]) -> bf16[8,128] {{
  %all-gather.7 = bf16[8,128]{{1,0:T(8,128)(2,1)}} all-gather(%p), channel_id=3, {groups}, dimensions={{0}}
}}
%cond (p: (s32[], bf16[8,128])) -> pred[] {{
  %constant.1 = s32[]{{:T(128)}} constant(32)
}}
ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {{
  %while.1 = (s32[]{{:T(128)}}, bf16[8,128]{{1,0:T(8,128)(2,1)}}) while(%t), condition=%cond, body=%body
  ROOT %fusion.9 = bf16[8,128]{{1,0}} fusion(%y), kind=kLoop, calls=%other, backend_config={{"estimated_cycles":"7"}}
}}
"""
    # The two fusions hold copies of one gather.
    assert hlo.read(text) == hlo.Program(32 * 120 + 7, 32 * 8 * 128 * 2 * (size - 1) / size)
