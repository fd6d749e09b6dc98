"""Who may ask, and who may change something: host names, tokens, and the headers of answers."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import os
import re
import socket
from collections.abc import Collection, Sequence

from flask import Response, request

from minibatch.errors import ArgumentError

TOKEN_VARIABLE = 'MINIBATCH_APP_TOKEN'  # noqa: S105
MIN_TOKEN = 8
HOW_TO = f'start the app with token=..., or with the environment variable {TOKEN_VARIABLE}'
HEADERS = {
    'X-Content-Type-Options': 'nosniff',
    'X-Frame-Options': 'DENY',
    'Referrer-Policy': 'no-referrer',
    'Cross-Origin-Resource-Policy': 'same-origin',
    'Cache-Control': 'no-store',
    'Content-Security-Policy': "default-src 'none'; frame-ancestors 'none'",
}


class Refused(Exception):
    """A request is refused; with the HTTP status, the reason, and more headers."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason
        self.headers = {name.replace('_', '-'): value for name, value in headers.items()}


class Guard:
    """Decides about requests.

    Args:
        token: what a client must know to change something; None to refuse all changes.
        private: whether it must know that to read, too.
        hosts: names by which the app may be asked, besides those of this machine; '*' for any.

    Raises:
        ArgumentError: naming the argument.
    """

    def __init__(self, token: str | None, private: bool, hosts: Sequence[str]) -> None:
        token = token if token is not None else os.environ.get(TOKEN_VARIABLE) or None
        fits = isinstance(token, str) and len(token) >= MIN_TOKEN and re.fullmatch('[!-~]+', token)
        if token is not None and not fits:
            raise ArgumentError(f'token must be a string of {MIN_TOKEN} or more characters of ASCII, without blanks')
        if private and token is None:
            raise ArgumentError('private=True needs a token, that who reads must know')
        if isinstance(hosts, str):
            raise ArgumentError(f'hosts must be a list of names, such as [{hosts!r}]')
        if not isinstance(hosts, Collection) or not all(isinstance(host, str) and host for host in hosts):
            raise ArgumentError(f'hosts must be a list of names, not {hosts!r}')
        self._token, self.private = token, private
        self._hosts = {'localhost', socket.gethostname().lower(), *(host.lower() for host in hosts)}

    @property
    def read_only(self) -> bool:
        """Whether nobody may change anything."""
        return self._token is None

    def check_host(self) -> None:
        """Refuse a name that is not ours: a page of somebody else whose name was made to point here (DNS rebinding).

        An address is never such a name, and a browser always says one: probes of HTTP/1.0 may not.
        """
        if 'Host' not in request.headers:
            return
        host = re.sub(r':\d+$', '', request.host.lower()).strip('[]').rstrip('.')
        if '*' in self._hosts or host in self._hosts or host.endswith('.localhost') or _is_address(host):
            return
        raise Refused(421, f'this app is not known as {host[:200]!r}; start it with hosts=[...], or '
                      f'`minibatch app --allow-host NAME`, if that is right')

    def check_reader(self) -> None:
        """Refuse who may not read."""
        if self.private:
            self._check_token()

    def check_writer(self) -> None:
        """Refuse who may not change anything."""
        if self.read_only:
            raise Refused(403, f'this app is read-only; to change something, {HOW_TO}')
        self._check_token()

    def _check_token(self) -> None:
        kind, _, given = request.headers.get('Authorization', '').partition(' ')
        expected = (self._token or '').encode()
        if kind.lower() != 'bearer' or not given:
            raise Refused(401, 'this needs the header `Authorization: Bearer TOKEN`', WWW_Authenticate='Bearer')
        if not hmac.compare_digest(given.strip().encode(), expected):
            raise Refused(401, 'the token is wrong', WWW_Authenticate='Bearer')


def harden(response: Response) -> Response:
    """Add the headers that tell a browser to be careful; what is set already stays."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


def policy(page: str) -> str:
    """The content security policy of a page whose script and style are inline: these, by their hashes, and no other."""
    allowed = {
        kind: ' '.join(f"'sha256-{_digest(text)}'" for text in re.findall(rf'<{kind}>(.*?)</{kind}>', page, re.DOTALL))
        for kind in ('script', 'style')
    }
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
        f"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
