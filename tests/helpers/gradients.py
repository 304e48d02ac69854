"""What a layer computes, forward and backward, for tests that compare two ways to compute it."""

import numpy as np
import paddle


def outputs_and_gradients(block, x, run=lambda block, x: block(x)) -> dict:
    """The block's output and every gradient of a random projection of it, by name."""
    x = x.detach()
    x.stop_gradient = False
    block.clear_gradients()
    paddle.seed(1)  # the same drop path masks
    y = run(block, x)
    projection = np.random.default_rng(0).standard_normal(y.shape)
    (y * paddle.to_tensor(projection.astype(y.numpy().dtype))).sum().backward()
    found = {name: p.grad for name, p in block.named_parameters()}
    found = {name: None if grad is None else grad.numpy().copy() for name, grad in found.items()}
    return {"output": y.numpy(), "x": x.grad.numpy(), **found}
