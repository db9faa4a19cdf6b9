"""Programs of the vendors' own packages, run in an environment that has them and nothing of this repository.

`FIELDS` prints the names of the fields that a request can have.
`GOLDEN` reads request bodies from standard input and prints what is wrong with them by the packages' types.
`TALK` has conversations with the model server, whole and streamed, and prints what the packages understood.
"""

from __future__ import annotations

__all__ = ["FIELDS", "GOLDEN", "TALK"]

FIELDS = """
import json
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming as Messages
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as Chat
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming as Responses

TYPES = {"anthropic": Messages, "openai_compatible": Chat, "openai_responses": Responses}
names = {name: kind.__required_keys__ | kind.__optional_keys__ for name, kind in TYPES.items()}
print(json.dumps({name: sorted(found) for name, found in names.items()}))
"""

GOLDEN = '''
import json, sys
from collections.abc import Iterator, Mapping
from pydantic import TypeAdapter, ValidationError
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming as Messages
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as Chat
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming as Responses

TYPES = {"anthropic": Messages, "openai_compatible": Chat, "openai_responses": Responses}
ADAPTERS = {name: TypeAdapter(kind) for name, kind in TYPES.items()}


def read_all(value):
    """Iterables are validated when they are read."""
    if isinstance(value, Mapping):
        for each in value.values():
            read_all(each)
    elif isinstance(value, (list, tuple, Iterator)) or type(value).__name__ == "ValidatorIterator":
        for each in value:
            read_all(each)


problems = []
for name, provider, body in json.load(sys.stdin):
    kind = TYPES[provider]
    known = kind.__required_keys__ | kind.__optional_keys__
    if unknown := sorted(body.keys() - known):
        problems.append(f"{name}: {provider} has no {unknown}")
    try:
        read_all(ADAPTERS[provider].validate_python(body))
    except ValidationError as error:
        problems.append(f"{name}: {provider}: {error}"[:1500])
print(json.dumps(problems))
'''

TALK = """
import json, sys
import anthropic, openai

url = sys.argv[1]
chat = openai.OpenAI(base_url=url, api_key="k", max_retries=0)
claude = anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="k", max_retries=0)
HI = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}]
found = {}


def items(response):
    return [item.type for item in response.output], response.output_text, response.usage.input_tokens


found["responses"] = items(chat.responses.create(model="m", input="hi", tools=TOOLS))
with chat.responses.stream(model="m", input="hi", tools=TOOLS) as stream:
    for _ in stream:
        pass
    found["responses streamed"] = items(stream.get_final_response())

begun = chat.responses.create(model="m", input="hi", background=True, stream=True)
first = next(iter(begun))
begun.close()
events = chat.responses.retrieve(first.response.id, stream=True, starting_after=first.sequence_number)
found["background"] = items([event for event in events][-1].response)
found["cancelled"] = chat.responses.cancel(first.response.id).status


def blocks(message):
    cached = message.usage.cache_read_input_tokens
    return [block.type for block in message.content], message.stop_reason, cached


found["messages"] = blocks(claude.messages.create(model="m", max_tokens=99, messages=HI))
with claude.messages.stream(model="m", max_tokens=99, messages=HI) as stream:
    found["messages streamed"] = blocks(stream.get_final_message())


def choice(completion):
    message = completion.choices[0].message
    names = [call.function.name for call in message.tool_calls]
    return names, message.content, completion.usage.prompt_tokens


found["chat"] = choice(chat.chat.completions.create(model="m", messages=HI))
usage = {"include_usage": True}
with chat.chat.completions.stream(model="m", messages=HI, stream_options=usage) as stream:
    found["chat streamed"] = choice(stream.get_final_completion())


def error(call):
    try:
        for _ in call():
            pass
    except Exception as problem:  # Anthropic's package lets errors of the connection through
        return [type(problem).__name__, getattr(problem, "status_code", None)]
    return None


def asked(fault):
    return [{"role": "user", "content": fault}]


for fault in ("rate_limit", "overloaded", "response", "error_in_200", "reset"):
    found[fault] = [
        error(lambda: chat.responses.create(model="m", input=asked(fault), stream=True)),
        error(lambda: claude.messages.create(model="m", max_tokens=9, messages=asked(fault), stream=True)),
        error(lambda: chat.chat.completions.create(model="m", messages=asked(fault), stream=True)),
    ]
print(json.dumps(found))
"""
