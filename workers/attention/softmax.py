"""One call of scaled dot-product attention that also tells each row's log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_with_lse(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention, [batch, heads, rows, head_dim] in the query's type, and log-sum-exp, [batch, heads, rows] float32.

    query [batch, heads, rows, head_dim]; key and value [batch, kv_heads, keys, head_dim]; `mask` is added to the
    scores, [batch, 1, rows, keys] in the query's type. `is_causal` needs as many keys as rows. The log-sum-exp is
    natural. A row whose mask is -inf throughout has no defined result. Neither rows nor keys may be empty: the fused
    kernel would end the process.
    """
    assert query.shape[2] > 0, "no rows"
    assert key.shape[2] > 0, "no keys"
    if query.device.type == "cpu":
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, is_causal=is_causal, attn_mask=mask
        )
        return fused[0], fused[1]
    return attend_by_matmul(query, key, value, mask=mask, is_causal=is_causal)


def attend_by_matmul(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """The same from matrix products, for devices without the fused kernel; scores and weights are float32."""
    batch, num_heads, num_rows, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    grouped = query.reshape(batch, num_kv_heads, -1, num_rows, head_dim)
    scores = (grouped @ key[:, :, None].mT).float() * head_dim**-0.5  # [batch, kv_heads, group, rows, keys]
    if mask is not None:
        scores = scores + mask[:, :, None]
    if is_causal:
        future = torch.ones(num_rows, num_keys, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    lse = scores.logsumexp(-1)
    attended = (scores - lse[..., None]).exp().to(value.dtype) @ value[:, :, None]
    return attended.view(query.shape), lse.view(batch, num_heads, num_rows)
