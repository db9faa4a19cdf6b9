"""How a provider is reached: the only place that knows an agent's proxy, certificates and version of HTTP."""

from __future__ import annotations

import os
import ssl
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import httpx

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.problems import ConfigProblem
from openagents_worker.secret_forms import remember_secret, remember_secrets_of_url

__all__ = ["ConnectionOptions", "FileStamps", "hint_for_connection"]

SOCKS = ("socks5", "socks5h")
PROXY_SCHEMES = "http://, https://, socks5://, socks5h://"

FileStamps = tuple[tuple[int, int, int] | None, ...]
"""Modification time, inode and size of each file: they change when a certificate is replaced."""


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """The options of an agent's connections. File names are those of this machine."""

    proxy: str | None = field(default=None, repr=False)
    """A URL, which may contain a password. None: the variables of the environment."""
    ca_file: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    key_password: str | None = field(default=None, repr=False)
    http2: bool | None = None

    @classmethod
    def of(cls, options: LLMOptions, env: Mapping[str, str]) -> Self:
        """The options of an agent. Logs and events mask the secrets in them from now on."""
        password = env.get(options.client_key_password_env or "")
        remember_secret(password)
        remember_secrets_of_url(options.proxy or "")
        return cls(
            options.proxy,
            options.ca_file,
            options.client_cert,
            options.client_key,
            password,
            options.http2,
        )

    @property
    def uses_http2(self) -> bool:
        """Whether HTTP/2 is used where a server offers it."""
        return is_http2_installed() if self.http2 is None else self.http2

    # --- certificates ------------------------------------------------------------------------------------

    def context(self, url: httpx.URL) -> ssl.SSLContext:
        """The SSL context for connections to a URL. To read the public authorities takes 0.1 s: call it in a
        thread. Raises `ValueError` for a file that cannot be used; the message begins with the option."""
        if self.ca_file is None and self.client_cert is None:
            if url.scheme == "http":
                return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # unused; it trusts nobody
            where = tuple(map(os.environ.get, ("SSL_CERT_FILE", "SSL_CERT_DIR")))
            return _trusting_the_public(self.uses_http2, *where)
        context = _verifying_with(self.ca_file) if self.ca_file is not None else httpx.create_ssl_context()
        self._load_client_cert(context)
        return context

    def stamps(self) -> FileStamps:
        return tuple(map(_stamp, (self.ca_file, self.client_cert, self.client_key)))

    def _load_client_cert(self, context: ssl.SSLContext) -> None:
        if self.client_cert is None:
            return
        cert = _readable("client_cert", self.client_cert)
        key = None if self.client_key is None else _readable("client_key", self.client_key)
        try:
            # Without a password OpenSSL would ask for one at the terminal.
            context.load_cert_chain(cert, key, password=lambda: self.key_password or "")
        except (ssl.SSLError, ValueError):
            raise ValueError(_problem_of_pair(cert, key, self.key_password)) from None

    # --- problems ----------------------------------------------------------------------------------------

    def problems(self, options: LLMOptions) -> Iterator[ConfigProblem]:
        """What is wrong with these options at start, on this machine."""
        yield from self._problems_of_proxy(options)
        yield from self._problems_of_authorities()
        yield from self._problems_of_client_cert(options)
        if self.http2 and not is_http2_installed():
            hint = "pip install 'openagents-worker[http2]'"
            yield ConfigProblem(("http2",), "HTTP/2 requires a package that is not installed", hint)

    def _problems_of_proxy(self, options: LLMOptions) -> Iterator[ConfigProblem]:
        if self.proxy is not None:
            found = _proxy_problem("llm.proxy", self.proxy)
            if found is not None:
                yield ConfigProblem(("proxy",), *found)
            return
        try:
            variable, proxy = _proxy_variable(httpx.URL(options.api_base or ""))
        except httpx.InvalidURL:  # the client reports the invalid URL
            return
        found = _proxy_problem(variable, proxy) if proxy else None
        if found is not None:
            yield ConfigProblem(("api_base",), f"it cannot be reached: {found[0]}", found[1])

    def _problems_of_authorities(self) -> Iterator[ConfigProblem]:
        if self.ca_file is None:
            return
        try:
            context = _verifying_with(self.ca_file)
        except ValueError as error:
            yield ConfigProblem(("ca_file",), str(error))
        else:
            if not context.cert_store_stats()["x509_ca"]:
                text = f"{self.ca_file} contains no certificate of an authority"
                hint = "give the certificate of the authority that signed the server's certificate"
                yield ConfigProblem(("ca_file",), text, hint)

    def _problems_of_client_cert(self, options: LLMOptions) -> Iterator[ConfigProblem]:
        if self.client_cert is None:
            for name in ("client_key", "client_key_password_env"):
                if getattr(options, name) is not None:
                    yield ConfigProblem((name,), "there is no client_cert that it belongs to")
            return
        variable = options.client_key_password_env
        if variable is not None and not self.key_password:
            hint = f"set {variable} in the worker's environment and restart the worker"
            text = f"the environment variable {variable} is not set"
            yield ConfigProblem(("client_key_password_env",), text, hint)
            return
        try:
            self._load_client_cert(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        except ValueError as error:
            yield ConfigProblem(("client_cert",), str(error))

    # --- the proxy ---------------------------------------------------------------------------------------

    def proxy_for(self, url: httpx.URL, context: ssl.SSLContext) -> httpx.Proxy | None:
        """The proxy for this URL. A proxy with TLS is verified as the server is."""
        address = self.proxy if self.proxy is not None else _proxy_variable(url)[1]
        if not address:
            return None
        is_tls = address.lower().startswith("https://")
        return httpx.Proxy(address, ssl_context=context if is_tls and self.ca_file else None)


@cache  # the certificates of all public authorities take 2 MB
def _trusting_the_public(http2: bool, file: str | None, folder: str | None) -> ssl.SSLContext:
    """A shared context for all agents without certificates of their own. httpcore changes it for `http2`;
    httpx reads the variables with `file` and `folder` itself."""
    return httpx.create_ssl_context()


def hint_for_connection(error: Exception) -> str:
    """What to check if there was no reply. `error` is httpx's."""
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "the server's certificate is not of an authority in llm.ca_file, or in the system's list"
    if "ALERT_CERTIFICATE_REQUIRED" in text.upper() or "CERTIFICATE_REQUIRED" in text.upper():
        return "the server requires a client certificate: see llm.client_cert"
    if "ProxyError" in type(error).__name__:
        return "check llm.proxy, or the proxy in the worker's environment, with its user and password"
    return "check llm.api_base, and llm.timeout_ms if the model is slow"


def is_http2_installed() -> bool:
    return find_spec("h2") is not None


def _readable(option: str, path: str) -> str:
    """The path, if this process can read the file. Raises `ValueError`."""
    try:
        with Path(path).open("rb"):
            return path
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ValueError(f"the file of {option} cannot be read: {path}: {reason}") from None


def _verifying_with(ca_file: str) -> ssl.SSLContext:
    """A context that trusts the authorities in the file, and no others. Raises `ValueError`."""
    try:
        return ssl.create_default_context(cafile=_readable("ca_file", ca_file))
    except ssl.SSLError:
        text = f"the file of ca_file contains no PEM certificate (-----BEGIN CERTIFICATE-----): {ca_file}"
        raise ValueError(text) from None


def _stamp(path: str | None) -> tuple[int, int, int] | None:
    try:
        found = Path(path).stat() if path is not None else None
    except OSError:
        return None
    return found and (found.st_mtime_ns, found.st_ino, found.st_size)


def _problem_of_pair(cert: str, key: str | None, password: str | None) -> str:
    """Why a certificate and its key cannot be used."""
    texts = [Path(path).read_bytes() for path in (cert, key or cert)]
    if b"-----BEGIN CERTIFICATE-----" not in texts[0]:
        return f"{cert} is not a PEM certificate"
    if b"PRIVATE KEY-----" not in texts[1]:
        where = "client_key" if key else "client_cert, and client_key is not set"
        return f"there is no private key in the file of {where}: {key or cert}"
    if b"ENCRYPTED" in texts[1]:
        state = "does not fit" if password else "is missing: set client_key_password_env"
        return f"the private key in {key or cert} has a password, which {state}"
    return f"the certificate in {cert} and the key in {key or cert} do not belong together"


def _proxy_problem(where: str, proxy: str) -> tuple[str, str] | None:
    """Why a proxy cannot be used, and a hint. None: it can be used. `where`: the option or the variable."""
    remember_secrets_of_url(proxy)
    scheme = proxy.partition("://")[0].lower() if "://" in proxy else ""
    if scheme not in ("http", "https", *SOCKS):
        named = f"the unknown scheme {scheme!r}" if scheme else "no scheme"
        return f"the proxy in {where} has {named}", f"known schemes: {PROXY_SCHEMES}"
    if scheme in SOCKS and find_spec("socksio") is None:
        return (
            f"the {scheme}:// proxy in {where} requires a package that is not installed",
            "pip install socksio, or use an http:// proxy"
            + ("" if where == "llm.proxy" else ", or add the model's host to NO_PROXY"),
        )
    try:
        has_host = bool(httpx.Proxy(proxy).url.host)
    except (httpx.InvalidURL, ValueError):
        has_host = False
    return None if has_host else (f"{where} is not a URL", "for example http://proxy.example.com:3128")


def _proxy_variable(url: httpx.URL) -> tuple[str, str]:
    """The name of the environment variable that sets a proxy for this URL, and the proxy; "" without one.

    Reads HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY.
    """
    proxies = urllib.request.getproxies()
    kind = url.scheme if proxies.get(url.scheme) else "all"
    proxy = proxies.get(kind, "")
    if not proxy or urllib.request.proxy_bypass(url.host):
        return "", ""
    return f"{kind.upper()}_PROXY", proxy if "://" in proxy else f"http://{proxy}"
