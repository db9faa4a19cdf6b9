"""Which images and files each provider is sent, and what the model reads in place of the others."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import pytest

from openagents_worker.agents import LLMOptions
from openagents_worker.llm.base import ModelRequest
from openagents_worker.llm.openai_chat import ChatCompletions
from openagents_worker.tools.mcp.results import tool_result
from tests.unit.llm.wire import ANTHROPIC, CHAT, FORMATS, HI, RESPONSES, Format

NOT_READ = "this model cannot read it"
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"


def block(kind: str, media_type: str, text: str = "a;b", **more: str) -> dict[str, Any]:
    return {"type": kind, "data": b64encode(text.encode()).decode(), "media_type": media_type, **more}


def of_tool(content: Any) -> list[dict[str, Any]]:
    """A conversation with a tool's result with this content."""
    call = {"id": "c1", "name": "t", "arguments": {}}
    answer = {"role": "tool", "tool_call_id": "c1", "name": "t", "content": content}
    return [*HI, {"role": "assistant", "content": "", "tool_calls": [call]}, answer]


def sent(wire: Format, content: Any, *, role: str, model: str = "") -> list[dict[str, Any]]:
    """The parts that a user's message or a tool's result is sent as. The provider accepts the request."""
    messages = [{"role": "user", "content": content}] if role == "user" else of_tool(content)
    body = wire.codec().body(ModelRequest(messages), model or wire.model)
    wire.check(body)
    if wire is RESPONSES:
        last = body["input"][-1]
        parts = last.get("content", last.get("output"))
    else:
        parts = body["messages"][-1]["content"]
    if wire is ANTHROPIC and role == "tool":
        parts = parts[0]["content"]
    if wire is CHAT and role == "tool" and isinstance(parts, list):
        parts = parts[1:]  # after the line that names the call
    found = [{"text": parts}] if isinstance(parts, str) else parts
    return [{name: value for name, value in part.items() if name != "cache_control"} for part in found]


def shape(part: dict[str, Any]) -> str:
    """A part in one word: its type, or what the model reads."""
    if "text" in part:
        return "line" if NOT_READ in part["text"] else "text"
    source = part.get("source") or {}
    return f"document of {source['type']}" if part["type"] == "document" else part["type"]


TABLE = [
    # a block, and what it is for Anthropic, for chat completions and for responses
    (block("image", "image/png"), "image", "image_url", "input_image"),
    (block("image", "image/jpg"), "image", "image_url", "input_image"),
    (block("file", "image/webp"), "image", "image_url", "input_image"),
    (block("image", "image/tiff"), "line", "line", "line"),
    (block("image", "image/svg+xml"), "document of text", "text", "text"),
    (block("file", "application/pdf"), "document of base64", "file", "input_file"),
    (block("file", "text/plain"), "document of text", "text", "input_file"),
    (block("file", "text/csv", name="a.csv"), "document of text", "text", "input_file"),
    (block("file", "text/csv; charset=utf-8"), "document of text", "text", "input_file"),
    (block("file", "text/x-python"), "document of text", "text", "text"),
    (block("file", "application/json"), "document of text", "text", "input_file"),
    (block("file", DOCX), "line", "line", "input_file"),
    (block("file", "application/zip", name="r.zip"), "line", "line", "line"),
    (block("file", "application/octet-stream"), "line", "line", "line"),
    (block("file", "audio/wav"), "line", "line", "line"),
    (block("file", "video/mp4"), "line", "line", "line"),
    ({"type": "image", "url": "https://x.test/a"}, "image", "image_url", "input_image"),
    ({"type": "file", "url": "https://x.test/a.pdf"}, "document of url", "line", "input_file"),
    (
        {"type": "file", "url": "https://x.test/a", "media_type": "image/png"},
        *("image", "image_url", "input_image"),
    ),
    ({"type": "file", "url": "https://x.test/a", "media_type": "audio/wav"}, "line", "line", "line"),
    ({"type": "file", "file_id": "file_7"}, "document of file", "file", "input_file"),
]


@pytest.mark.parametrize("role", ["user", "tool"])
@pytest.mark.parametrize(("content", "anthropic", "chat", "responses"), TABLE)
def test_each_provider_is_sent_what_it_takes(
    content: dict[str, Any], anthropic: str, chat: str, responses: str, role: str
) -> None:
    """A request with another type is refused, and so is every later one of the conversation."""
    found = {wire.provider: [shape(part) for part in sent(wire, [content], role=role)] for wire in FORMATS}

    assert found == {
        "anthropic": [anthropic],
        "openai_compatible": [chat],
        "openai_responses": [responses],
    }


@pytest.mark.parametrize("wire", FORMATS, ids=lambda wire: wire.provider)
def test_the_model_reads_what_the_file_was(wire: Format) -> None:
    zipped = block("file", "application/zip", "x" * 12_000, name="r.zip")
    there = {"type": "file", "url": "https://x.test/a", "name": "a.mp4", "media_type": "video/mp4"}

    texts = [sent(wire, [each], role="tool")[0]["text"] for each in (zipped, there)]

    assert texts == [
        f"[file r.zip, application/zip, 12 KB: {NOT_READ}]",
        f"[file a.mp4, video/mp4, https://x.test/a: {NOT_READ}]",
    ]


@pytest.mark.parametrize("wire", FORMATS, ids=lambda wire: wire.provider)
def test_a_file_beside_texts_stands_on_lines_of_its_own(wire: Format) -> None:
    """Some wire formats join the texts of a tool's result."""
    content = [
        {"type": "text", "text": "one"},
        block("file", "application/zip"),
        {"type": "text", "text": "two"},
    ]

    whole = "".join(part["text"] for part in sent(wire, content, role="tool"))

    assert whole == f"one\n[file, application/zip, 3 bytes: {NOT_READ}]\ntwo"


def test_chat_completions_are_sent_the_text_of_a_file() -> None:
    """OpenAI's chat completions take only PDF as files: what is text, the model reads as text."""
    (part,) = sent(CHAT, [block("file", "text/csv", "a;ü", name="a.csv")], role="user")

    assert part["text"] == "[file a.csv, text/csv, 4 bytes]\na;ü"


@pytest.mark.parametrize(
    ("media_type", "format_"), [("audio/wav", "wav"), ("audio/x-wav", "wav"), ("audio/mpeg", "mp3")]
)
@pytest.mark.parametrize("model", ["gpt-audio", "gpt-4o-audio-preview", "google/gemini-3-pro"])
def test_a_model_that_hears_is_sent_audio(media_type: str, format_: str, model: str) -> None:
    """In chat completions. Other models refuse a request with audio."""
    content = block("file", media_type)

    (part,) = sent(CHAT, [content], role="tool", model=model)

    assert part == {"type": "input_audio", "input_audio": {"data": content["data"], "format": format_}}
    assert shape(sent(CHAT, [block("file", "audio/ogg")], role="tool", model=model)[0]) == "line"


def test_a_file_without_a_name_gets_one() -> None:
    """OpenAI refuses the bytes of a file without a name."""
    pdf = block("file", "application/pdf")

    assert sent(CHAT, [pdf], role="user")[0]["file"]["filename"] == "file.pdf"
    assert sent(RESPONSES, [pdf], role="user")[0]["filename"] == "file.pdf"
    assert sent(RESPONSES, [block("file", DOCX)], role="user")[0]["filename"] == "file.docx"


def test_bedrock_takes_documents_by_way_of_litellm() -> None:
    messages = [{"role": "user", "content": [block("file", DOCX, name="a.docx")]}]

    body = CHAT.codec().body(ModelRequest(messages), "bedrock/amazon.nova-pro-v1:0")

    assert body["messages"][0]["content"][0]["file"]["filename"] == "a.docx"


def test_openrouter_is_sent_the_url_of_a_file() -> None:
    """It fetches the file, which OpenAI's chat completions do not."""
    options = LLMOptions(provider="openai_compatible", api_base="https://openrouter.ai/api/v1")
    messages = [{"role": "user", "content": [{"type": "file", "url": "https://x.test/a.pdf"}]}]

    body = ChatCompletions(options, {}).body(ModelRequest(messages), "m")

    assert body["messages"][0]["content"][0]["file"]["file_data"] == "https://x.test/a.pdf"


@pytest.mark.parametrize(
    ("found", "media_type"),
    [
        ({"type": "audio", "data": "UklG", "mimeType": "audio/wav"}, "audio/wav"),
        ({"type": "image", "data": "UklG"}, "application/octet-stream"),
        ({"type": "resource", "resource": {"uri": "file:///r.zip", "blob": "UEsD"}}, "application/zip"),
        ({"type": "resource", "resource": {"uri": "file:///r", "blob": "UEsD"}}, "application/octet-stream"),
        (
            {
                "type": "resource",
                "resource": {"uri": "a:b", "blob": "YSxi", "mimeType": "text/csv; header=present"},
            },
            "text/csv",
        ),
    ],
)
@pytest.mark.parametrize("wire", FORMATS, ids=lambda wire: wire.provider)
def test_what_a_server_of_mcp_returns_can_be_sent(
    found: dict[str, Any], media_type: str, wire: Format
) -> None:
    """Servers may leave out the type, or add parameters to it."""
    (content,) = tool_result({"content": [found]}, "t")

    assert content["media_type"] == media_type
    assert sent(wire, [content], role="tool")
