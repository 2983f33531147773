"""Compares tiny models of mindformers that attend by CoreAttention with their own attention, on CPU in float32.

    python values.py [case ...]

It prints a line for each case: the largest difference of the loss and of any gradient, relative to its largest entry.
It exits with 1 if one is above its bound.
"""
import sys
import time

import models
import numpy as np
from mindspore import Tensor, ops
from models import N, config_of, difference, get_gpt_decoder_block_spec, gpt, loss_and_gradients, tokens

from local_attention.zoo import mindformers as windows

BOUND = 1e-5
OURS = windows.CoreAttention
CASES = {}


def case(bound=BOUND):
    def add(function):
        CASES[function.__name__] = function, bound
        return function
    return add


def window(keys):
    return None if keys is None else (keys - 1, 0)


def compared(wanted=None, given=None, spec=None, tied=False, **settings):
    """Return the difference of two models of the same settings; `wanted` changes those of mindformers' own."""
    given = given or tokens()
    theirs = gpt(config_of(**{**settings, **(wanted or {})}), tied=tied)
    config = config_of(**settings)
    ours = gpt(config, OURS, spec and spec(config), tied)
    return difference(loss_and_gradients(theirs, *given), loss_and_gradients(ours, *given))


@case()
def windows_of_all_16_and_1():
    return max(compared(window_size=window(keys)) for keys in (N, 16, 1))


@case()
def no_window():
    return compared()


@case()
def without_flash():
    return compared(window_size=window(16), use_flash_attention=False)


@case()
def both_sides():
    return compared(window_size=(5, 3))


@case()
def grouped_heads():
    return max(compared(window_size=window(16), num_query_groups=groups) for groups in (2, 1))


@case()
def layers():
    """By the pattern, where it can be told; by with_windows, also where it cannot."""
    pattern = dict(num_layers=3, window_size=window(16), window_attn_skip_freq=[1, 1, 0])
    chosen = compared(pattern, num_layers=3, spec=lambda config: windows.with_windows(
        get_gpt_decoder_block_spec(config), [16, 16, None]))
    return max(compared(**pattern), chosen)


def _packed(rows):
    """Return tokens of 2048 places, with documents that end within rows: the ends, and the places in documents."""
    n, ends = 2048, [[700, 1500, 2048, 2048], [1, 5, 1033, 2048]][:rows]
    places = [np.concatenate([np.arange(b - a) for a, b in zip([0] + row, row)]) for row in ends]
    flat = np.array([[end + row * n for end in ends[row]] for row in range(rows)], np.int32)
    return (*tokens(n, rows), Tensor(np.stack(places).astype(np.int32)), Tensor(flat))


@case()
def documents():
    return max(compared(given=_packed(rows), num_layers=1, seq_length=2048, max_position_embeddings=2048,
                        use_eod_attn_mask_compression=True, use_eod_reset=True, window_size=window(16),
                        num_query_groups=2) for rows in (1, 2))


@case()
def recompute():
    return max(compared(wanted=dict(recompute=False, select_recompute=False), window_size=window(16), **more)
               for more in (dict(recompute=True), dict(select_recompute=[r"self_attention\.core_attention"])))


@case()
def tied_embeddings():
    return compared(window_size=window(16), tied=True)


@case()
def dropout():
    """Two steps differ, evaluation does not: the difference there, or 1 if steps are alike."""
    config = config_of(window_size=window(16), attention_dropout=.1)
    model, (x, y) = gpt(config, OURS), tokens()
    step = models.step_of(model)
    losses = {float(step(x, y)[0].asnumpy()) for _ in range(3)}
    without = gpt(config_of(window_size=window(16)), OURS).set_train(False)(x).asnumpy()
    evaluated = np.abs(model.set_train(False)(x).asnumpy() - without).max()
    return 1. if len(losses) < 3 else float(evaluated)


def _trained(attention):
    """Return the losses of 8 steps by mindformers' own wrapper and optimizer."""
    from mindformers.core.optim import AdamW
    from mindformers.wrapper.wrapper import MFTrainOneStepCell

    class Step(MFTrainOneStepCell):
        """Without the check for overflow, whose operators CPU lacks."""

        def start_overflow_check(self, pre_cond, compute_input):
            return None, compute_input

        def get_overflow_status(self, status, compute_output):
            return ops.zeros(()) > 1

        def process_loss_scale(self, overflow):
            return overflow

    model = models.qwen3(attention)
    model.set_train()
    step = Step(model, AdamW(model.trainable_params(), learning_rate=1e-2), use_clip_grad=True, max_grad_norm=1.,
                scale_sense=1.)
    step.set_train()
    x, y = tokens()
    return [float(step(x, None, None, None, y)[0].asnumpy().reshape(-1)[0]) for _ in range(8)]


@case(2e-3)
def eight_steps_of_qwen3():
    theirs, ours = _trained(None), _trained(OURS)
    print(f"  theirs {theirs[0]:.5f} to {theirs[-1]:.5f}, ours {ours[0]:.5f} to {ours[-1]:.5f}", flush=True)
    return max(abs(a - b) for a, b in zip(theirs, ours)) if theirs[-1] < theirs[0] / 2 else 1.


def main(names):
    models.start()
    wrong = []
    for name in names or CASES:
        function, bound = CASES[name]
        begun = time.time()
        found = function()
        wrong += [] if found <= bound else [name]
        print(f"{name:25} {found:.1e} of {bound:.0e}{'' if found <= bound else ' WRONG'} ({time.time() - begun:.0f} s)",
              flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
