"""Ask an export in every way that its card names, with whatever transformers is on PYTHONPATH.

Arguments: the folder, the question (JSON), and where the answer goes (tensors and plain values).
"""
import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder, question, answer = sys.argv[1:]
asked = json.loads(Path(question).read_text())
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
options = dict(max_new_tokens=asked["max_new_tokens"], do_sample=False)
chats = tokenizer.apply_chat_template(asked["chats"], padding=True, return_dict=True, return_tensors="pt",
                                      condition="cot")
batches = {"prompts": tokenizer(asked["prompts"], padding=True, return_tensors="pt"), "chats": chats,
           "pairs": tokenizer(asked["prompts"], asked["answers"], padding=True, return_tensors="pt")}
found = {"version": transformers.__version__, "file": transformers.__file__}
for name, batch in batches.items():
    with torch.no_grad():
        logits = model(**batch).logits
    found[f"{name} logits"] = [row[mask.bool()] for row, mask in zip(logits, batch["attention_mask"], strict=True)]
    if name != "pairs":
        output = model.generate(**batch, **options)
        found[f"{name} answers"] = output[:, batch["input_ids"].shape[1]:].tolist()
again = Path(answer).with_name("saved again")
for part in (tokenizer, model):
    part.save_pretrained(again)
shutil.copytree(Path(folder, "custom_generate"), again / "custom_generate")  # which the card asks for
trusting = dict(trust_remote_code=True)
for name, place, trust in (("trusted", folder, trusting), ("causal", folder, {}), ("saved again", again, trusting)):
    pipe = pipeline("text-generation", model=str(place), device="cpu", **trust)
    found[name] = [out[0]["generated_text"] for out in pipe(asked["prompts"], return_full_text=False, **options)]
torch.save(found, answer)
