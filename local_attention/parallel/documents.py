"""Places in documents that may have begun on any earlier rank."""
import mindspore as ms
from mindspore import ops

from ..backends.spans import document_bounds
from .exchange import every_rank


def places(group, segment_ids):
    """Return each token's place in its document, for ids `(b, n)`. Documents may begin on any earlier rank."""
    b, n = segment_ids.shape
    first = document_bounds(segment_ids)[..., 0]
    own = ops.arange(0, n, 1).reshape(1, n) - first
    if group.size == 1:
        return own
    ids = ops.stop_gradient(segment_ids)
    edges = ops.stack((ids[:, 0], ids[:, n - 1], ops.cast(own[:, n - 1], ids.dtype)), 0)
    heads, tails, last = every_rank(group, edges.reshape(1, -1)).reshape(group.size, 3, b).unbind(1)
    goes_on = ops.logical_and(heads[1:] == tails[:-1], heads[1:] >= 0)  # a document continues from the rank before
    goes_on = ops.cat((ops.zeros((1, b), ms.bool_), goes_on))
    # where the document of each rank's last token began; 0 if before that rank
    began = ops.arange(n - 1, group.size * n, n).reshape(-1, 1) - last
    began = ops.masked_fill(began, ops.logical_and(goes_on, last == n - 1), 0)
    before = group.rank * n - ops.amax(began[:max(group.rank, 1)], 0)
    before = ops.cast(ops.masked_fill(before, ops.logical_not(goes_on[group.rank]), 0), own.dtype)
    return own + ops.masked_fill(ops.broadcast_to(before.reshape(b, 1), (b, n)), first > 0, 0)
