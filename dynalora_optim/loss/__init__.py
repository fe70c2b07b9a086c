"""The loss of a language model, computed in chunks of rows.

How the pieces divide the work. `linear_cross_entropy` computes the loss from the hidden states and
the head, a few rows at a time, so that the logits of all rows never exist together. `LazyLogits`
stands for logits that nobody has asked for yet: a model returns it in place of its logits, and the
first operation on it computes them. `dynalora_optim.integrations.transformers.chunk_loss` puts the
two into a model of transformers.
"""

from dynalora_optim.loss._lazy_logits import LazyLogits
from dynalora_optim.loss._linear_cross_entropy import linear_cross_entropy

__all__ = ["LazyLogits", "linear_cross_entropy"]
