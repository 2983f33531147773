"""The processes that train together."""
import json
import os
import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor, communication, ops


class Ranks:
    """The processes that train together, and the rank of this one. Without msrun there is one process."""

    def __init__(self, count):
        self.rank, self.count = 0, count
        if "MS_ROLE" in os.environ:
            communication.init()
            self.rank = communication.get_rank()

    def mean(self, *values):
        """Return the mean of each number over the processes."""
        if self.count == 1:
            return values
        return (ops.AllReduce()(Tensor(values, ms.float32)) / self.count).asnumpy().tolist()

    def agree(self, values):
        """End every process if their `values` differ. The keys are the names in the message."""
        if self.count == 1:
            return
        text = np.frombuffer(json.dumps(values).encode(), np.uint8).astype(np.int32)
        lengths = ops.AllGather()(Tensor([len(text)], ms.int32)).asnumpy()
        texts = ops.AllGather()(Tensor(np.resize(text, lengths.max()))).asnumpy().reshape(self.count, -1)
        first, *others = (json.loads(text[:length].astype(np.uint8).tobytes()) for text, length in zip(texts, lengths))
        for rank, other in enumerate(others, 1):
            for name, value in first.items():
                if other.get(name) != value:
                    sys.exit(f"train.py: {name} is {value} for rank 0 and {other.get(name)} for rank {rank}, but must "
                             "be the same for all.")
