"""Model servers that others wrote, each in an environment of its own. The only place that starts them.

`LLAMA` writes a model with random weights and serves it with llama.cpp's own HTTP server, from the package
`xllamacpp`: `llama-cpp-python` has no wheels on the index, and compiles llama.cpp for many minutes. A random
model writes random bytes, but under a grammar it writes valid JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.deployment.commands import Running, free_port, running
from tests.support.waiting import wait_for

__all__ = ["MASTER_KEY", "environment", "fakellm", "litellm_proxy", "llama"]

INSTALLED_WITHIN_S = 600
STARTED_WITHIN_S = 240  # the proxy imports for half a minute
MASTER_KEY = "sk-a-master-key-that-is-long-enough-0123456789"

LLAMA = """
import signal, sys
import gguf, numpy, xllamacpp

path, port = sys.argv[1], int(sys.argv[2])
WIDTH, INNER, LAYERS = 64, 128, 2
NORMAL = [chr(code) for code in range(33, 127)] + ["\\u2581"]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *NORMAL]
KINDS = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
KINDS += [gguf.TokenType.NORMAL] * len(NORMAL)

random = numpy.random.default_rng(7)
model = gguf.GGUFWriter(path, "llama")
model.add_context_length(8192)
model.add_embedding_length(WIDTH)
model.add_block_count(LAYERS)
model.add_feed_forward_length(INNER)
model.add_head_count(4)
model.add_head_count_kv(4)
model.add_layer_norm_rms_eps(1e-5)
model.add_rope_dimension_count(WIDTH // 4)
model.add_vocab_size(len(TOKENS))
model.add_file_type(gguf.LlamaFileType.ALL_F32)
model.add_tokenizer_model("llama")
model.add_token_list(TOKENS)
model.add_token_scores([0.0] * len(TOKENS))
model.add_token_types([int(kind) for kind in KINDS])
model.add_bos_token_id(1)
model.add_eos_token_id(2)
model.add_unk_token_id(0)
model.add_chat_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}assistant: ")


def weights(name, *shape):
    model.add_tensor(name + ".weight", (random.standard_normal(shape) * 0.3).astype(numpy.float32))


def ones(name):
    model.add_tensor(name + ".weight", numpy.ones(WIDTH, numpy.float32))


weights("token_embd", len(TOKENS), WIDTH)
weights("output", len(TOKENS), WIDTH)
ones("output_norm")
for layer in range(LAYERS):
    block = f"blk.{layer}."
    ones(block + "attn_norm")
    ones(block + "ffn_norm")
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        weights(block + name, WIDTH, WIDTH)
    weights(block + "ffn_gate", INNER, WIDTH)
    weights(block + "ffn_up", INNER, WIDTH)
    weights(block + "ffn_down", WIDTH, INNER)
model.write_header_to_file()
model.write_kv_data_to_file()
model.write_tensors_to_file()
model.close()

params = xllamacpp.CommonParams()
params.model.path = path
params.hostnames = ["127.0.0.1"]
params.port = port
params.n_ctx = 8192
params.n_parallel = 2
params.cpuparams.n_threads = 1
params.warmup = False
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
signal.pause()
"""

PROXY = {
    "model_list": [
        {
            "model_name": "gpt-4o-mini",
            "litellm_params": {"model": "openai/gpt-4o-mini", "api_base": "{model}", "api_key": "k"},
        },
        {
            "model_name": "claude-sonnet-4-5",
            "litellm_params": {
                "model": "anthropic/claude-sonnet-4-5",
                "api_base": "{model_root}",
                "api_key": "k",
            },
        },
        {
            "model_name": "mock",
            "litellm_params": {
                "model": "openai/gpt-4o-mini",
                "api_key": "k",
                "mock_response": "It is a mock.",
            },
        },
    ],
    "litellm_settings": {"num_retries": 0},
}

FAKE = {
    "version": 1,
    "rules": [
        {
            "name": "after",
            "when": {"tool_result_contains": "counted"},
            "respond": {"content": "It is counted."},
        },
        {
            "name": "call",
            "when": {"tools_include": "count"},
            "respond": {"tool_calls": [{"name": "count", "arguments": {"number": 7}}]},
        },
        {
            "name": "full",
            "when": {"messages_contain": "too much"},
            "respond": {"status": 400, "error": "This is too much."},
        },
    ],
}


def environment(folder: Path, *packages: str) -> Path:
    """The folder of the programs of a new environment with these packages, and with nothing of ours."""
    _run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    python = folder / "bin" / "python"
    quiet = ("--quiet", "--disable-pip-version-check")
    _run(sys.executable, "-m", "pip", "--python", str(python), "install", *quiet, *packages)
    return folder / "bin"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALLED_WITHIN_S)
    assert done.returncode == 0, done.stderr[-4000:]


@contextmanager
def llama(programs: Path, folder: Path) -> Generator[str]:
    """llama.cpp with the small random model. Yields the URL for `llm.api_base`."""
    port = free_port()
    program = folder / "llama.py"
    program.write_text(LLAMA)
    command = [str(programs / "python"), str(program), str(folder / "model.gguf"), str(port)]
    with _started(command, folder, port, "/health") as url:
        yield url


@contextmanager
def litellm_proxy(programs: Path, folder: Path, *, model_url: str) -> Generator[str]:
    """LiteLLM's proxy before a model server, and with a reply of its own for the model `mock`."""
    port = free_port()
    text = (
        json.dumps(PROXY).replace("{model}", model_url).replace("{model_root}", model_url.removesuffix("/v1"))
    )
    config = folder / "proxy.yaml"
    config.write_text(text)  # JSON is YAML
    env = {"LITELLM_MASTER_KEY": MASTER_KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command = [str(programs / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    with _started(command, folder, port, "/health/liveliness", env) as url:
        yield url


@contextmanager
def fakellm(programs: Path, folder: Path) -> Generator[str]:
    """The mock server `fakellm` with the rules of `FAKE`."""
    port = free_port()
    config = folder / "fakellm.yaml"
    config.write_text(json.dumps(FAKE))
    command = [str(programs / "fakellm"), "serve", "--config", str(config), "--port", str(port)]
    with _started(command, folder, port, "/_fakellm/stats") as url:
        yield url


@contextmanager
def _started(
    command: Sequence[str], folder: Path, port: int, path: str, env: Mapping[str, str] | None = None
) -> Generator[str]:
    """A server for as long as the block lasts, once it answers at `path`."""
    variables = {"PATH": f"{Path(command[0]).parent}:/usr/bin:/bin", "HOME": str(folder), **(env or {})}
    with running(command, variables, folder, cwd=folder) as process:
        address = f"http://127.0.0.1:{port}"
        wait_for(lambda: _answers(address + path, process), f"{command[0]} answers", STARTED_WITHIN_S)
        yield f"{address}/v1"


def _answers(url: str, process: Running) -> bool:
    assert process.process.poll() is None, process.said[-4000:]
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.TransportError:
        return False
