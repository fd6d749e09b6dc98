"""URLs, and which database is meant."""

import subprocess
import sys
import uuid

import pytest
from bson import CodecOptions
from bson.binary import UuidRepresentation
from bson.codec_options import DatetimeConversion
from pymongo.errors import ConfigurationError, PyMongoError

import minibatch as mb
from minibatch import connection
from minibatch.connection import Target, authenticated_url, connectdb, masked, target
from minibatch.errors import ArgumentError, UnreachableError


@pytest.fixture(autouse=True)
def fresh():
    connection.disconnect()
    yield
    connection.disconnect()


@pytest.mark.parametrize(
    ('url', 'expected'),
    [
        ('mongodb://u:p@h/db', 'mongodb://u:p@h/db?authSource=admin'),
        ('mongodb://u:p@h', 'mongodb://u:p@h/?authSource=admin'),
        ('mongodb://u:p@h/db?w=1', 'mongodb://u:p@h/db?w=1&authSource=admin'),
        ('mongodb://u:p@h/db?authSource=other', 'mongodb://u:p@h/db?authSource=other'),
        ('mongodb+srv://u:p@h/db', 'mongodb+srv://u:p@h/db'),
        ('mongodb://h/db', 'mongodb://h/db'),
    ],
)
def test_authenticated_url_adds_the_source_where_none_is_given(url, expected):
    assert authenticated_url(url) == expected


def test_a_url_is_preferred_to_the_environment(monkeypatch):
    monkeypatch.setenv('MINIBATCH_MONGO_URL', 'mongodb://first/x')
    monkeypatch.setenv('MONGO_URL', 'mongodb://second/y')
    assert target('mongodb://given/z').dbname == 'z'
    assert target().dbname == 'x'
    monkeypatch.delenv('MINIBATCH_MONGO_URL')
    assert target().dbname == 'y'


def test_the_database_is_called_minibatch_if_nobody_says_otherwise():
    assert target('mongodb://h').dbname == 'minibatch'
    assert target('mongodb://h/a', dbname='b').dbname == 'b'
    assert target('mongodb://h1:1,h2:2/a?replicaSet=rs').dbname == 'a'


def test_what_connectdb_chose_is_used_by_calls_without_a_url():
    connectdb('mongomock://localhost/chosen')
    assert target().dbname == 'chosen'
    assert target('mongodb://h/other').dbname == 'other'


def test_no_password_is_shown():
    url = 'mongodb://me:se%40cret@h/db'
    assert masked(url) == 'mongodb://me:***@h/db'
    assert 'cret' not in repr(Target(url, 'db'))


@pytest.mark.parametrize('url', ['localhost', 'http://h/db', 42])
def test_something_that_is_no_mongodb_url_is_refused(url):
    with pytest.raises(ArgumentError, match='url must start with'):
        target(url)


def test_an_unknown_option_of_the_client_is_refused_without_the_password():
    with pytest.raises(ArgumentError) as caught:
        target('mongodb://me:secret@127.0.0.1:1/db', nonsense=1).check()
    assert 'nonsense' in str(caught.value)
    assert 'secret' not in str(caught.value)


def test_writes_that_nobody_confirms_are_refused():
    with pytest.raises(ArgumentError, match='w=0'):
        target('mongodb://127.0.0.1:1/db?w=0').check()


def test_a_server_that_does_not_answer_is_named_and_the_password_is_not(monkeypatch):
    monkeypatch.setattr(connection, 'CONNECT_TIMEOUT', 0.2)
    with pytest.raises(UnreachableError) as caught:
        target('mongodb://me:secret@127.0.0.1:1/db').check()
    assert '127.0.0.1:1' in str(caught.value)
    assert 'secret' not in str(caught.value)


def test_a_short_password_is_masked_as_a_word_and_a_long_one_everywhere():
    said = PyMongoError("Bad value 'ab' for cabbage")
    assert "Bad value '***' for cabbage." in Target('mongodb://u:ab@h/x', 'x').explain(said)
    assert "Bad value 'ab' for c***e." in Target('mongodb://u:abbag@h/x', 'x').explain(said)


def test_bookkeeping_is_at_majority_whatever_the_url_says():
    meant = target('mongodb://127.0.0.1:1/db?w=1&readPreference=secondary')
    assert meant.db.write_concern.document == {'w': 1}
    assert meant.majority.write_concern.document == {'w': 'majority'}
    assert meant.db.read_preference.mode == 0
    assert target('mongodb://127.0.0.1:1/db').db.write_concern.document == {'w': 'majority'}


def test_a_process_that_leaves_quickly_does_not_wait_for_the_threads_of_pymongo(url, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(
        'import threading\n'
        'from minibatch import connection\n'
        f'connection.target({url!r}).client.admin.command("ping")\n'
        'join = threading.Thread.join\n'
        'threading.Thread.join = lambda thread, timeout=None: (print("waits"), join(thread, timeout))\n'
        'connection.leave_quickly()\n'
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_a_connection_that_was_made_while_the_server_started_does_not_say_for_ever_that_there_are_no_sessions(url):
    client = target(url).client
    client.admin.command('ping')
    for server in client._topology._servers.values():
        for poisoned in server.pool.conns:
            poisoned.supports_sessions = False
    with client.start_session() as session, pytest.raises(ConfigurationError) as caught:
        client.test.stream.find_one(session=session)
    assert connection.is_passing(caught.value)
    connection.heal(client, caught.value)
    with client.start_session() as session:
        assert client.test.stream.find_one(session=session) is None


@pytest.mark.integration
def test_what_a_url_says_holds_and_what_it_does_not_say_has_a_default(url):
    plain = target(url).client.options
    assert (plain.pool_options.appname, plain.pool_options.socket_timeout) == ('minibatch', 120)
    assert plain.codec_options.uuid_representation == UuidRepresentation.STANDARD
    for said in (
        '&appName=mine&uuidRepresentation=javaLegacy&socketTimeoutMS=7000&datetime_conversion=DATETIME_MS',
        '&appname=mine&UUIDREPRESENTATION=javaLegacy&sockettimeoutms=7000&datetime_conversion=DATETIME_MS',
    ):
        options = target(url + said).client.options
        assert (options.pool_options.appname, options.pool_options.socket_timeout) == ('mine', 7)
        assert options.codec_options.uuid_representation == UuidRepresentation.JAVA_LEGACY
        assert options.codec_options.datetime_conversion == DatetimeConversion.DATETIME_MS
    with pytest.raises(ArgumentError, match='Invalid datetime_conversion'):
        target(url + '&datetime_conversion=none').client  # noqa: B018
    assert target(url, AppName='called').client.options.pool_options.appname == 'called'


@pytest.mark.integration
@pytest.mark.parametrize(('representation', 'kind'), [
    ('standard', UuidRepresentation.STANDARD), ('pythonLegacy', UuidRepresentation.PYTHON_LEGACY),
    ('javaLegacy', UuidRepresentation.JAVA_LEGACY),
])
def test_uuids_are_stored_as_the_url_says_and_come_back(url, db, representation, kind):
    where, value = f'{url}&uuidRepresentation={representation}', uuid.uuid4()
    stream = mb.stream('s', url=where)
    stream.append({'id': value}, meta={'id': value})
    [message] = stream.tail(last=1, follow=False)
    assert (message.data, message.meta) == ({'id': value}, {'id': value})
    codec = CodecOptions(uuid_representation=kind)
    assert db.get_collection('buffer', codec).find_one()['data'] == {'id': value}
