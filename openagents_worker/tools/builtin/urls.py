"""URLs: `url_parse`, `url_build`, `query_param`, `host_lookup`. None of them uses the network."""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Any, Literal
from urllib.parse import SplitResult, parse_qs, quote, urlencode, urlparse, urlsplit

from pydantic import Field

from openagents_worker.errors import ToolValidationError
from openagents_worker.tools.base import ToolContext
from openagents_worker.tools.typed import READS_ONLY, TypedTool

__all__ = ["HostLookup", "QueryParam", "URLBuild", "URLParse"]

MAX_URL_CHARS = 8_192  # as in http_request
MAX_PARAMETERS = 1_000
MAX_PORT = 65_535
KEPT_IN_PATH = "/:@!$&'()*+,;=~%"  # characters that are allowed in a path (RFC 3986), and escapes
KEPT_IN_QUERY = KEPT_IN_PATH + "?"
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_BEFORE_HOST = re.compile(rf"({SCHEME.pattern}:)?//")
_NOT_AN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
HOST = re.compile(r"[A-Za-z0-9_~!$&'()*+,;=%.-]+|[^\W_][\w.-]*")
"""A host name: ASCII as in RFC 3986, or an international name."""

URL = Field(min_length=1, max_length=MAX_URL_CHARS, description="The URL.")


class URLParse(TypedTool):
    name = "url_parse"
    description = "Splits a URL into scheme, host, port, path, query, fragment and user."
    spec = READS_ONLY

    class Params(TypedTool.Params):
        url: str = URL

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        try:
            parts = urlparse(args.url)
            return {
                "scheme": parts.scheme,
                "netloc": parts.netloc,
                "hostname": parts.hostname,
                "port": parts.port,
                "path": parts.path,
                "params": parts.params,
                "query": parts.query,
                "fragment": parts.fragment,
                "username": parts.username,
                "password": parts.password,
            }
        except ValueError as error:
            raise _not_a_url(error, self.name) from None


class URLBuild(TypedTool):
    name = "url_build"
    description = "Builds a URL from its parts, and escapes the characters that a part must not contain."
    spec = READS_ONLY

    class Params(TypedTool.Params):
        host: str = Field(
            min_length=1, max_length=300, description="The host, also with a port: `a.org:8080`."
        )
        scheme: str = Field("https", min_length=1, max_length=32, description="The scheme.")
        path: str = Field("/", max_length=MAX_URL_CHARS, description="The path.")
        query: str | dict[str, str | int | float | bool | list[str | int | float]] = Field(
            "", description='The query: a text such as `q=1&p=2`, or an object: {"q": 1, "tag": ["a", "b"]}.'
        )
        fragment: str = Field("", max_length=MAX_URL_CHARS, description="The part after `#`.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        if SCHEME.fullmatch(args.scheme) is None:
            raise ToolValidationError(f"scheme: {args.scheme!r} is not a valid scheme", self.name)
        path = _escaped(args.path, KEPT_IN_PATH)
        if path and not path.startswith("/"):
            path = "/" + path
        url = f"{args.scheme}://{_checked_host(args.host, self.name)}{path}"
        if args.query:
            url += "?" + _query_text(args.query)
        if args.fragment:
            url += "#" + _escaped(args.fragment, KEPT_IN_QUERY)
        if len(url) > MAX_URL_CHARS:
            raise ToolValidationError(
                f"the URL has {len(url):,} characters; {MAX_URL_CHARS:,} are allowed", self.name
            )
        return {"url": url}


class QueryParam(TypedTool):
    name = "query_param"
    description = "Reads one parameter in the query of a URL (`get`), or all of them (`list`)."
    spec = READS_ONLY

    class Params(TypedTool.Params):
        url: str = URL
        key: str | None = Field(None, description="The name of the parameter; required for `get`.")
        action: Literal["get", "list"] = Field("get", description="`get`: one parameter; `list`: all.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        try:
            query = urlsplit(args.url).query
            found = parse_qs(query, keep_blank_values=True, max_num_fields=MAX_PARAMETERS)
        except ValueError as error:
            raise _not_a_url(error, self.name) from None
        if args.action == "list":
            return {"params": {name: _one_or_all(values) for name, values in found.items()}}
        if not args.key:
            raise ToolValidationError("key: the name of the parameter is required for `get`", self.name)
        return {"key": args.key, "value": _one_or_all(found.get(args.key, [None]))}


class HostLookup(TypedTool):
    name = "host_lookup"
    description = "Reads host, port and top-level domain from a URL or host name, without any network access."
    spec = READS_ONLY

    class Params(TypedTool.Params):
        url: str = Field(min_length=1, max_length=MAX_URL_CHARS, description="A URL, or `host:port`.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        try:
            parts = _split_with_host(args.url)
            host, port = _host_of(parts), parts.port
        except ValueError as error:
            raise _not_a_url(error, self.name) from None
        if not host:
            raise ToolValidationError(
                "url: it has no host", self.name, hint="for example https://example.org/a"
            )
        return {"host": host, "port": port, "has_https": parts.scheme == "https", "domain": _domain(host)}


def _split_with_host(url: str) -> SplitResult:
    """The parts of a URL. Text that does not begin with a scheme or `//` begins with the host:
    `example.org:8080/a`."""
    url = url.strip()
    return urlsplit(url if _BEFORE_HOST.match(url) else f"//{url}")


def _host_of(parts: SplitResult) -> str:
    """The host in the case in which it was written; `hostname` would make it lower case."""
    host_and_port = parts.netloc.rpartition("@")[2]
    if host_and_port.startswith("["):
        return host_and_port.partition("]")[0][1:]
    return host_and_port.partition(":")[0]


def _domain(host: str) -> str:
    """The last label of a host name; an IP address as a whole."""
    try:
        return str(ip_address(host.partition("%")[0]))
    except ValueError:
        return host.rstrip(".").rpartition(".")[2]


def _checked_host(host: str, tool_name: str) -> str:
    """A host with an optional port. Raises `ToolValidationError` if it contains other parts of a URL."""
    has_port = "]:" in host or (host.count(":") == 1 and not host.startswith("["))
    name, separator, port = host.rpartition(":") if has_port else (host, "", "")
    if separator and not (port.isascii() and port.isdigit() and int(port) <= MAX_PORT):
        raise ToolValidationError(f"host: {port[:20]!r} is not a valid port", tool_name)
    address = name.removeprefix("[").removesuffix("]")
    if ":" in name:
        try:
            return f"[{ip_address(address)}]{separator}{port}"
        except ValueError:
            raise ToolValidationError(f"host: {name[:80]!r} is not a valid host", tool_name) from None
    if HOST.fullmatch(name) is None:
        raise ToolValidationError(
            f"host: {name[:80]!r} is not a valid host", tool_name, hint="give path and user in other parts"
        )
    return f"{name}{separator}{port}"


def _escaped(text: str, kept: str) -> str:
    """A part of a URL with escapes for all other characters. Escapes that it contains are kept."""
    return quote(_NOT_AN_ESCAPE.sub("%25", text), safe=kept)


def _query_text(query: str | dict[str, Any]) -> str:
    if isinstance(query, str):
        return _escaped(query.removeprefix("?"), KEPT_IN_QUERY)
    texts = {
        name: [_text(each) for each in value] if isinstance(value, list) else _text(value)
        for name, value in query.items()
    }
    return urlencode(texts, doseq=True, quote_via=quote)


def _text(value: str | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _not_a_url(error: ValueError, tool_name: str) -> ToolValidationError:
    return ToolValidationError(f"url: it is not a valid URL: {error}", tool_name)
