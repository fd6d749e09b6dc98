"""JSON is read and written by one rule."""

import json
import math
from datetime import datetime

import pytest

from minibatch import jsontext
from minibatch.cli import reading
from minibatch.contrib.apps import bodies
from minibatch.contrib.kafka import KafkaSource
from minibatch.contrib.mqtt.source import PAYLOADS
from minibatch.encoding import encode

ENTRANCES = {
    'the command line': reading._load,
    'the app': lambda text: bodies.read_messages(text, 'application/json')[0][0],
    'MQTT': PAYLOADS['json'],
    'Kafka': lambda text: KafkaSource('topic')._value('topic', [], text),
}


@pytest.mark.parametrize('unit', ['C', '$', '$date'])
@pytest.mark.parametrize('entrance', ENTRANCES)
def test_nan_and_infinity_are_numbers_at_every_entrance(entrance, unit):
    text = b'{"t": NaN, "in": [Infinity, -Infinity, 1e999], "unit": "' + unit.encode() + b'"}'
    found = ENTRANCES[entrance](text)
    assert math.isnan(found['t'])
    assert found['in'] == [math.inf, -math.inf, math.inf]
    assert found['unit'] == unit
    assert encode(found)


@pytest.mark.parametrize(('value', 'text'), [
    ({'a': 1.5, 'b': 'ü', 'c': None}, '{"a": 1.5, "b": "ü", "c": null}'),
    ({'a': math.nan, 'b': [math.inf, {'c': -math.inf, 'd': 1.5}]}, '{"a": null, "b": [null, {"c": null, "d": 1.5}]}'),
    ({'a': 'NaN', 'b': math.nan}, '{"a": "NaN", "b": null}'),
    (math.nan, 'null'),
])  # fmt: skip
def test_what_is_written_is_json_that_all_can_read(value, text):
    assert jsontext.dumps(value) == text.encode()

    def refuse(word):
        raise AssertionError(word)

    json.loads(text, parse_constant=refuse)


def test_what_json_has_not_is_asked_for_also_beside_a_nan():
    assert jsontext.dumps({'a': math.nan, 'b': datetime(2026, 1, 2)}, str) == b'{"a": null, "b": "2026-01-02 00:00:00"}'


def circle():
    inner = {}
    inner['a'] = inner
    return inner


@pytest.mark.parametrize('value', [object(), {'n': math.nan, 'a': object()}, circle(), '\ud800'])
def test_what_is_no_json_is_an_error(value):
    with pytest.raises((TypeError, ValueError)):
        jsontext.dumps(value)
