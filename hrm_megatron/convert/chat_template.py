"""The chat template of an export, in Jinja: formats chats as data/chat.py does, with condition tags before them."""
from __future__ import annotations

import json
import re

from hrm_megatron.data.chat import CALLS, SPEAKERS
from hrm_megatron.data.spelling import Spelling

# The statements trim surrounding whitespace; `chat_template` joins these lines into one.
TEMPLATE = """
{%- set speakers = SPEAKERS -%}
{%- set tokens = TAGS -%}
{%- set said = namespace(turns=[], system='', paragraphs=[]) -%}
{%- for message in messages -%}
  {%- if message['role'] not in speakers -%}
    {{- raise_exception('unknown role ' ~ message['role'] ~ '; use one of ' ~ ROLES) -}}
  {%- endif -%}
  {%- if CALLED -%}
    {{- raise_exception('a call of a tool would be lost; write it into the text of its turn') -}}
  {%- endif -%}
  {%- if message['content'] is string -%}
    {%- set text = message['content'] -%}
  {%- else -%}
    {%- for part in (message['content'] or []) if part['type'] != 'text' -%}
      {{- raise_exception('this model reads text, not ' ~ part['type']) -}}
    {%- endfor -%}
    {%- set text = (message['content'] or []) | map(attribute='text') | join('') -%}
  {%- endif -%}
  {%- set speaker = speakers[message['role']] -%}
  {%- if text | trim or speaker == 'Tool' -%}
    {%- set said.turns = said.turns + [{'speaker': speaker, 'text': text}] -%}
  {%- elif speaker != 'System' -%}
    {{- raise_exception('an empty turn of the role ' ~ message['role']) -}}
  {%- endif -%}
{%- endfor -%}
{%- if said.turns and said.turns[0]['speaker'] == 'System' -%}
  {%- set said.system = said.turns[0]['text'] -%}
  {%- set said.turns = said.turns[1:] -%}
{%- endif -%}
{%- if not said.turns or said.turns[-1]['speaker'] not in ['User', 'Tool'] -%}
  {{- raise_exception('the last message must ask something; an answer is the second text of a pair') -}}
{%- endif -%}
{%- if said.system -%}
  {%- set said.paragraphs = [said.system] -%}
{%- endif -%}
{%- if said.turns | length == 1 and said.turns[0]['speaker'] == 'User' -%}
  {%- set said.paragraphs = said.paragraphs + [said.turns[0]['text']] -%}
{%- else -%}
  {%- for turn in said.turns -%}
    {%- set said.paragraphs = said.paragraphs + [turn['speaker'] ~ ': ' ~ turn['text']] -%}
  {%- endfor -%}
{%- endif -%}
{{- BOQ -}}
{%- for tag in (condition or '').split(',') if tag.strip() -%}
  {%- if tag.strip() not in tokens -%}
    {{- raise_exception('unknown tag ' ~ tag.strip() ~ '; use ' ~ NAMES) -}}
  {%- endif -%}
  {{- tokens[tag.strip()] -}}
{%- endfor -%}
{{- said.paragraphs | join('\\n\\n') ~ EOQ -}}
"""


def chat_template(spelling: Spelling) -> str:
    """Return the template, which formats everything said as a prefix; apply_chat_template accepts `condition`."""
    # Joined here: llama.cpp's Jinja cannot join the keys of an object.
    literals = {"ROLES": ", ".join(SPEAKERS), "NAMES": ", ".join(spelling.tags), "SPEAKERS": SPEAKERS,
                "TAGS": dict(spelling.tags), "BOQ": spelling.boq, "EOQ": spelling.eoq}
    # ensure_ascii=False: Jinja would decode an escaped surrogate pair as two invalid characters.
    values = {name: json.dumps(value, ensure_ascii=False) for name, value in literals.items()} | {
        "CALLED": " or ".join(f"message['{call}']" for call in CALLS)}
    spelled = "".join(line.strip() for line in TEMPLATE.splitlines())
    return re.sub(rf"\b({'|'.join(values)})\b", lambda found: values[found[0]], spelled)
