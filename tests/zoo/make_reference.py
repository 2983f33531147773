"""Write the weights and the results of tiny random models of Hugging Face transformers 4.57.1 (torch 2.13, eager).

python make_reference.py FOLDER [family ...]
"""

import os
import sys
import warnings

import numpy as np
import torch
import transformers
from families import FAMILIES

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
folder = sys.argv[1]
rng = np.random.RandomState(0)
ids = rng.randint(3, 64, (2, 40)).astype(np.int64)
mask = np.ones((2, 40), np.int64)
mask[0, :5] = 0
pos = np.concatenate([np.arange(13), np.arange(20), np.arange(7)])[None]  # three documents in a row
for name, (c, m, kw) in FAMILIES.items():
    if sys.argv[2:] and name not in sys.argv[2:]:
        continue
    try:
        torch.manual_seed(1)
        model = getattr(transformers, m)(getattr(transformers, c)(**kw, attn_implementation="eager")).eval()
        for p in model.parameters():  # random, and so large that attention is not uniform
            if p.dim() >= 2:
                torch.nn.init.normal_(p, std=0.25)
        model.save_pretrained(os.path.join(folder, name), safe_serialization=True)
        # from the saved file: ModernBERT's decoder ties a weight only when it is loaded
        model = getattr(transformers, m).from_pretrained(os.path.join(folder, name), attn_implementation="eager").eval()
        causal = "CausalLM" in m
        kwargs = dict(use_cache=False) if causal else {}
        t = torch.from_numpy(ids)
        logits = model(t, **kwargs).logits
        (logits.float() ** 2).mean().backward()
        out = dict(logits=logits.detach().numpy(), grad=model.get_input_embeddings().weight.grad.numpy().copy())
        with torch.no_grad():
            out["padded"] = model(t, attention_mask=torch.from_numpy(mask), **kwargs).logits.numpy()
            if causal:
                cuts = [0, 13, 33, 40]
                out["packed"] = torch.cat(
                    [model(t[:1, a:b], **kwargs).logits for a, b in zip(cuts, cuts[1:])], 1
                ).numpy()
                out["gen"] = model.generate(
                    t, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
                ).numpy()
        np.savez(os.path.join(folder, name + ".npz"), ids=ids, mask=mask, pos=pos, **out)
        print(name, "made", flush=True)
    except Exception as e:
        print(name, "not made:", type(e).__name__, str(e)[:150], flush=True)
