"""A model, its optimizer, and the compiled functions that train it."""
import math
import sys
import zlib

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from tqdm import tqdm

from local_attention import LocalMHA, LocalTransformer
from local_attention.parallel import AverageGradients

from .folder import replace

BITS = 1 / math.log(2)  # bits in a nat


def learning_rate(settings, step):
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1)))


class Trainer:
    """A model, its optimizer, and the compiled functions that train it."""

    def __init__(self, settings):
        self.settings = settings
        self.step = 0
        ms.set_seed(settings.seed)
        heads = dict(dim=settings.dim, heads=settings.heads, kv_heads=settings.kv_heads, dim_head=settings.dim_head,
                     causal=True)
        full = None
        if settings.global_layers:  # one window, as long as the sequence
            full = LocalMHA(
                window_size=settings.seq_len, look_backward=0, exact_windowsize=False, prenorm=True, **heads)
        windows = settings.windows * (settings.depth if len(settings.windows) == 1 else 1)
        self.model = LocalTransformer(
            **heads, num_tokens=256, max_seq_len=settings.seq_len, depth=settings.depth,
            local_attn_window_size=tuple(windows), num_residual_streams=settings.num_residual_streams,
            global_attn_layer=full, layers_insert_global_attn=settings.global_layers)
        # rotary embedding already gives positions, and small initial vectors need fewer steps than PyTorch's large ones
        for embedding, scale in ((self.model.token_emb, 0.3), (self.model.pos_emb, 0.)):
            embedding.embedding_table.set_data(embedding.embedding_table * scale)
        self.optimizer = nn.Adam(self.model.trainable_params(), learning_rate=settings.learning_rate, beta2=0.99)
        self.average = AverageGradients() if settings.ranks > 1 else None
        self._each = ops.HyperMap()
        compiled = ms.jit if settings.mode == "graph" else lambda function: function
        self.loss = compiled(self._loss)
        self._gradients = ms.value_and_grad(self._part, None, self.model.trainable_params())
        self.gradients = compiled(self._gradients)
        self.add = compiled(self._add)
        self.update = compiled(self._update)
        self.step_of_one = compiled(self._step_of_one)

    def _loss(self, tokens, segment_ids=None):
        return self.model(tokens, return_loss=True, segment_ids=segment_ids)

    def _part(self, weight, tokens, segment_ids=None):
        """Return what a batch adds to the loss of its step."""
        return self._loss(tokens, segment_ids) * weight

    def _add(self, total, gradients):
        return self._each(ops.add, total, gradients)

    def _update(self, gradients):
        if self.average is not None:
            gradients = self.average(gradients)
        return self.optimizer(ops.clip_by_global_norm(gradients, self.settings.clip))

    def _step_of_one(self, *batch):
        """Run a step of one batch. Its gradients stay in the compiled function: this saves a fifth of a small step."""
        loss, gradients = self._gradients(*batch)
        return ops.depend(loss, self._update(gradients))

    def train_step(self, batches):
        """Run one step of the optimizer; return the mean loss of its labels, in bits per byte."""
        self.model.set_train(True)
        ops.assign(self.optimizer.learning_rate, Tensor(learning_rate(self.settings, self.step), ms.float32))
        parts = [self.step_of_one(*batches[0])] if len(batches) == 1 else self._step_of_several(batches)
        self.step += 1
        return self._bits(parts)

    def _step_of_several(self, batches):
        parts, total = [], None
        for batch in batches:
            loss, gradients = self.gradients(*batch)
            parts.append(loss)
            gradients = ms.mutable(gradients)  # any other tuple is a constant, for which each call would compile
            total = gradients if total is None else ms.mutable(self.add(total, gradients))
        self.update(total)
        return parts

    def validate(self, batches):
        self.model.set_train(False)
        return self._bits([self.loss(*batch) * weight for weight, *batch in batches])

    def _bits(self, parts):
        return sum(float(part.asnumpy()) for part in parts) * BITS

    def sample(self, prime, shown):
        """Return the text that the model writes after `prime`, with a progress bar if `shown`."""
        length = self.settings.sample_len
        with tqdm(total=length, desc="sampling", unit="token", leave=False, disable=not shown) as bar:
            tokens = self.model.generate(Tensor(prime[None].astype(np.int32)), length,
                                         temperature=self.settings.temperature, callback=lambda _: bar.update())
        return bytes(tokens.asnumpy()[0].astype(np.uint8).tolist())

    def save(self, path):
        """Save weights, optimizer state and step. The file at `path` is complete at every moment."""
        temporary = path.with_name("checkpoint.tmp.ckpt")
        ms.save_checkpoint(self.optimizer, str(temporary), append_dict={"step": self.step})
        replace(temporary, path)

    def load(self, path):
        values = ms.load_checkpoint(str(path))
        self.step = int(values.pop("step").asnumpy())
        missing, left_over = ms.load_param_into_net(self.optimizer, values, strict_load=True)
        if missing or left_over:
            sys.exit(f"train.py: {path} does not belong to this model: {', '.join([*missing, *left_over])}.")

    def checksum(self):
        """Return a checksum of the weights and the optimizer's state."""
        total = 0
        for parameter in self.optimizer.get_parameters():
            total = zlib.crc32(parameter.asnumpy().tobytes(), total)
        return total
