// Attention of one block of queries, forward and backward, for one width of vectors. This file is included once for
// each width. Before it, KERNEL (its namespace), VECTOR_BYTES and REGISTERS (how many vectors the processor holds) are
// defined.
//
// In a tile, each row is a key, and the lanes of its vectors are queries. So a softmax runs down the columns, with no
// sum across lanes, and a mask compares lanes with the number of a key.

namespace KERNEL {

#include "vectors.h"
#include "half.h"
#include "block.h"
#include "products.h"
#include "scores.h"
#include "forward.h"
#include "backward.h"
#include "layers.h"

const Kernel kernel{run_forward<Worker>, run_backward<Worker>, layer_norm, layer_norm_backward, geglu, geglu_backward,
                    rotate, move_heads<false>, move_heads<true>};

}  // namespace KERNEL
