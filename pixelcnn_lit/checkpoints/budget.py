"""A bound on the memory that a constructor may ask for, whatever an untrusted file makes of its settings."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Kinds of operations whose result is no larger than their inputs, broadcast. Older torch has no tag for reductions.
BOUNDED = {torch.Tag.pointwise, getattr(torch.Tag, "reduction", torch.Tag.pointwise)}


class MemoryBudget(TorchDispatchMode):
    """Let the operations inside allocate so many bytes in all, and raise MemoryError before one that asks for more.

    How much an operation asks for, its own kernel says on the device "meta", where tensors have shapes and no memory.
    All else is as without: other than under `torch.device("meta")`, tensors have values that a constructor may read.
    """

    SMALLEST = 4096  # bytes a tensor counts for: about what torch and Python keep of the smallest

    def __init__(self, n_bytes: int) -> None:
        super().__init__()
        self.n_bytes = self.left = n_bytes

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch would otherwise import its compiler, for 1.5 seconds, to keep it away from here."""
        return False

    def __torch_dispatch__(
        self, func: OpOverload, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.left -= self._asked_for(func, args, kwargs or {})
        if self.left < 0:
            raise MemoryError(f"it asks for more than {self.n_bytes:,} bytes of memory")
        return func(*args, **(kwargs or {}))

    def _asked_for(self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
        if all(result.alias_info for result in func._schema.returns):  # a view, or in place
            return 0
        if BOUNDED & set(func.tags):  # by its inputs; and its meta kernel would import torch's compiler
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
            return max(math.prod(shape) * max([4, *(tensor.itemsize for tensor in tensors)]), self.SMALLEST)
        shapes, options = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        if any(argument.name == "device" for argument in func._schema.arguments):
            options |= {"device": torch.device("meta"), "pin_memory": False}
        try:
            results = tree_leaves(func(*shapes, **options))
        except (RuntimeError, NotImplementedError):  # as where the size of the result depends on values
            return 0
        return sum(max(result.nbytes, self.SMALLEST) for result in results if isinstance(result, Tensor))
