"""Sums of cross-entropy in chunks of tokens, with PyTorch.

See `gemma_keras.model.token_loss`.
"""

from __future__ import annotations

import torch

from gemma_keras.model.losses import Wanted


def chunked(hidden, table, targets, weights, cap, tokens: int, wanted: Wanted):
    """As `gemma_keras.model.token_loss_jax.chunked`."""
    return _Chunked.apply(hidden, table, targets, weights, cap, tokens, wanted)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, table, targets, weights, cap, tokens, wanted):
        counted = torch.nonzero(weights).flatten()
        of_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wanted.hidden else None
        of_table = torch.zeros_like(table, dtype=torch.float32) if wanted.table else None
        sums = hidden.new_zeros(3, dtype=torch.float32)
        wide = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        for rows in counted.split(tokens):
            x, weight = hidden[rows], weights[rows]
            logits = (x @ table.T).float()
            if cap is not None:
                logits = logits.div_(cap).tanh_().mul_(cap)
            target = targets[rows].long()
            chosen = logits.gather(1, target[:, None])[:, 0]
            greatest = logits.amax(dim=1)
            sums[2] += (chosen >= greatest).sum()
            exponents = torch.sub(logits, greatest[:, None]).exp_()
            mass = exponents.sum(dim=1)
            losses = mass.log() + greatest - chosen
            sums[0] += (losses * weight).sum()
            sums[1] += losses.sum()
            if of_hidden is None:
                continue
            slope = exponents.div_(mass[:, None])
            slope[torch.arange(len(rows), device=rows.device), target] -= 1
            slope.mul_(weight[:, None])
            if cap is not None:
                slope.mul_(logits.div_(cap).square_().neg_().add_(1))
            slope = slope.to(wide)
            of_hidden[rows] = (slope @ table.to(wide)).float()
            if of_table is not None:
                _add_product(of_table, slope.T, x.to(wide))
        ctx.gradients, ctx.dtype = (of_hidden, of_table), hidden.dtype
        weighted, total, right = sums.unbind()
        return weighted.clone(), total.clone(), right.clone()

    @staticmethod
    def backward(ctx, *scales):
        found = [None if g is None else (g * scales[0]).to(ctx.dtype) for g in ctx.gradients]
        return *found, None, None, None, None, None


def _add_product(to, a, b) -> None:
    """Add a product to a float32 matrix, in place."""
    if a.dtype == torch.float32:
        to.addmm_(a, b)
    else:
        to.add_(a @ b)
