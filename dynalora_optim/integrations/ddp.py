"""DistributedDataParallel: averaging only the gradients of active modules.

DDP is correct without this hook; the hook makes the ranks send fewer bytes.
"""

# No "from __future__ import annotations": DDP compares the hook's annotations by identity.
import torch
from torch import Tensor, distributed
from torch.distributed import GradBucket  # type: ignore[attr-defined]

from dynalora_optim._optimizer import DynamicAllocationOptimizer

__all__ = ["active_gradients_hook"]


def active_gradients_hook(
    optimizer: DynamicAllocationOptimizer, bucket: GradBucket
) -> torch.futures.Future[Tensor]:
    """Average the active gradients of a bucket, and leave out the rest.

    ``ddp_model.register_comm_hook(optimizer, active_gradients_hook)``: if a third of the modules is
    active, a third of the bytes is sent. All ranks leave out the same gradients; the optimizer
    checks this at each reallocation.

    Args:
        optimizer: The optimizer, which knows the active parameters.
        bucket: The bucket of gradients that DDP passes to its hook.

    Returns:
        A future of the bucket's buffer.
    """
    active = {id(parameter) for parameter in optimizer.active_parameters()}
    pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
    gradients = [gradient for parameter, gradient in pairs if id(parameter) in active]
    if not gradients:
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    flat /= distributed.get_world_size()
    work = distributed.all_reduce(flat, async_op=True)
    assert work is not None
    sizes = [gradient.numel() for gradient in gradients]

    def put_back(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        pieces = torch.split(future.value()[0], sizes)
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))
        return bucket.buffer()

    sent: torch.futures.Future[list[Tensor]] = work.get_future()
    return sent.then(put_back)
