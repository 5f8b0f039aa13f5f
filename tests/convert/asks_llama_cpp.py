"""Ask files of llama.cpp, in the interpreter that has llama_cpp; see test_llama_cpp.py.

Arguments: the question (JSON) and where the answer goes (JSON).
"""
import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

import llama_cpp
from llama_cpp import llama_cpp as library
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

F32 = 0  # ggml_type
asked = json.loads(Path(sys.argv[1]).read_text())
options = dict(n_ctx=64, n_batch=64, n_ubatch=64, type_k=F32, type_v=F32, flash_attn=False, n_threads=1, verbose=False)
defaults = library.llama_model_default_params


def without_repacking():
    """This version's kernels for AMX crash with any file of Q8_0 on some machines: use its ordinary ones."""
    chosen = defaults()
    chosen.use_extra_bufts = False
    return chosen


def logits(path, rows, whole, **more):
    """Logits at all positions but the last of each [prompt, answer]; `whole`: how the prompt is decoded."""
    model, found = llama_cpp.Llama(path, logits_all=True, **options, **more), []
    for prompt, answer in rows:
        model.reset()
        model._ctx.kv_cache_clear()
        if whole:
            llama_cpp.llama_set_causal_attn(model._ctx.ctx, False)
        model.eval(prompt)
        if whole:
            llama_cpp.llama_set_causal_attn(model._ctx.ctx, True)
        for token in answer[:-1]:
            model.eval([token])
        found.append(model.scores[:len(prompt) + len(answer) - 1].tolist())
    return found


def card(folder):
    """Run the lines of a card in its folder, for fewer tokens, and return what they print."""
    os.chdir(folder)
    [lines] = re.findall(r"^```python\n(.*?)^```$", Path("README.md").read_text(), re.M | re.S)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(lines.replace("== 100", f"== {asked['max_new_tokens']}"), {})
    return out.getvalue()


library.llama_model_default_params = without_repacking
found = {"version": llama_cpp.__version__}
for name, folder in asked["folders"].items():
    path = f"{folder}/model.gguf"
    found[name] = {"whole": logits(path, asked["rows"], True), "causal": logits(path, asked["rows"], False),
                   "overridden": logits(path, asked["rows"], False,
                                        kv_overrides={"hrm_text.attention.causal": False})}
folder = asked["folders"]["float32"]
found["card"], found["card without tokenizer"] = card(folder), card(asked["without tokenizer"])
model = llama_cpp.Llama(f"{folder}/model.gguf", **options)
found["prompts"] = [model.tokenize(text.encode(), add_bos=False, special=True) for text in asked["prompts"]]
found["texts"] = [model.tokenize(text.encode(), add_bos=False, special=False) for text in asked["texts"]]
found["ends"] = [model.token_bos(), model.token_eos()]
template = Jinja2ChatFormatter(model.metadata["tokenizer.chat_template"], eos_token="", bos_token="")
found["chats"] = [template(messages=chat).prompt for chat in asked["chats"]]
try:
    llama_cpp.Llama(f"{asked['flat']}/model.gguf", **options)
except ValueError as error:
    found["flat"] = str(error)
Path(sys.argv[2]).write_text(json.dumps(found))
