"""How to reach Kafka, and the arguments that say it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from kafka.errors import KafkaError

from minibatch import functions
from minibatch.errors import ArgumentError

LOCAL = 'localhost:9092'
TOPIC_NAME = re.compile(r'[a-zA-Z0-9._-]{1,249}')

Coder: TypeAlias = Callable[[str, Any, Any], Any]  # of topic, headers, data


def checked_topic(topic: Any) -> list[str] | re.Pattern[str]:
    """The names of topics, or a pattern."""
    if isinstance(topic, re.Pattern) and isinstance(topic.pattern, str):
        return topic
    names = [topic] if isinstance(topic, str) else topic
    if not isinstance(names, (list, tuple)) or not names:
        raise ArgumentError(f'topic must be a name, a list of names, or a compiled pattern, not {topic!r}')
    for name in names:
        if not isinstance(name, str) or not TOPIC_NAME.fullmatch(name):
            raise ArgumentError(
                f'topic must have 1 to 249 letters, digits, and . _ -, not {name!r}; for a pattern pass re.compile(...)'
            )
    return list(names)


def checked_urls(urls: Any) -> list[str]:
    urls = LOCAL if urls is None else urls
    found = urls.split(',') if isinstance(urls, str) else urls
    if not isinstance(found, (list, tuple)) or not found:
        raise ArgumentError("urls must be 'host:port' of a broker, or a list of such")
    for each in found:
        # Not shown: somebody may write a password into it.
        if not isinstance(each, str) or not re.fullmatch(r'([\w.-]+|\[[0-9a-fA-F:.]+\])(:\d{1,5})?', each.strip()):
            raise ArgumentError(
                "urls must be 'host:port' of a broker, or a list of such; give user and password as "
                'sasl_plain_username and sasl_plain_password'
            )
    return [each.strip() for each in found]


def checked_configs(client: Any, defaults: dict[str, Any], configs: dict[str, Any]) -> dict[str, Any]:
    """Our defaults, and what the user has given."""
    if 'bootstrap_servers' in configs:
        raise ArgumentError('bootstrap_servers is called urls here')
    for name in configs:
        if name not in client.DEFAULT_CONFIG:
            raise ArgumentError(f'{name} is no argument, and no configuration of kafka.{client.__name__}')
    return {**defaults, **configs}


def coder(configs: dict[str, Any], name: str, default: Any) -> Coder:
    """Take a (de)serializer out of configs, as a function of topic, headers and data."""
    given = configs.pop(name, None) or default
    method = 'deserialize' if name.endswith('_deserializer') else 'serialize'
    if hasattr(given, method):
        coder: Coder = getattr(given, method)
        return coder
    if not callable(given):
        raise ArgumentError(f'{name} must be a function, or have a method {method}, not {given!r}')
    functions.check(name, given, 'the data', plain=True)
    return partial(_of_data, given)


def _of_data(coder: Callable[[Any], Any], topic: str, headers: Any, data: Any) -> Any:
    return coder(data)


def opened(client: Any, urls: list[str], configs: dict[str, Any]) -> tuple[Any, Any]:
    """A consumer or producer, and the network client of it; which it leaves open, with a thread, if it fails."""
    made: list[Any] = []
    make = configs.get('kafka_client') or client.DEFAULT_CONFIG['kafka_client']

    def note(*args: Any, **options: Any) -> Any:
        made.append(make(*args, **options))
        return made[-1]

    try:
        return client(**{**configs, 'bootstrap_servers': urls, 'kafka_client': note}), made[0]
    except BaseException as exc:
        for each in made:
            each.close()
        if isinstance(exc, KafkaError) and exc.retriable:
            raise ConnectionError(
                f'no Kafka broker answers at {", ".join(urls)}, or the security settings are not right: {exc}'
            ) from exc
        raise
